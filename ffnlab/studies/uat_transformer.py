"""One layer of a transformer approximates maps between sequences: by construction, and learned.

A network is made for a map and measured in the largest error over a grid, wider and wider; what
attention gathers is held against its bound; attention and positions are taken away in turn; and the
same architecture learns the map from random weights.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.analysis import Construction, construct, corners_and_grid, errors_of
from ffnlab.analysis.universal import Errors
from ffnlab.data import ArrayBatches, drawn_pairs
from ffnlab.data.sequence_maps import SEQUENCE_MAPS
from ffnlab.learning import backprop, members, squares
from ffnlab.models import SequenceConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import learned_members, spread

__all__ = ["run"]

WAVES, FIRST = SEQUENCE_MAPS["waves"], SEQUENCE_MAPS["first"]
WIDTHS = (16, 64, 256, 1024)
BETAS = (0.0, 1.0, 2.0, 4.0, 8.0, 40.0)
SMALL, TIMES = 0.1, 4.0  # largest error at the last width, and how much below that of the second
MIXED = 3.0  # times that the error is larger without attention
FLOOR, FITTED = 0.5, 0.05
EXACT = 1e-12
RMS = 0.05  # of what was learned
HIDDEN, STEPS, RATE = 256, 2000, 3e-3

Sweep = Mapping[int, Sequence[Errors]]  # by width, of every seed


class Learned(NamedTuple):
    """What learned networks are, by seed.

    Attributes:
      waves, apart: errors for the map whose places hang on each other, with and without attention.
      first, alike: for the map that tells places apart, with and without positions.
    """

    waves: list[Errors]
    apart: list[Errors]
    first: list[Errors]
    alike: list[Errors]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = tuple(range(seed, seed + (1 if quick else 3)))
    two = swept(2, seeds)
    three = swept(3, seeds)
    gaps = [gathered(beta) for beta in BETAS]
    without = [
        errors_of(construct(WAVES, 2, width=1024, gathers=False, seed=s), WAVES, grid(2))
        for s in seeds
    ]
    told = [errors_of(construct(FIRST, 2, seed=s), FIRST, grid(2)) for s in seeds]
    alike = [errors_of(construct(FIRST, 2, positions=False, seed=s), FIRST, grid(2)) for s in seeds]
    learned = all_learned(seeds, STEPS)
    return Result(
        slug="uat-transformer",
        title=STUDIES["uat-transformer"].title,
        settings={
            "maps": "waves: sin(3 x_i) x_(i+1), and |x_n - x_1| last; first: (x_1, 0); on -1..1",
            "construction": "our own: n heads that copy, random ReLU features, ridge 1e-8 a "
            "sample on 6,000 draws, fitted in float64 and measured in float32",
            "points": "15 a side of n = 2 and of n = 3, corners among them",
            "learned": f"{HIDDEN} units, stream of 32, two heads; Adam at {RATE:g}, cosine, "
            f"{STEPS} steps of 64; one rate, not tuned",
            "seeds": list(seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *width_claims(two, three, len(seeds)),
            gather_claim(gaps),
            attention_claim(two, without, learned, len(seeds)),
            position_claim(told, alike, learned, len(seeds)),
            learned_claim(learned.waves, len(seeds)),
        ],
        table=rows_of(two, three, gaps, without, told, alike, learned),
        pictures={"width": lambda figure: widths_drawn(figure, two, three)},
    ).write(out)


def grid(length: int) -> np.ndarray:
    """Points of a box, corners among them."""
    return corners_and_grid(length)


def swept(length: int, seeds: Sequence[int]) -> Sweep:
    """Errors of constructions for the waves, by width."""
    points = grid(length)
    return {
        width: [
            errors_of(construct(WAVES, length, width=width, seed=s), WAVES, points) for s in seeds
        ]
        for width in WIDTHS
    }


def gathered(beta: float) -> tuple[float, float]:
    """(largest difference of what attention gathers from the sequence, its bound), in float64."""
    made: Construction = construct(WAVES, 3, width=1, beta=beta, samples=10)
    x = grid(3)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), made.model)
        u = np.asarray(wide.mixed(jnp.asarray(x, jnp.float64)))
    whole = np.broadcast_to(x.reshape(len(x), 1, 3), (len(x), 3, 3))
    return float(np.abs(u[..., 4:] - whole).max()), made.gather


def all_learned(seeds: Sequence[int], steps: int) -> Learned:
    """Members with and without what a map needs, each for its map."""
    return Learned(
        learn("waves", seeds, steps, heads=2),
        learn("waves", seeds, steps, heads=0),
        learn("first", seeds, steps, heads=2),
        learn("first", seeds, steps, heads=2, positions=False),
    )


def learn(name: str, seeds: Sequence[int], steps: int, **options: Any) -> list[Errors]:
    """Errors on the grid of networks that learned a map, by seed."""
    config = SequenceConfig(2, 1, 1, 32, HIDDEN, **options)
    pairs = drawn_pairs(name, 6000, 2, seed=seeds[0])
    rate = optax.cosine_decay_schedule(RATE, steps)
    rule = members(lambda: backprop(squares, optax.adam(rate)), len(seeds))
    nets = jax.vmap(lambda key: config.make(key=key))(
        jnp.stack([jax.random.key(seed) for seed in seeds])
    )
    batches = ArrayBatches(pairs, 64, seeds[0])
    found = learned_members(rule, nets, batches, steps, seeds[0], len(seeds))
    return [errors_of(net, SEQUENCE_MAPS[name], grid(2)) for net in found]


def largest(found: Sequence[Errors]) -> list[float]:
    """Of every seed."""
    return [each.largest for each in found]


def rms(found: Sequence[Errors]) -> list[float]:
    """Of every seed."""
    return [each.rms for each in found]


def falls(columns: Sequence[Sequence[float]]) -> bool:
    """Whether every seed's error falls from width to width."""
    return bool((np.diff(np.array(columns), axis=0) < 0).all())


def width_claims(two: Sweep, three: Sweep, seeds: int) -> list[Claim]:
    """The largest error and the width."""
    tops = [largest(found) for found in two.values()]
    drop = np.array(tops[1]) / np.array(tops[-1])
    roots = [rms(found) for found in three.values()]
    told = lambda columns: ", ".join(  # noqa: E731
        f"{width} {spread(each)}" for width, each in zip(WIDTHS, columns, strict=True)
    )
    return [
        Claim(
            "one layer comes as close to a map of two places as its width allows",
            "any precision",
            f"largest error by width: {told(tops)}",
            falls(tops) and max(tops[-1]) <= SMALL and bool(drop.min() >= TIMES),
            f"falling at every width, at most {SMALL:g} at the last and {TIMES:g} times below that "
            "of 64, with each seed; our construction, not the paper's",
            seeds=seeds,
        ),
        Claim(
            "and to one of three places",
            "any precision",
            f"root mean square error by width: {told(roots)}",
            falls(roots),
            "falling at every width, with each seed",
            seeds=seeds,
        ),
    ]


def gather_claim(gaps: Sequence[tuple[float, float]]) -> Claim:
    """What attention gathers."""
    told = ", ".join(
        f"beta {beta:g}: {gap:.1e}" for beta, (gap, _) in zip(BETAS, gaps, strict=True)
    )
    return Claim(
        "attention gathers the whole sequence at every place",
        "-",
        told,
        all(gap <= bound + EXACT for gap, bound in gaps) and gaps[-1][0] <= EXACT,
        f"within 2 (n - 1) exp(-beta) max |x| at every beta, and {EXACT:g} at the last; three "
        "places, float64, a grid",
        seeds=0,
    )


def attention_claim(two: Sweep, without: Sequence[Errors], learned: Learned, seeds: int) -> Claim:
    """Without mixing of places."""
    made = np.array(rms(without)) / np.array(rms(two[WIDTHS[-1]]))
    taught = np.array(rms(learned.apart)) / np.array(rms(learned.waves))
    return Claim(
        "without attention a map across places is not to be had",
        "-",
        f"root mean square error without over with: constructed {spread(made.tolist())}, learned "
        f"{spread(taught.tolist())}",
        bool(min(made.min(), taught.min()) >= MIXED),
        f"at least {MIXED:g} times, of both, with each seed",
        seeds=seeds,
    )


def position_claim(
    told: Sequence[Errors], alike: Sequence[Errors], learned: Learned, seeds: int
) -> Claim:
    """Without positions."""
    with_them, without = (*told, *learned.first), (*alike, *learned.alike)
    return Claim(
        "without positions no map that tells places apart is to be had",
        "-",
        f"largest error for (x_1, 0): constructed {spread(largest(told))} with, "
        f"{spread(largest(alike))} without; learned {spread(largest(learned.first))} with, "
        f"{spread(largest(learned.alike))} without",
        max(largest(with_them)) <= FITTED and min(largest(without)) >= FLOOR,
        f"at most {FITTED:g} with, at least {FLOOR:g} without (at x_1 = x_2 = 1 both outputs are "
        "the same), of both, with each seed",
        seeds=seeds,
    )


def learned_claim(found: Sequence[Errors], seeds: int) -> Claim:
    """From random weights."""
    return Claim(
        "the same architecture learns the map",
        "-",
        f"root mean square error {spread(rms(found))}, largest {spread(largest(found))}",
        max(rms(found)) <= RMS,
        f"root mean square error at most {RMS:g} on the grid, with each seed",
        seeds=seeds,
    )


def rows_of(
    two: Sweep,
    three: Sweep,
    gaps: Sequence[tuple[float, float]],
    without: Sequence[Errors],
    told: Sequence[Errors],
    alike: Sequence[Errors],
    learned: Learned,
) -> list[dict[str, Any]]:
    """Lines of the table."""
    cases = {
        f"waves, {n} places, width {w}": e for n, s in ((2, two), (3, three)) for w, e in s.items()
    }
    cases |= {"waves without attention": without, "first": told, "first without positions": alike}
    cases |= {f"learned: {name}": each for name, each in learned._asdict().items()}
    rows: list[dict[str, Any]] = [
        {"case": name, "largest": float(np.mean(largest(found)))}
        | {"root mean square": float(np.mean(rms(found)))}
        for name, found in cases.items()
    ]
    return rows + [
        {"case": f"gathered, beta {beta:g}", "largest": gap, "bound": bound}
        for beta, (gap, bound) in zip(BETAS, gaps, strict=True)
    ]


def widths_drawn(figure: Any, two: Sweep, three: Sweep) -> None:
    """Errors over the width; a line for each seed."""
    axes = figure.subplots()
    for color, name, sweep in (("C0", "two places", two), ("C1", "three places", three)):
        for style, pick, what in (("o-", largest, "largest"), ("s--", rms, "root mean square")):
            for i, column in enumerate(zip(*(pick(e) for e in sweep.values()), strict=True)):
                label = f"{name}, {what}" if i == 0 else None
                axes.plot(WIDTHS, column, style, color=color, markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("units of the feed-forward network")
    axes.set_ylabel("error on the grid")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
