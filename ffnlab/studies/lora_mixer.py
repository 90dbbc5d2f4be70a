"""LoRA-Mixer: adapters of three texts in one model, mixed for each token by trained routers.

The embedded model of Python source gets a low-rank adapter for each of three texts it never saw.
They are written as PEFT directories, read back, and frozen; routers between them learn from a
little mixed text. The mixture is compared, on held-out parts of the texts, with the adapter made
for the text, with each single adapter on all texts, and with all of them averaged. The texts are
Shakespeare, Wikipedia and German where FFNLAB_DATA has them, else three ciphers of the standard
library's source. No setting was chosen by held-out text.
"""

import time
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from ffnlab import models, transform
from ffnlab.data import TextBatches
from ffnlab.formats.embedded import embedded
from ffnlab.routing import mixed
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.lora_mixer_measure import (
    ADAPTER_RATE,
    CERTAINTY,
    FULL,
    LENGTH,
    LOSSES,
    MIXED_ROWS,
    QUICK,
    RANK,
    ROUTER_RATE,
    Score,
    adapted,
    averaged,
    each,
    routed,
    three_texts,
    through_directories,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

Scores = Mapping[str, Mapping[str, Sequence[Score]]]  # way -> text -> by seed


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = QUICK if quick else FULL
    texts, kind = three_texts()
    split = {name: len(text) * 9 // 10 for name, text in texts.items()}
    learn = {name: text[: split[name]] for name, text in texts.items()}
    held = {
        name: jnp.asarray(TextBatches(text[split[name] :], sizes.held_out, LENGTH, seed)(0))
        for name, text in texts.items()
    }
    base = models.stack(embedded()[0])
    own = adapted(base, list(learn.values()), sizes, seed)
    experts, difference = through_directories(base, own, held)
    scores: dict[str, dict[str, list[Score]]] = {"base": each(base, held)}
    for name, model in zip(texts, experts, strict=True):
        scores[f"adapter of {name}"] = each(model, held)
    together, _ = transform.apply(mixed(experts, seed=seed), base)
    scores["average"] = each(averaged(together), held)
    found, entropies, shares = routed(together, learn, held, sizes, seed)
    scores |= found
    return Result(
        slug="lora-mixer",
        title=STUDIES["lora-mixer"].title,
        settings={
            "texts": {name: len(text) for name, text in texts.items()},
            "kind": kind,
            "rank": RANK,
            "maps": "q, k, v, o of all layers",
            "length": LENGTH,
            "sizes": sizes._asdict(),
            "rates": {"adapters": ADAPTER_RATE, "routers": ROUTER_RATE},
            "losses": {name: list(weights) for name, weights in LOSSES.items()},
            "mixed_rows": MIXED_ROWS,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            directory_claim(difference),
            *mixture_claims(scores, list(texts), sizes.seeds),
            *loss_claims(scores, entropies, shares, sizes.seeds),
        ],
        table=rows_of(scores, entropies, shares),
        pictures={"accuracy": lambda figure: bars(figure, scores)},
    ).write(out)


def means(scores: Scores, way: str, field: str) -> list[float]:
    """Over texts, by seed."""
    rows = zip(*scores[way].values(), strict=True)
    return [float(np.mean([getattr(score, field) for score in row])) for row in rows]


def directory_claim(difference: float) -> Claim:
    """Whether adapters survive being written."""
    return Claim(
        "experts come from adapters as others publish them",
        "public adapters, frozen",
        f"written as PEFT directories and read back: largest change of a logit {difference:.1e}",
        difference <= 1e-5,
        "two windows, each adapter",
        seeds=0,
    )


def mixture_claims(scores: Scores, texts: Sequence[str], seeds: int) -> list[Claim]:
    """The mixture against the adapter of each text, against single ones, against the average."""
    mix = means(scores, "specialized", "accuracy")
    own = float(np.mean([scores[f"adapter of {t}"][t][0].accuracy for t in texts]))
    single = {t: means(scores, f"adapter of {t}", "accuracy")[0] for t in texts}
    average = means(scores, "average", "accuracy")[0]
    base = means(scores, "base", "accuracy")[0]
    best = max(single.values())
    sharp = means(scores, "specialized, top 1", "accuracy")
    said = f"mixture {spread(mix)} of next bytes"
    return [
        Claim(
            "the mixture is within 3 points of the adapter made for each text",
            "LLaMA3-8B GSM8K 65.53 against 65.14 of a single LoRA",
            f"{said}, own adapters {own:.3f}, base {base:.3f}",
            min(mix) >= own - 0.03,
            "accuracy of next bytes, mean over the texts, each seed",
            seeds=seeds,
        ),
        Claim(
            "the mixture is better than any single adapter on all texts",
            "-",
            f"{said}; " + ", ".join(f"{name} {value:.3f}" for name, value in single.items()),
            min(mix) > best,
            "accuracy of next bytes, mean over the texts, each seed",
            seeds=seeds,
        ),
        Claim(
            "the mixture is 10 points better than all adapters averaged",
            "-",
            f"{said}, average {average:.3f}",
            min(mix) >= average + 0.1,
            "accuracy of next bytes, mean over the texts, each seed",
            seeds=seeds,
        ),
        Claim(
            "one expert of a token is as good as the soft mixture that was trained",
            "the largest 3 are used, of 6 or 7",
            f"top 1 {spread(sharp)}, soft {spread(mix)}",
            all(a >= b - 0.01 for a, b in zip(sharp, mix, strict=True)),
            "accuracy of next bytes at most .01 lower, each seed",
            seeds=seeds,
        ),
    ]


def loss_claims(
    scores: Scores,
    entropies: Mapping[str, Sequence[float]],
    shares: Mapping[str, Sequence[float]],
    seeds: int,
) -> list[Claim]:
    """What the routers' loss does."""
    sure, printed, plain = (
        entropies[name] for name in ("specialized", "as printed", "balance alone")
    )
    mix, without = (means(scores, name, "accuracy") for name in ("specialized", "balance alone"))
    return [
        Claim(
            "the entropy moves as the sign of its weight says",
            "printed with a minus, which spreads; the text says that it sharpens",
            f"+{CERTAINTY}: {spread(sure)}, 0: {spread(plain)}, "
            f"-{CERTAINTY}: {spread(printed)} nats",
            all(a < b < c for a, b, c in zip(sure, plain, printed, strict=True)),
            "mean entropy of a token's mixture on held-out text, each seed",
            seeds=seeds,
        ),
        Claim(
            "with the balance no expert takes half of the tokens",
            "15 to 18 % each, of 6 or 7",
            f"largest share of an expert in a router {spread(shares['specialized'])}, without the "
            f"loss {spread(shares['none'])}",
            max(shares["specialized"]) < 0.5,
            "every router, texts in equal parts, each seed",
            seeds=seeds,
        ),
        Claim(
            "the specialization loss is better than the balance alone",
            "2k examples, HumanEval: 57.32 against 50.46",
            f"{spread(mix)} against {spread(without)} of next bytes",
            all(a > b for a, b in zip(mix, without, strict=True)),
            "accuracy of next bytes, mean over the texts, each seed",
            seeds=seeds,
        ),
    ]


def rows_of(
    scores: Scores,
    entropies: Mapping[str, Sequence[float]],
    shares: Mapping[str, Sequence[float]],
) -> list[dict[str, object]]:
    """A row for each way: bits per byte and accuracy on each text, means over seeds."""
    rows = []
    for way, by_text in scores.items():
        row: dict[str, object] = {"way": way}
        for text, found in by_text.items():
            row[f"{text}, bits"] = float(np.mean([score.bits for score in found]))
            row[f"{text}, accuracy"] = float(np.mean([score.accuracy for score in found]))
        if way in entropies:
            row["entropy"] = float(np.mean(entropies[way]))
            row["largest share"] = float(np.mean(shares[way]))
        rows.append(row)
    return rows


def bars(figure, scores: Scores) -> None:
    """Accuracy of each way on each text, means over seeds."""
    figure.set_size_inches(9, 4.5)
    axes = figure.subplots()
    ways = [way for way in scores if way not in ("as printed, top 1", "none, top 1")]
    texts = list(scores["base"])
    width = 0.8 / len(texts)
    for i, text in enumerate(texts):
        values = [np.mean([score.accuracy for score in scores[way][text]]) for way in ways]
        axes.bar(np.arange(len(ways)) + (i - 1) * width, values, 0.94 * width, label=text)
    axes.set_xticks(range(len(ways)), ways, rotation=30, ha="right", fontsize=8)
    axes.set_ylabel("accuracy of next bytes, held out")
    axes.legend(frameon=False, ncols=len(texts))
    axes.spines[["top", "right"]].set_visible(False)
