"""Safety of single decisions: digits whose pixels are moved, networks with and without a penalty.

Five members of each kind. Around test digits a grid of five pixels in steps is asked whole, and all
points within a radius are bounded and bisected; small networks are held against an exact program,
and a network with INT4 weights is verified against what it was made of.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float, PyTree

from ffnlab import transform, tree
from ffnlab.analysis import Cube, Grid, Verdict, least_margin, linear_bounds, verify
from ffnlab.data import digits
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled, members
from ffnlab.quantization import nearest
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.classify import learned
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.weights import Dense

__all__ = ["run"]

SIZES, BATCH, RATE = (64, 32, 10), 64, 3e-3
PIXELS, STEP, WIDE, COUNT = 5, 1 / 16, 1 / 4, 2  # 3,125 points, of two steps
RADII = (0.005, 0.02, 0.05)
PENALTY = 1e-2
HELD, FREE = "penalized", "over-fitted"
EPOCHS = {HELD: 40, FREE: 160}
LEARNED = 0.96
EXACT = (2, 16, 16, 2)
CELLS = 256  # of a cube, before a verdict is given up
STATUSES = ("safe", "unsafe", "unknown")

Counts = Mapping[str, int]


class Found(NamedTuple):
    """Verdicts of a kind of networks.

    Attributes:
      accuracy: by seed.
      grids: verdicts of images by seed.
      wide: the same of wide steps.
      cubes: radius -> the same.
    """

    accuracy: Sequence[float]
    grids: Sequence[Sequence[Verdict]]
    wide: Sequence[Sequence[Verdict]]
    cubes: Mapping[float, Sequence[Sequence[Verdict]]]


class Agreement(NamedTuple):
    """Verdicts beside an exact program's.

    Attributes:
      asked: how many regions.
      safe: how many the program calls safe.
      wrong: how many verdicts differ.
      missed: how many were left unknown.
    """

    asked: int
    safe: int
    wrong: int
    missed: int


class Rounded(NamedTuple):
    """A network with INT4 weights beside its original.

    Attributes:
      same: share of images of which the rounded network is proved to keep the original's class.
      moved: largest proved difference of logits over a cube, by image.
      seen: largest difference at 64 points drawn in each cube.
    """

    same: float
    moved: Float[np.ndarray, "n"]
    seen: Float[np.ndarray, "n"]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed, seed + 1] if quick else [seed + i for i in range(5)]
    images = 8 if quick else 20
    train, test = digits(seed)
    nets = {name: trained(train, name, seeds) for name in (HELD, FREE)}
    x = test.x[:images].astype(np.float64)
    radii = RADII[1:2] if quick else RADII
    found = {name: judged(each, x, test, radii) for name, each in nets.items()}
    agreed = agreement(20 if quick else 120, seed)
    rounded = rounding(functions(nets[HELD])[0], member(nets[HELD], 0), x)
    return Result(
        slug="safety-verification",
        title=STUDIES["safety-verification"].title,
        settings={
            "networks": f"MLP {list(SIZES)}, ReLU, Adam at {RATE:g}, batch {BATCH}",
            "penalty": f"{PENALTY:g} times the weights in the gradient, {EPOCHS[HELD]} epochs; "
            f"none, {EPOCHS[FREE]} epochs",
            "images": images,
            "grid": f"{PIXELS} pixels furthest from the mean, {COUNT} steps of 1/16 and of 1/4",
            "radii": list(radii),
            "cells": CELLS,
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            found_claim(found, len(seeds)),
            penalty_claim(found, len(seeds)),
            agreement_claim(agreed),
            decided_claim(found, len(seeds)),
            rounded_claim(rounded),
        ],
        table=rows_of(found),
        pictures={
            "verdicts": lambda figure: bars(figure, found),
            "witnesses": lambda figure: witnesses(figure, x, found[FREE]),
        },
    ).write(out)


def trained(train: Any, name: str, seeds: Sequence[int]) -> PyTree:
    """Members [seeds, …] of a kind."""
    decay = PENALTY if name == HELD else 0.0
    optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(RATE))
    rule = members(lambda: backprop(labelled, optimizer), len(seeds))
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    nets = jax.vmap(lambda key: MLP(SIZES, key=key))(keys)
    steps = EPOCHS[name] * len(train.x) // BATCH
    return rule.model(learned(rule, nets, train, batch=BATCH, steps=steps, seed=seeds[0]))


def member(nets: PyTree, i: int) -> MLP:
    """One network in float64."""
    with jax.enable_x64(True):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf[i], jnp.float64), nets)


def functions(nets: PyTree) -> list[Callable[[jax.Array], jax.Array]]:
    """The members as functions."""
    count = len(jax.tree.leaves(nets)[0])
    return [function_of(member(nets, i)) for i in range(count)]


def function_of(net: MLP) -> Callable[[jax.Array], jax.Array]:
    """A network as a function, one for all that is asked of it."""
    return lambda x: net(x)


def judged(nets: PyTree, x: Float[np.ndarray, "n d"], test: Any, radii: Sequence[float]) -> Found:
    """Accuracies, and verdicts of all regions."""
    logits = jax.vmap(lambda net: net(jnp.asarray(test.x)))(nets)
    right = (np.asarray(logits).argmax(-1) == test.y).mean(-1)
    each = functions(nets)
    places = [furthest(image) for image in x]
    grids, wide = (
        [
            [verify(fn, Grid(i, p, step, COUNT)) for i, p in zip(x, places, strict=True)]
            for fn in each
        ]
        for step in (STEP, WIDE)
    )
    cubes = {
        radius: [[verify(fn, Cube(i, radius), most_cells=CELLS) for i in x] for fn in each]
        for radius in radii
    }
    return Found(right.tolist(), grids, wide, cubes)


def furthest(image: Float[np.ndarray, "d"]) -> list[int]:
    """The pixels furthest from their mean, as the paper's tool takes them."""
    return np.argsort(-np.abs(image - image.mean()), kind="stable")[:PIXELS].tolist()


def agreement(count: int, seed: int) -> Agreement:
    """Small networks on boxes of the unit square, beside an exact program."""
    random, key = np.random.default_rng(seed), jax.random.key(seed)
    with jax.enable_x64(True):
        net = MLP(EXACT, key=key, dtype=jnp.float64)
        last = net.maps[-1]
        net.maps[-1] = last.replace(last.weight, -net(jnp.full(2, 0.5, jnp.float64)))
    fn = function_of(net)
    safe = wrong = missed = 0
    for _ in range(count):
        cube = Cube(random.uniform(size=2), float(random.choice([0.02, 0.05, 0.1])))
        found = verify(fn, cube)
        margin = least_margin(net, *cube.ends, found.label).margin
        is_safe = margin is not None and margin > 0
        safe += is_safe
        missed += found.status == "unknown"
        wrong += found.status != "unknown" and (found.status == "safe") != is_safe
    return Agreement(count, safe, wrong, missed)


def rounding(fn: Callable, net: MLP, x: Float[np.ndarray, "n d"]) -> Rounded:
    """A network with INT4 weights, verified against its original."""
    small, _ = transform.apply(nearest(format="int4", group=16), narrow(net))
    with jax.enable_x64(True):
        rounded = tree.copy(net)
        for i, old in enumerate(small.maps):
            weight = Dense(old.weight.dense().astype(jnp.float64))
            rounded.maps[i] = net.maps[i].replace(weight)
        other = lambda x: rounded(x)  # noqa: E731
        apart = jax.jit(lambda low, high: linear_bounds(lambda x: other(x) - fn(x), low, high))
        same, moved, seen = [], [], []
        random = np.random.default_rng(0)
        for image in x:
            cube = Cube(image, RADII[0])
            label = int(np.asarray(fn(jnp.asarray(image))).argmax())
            same.append(verify(other, cube, label=label, most_cells=CELLS).status == "safe")
            box = apart(*map(jnp.asarray, cube.ends))
            moved.append(float(jnp.maximum(-box.low, box.high).max()))
            points = jnp.asarray(random.uniform(*cube.ends, size=(64, len(image))))
            seen.append(float(jnp.abs(jax.vmap(lambda p: other(p) - fn(p))(points)).max()))
    return Rounded(float(np.mean(same)), np.array(moved), np.array(seen))


def narrow(net: MLP) -> MLP:
    """A network in float32."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), net)


def counts(verdicts: Sequence[Verdict]) -> Counts:
    """How many of each status."""
    return {status: sum(v.status == status for v in verdicts) for status in STATUSES}


def found_claim(found: Mapping[str, Found], seeds: int) -> Claim:
    """Whether searches end, and witnesses are ones."""
    grids = [v for e in found.values() for row in (*e.grids, *e.wide) for v in row]
    accuracy = [a for each in found.values() for a in each.accuracy]
    held = counts(grids)
    return Claim(
        "adversarial examples of the region and its steps are found where there are any",
        "found if they exist",
        f"{held['unsafe']} of {len(grids)} grids unsafe, each with a witness of another class, "
        f"{held['safe']} safe after all points; accuracy of networks {spread(accuracy)}",
        held["unknown"] == 0 and min(accuracy) >= LEARNED and all(map(is_witnessed, grids)),
        f"no grid of 3,125 points left undecided, of either step; networks of at least {LEARNED:g}",
        seeds=seeds,
    )


def is_witnessed(verdict: Verdict) -> bool:
    """Whether what is unsafe has a witness of another class, and nothing else has one."""
    return (verdict.witness is not None) == (verdict.status == "unsafe") and (
        verdict.other != verdict.label
    )


def penalty_claim(found: Mapping[str, Found], seeds: int) -> Claim:
    """Whether a penalty makes decisions safer, in every kind of region."""
    held, free = (safe_of(found[name]) for name in (HELD, FREE))
    shares = {region: float(np.mean(held[region] >= free[region])) for region in held}
    return Claim(
        "a penalty of weights makes decisions safer",
        "-",
        f"safe of {len(found[HELD].grids[0])} images, {HELD} and {FREE}: "
        + "; ".join(
            f"{region} {spread(held[region].tolist())}, {spread(free[region].tolist())}"
            for region in held
        ),
        min(shares.values()) >= 0.8 and any(held[r].sum() > free[r].sum() for r in held),
        "in every kind of region at least as many in four of five pairs of members, and more in "
        "one",
        seeds=seeds,
    )


def safe_of(found: Found) -> dict[str, Float[np.ndarray, "seeds"]]:
    """How many images are safe, by region and seed."""
    return {
        region: np.array([counts(each)["safe"] for each in verdicts], float)
        for region, verdicts in regions_of(found).items()
    }


def regions_of(found: Found) -> dict[str, Sequence[Sequence[Verdict]]]:
    """Verdicts by region, by seed."""
    cubes = {f"radius {radius:g}": verdicts for radius, verdicts in found.cubes.items()}
    return {"grid": found.grids, "wide grid": found.wide, **cubes}


def agreement_claim(found: Agreement) -> Claim:
    """Verdicts beside an exact program."""
    return Claim(
        "what is called safe is safe, what is called unsafe is not",
        "exhaustive within the region",
        f"{found.asked - found.wrong - found.missed} of {found.asked} verdicts as an exact program "
        f"says ({found.safe} safe), {found.wrong} against it, {found.missed} unknown",
        found.wrong == 0,
        f"ReLU networks {list(EXACT)}, boxes of radius .02, .05 and .1; no verdict against the "
        "least margin that HiGHS finds",
        seeds=1,
    )


def decided_claim(found: Mapping[str, Found], seeds: int) -> Claim:
    """How many cubes are decided."""
    shares = {
        radius: float(
            np.mean(
                [v.status != "unknown" for e in found.values() for r in e.cubes[radius] for v in r]
            )
        )
        for radius in found[HELD].cubes
    }
    return Claim(
        "cubes of all 64 pixels are decided by bounds and bisection",
        "-",
        "; ".join(f"radius {radius:g}: {share:.2f} decided" for radius, share in shares.items())
        + f" ({min(shares.values()):.2f} to {max(shares.values()):.2f})",
        min(shares.values()) >= 0.9,
        f"at least .9 of images at every radius, with at most {CELLS} cells; both kinds",
        seeds=seeds,
    )


def rounded_claim(found: Rounded) -> Claim:
    """What is proved of INT4 weights."""
    return Claim(
        "a network with INT4 weights keeps its original's class around an input, provably",
        "-",
        f"{found.same:.2f} of images within {RADII[0]:g}; logits differ by at most "
        f"{found.moved.mean():.2f} on the mean by proof, {found.seen.mean():.2f} at points drawn",
        found.same >= 0.5 and bool((found.moved >= found.seen).all()),
        "at least half of the images, and no point differs by more than is proved; one member",
        seeds=1,
    )


def rows_of(found: Mapping[str, Found]) -> list[dict[str, Any]]:
    """Lines of the table: shares of verdicts."""
    rows: list[dict[str, Any]] = []
    for name, each in found.items():
        for region, verdicts in regions_of(each).items():
            held = counts([v for row in verdicts for v in row])
            total = sum(held.values())
            shares = {status: held[status] / total for status in STATUSES}
            cells = float(np.mean([v.cells for row in verdicts for v in row]))
            rows.append({"networks": name, "region": region} | shares | {"cells": cells})
    return rows


def bars(figure: Any, found: Mapping[str, Found]) -> None:
    """Shares of verdicts by region and kind."""
    rows = rows_of(found)
    axes = figure.subplots()
    names = [f"{row['networks']},\n{row['region']}" for row in rows]
    left = np.zeros(len(rows))
    for status, color in zip(STATUSES, ("C2", "C3", "0.7"), strict=True):
        values = np.array([row[status] for row in rows])
        axes.barh(names, values, left=left, color=color, label=status)
        left += values
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_xlabel("share of images and members")
    axes.legend(frameon=False, fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)


def witnesses(figure: Any, x: Float[np.ndarray, "n d"], found: Found) -> None:
    """Digits, and the points near them that get another class."""
    pairs = [
        (image, v, v.witness)
        for row in found.wide
        for image, v in zip(x, row, strict=True)
        if v.witness is not None
    ]
    columns = min(8, max(1, len(pairs)))
    figure.set_size_inches(1 + columns, 2.6)
    grid = figure.subplots(2, columns, squeeze=False)
    for axes in grid.ravel():
        axes.axis("off")
    for column, (image, verdict, witness) in enumerate(pairs[:columns]):
        for line, (pixels, label) in enumerate(((image, verdict.label), (witness, verdict.other))):
            grid[line, column].imshow(np.reshape(pixels, (8, 8)), cmap="gray", vmin=0, vmax=1)
            grid[line, column].set_title(str(label), fontsize=8)
    figure.suptitle("Digits (above) and witnesses near them", fontsize=9)
