"""Structured FFNs: what thin products and blocks cost a language model, and what a guide gives.

Small byte decoders learn the source of the standard library with dense FFNs, and with structured
ones beyond the first layer, of 63 and of 32 % of the parameters. A dense companion guides some of
them through half of the steps. Everything is compared at equal steps, and, apart from that, at
equal FLOPs. Every way tries the same rates, by the loss on validation modules with the first seed;
figures are of held-out modules, which choose nothing.
"""

import dataclasses
import time
from collections.abc import Mapping
from itertools import pairwise

import numpy as np

from ffnlab.bench import structured as bench
from ffnlab.data import stdlib_text
from ffnlab.storage.files import StrPath
from ffnlab.structure.structured_ffn import FORMS
from ffnlab.studies import STUDIES
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.structured_ffn_measure import (
    BATCH,
    CONFIG,
    FULL,
    GUIDED,
    LENGTH,
    QUICK,
    Exact,
    Run,
    compared,
    exact,
)

__all__ = ["run"]

Found = Mapping[str, Run]  # way -> what it reached
LIMIT = 1e-5  # of products and logits of about one, float32
EVEN, SLACK = 0.05, 0.05  # of the rate of guides that run; of FLOPs called equal, relative
FAST = {63: 1.2, 32: 2.0}  # times as fast as a dense FFN; the paper has 1.4 and 2.5


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = QUICK if quick else FULL
    same = exact(max(350, sizes.steps // 2), seed)
    found = compared(sizes, seed)
    settings = bench.Settings(width=1536, tokens=512, turns=7)
    if quick:
        settings = bench.Settings(width=256, tokens=512, rows=(1, 8, 64), turns=3)
    speed = bench.compare(settings)
    return Result(
        slug="structured-ffn",
        title=STUDIES["structured-ffn"].title,
        settings={
            "model": dataclasses.asdict(CONFIG),
            "batch": [BATCH, LENGTH],
            "optimizer": "AdamW, decay 0.1, clipped at 1; a tenth of warm-up, cosine to a tenth",
            "guided": f"{GUIDED} of the steps; at equal FLOPs as many as are learned again",
            "sizes": sizes._asdict(),
            "tried": {
                way: {f"{rate:g}": nats for rate, nats in one.tried.items()}
                for way, one in found.items()
            },
            "text": stdlib_text().identity,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *exact_claims(same, found),
            *size_claims(found),
            *form_claims(found),
            *guide_claims(found),
            *equal_claims(found),
            *start_claims(found, sizes.early),
            *speed_claims(speed, settings.width),
        ],
        table=rows_of(found),
        pictures={"losses": lambda figure: losses(figure, found)},
    ).write(out)


def exact_claims(same: Exact, found: Found) -> list[Claim]:
    """What must hold of any model."""
    few, many = same.merged
    dropped = [one.dropped for way, one in found.items() if "guided" in way]
    return [
        Claim(
            "structured products and their gradients are those of the dense matrix",
            "-",
            f"largest difference {same.products:.1e}; counts differ by {same.numbers:.1e}",
            same.products <= LIMIT and same.numbers == 0,
            f"all forms, wide and narrow, at most {LIMIT:g}; parameters by the formulas, exact",
            seeds=0,
        ),
        Claim(
            "products kept for few rows, and factors for many, give the same",
            "-",
            f"largest difference of a logit {few:.1e} with 8 rows, {many:.1e} with 128",
            few <= LIMIT and many == 0,
            f"a threshold of 64 rows: below it at most {LIMIT:g}, from it on the same bits",
            seeds=0,
        ),
        Claim(
            "a guide changes nothing when it is put there and when it is dropped",
            "the guide begins as the product of the factors, and its share ends at 0",
            f"largest difference of a logit {same.guided:.1e} at first, {max(dropped):.1e} when "
            "dropped after the guided steps",
            same.guided <= LIMIT and max(dropped) == 0,
            f"of blocks with a shuffle, whose guide is the true product: at most {LIMIT:g}; of "
            f"{len(dropped)} trained ways: the same bits",
            seeds=0,
        ),
        Claim(
            "guides run half of the time",
            "0.5 of the dense branch over T steps",
            f"{same.rate:.3f} of them",
            abs(same.rate - 0.5) <= EVEN,
            f"drawn as in training for every map and step; within {EVEN} of one half",
            seeds=0,
        ),
    ]


def said(found: Found, *ways: str) -> str:
    """Held-out losses in words."""
    return ", ".join(f"{way} {spread(found[way].nats.tolist())}" for way in ways) + " nats"


def tuned(found: Found, *ways: str) -> str:
    """How the rates were chosen."""
    rates = ", ".join(f"{rate:g}" for rate in found["dense"].tried)
    chosen = ", ".join(f"{way} {found[way].rate:g}" for way in ways)
    return f"AdamW at {rates} tried alike on validation modules with the first seed: {chosen}"


def mean(found: Found, way: str) -> float:
    """Of held-out nats over seeds."""
    return float(found[way].nats.mean())


def claim_of(
    found: Found, claim: str, paper: str, holds: bool, rule: str, *ways: str, ours: str = ""
) -> Claim:
    """A claim about ways that were trained."""
    told = f"{ours}; {said(found, *ways)}" if ours else said(found, *ways)
    how = f"{rule}; {tuned(found, *ways)}"
    return Claim(claim, paper, told, holds, how, seeds=len(found["dense"].nats))


def size_claims(found: Found) -> list[Claim]:
    """What fewer parameters cost."""
    ways = [way for way in ("dense", "low_rank 63", "low_rank 32") if way in found]
    means = [mean(found, way) for way in ways]
    shares = ", ".join(f"{100 * found[way].share:.1f} %" for way in ways[1:])
    return [
        claim_of(
            found,
            "at equal steps the loss rises as low-rank FFNs shrink",
            "Transformer-xl: 12.46, 12.86 at 63 %, 13.55 at 32 % perplexity",
            all(more < less for more, less in pairwise(means)),
            "means over seeds rise in this order",
            *ways,
            ours=f"{shares} of the FFNs' parameters beyond the first layer",
        )
    ]


def form_claims(found: Found) -> list[Claim]:
    """The three forms beside each other."""
    claims = []
    for percent, paper in ((63, "12.86, 12.97, 12.98"), (32, "13.55, 13.74, 13.81")):
        ways = [f"{form} {percent}" for form in FORMS]
        if not set(ways) <= set(found):
            continue
        best = min(ways, key=lambda way: mean(found, way))
        claims.append(
            claim_of(
                found,
                f"with {percent} % of the parameters low rank is the best form",
                f"Transformer-xl: {paper} perplexity of low rank, block dense, block shuffle",
                best == ways[0],
                "the least mean over seeds",
                *ways,
            )
        )
    return claims


def guide_claims(found: Found) -> list[Claim]:
    """What a guide gives at equal steps."""
    claims = []
    for form in FORMS:
        plain, way = f"{form} 32", f"{form} 32, guided"
        if not {plain, way} <= set(found):
            continue
        gains = found[plain].nats - found[way].nats
        name = form.replace("_", " ")
        claims.append(
            claim_of(
                found,
                f"a guide lowers the loss of {name} FFNs at equal steps",
                "32 % FFNs, 1.3 B: guided about 0.4 perplexity behind dense, at equal FLOPs",
                float(gains.mean()) > 0,
                "mean gain over seeds above 0; the guided run costs more a step",
                plain,
                way,
                "dense",
                ours=f"gain {spread(gains.tolist())}",
            )
        )
    return claims


def equal_claims(found: Found) -> list[Claim]:
    """At the dense run's FLOPs: more steps, with and without a guide."""
    start = "low_rank 32"
    way, plain = f"{start}, guided, equal FLOPs", f"{start}, equal FLOPs"
    if way not in found:
        return []
    dense = mean(found, "dense")
    gaps = [mean(found, name) - dense for name in (start, way)]
    work = found[way].flops / found["dense"].flops
    claims = [
        claim_of(
            found,
            "at equal FLOPs a guided 32 % model is closer to dense than without a guide at equal "
            "steps",
            "1.3 B: 0.4 perplexity behind dense at equal FLOPs, 1.09 at equal tokens unguided",
            gaps[1] < gaps[0] and abs(work - 1) <= SLACK,
            f"mean gap smaller; counted FLOPs within {SLACK:.0%} of the dense run's",
            "dense",
            start,
            way,
            ours=f"{gaps[1]:.3f} nats behind dense at {work:.3f} of its FLOPs in "
            f"{found[way].steps} steps, {gaps[0]:.3f} in {found[start].steps} unguided",
        )
    ]
    if plain not in found:
        return claims
    gains = found[plain].nats - found[way].nats
    return [
        *claims,
        claim_of(
            found,
            "a guide is worth its FLOPs: as many spent on more steps without one give less",
            "-",
            float(gains.mean()) > 0,
            f"mean gain over seeds above 0; {found[plain].steps} steps unguided",
            plain,
            way,
            ours=f"gain {spread(gains.tolist())}",
        ),
    ]


def start_claims(found: Found, early: int) -> list[Claim]:
    """Factors of a decomposition, or drawn plainly."""
    ways = ("low_rank 32", "low_rank 32, gaussian")
    if not set(ways) <= set(found):
        return []
    values = [found[way].early.tolist() for way in ways]
    return [
        Claim(
            "low-rank factors from an SVD learn faster at first than plain Gaussian ones",
            "-",
            f"after {early} steps: SVD {spread(values[0])}, plain {spread(values[1])} nats",
            bool(np.mean(values[0]) < np.mean(values[1])),
            f"means over seeds; {tuned(found, *ways)}",
            seeds=len(values[0]),
        )
    ]


def speed_claims(speed: bench.Structured, width: int) -> list[Claim]:
    """What structured FFNs save in time."""
    claims = []
    for percent, wanted in FAST.items():
        over = {form: speed.ratios[f"{form} {percent}"] for form in FORMS}
        claims.append(
            Claim(
                f"an FFN with {percent} % of the parameters is {wanted:g} times as fast, low rank",
                f"from width 1536 on: {1.4 if percent == 63 else 2.5} times",
                ", ".join(f"{form} {ratio:.2f}" for form, ratio in over.items()) + " times",
                over["low_rank"] >= wanted,
                f"median over turns of the dense time over it, width {width}, 512 tokens, float32",
                seeds=0,
                timed=True,
            )
        )
    rows = {form: speed.crossover[form] for form in FORMS}
    return [
        *claims,
        Claim(
            "for few rows the product is faster than low-rank factors",
            "merged below 16 tokens or so, on a GPU",
            ", ".join(f"{form}: factors from {at or 'no'} rows on" for form, at in rows.items()),
            rows["low_rank"] != 1,
            f"factors over product at {', '.join(map(str, speed.factors['low_rank']))} rows, width "
            f"{width}: the least from which on it stays at 1 or below is above 1",
            seeds=0,
            timed=True,
        ),
    ]


def rows_of(found: Found) -> list[dict[str, object]]:
    """A row for each way."""
    dense = found["dense"].flops
    return [
        {
            "way": way,
            "FFN parameters": one.share,
            "rate": one.rate,
            "steps": one.steps,
            "FLOPs": one.flops / dense,
            "nats": float(one.nats.mean()),
            "lowest": float(one.nats.min()),
            "highest": float(one.nats.max()),
            "early nats": float(one.early.mean()),
        }
        for way, one in found.items()
    ]


def losses(figure, found: Found) -> None:
    """Held-out loss by way, means over seeds with their range."""
    figure.set_size_inches(8, 1.2 + 0.35 * len(found))
    axes = figure.subplots()
    names = list(found)[::-1]
    means = np.array([found[way].nats.mean() for way in names])
    ends = np.array([(found[w].nats.min(), found[w].nats.max()) for w in names]).T
    colors = ["0.3" if w == "dense" else "C1" if "guided" in w else "C0" for w in names]
    axes.errorbar(means, range(len(names)), xerr=np.abs(ends - means), fmt="none", ecolor="0.6")
    axes.scatter(means, range(len(names)), c=colors, zorder=3)
    for place, value in enumerate(means):
        axes.annotate(
            f"{value:.3f}",
            (value, place),
            (0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.3)
    axes.axvline(found["dense"].nats.mean(), color="0.8", zorder=0)
    axes.set_xlabel("held-out nats per byte")
    axes.spines[["top", "right"]].set_visible(False)
