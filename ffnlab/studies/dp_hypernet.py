"""Continual learning by hypernetworks: chunks in a chain and apart, beside plain networks.

Permuted digits, and permuted and split MNIST where it is there. Which task a test row is of is
told: none of this is class-incremental learning. The paper's claim of being better than chunks
apart is put to the test and not assumed; our prototype did not find it.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ffnlab.data import Labelled, digits, mnist
from ffnlab.data.images.mnist import mnist_folder
from ffnlab.learning import grow
from ffnlab.learning.continual.drift import outputs
from ffnlab.models import HypernetConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.dp_hypernet_measure import (
    APART,
    CHAINED,
    EACH,
    FINE,
    RATE,
    Case,
    Followed,
    dependency,
    followed,
    one_of,
    permuted_case,
    split_case,
    tuned,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tuning import CLOSE, Found, Tuned

__all__ = ["run"]

SIDES = (FINE, EACH, APART, CHAINED)
BETAS, RATES = (0.01, 0.1, 1.0), (5e-4, 2e-3, 8e-3)
DIGITS, PERMUTED, SPLIT = "permuted digits", "permuted MNIST", "split MNIST"
ROWS = 10_000  # of MNIST
FINAL, GAIN, LOST, APART_BY, STAYS = 0.93, 0.25, 0.02, 0.03, 1e-6
WIDER = 8

Runs = Mapping[str, Mapping[str, Followed]]  # case -> side


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      tasks, steps: of permuted digits.
      betas, rates: tried, as many of each.
      seeds: of networks.
      mnist: whether MNIST is learned, where it is there.
    """

    tasks: int
    steps: int
    betas: tuple[float, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    mnist: bool


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = Sizes(5, 400, BETAS, RATES, (seed, seed + 1, seed + 2), True)
    if quick:
        sizes = Sizes(3, 150, BETAS[1:2], RATES[1:2], (seed,), False)
    cases = made(sizes, seed)
    runs = {name: learned(case, sizes, name) for name, case in cases.items()}
    found: dict[str, dict[str, Tuned]] = {
        name: chosen(sides, sizes, seeds_of(sizes, name)) for name, sides in runs.items()
    }
    return Result(
        slug="dp-hypernet",
        title=STUDIES["dp-hypernet"].title,
        settings={
            "data": ", ".join(f"{name}: {len(case.tasks)} tasks" for name, case in cases.items()),
            "networks": {name: "-".join(map(str, c.target.sizes)) for name, c in cases.items()},
            "generators": f"chunks of {cases[DIGITS].chunk} (MNIST: 4096), embeddings of 16; an "
            "LSTM of 32 units, or 50-50 hidden units",
            "optimizer": f"Adam; {RATE:g} for hypernetworks, whose beta is tuned; begun anew with "
            "each task",
            "steps": {name: case.steps for name, case in cases.items()},
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            dependency_claim(cases[DIGITS], seed),
            kept_claim(runs[DIGITS], found[DIGITS], sizes.seeds),
            *compared_claims(found),
            better_claim(found),
            size_claim(runs[DIGITS], cases[DIGITS]),
            growth_claim(runs[DIGITS][CHAINED], seed),
        ],
        table=tuning.table(found),
        pictures={
            "accuracy": lambda figure: bars(figure, found),
            "forgetting": lambda figure: lines(figure, runs[DIGITS], found[DIGITS], seed),
        },
    ).write(out)


def made(sizes: Sizes, seed: int) -> dict[str, Case]:
    """The cases that there are data for."""
    given = {"tasks": sizes.tasks, "hidden": 64, "chunk": 512, "steps": sizes.steps}
    cases = {DIGITS: permuted_case(digits(seed), **given, seed=seed)}
    if sizes.mnist and mnist_folder() is not None:
        train, test = mnist()
        data = Labelled(train.x[:ROWS], train.y[:ROWS]), Labelled(test.x[:2000], test.y[:2000])
        common = {"hidden": 100, "chunk": 4096, "steps": 200, "seed": seed}
        cases[PERMUTED] = permuted_case(data, tasks=5, **common)
        cases[SPLIT] = split_case(data, **common)
    return cases


def seeds_of(sizes: Sizes, name: str) -> tuple[int, ...]:
    """The seeds of a case: one of MNIST, which takes longer."""
    return sizes.seeds if name == DIGITS else sizes.seeds[:1]


def learned(case: Case, sizes: Sizes, name: str) -> dict[str, Followed]:
    """Every side of a case; of hypernetworks of digits beta = 0 too, to compare with."""
    free = (0.0,) if name == DIGITS else ()
    seeds = seeds_of(sizes, name)
    return {
        side: followed(
            case, side, sizes.rates if side in (FINE, EACH) else (*free, *sizes.betas), seeds
        )
        for side in SIDES
    }


def chosen(sides: Mapping[str, Followed], sizes: Sizes, seeds: Sequence[int]) -> dict[str, Tuned]:
    """Each side at its best setting."""
    plain = {side: tuned(sides[side], sizes.rates, seeds, "rate") for side in (FINE, EACH)}
    held = {side: tuned(sides[side], sizes.betas, seeds, "beta") for side in (APART, CHAINED)}
    return plain | held


def dependency_claim(case: Case, seed: int) -> Claim:
    """Which chunks depend on which."""
    key = jax.random.key(seed)
    said, right = [], True
    for side in (CHAINED, APART):
        config = HypernetConfig(case.target, case.spec(side))
        found, before = dependency(jax.jit(lambda key, c=config: c.make(key=key))(key))
        wanted = before if side == CHAINED else np.eye(len(found), dtype=bool)
        right = right and bool((found == wanted).all())
        said.append(f"{side}: {int(found.sum())} of {found.size} pairs depend")
    return Claim(
        "each chunk of a chain depends on those before it, a chunk apart on none",
        "dependency preserving",
        "; ".join(said),
        right,
        "gradients of the first 8 weights of a chunk with respect to the embeddings of all: not 0 "
        "exactly where a chunk is not after, or the same",
        seeds=1,
    )


def kept_claim(
    runs: Mapping[str, Followed], found: Mapping[str, Tuned], seeds: Sequence[int]
) -> Claim:
    """Whether a chain that is held forgets."""
    beta = found[CHAINED].setting["beta"]
    held, free = ([runs[CHAINED].scores[b, s] for s in seeds] for b in (beta, 0.0))
    final, loose = ([score.final for score in scores] for scores in (held, free))
    lost = [score.lost for score in held]
    gains = [a - b for a, b in zip(final, loose, strict=True)]
    return Claim(
        "a chain of chunks does not forget where what it gave is held",
        "our prototype on clusters: 0.96 to 0.975 with beta, 0.55 without",
        f"final accuracy {spread(final)} at beta {beta:g}, {spread(loose)} at 0; lost since "
        f"learned {spread(lost)}",
        min(final) >= FINAL and min(gains) >= GAIN and max(lost) <= LOST,
        f"{DIGITS}, every seed: at least {FINAL}, {GAIN} more than at 0, at most {LOST} lost",
        seeds=len(seeds),
    )


def compared_claims(found: Found) -> list[Claim]:
    """A chain beside plain networks, and beside chunks apart."""
    gain = min(t[CHAINED].mean - t[FINE].mean for t in found.values())
    lost = max(t[EACH].mean - t[CHAINED].mean for t in found.values())
    off = tuning.deficit(found, CHAINED, APART)
    return [
        tuning.tuned_claim(
            "a chain of chunks knows more of all tasks at the end than a network that was fine-"
            "tuned from task to task",
            "-",
            f"mean accuracy higher in all cases; least gain {gain:+.3f}",
            gain > 0,
            found,
            FINE,
            CHAINED,
        ),
        tuning.tuned_claim(
            "and as much as a network for each task",
            "-",
            f"mean accuracy at most {CLOSE} lower in all cases; most lost {lost:+.3f}",
            lost <= CLOSE,
            found,
            EACH,
            CHAINED,
        ),
        tuning.tuned_claim(
            "a chain is close to chunks apart",
            "our prototype: within 0.03",
            f"accuracy at most {APART_BY} lower, in all cases and seeds; most {off:+.3f}",
            off <= APART_BY,
            found,
            APART,
            CHAINED,
        ),
    ]


def better_claim(found: Found) -> Claim:
    """What the paper says of both generators."""
    least = min(t[CHAINED].mean - t[APART].mean for t in found.values())
    return tuning.tuned_claim(
        "a chain of chunks is better than chunks apart",
        "better in all settings (no figures at hand)",
        f"mean accuracy higher in all cases; least gain {least:+.3f}",
        least > 0,
        found,
        APART,
        CHAINED,
    )


def size_claim(runs: Mapping[str, Followed], case: Case) -> Claim:
    """Numbers of both generators, as they are and by the formula."""
    e, h, s, t = case.embedding, 32, case.chunk, len(case.tasks)
    weights = tuning.numbers(jax.eval_shape(case.target.make, key=jax.random.key(0)))
    count = -(-weights // s)
    wanted = 4 * h * (2 * e + h + 1) + h * s + s + e * (t + count)
    chained, apart = runs[CHAINED].size, runs[APART].size
    return Claim(
        "a chain has no more numbers than chunks apart",
        "the same parameter cost",
        f"{chained:,} against {apart:,} for a target of {weights:,}; by the formula {wanted:,}",
        chained <= apart and chained == wanted,
        f"{DIGITS}: counted, and 4 H (2 e + H + 1) + H S + S + e (tasks + chunks)",
        seeds=1,
    )


def growth_claim(runs: Followed, seed: int) -> Claim:
    """What a wider generator gives."""
    state = one_of(runs.state, len(runs.scores) - 1)
    wide = grow(state, WIDER, key=jax.random.key(seed))
    give = jax.jit(outputs)
    far = float(np.abs(np.asarray(give(wide.model)) - np.asarray(give(state.model))).max())
    more = tuning.numbers(wide.model) - tuning.numbers(state.model)
    return Claim(
        "a generator that grows gives what it gave",
        "a network growth technique for the recurrent network",
        f"weights of all tasks move by at most {far:.1e}; {more:,} numbers more",
        far < STAYS,
        f"{DIGITS}, at the end, {WIDER} units more; below {STAYS:g}",
        seeds=1,
    )


def bars(figure: Any, found: Found) -> None:
    """Accuracy at the end."""
    figure.set_size_inches(3.5 + 2.5 * len(found), 3.8)
    axes = figure.subplots()
    grouped_bars(axes, tuning.values(found))
    axes.set(ylim=(0, 1.3), ylabel="accuracy on all tasks at the end")


def lines(figure: Any, runs: Mapping[str, Followed], found: Mapping[str, Tuned], seed: int) -> None:
    """Accuracy on the first task, as others are learned."""
    figure.set_size_inches(5.5, 3.6)
    axes = figure.subplots()
    shown = {side: next(iter(found[side].setting.values())) for side in (FINE, APART, CHAINED)}
    for side, setting in shown.items():
        first = runs[side].scores[setting, seed].test[:, 0]
        axes.plot(range(1, len(first) + 1), first, "o-", label=f"{side}, {setting:g}")
    free = runs[CHAINED].scores[0.0, seed].test[:, 0]
    axes.plot(range(1, len(free) + 1), free, "o:", color="0.5", label=f"{CHAINED}, beta 0")
    axes.set(xlabel="tasks learned", ylabel="accuracy on the first task", ylim=(0, 1.02))
    axes.set_xticks(range(1, len(free) + 1))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
