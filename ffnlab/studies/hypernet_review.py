"""Hypernetworks: one that is an ordinary network, sharing between tasks, how generation begins.

Four tasks that are alike: a family of regressions, and the vowels of boys, girls, men and women
where they are there. A network for each task, one network for all, told which task it is or not,
and two hypernetworks that give a network for each, all at once or in chunks.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ffnlab.models import HypernetConfig, HypernetSpec, MLPConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.hypernet_review_measure import (
    CHUNKS,
    ONCE,
    ONE,
    OWN,
    SIDES,
    TOLD,
    activations,
    reduction,
    regression,
    speech,
    tuned,
    vowels_are_there,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tuning import Found

__all__ = ["run"]

FEW, MANY = "20 samples a task", "50 samples a task"
VOWELS, FIVE = "vowels", "vowels, five speakers a group"
RATE = 3e-3  # of the prototype, which took 1,500 steps
RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STOPS = (100, 250, 500, 1000, 1500)
SHARE, SHARE_ONCE = 0.6, 0.9  # of the error of a network each
PROTOTYPE = {
    MANY: "our prototype: 0.39 and 0.74 of its error",
    FEW: "our prototype gained nothing: 1.06 and 1.23 of its error",
}
SAME, NEAR = 1e-6, 0.25
BATCH = 64  # vowels of each group in a step
LARGE = MLPConfig((784, 110, 110, 10))

Scores = Mapping[str, Mapping[str, Mapping[tuple[float, int], Sequence[float]]]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      rates, stops: tried for every side.
      seeds: of tasks and networks.
      samples: of each regression, by case.
      vowels: whether vowels are learned, where they are there.
    """

    rates: tuple[float, ...]
    stops: tuple[int, ...]
    seeds: tuple[int, ...]
    samples: Mapping[str, int]
    vowels: bool


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = (seed, seed + 1, seed + 2)
    sizes = Sizes(RATES, STOPS, seeds, {MANY: 50, FEW: 20}, True)
    if quick:
        sizes = Sizes(RATES[1:4], (100, 250, 750), (seed,), {MANY: 50}, False)
    errors, by_error = compared(sizes, seeds=sizes.seeds)
    rights: Found = {}
    if sizes.vowels and vowels_are_there():
        cases = {VOWELS: None, FIVE: 5}
        rights = {
            name: {
                side: tuned(speech(count, BATCH, seeds), side, sizes.rates, sizes.stops, seeds)[0]
                for side in SIDES
            }
            for name, count in cases.items()
        }
    starts = {init: activations(init, seed) for init in ("hyperfan", "uniform")}
    found = {**errors, **rights}
    return Result(
        slug="hypernet-review",
        title=STUDIES["hypernet-review"].title,
        settings={
            "data": "y = sin(0.4 x.(w_0 + w_t / 4)) + 0.05 noise of four tasks"
            + ("; vowels of Hillenbrand et al., a task for each group" if rights else ""),
            "network": "8 (5 of vowels), 32, 32, 1 (12), ELU",
            "hypernetworks": "embeddings of 8, 64 hidden units, chunks of 128",
            "optimizer": "Adam; all samples of a regression, 64 vowels of each group in a step",
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            reduction_claim(reduction(50, seed)),
            *sharing_claims(errors, by_error),
            *vowel_claims(rights),
            size_claim(),
            start_claim(starts),
        ],
        table=tuning.table(errors, "test error") + tuning.table(rights),
        pictures={
            "sharing": lambda figure: bars(figure, errors, rights),
            "starts": lambda figure: lines(figure, starts),
        },
    ).write(out)


def compared(sizes: Sizes, seeds: Sequence[int]) -> tuple[Found, Scores]:
    """The regressions: every side at its best setting, and the scores of all settings."""
    best: dict[str, dict[str, tuning.Tuned]] = {}
    scores: dict[str, dict] = {}
    for name, samples in sizes.samples.items():
        case = regression(samples, seeds)
        pairs = {side: tuned(case, side, sizes.rates, sizes.stops, seeds) for side in SIDES}
        best[name] = {side: pair[0] for side, pair in pairs.items()}
        scores[name] = {side: pair[1] for side, pair in pairs.items()}
    return best, scores


def reduction_claim(far: float) -> Claim:
    """What a hypernetwork without inputs is."""
    return Claim(
        "an ordinary network is the hypernetwork Theta = Phi",
        "-",
        f"losses of 50 steps of Adam differ by at most {far:.1e}",
        far <= SAME,
        f"8-32-3 network, 64 rows; at most {SAME:g}",
        seeds=1,
    )


def sharing_claims(best: Found, scores: Scores) -> list[Claim]:
    """What tasks gain by each other."""
    many = scores[MANY]
    steps = max(stop for _, stop in many[OWN])
    at_card = {side: many[side][RATE, steps] for side in SIDES}
    means = {side: float(np.mean(values)) for side, values in at_card.items()}
    said = ", ".join(f"{side} {spread(values)}" for side, values in at_card.items())
    share, once = means[CHUNKS] / means[OWN], means[ONCE] / means[OWN]
    claims = [
        Claim(
            "hypernetworks share between tasks: in chunks and all at once they err less than a "
            "network each",
            "soft weight sharing (no figure); our prototype had 0.39 and 0.74 of its error",
            f"{share:.2f} of its error in chunks, {once:.2f} at once; test error: {said}",
            share <= SHARE and once <= SHARE_ONCE,
            f"{MANY}, Adam at {RATE:g}, {steps} steps for all; mean test error at most "
            f"{SHARE} and {SHARE_ONCE} of that of {OWN}",
            seeds=len(at_card[OWN]),
        )
    ]
    for name, sides in best.items():
        share, once = (sides[side].mean / sides[OWN].mean for side in (CHUNKS, ONCE))
        claims.append(
            tuning.tuned_claim(
                f"they do where every side has its best rate and steps, {name}",
                PROTOTYPE[name],
                f"test error in chunks {share:.2f} and at once {once:.2f} of that of {OWN}; at "
                f"most {SHARE} and {SHARE_ONCE}",
                share <= SHARE and once <= SHARE_ONCE,
                {name: sides},
                OWN,
                ONCE,
                CHUNKS,
            )
        )
    others = max(
        sides[CHUNKS].mean / min(sides[s].mean for s in (ONE, TOLD)) for sides in best.values()
    )
    claims.append(
        tuning.tuned_claim(
            "a hypernetwork in chunks errs less than one network for all tasks",
            "-",
            "mean test error lower in all cases, than of one told the task too; at most "
            f"{others:.2f} of theirs",
            others < 1,
            best,
            ONE,
            TOLD,
            CHUNKS,
        )
    )
    return claims


def vowel_claims(rights: Found) -> list[Claim]:
    """The same of vowels; nothing where they are not there."""
    if not rights:
        return []
    gains = {
        other: min(sides[CHUNKS].mean - sides[other].mean for sides in rights.values())
        for other in (OWN, ONE, TOLD)
    }
    return [
        tuning.tuned_claim(
            "a hypernetwork in chunks knows more vowels of speakers it never heard than a network "
            "for each group",
            "-",
            f"mean accuracy higher in both cases; least gain {gains[OWN]:+.3f}",
            gains[OWN] > 0,
            rights,
            OWN,
            ONCE,
            CHUNKS,
        ),
        tuning.tuned_claim(
            "and than one network for all groups",
            "-",
            f"mean accuracy higher in both cases; least gain {gains[ONE]:+.3f} over one that is "
            f"not told the group, {gains[TOLD]:+.3f} over one that is",
            min(gains[ONE], gains[TOLD]) > 0,
            rights,
            ONE,
            TOLD,
            CHUNKS,
        ),
    ]


def size_claim() -> Claim:
    """What chunks save of a large target."""
    spec = HypernetSpec(outputs="chunk_wise", tasks=4, hidden=(64,), chunk=512)
    made = jax.eval_shape(lambda key: HypernetConfig(LARGE, spec).make(key=key), jax.random.key(0))
    small, whole = tuning.numbers(made), made.layout.size
    return Claim(
        "generated in chunks, networks are compressed",
        "weight compression (no figure)",
        f"{small:,} numbers give each of four networks of {whole:,}",
        small < whole,
        "counted: 784-110-110-10, 64 hidden units, chunks of 512; below one network",
        seeds=1,
    )


def start_claim(starts: Mapping[str, tuple[list[float], list[float]]]) -> Claim:
    """How generated networks begin."""

    def begins_well(pair: tuple[list[float], list[float]]) -> bool:
        return all(abs(v - 1) <= NEAR for v in pair[0]) and all(0.5 <= s <= 2 for s in pair[1])

    said = "; ".join(
        f"{name}: variances {min(v):.2f} to {max(v):.2f} of 2 / in, activations' deviation "
        f"{s[0]:.2g} after one layer and {s[-1]:.2g} after six"
        for name, (v, s) in starts.items()
    )
    return Claim(
        "generated layers begin like drawn ones where the last map is drawn for it",
        "-",
        said,
        begins_well(starts["hyperfan"]) and not begins_well(starts["uniform"]),
        f"six layers of 64, given at once; variances within {NEAR:.0%}, deviations in 0.5 to 2, "
        "and not so where maps are drawn as torch draws them",
        seeds=1,
    )


def bars(figure: Any, errors: Found, rights: Found) -> None:
    """Test errors and accuracies of all sides."""
    parts = [("test error", errors), ("accuracy on test vowels", rights)]
    parts = [(label, found) for label, found in parts if found]
    figure.set_size_inches(5 + 4 * len(parts), 3.8)
    for axes, (label, found) in zip(
        figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True
    ):
        values = tuning.values(found)
        grouped_bars(axes, values)
        axes.set_ylim(0, 1.45 * max(max(v) for v in values.values()))
        axes.set_ylabel(label)


def lines(figure: Any, starts: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Activations through generated layers."""
    figure.set_size_inches(5, 3.4)
    axes = figure.subplots()
    for name, (_, spreads) in starts.items():
        axes.semilogy(range(1, len(spreads) + 1), spreads, "o-", label=name)
    axes.axhspan(0.5, 2, color="0.9")
    axes.set(xlabel="layer", ylabel="deviation of activations at the start")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
