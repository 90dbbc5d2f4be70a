"""LoRA-Mixer: adapters of three texts in one model, mixed for each token by trained routers.

The embedded model of Python source gets a low-rank adapter for each of three texts it never saw.
They are written as PEFT directories, read back, and frozen; routers between them learn from a
little mixed text. The mixture is compared, on held-out parts of the texts, with the adapter made
for the text, with each single adapter on all texts, and with all of them averaged. The texts are
Shakespeare, Wikipedia and German where FFNLAB_DATA has them, else three ciphers of the standard
library's source. No setting was chosen by held-out text.
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import models, transform, tree
from ffnlab.data import TextBatches, find_folder, squad, stdlib_text
from ffnlab.formats.embedded import embedded
from ffnlab.formats.peft import load_adapter, save_adapter
from ffnlab.layers import RoutedLinear
from ffnlab.learning import backprop, members
from ffnlab.losses import next_token
from ffnlab.models import Decoder, adapters
from ffnlab.parallel import LoopOptions, train
from ffnlab.routing import MIXERS, mixed, sharpened, specialized
from ffnlab.rule import Rule
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.result import Claim, Result
from ffnlab.weights import Dense

__all__ = ["Score", "Sizes", "run"]

RANK, LENGTH = 8, 128
ADAPTER_RATE, ROUTER_RATE = 3e-3, 1e-2
BALANCE, CERTAINTY = 1e-2, 1e-3
MIXED_ROWS = 200  # of text that routers learn from, as in the card
# Weights of the two parts of the routers' loss: as the paper says, as it is printed, without the
# entropy, and with neither.
LOSSES: Mapping[str, tuple[float, float]] = {
    "specialized": (BALANCE, CERTAINTY),
    "as printed": (BALANCE, -CERTAINTY),
    "balance alone": (BALANCE, 0.0),
    "none": (0.0, 0.0),
}


class Sizes(NamedTuple):
    """How much is run.

    Attributes:
      seeds: of the routers.
      steps, rows: of each adapter.
      router_steps, router_rows: of the routers.
      held_out: windows of each text.
    """

    seeds: int
    steps: int
    rows: int
    router_steps: int
    router_rows: int
    held_out: int


FULL = Sizes(3, 400, 8, 150, 6, 48)
QUICK = Sizes(1, 40, 4, 20, 6, 8)


class Score(NamedTuple):
    """Of a model on a held-out text.

    Attributes:
      bits: per byte.
      accuracy: of next bytes.
    """

    bits: float
    accuracy: float


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


def three_texts() -> tuple[dict[str, bytes], str]:
    """Three texts by name, and what they are."""
    folders = [find_folder(name) for name in ("tinyshakespeare", "wikitext2", "xquad")]
    if all(folder is not None for folder in folders):
        plays, wiki, questions = folders
        contexts = dict.fromkeys(q.context for q in squad(questions / "xquad.de.first36.json"))
        real = {
            "Shakespeare": (plays / "input.txt").read_bytes(),
            "Wikipedia": (wiki / "valid.txt").read_bytes(),
            "German": "\n".join(contexts).encode(),
        }
        return {name: text[:400_000] for name, text in real.items()}, "real"
    source = stdlib_text().train[:1_200_000]
    third = len(source) // 3
    return {
        "capitals": source[:third].upper(),
        "rotated": source[third : 2 * third].translate(rotated(13)),
        "mirrored": source[2 * third :].translate(rotated(-1)),
    }, "ciphers of the standard library, for want of FFNLAB_DATA"


def rotated(by: int) -> bytes:
    """A table that moves lower-case letters along the alphabet."""
    table = np.arange(256)
    table[97:123] = 97 + (np.arange(26) + by) % 26
    return bytes(table.astype(np.uint8))


def adapted(base: Decoder, texts: Sequence[bytes], sizes: Sizes, seed: int) -> list[Decoder]:
    """An adapter of each text on the same base, all learning side by side."""
    where = tree.at("layers**.attn.*")
    small, _ = transform.apply(adapters.lora(rank=RANK, where=where, seed=seed), base)
    joined = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(texts)), small)
    streams = [TextBatches(text, sizes.rows, LENGTH, seed) for text in texts]

    def one() -> Rule:
        optimizer = optax.adam(optax.cosine_decay_schedule(ADAPTER_RATE, sizes.steps))
        return backprop(next_token, optimizer, trainable=adapters.TRAINS["lora"])

    rule = members(one, len(texts), shared_batch=False)
    batches = lambda position: np.stack([stream(position) for stream in streams])  # noqa: E731
    return learned(rule, joined, batches, sizes.steps, seed, len(texts))


def learned(rule: Rule, model: PyTree, batches, steps: int, seed: int, count: int) -> list[PyTree]:
    """The models of all members after so many steps.

    Raises:
      KeyboardInterrupt: a signal stopped it; what it learned so far is no result.
    """
    outcome = train(
        rule,
        model,
        batches,
        steps,
        key=jax.random.key(seed),
        options=LoopOptions(log_every=0),
        together=10,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    found = rule.model(outcome.state)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(count)]


def through_directories(
    base: Decoder, own: Sequence[Decoder], held: Mapping[str, Array]
) -> tuple[list[Decoder], float]:
    """(the adapters as read back from PEFT directories, largest change of a logit)."""
    tokens = next(iter(held.values()))[:2, :-1]
    with tempfile.TemporaryDirectory() as folder:
        read = []
        for i, model in enumerate(own):
            save_adapter(model, Path(folder) / str(i))
            read.append(load_adapter(base, Path(folder) / str(i)))
    changes = [np.abs(a(tokens) - b(tokens)).max() for a, b in zip(own, read, strict=True)]
    return read, float(max(changes))


def averaged(model: Decoder) -> Decoder:
    """The mixture with all routers at zero: every expert has the same share."""
    zero = lambda m: m.replace(Dense(jnp.zeros_like(m.weight.w)))  # noqa: E731
    chosen = tree.where(lambda path, node: path.endswith(".router") and hasattr(node, "w"))
    return tree.map_at(model, chosen, zero)


def routed(
    model: Decoder,
    learn: Mapping[str, bytes],
    held: Mapping[str, Array],
    sizes: Sizes,
    seed: int,
) -> tuple[dict[str, dict[str, list[Score]]], dict[str, list[float]], dict[str, list[float]]]:
    """(scores, entropy of a token's mixture, largest share of an expert) by loss and seed.

    All losses and seeds learn side by side from the same rows; a seed draws the routers.
    """
    settings = [(name, s) for name in LOSSES for s in range(seed, seed + sizes.seeds)]
    starts = [redrawn(model, s) for _, s in settings]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)

    def one(balance: float | Array, certainty: float | Array) -> Rule:
        loss = specialized(balance=balance, certainty=certainty)
        return backprop(loss, optax.adam(ROUTER_RATE), trainable=MIXERS)

    vary = {
        name: [LOSSES[loss][i] for loss, _ in settings]
        for i, name in enumerate(("balance", "certainty"))
    }
    rule = members(one, len(settings), vary=vary, chunk=sizes.seeds)
    batches = mixed_rows(list(learn.values()), sizes.router_rows, seed)
    found = learned(rule, joined, batches, sizes.router_steps, seed, len(settings))
    scores: dict[str, dict[str, list[Score]]] = {}
    entropies: dict[str, list[float]] = {name: [] for name in LOSSES}
    shares: dict[str, list[float]] = {name: [] for name in LOSSES}
    every = jnp.concatenate([tokens[:8] for tokens in held.values()])
    look = jax.jit(lambda model: specialized()(model, every)[1])
    for (name, _), made in zip(settings, found, strict=True):
        for way, k in ((name, None), (f"{name}, top 1", 1)):
            for text, (score,) in each(sharpened(made, k=k), held).items():
                scores.setdefault(way, {}).setdefault(text, []).append(score)
        seen = look(made)
        entropies[name].append(float(seen["entropy"]))
        shares[name].append(float(seen["share"]))
    return scores, entropies, shares


def redrawn(model: Decoder, seed: int) -> Decoder:
    """The mixture with other routers: each from N(0, 1 / in) by a seed."""

    def draw(path: str, layer: RoutedLinear) -> RoutedLinear:
        w = layer.router.weight.w
        key = jax.random.fold_in(jax.random.key(seed), sum(path.encode()))
        new = jax.tree.map(lambda leaf: leaf, layer)
        noise = jax.random.normal(key, w.shape) * w.shape[-2] ** -0.5
        new.router = layer.router.replace(Dense(noise))
        return new

    return tree.map_at_path(model, tree.of_type(RoutedLinear), draw)


def mixed_rows(texts: Sequence[bytes], rows: int, seed: int):
    """Batches of `MIXED_ROWS` rows in all, as many of each text in every batch."""
    share = rows // len(texts)
    few = MIXED_ROWS // len(texts)
    streams = [TextBatches(text[: (few + 2) * LENGTH], share, LENGTH, seed) for text in texts]
    return lambda position: np.concatenate([stream(position) for stream in streams])


def each(model: Decoder, held: Mapping[str, Array]) -> dict[str, list[Score]]:
    """The score of a model on each text."""
    return {name: [score(model, tokens)] for name, tokens in held.items()}


def score(model: Decoder, tokens: Int[Array, "b t"]) -> Score:
    """Bits per byte and accuracy of next bytes, eight windows at a time."""
    parts = [_measure(model, tokens[i : i + 8]) for i in range(0, len(tokens), 8)]
    nats, right = (float(np.mean([part[i] for part in parts])) for i in (0, 1))
    return Score(nats / float(np.log(2)), right)


@jax.jit
def _measure(
    model: Decoder, tokens: Int[Array, "b t"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    logits = model(tokens[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    return nats, jnp.mean(logits.argmax(-1) == tokens[:, 1:])


def spread(values: Sequence[float], digits: int = 3) -> str:
    """One value, or a mean with its range."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


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
