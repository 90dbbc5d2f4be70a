"""Adaptive estimators: information by cells and kernels that follow what a layer does at the time.

Tanh and ReLU networks, with and without a penalty of their weights, eight initialisations each, all
members of one program; all eight of the authors' nonlinearities in the full form. Information is of
all 4,096 inputs of a finite world, by cells that hold as many distinct values each; with kernels at
the end, as wide as a share of the layer's activity and of one width for all.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ffnlab.analysis import Cells, Kernels
from ffnlab.analysis.information_plane import LOWS, layers_of
from ffnlab.data import ring
from ffnlab.layers import MLP
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.information_measure import Case, Course, World, course, world_of
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

SIZES, BINS, PENALTY = (12, 10, 7, 5, 4, 3, 2), 30, 0.015
BOTH = ("tanh", "relu")
OTHERS = ("abs", "elu", "silu", "softplus", "prelu", "srelu")
LAYER = 2  # the third, whose information the card's limit is of
LOWERED = 1.5  # bits
LEAST = -10.0  # of nonlinearities without a floor, below all that they give
SCALES = (0.1, 1.0, 10.0)

Courses = Mapping[str, Course]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = tuple(range(seed, seed + (3 if quick else 8)))
    epochs, points = (400, 12) if quick else (1500, 40)
    world = world_of(ring(), seed)
    names = BOTH if quick else (*BOTH, *OTHERS)
    found = {name: arms(name, world, seeds, epochs, points) for name in names}
    scales = {name: scaled(found[name], world) for name in BOTH}
    return Result(
        slug="adaptive-mi",
        title=STUDIES["adaptive-mi"].title,
        settings={
            "world": "all 4,096 binary inputs of twelve points on a ring, 80 % learned",
            "network": f"{list(SIZES)}, Adam at 4e-4, batches of 256; truncated normal weights of "
            "deviation 1 / sqrt(inputs), twice that but for tanh",
            "epochs": epochs,
            "cells": f"{BINS}, as many distinct values in each",
            "penalty": PENALTY,
            "nonlinearities": list(names),
            "ceiling in bits": world.ceiling,
            "seeds": list(seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *penalty_claims(found, len(seeds)),
            *phase_claims(found, len(seeds)),
            variation_claim(found, len(seeds)),
            last_claim(found, len(seeds)),
            scale_claim(scales, len(seeds)),
        ],
        table=rows_of(found),
        pictures={"planes": lambda figure: planes(figure, {n: found[n] for n in BOTH})},
    ).write(out)


@dataclasses.dataclass(frozen=True)
class Flat(Case):
    """Networks whose parametric rectifiers begin as ReLU, as the authors' do."""

    def made(self, key: Array) -> MLP:
        """A network of it."""
        net = super().made(key)
        if self.activation == "prelu":
            for unit in net.units or ():
                unit.slope[...] = jnp.zeros_like(unit.slope[...])
        return net


def arms(name: str, world: World, seeds: Sequence[int], epochs: int, points: int) -> Course:
    """The members without a penalty, then as many with one, of a nonlinearity."""
    case = Flat(
        SIZES,
        name,
        256,
        epochs,
        scale=1.0 if name == "tanh" else 2.0,
        penalties=(0.0,) * len(seeds) + (PENALTY,) * len(seeds),
    )
    cells = Cells(BINS, LOWS.get(name, LEAST), adaptive=True)
    return course(case, world, cells, (*seeds, *seeds), points=points)


def halves(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What is of members without a penalty, and of those with one; members on the last axis."""
    count = values.shape[-1] // 2
    return values[..., :count], values[..., count:]


def penalty_claims(found: Courses, seeds: int) -> list[Claim]:
    """What a penalty of weights does to information and to accuracy."""
    last = {name: halves(found[name].x[-1, :, LAYER]) for name in BOTH}
    test = {name: halves(found[name].test[-1]) for name in BOTH}
    drops = {name: plain - held for name, (plain, held) in last.items()}
    return [
        Claim(
            "a penalty of weights greatly increases compression",
            "greatly",
            "; ".join(
                f"{name}: I(X;T) of layer {LAYER + 1} {spread(plain.tolist())} without, "
                f"{spread(held.tolist())} with"
                for name, (plain, held) in last.items()
            ),
            all(bool(drop.mean() >= LOWERED) for drop in drops.values()),
            f"mean at least {LOWERED:g} bits lower with a penalty of {PENALTY:g}, of both; the "
            f"ceiling is 12 bits",
            seeds=seeds,
        ),
        Claim(
            "a penalty of weights prevents overfitting",
            "prevents",
            "; ".join(
                f"{name}: test accuracy {spread(plain.tolist())} without, {spread(held.tolist())} "
                "with"
                for name, (plain, held) in test.items()
            ),
            bool(test["relu"][1].mean() >= test["relu"][0].mean()),
            "mean of ReLU networks not lower with it",
            seeds=seeds,
        ),
    ]


def phase_claims(found: Courses, seeds: int) -> list[Claim]:
    """What happens to the fifth layer without a penalty."""
    x = {name: halves(found[name].x[:, :, 4])[0] for name in BOTH}
    y = halves(found["tanh"].y[:, :, 4])[0]
    first, last = x["tanh"][0], x["tanh"][-1]
    change = {name: each[-1] - each[0] for name, each in x.items()}
    return [
        Claim(
            "a tanh network forgets its input while it comes to know the answer",
            "compression without a fixed grid",
            f"layer 5: I(X;T) {spread(first.tolist())} at first, {spread(last.tolist())} at last; "
            f"I(T;Y) {spread(y[0].tolist())} to {spread(y[-1].tolist())}",
            bool(change["tanh"].mean() < 0 < (y[-1] - y[0]).mean()),
            "signs of the mean changes, without a penalty",
            seeds=seeds,
        ),
        Claim(
            "averaged over initialisations a ReLU network shows no compression",
            "fitting and compression mostly cancel (50 initialisations)",
            f"layer 5: I(X;T) changes by {spread(change['relu'].tolist())} bits",
            bool(change["relu"].mean() > 0),
            "ends higher than it begins, mean of all members, without a penalty",
            seeds=seeds,
        ),
    ]


def variation_claim(found: Courses, seeds: int) -> Claim:
    """How far initialisations differ."""
    x = {name: halves(each.x[:, :, 4])[0] for name, each in found.items()}
    lost = {name: each.max(0) - each[-1] for name, each in x.items()}
    wide = {name: float(each.max() - each.min()) for name, each in lost.items()}
    return Claim(
        "initialisations differ widely, and nonlinearities too, in how much is compressed",
        "large variation",
        "bits lost of layer 5: "
        + "; ".join(f"{name} {spread(each.tolist())}" for name, each in lost.items()),
        max(wide.values()) >= 1.0,
        "range over initialisations of at least one bit, of some nonlinearity",
        seeds=seeds,
    )


def last_claim(found: Courses, seeds: int) -> Claim:
    """Whose compression goes with generalisation."""
    pairs: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
    for each in found.values():
        plain = halves(each.test[-1])[0]
        for layer in range(len(SIZES) - 1):
            x = halves(each.x[:, :, layer])[0]
            pairs.setdefault(layer, []).append((x.max(0) - x[-1], plain))
    rho = {}
    for layer, each in pairs.items():
        # Within a nonlinearity, so that what differs between them counts for nothing.
        lost = np.concatenate([a - a.mean() for a, _ in each])
        test = np.concatenate([b - b.mean() for _, b in each])
        size = np.linalg.norm(lost) * np.linalg.norm(test)
        rho[layer + 1] = float(lost @ test / size) if size else 0.0
    *inner, last = rho.values()
    return Claim(
        "the last layer's compression goes with generalisation, the others' does not",
        "only the last layer's correlates positively",
        "correlation of bits lost with test accuracy, by layer: "
        + ", ".join(f"{layer} {value:+.2f}" for layer, value in rho.items())
        + f" ({min(rho.values()):.2f} to {max(rho.values()):.2f})",
        last > 0 and max(inner) <= 0.2,
        "within nonlinearities, without a penalty: positive of the last, at most .2 of the others",
        seeds=seeds,
    )


def scaled(found: Course, world: World) -> dict[str, list[list[float]]]:
    """I(X;T) in bits of layer 3 of each member, its activations made smaller and larger: by
    kernels that follow, and by kernels of one width."""
    rows, labels = jnp.asarray(world.x[:1024]), jnp.asarray(world.y[:1024])
    ways = {
        "following": Kernels(2, 0.05, adaptive=True),
        "of one width": Kernels(2, 0.01),
    }

    def of_member(net: Any, scale: Any) -> dict[str, Any]:
        values = scale * list(layers_of(net, rows).values())[LAYER]
        return {name: way(values, labels).x / math.log(2) for name, way in ways.items()}

    ask = jax.jit(jax.vmap(of_member, (0, None)))
    each = [jax.device_get(ask(found.nets, scale)) for scale in SCALES]
    return {name: [e[name].tolist() for e in each] for name in ways}


def scale_claim(found: Mapping[str, Mapping[str, list[list[float]]]], seeds: int) -> Claim:
    """Whether estimates follow the scale of activations, which says nothing of what is known."""
    changes = {
        way: [
            abs(a - b)
            for each in found.values()
            for a, b in zip(each[way][0], each[way][1], strict=True)
        ]
        for way in ("following", "of one width")
    }
    return Claim(
        "kernels that follow a layer's activity do not see its scale, kernels of one width do",
        "the reason for adaptive estimators",
        "I(X;T) of layer 3 with activations a tenth as large changes by "
        + ", ".join(f"{spread(v)} bits {way}" for way, v in changes.items()),
        max(changes["following"]) <= 1e-2 and float(np.mean(changes["of one width"])) >= 1.0,
        "at most .01 bits and at least one bit on the mean, 1,024 inputs, tanh and ReLU, all "
        "members",
        seeds=seeds,
    )


def rows_of(found: Courses) -> list[dict[str, Any]]:
    """Lines of the table: by nonlinearity, penalty and layer."""
    rows = []
    for name, each in found.items():
        for layer in range(len(SIZES) - 1):
            for penalty, x, y in zip(
                (0.0, PENALTY),
                halves(each.x[:, :, layer]),
                halves(each.y[:, :, layer]),
                strict=True,
            ):
                rows.append(
                    {"nonlinearity": name, "penalty": penalty, "layer": layer + 1}
                    | {"I(X;T) first": float(x[0].mean()), "most": float(x.max(0).mean())}
                    | {"last": float(x[-1].mean()), "I(T;Y) last": float(y[-1].mean())}
                )
    return rows


def planes(figure: Any, found: Courses) -> None:
    """Means of all layers, and three single runs of the fifth, without a penalty and with one."""
    figure.set_size_inches(6, 2.2 * len(found))
    grid = figure.subplots(len(found), 2, squeeze=False)
    for line, (name, each) in zip(grid, found.items(), strict=True):
        for axes, title, x, y in zip(
            line, ("without", "with a penalty"), halves_of(each.x), halves_of(each.y), strict=True
        ):
            for layer in range(x.shape[2]):
                color = f"C{layer}"
                if layer == 4:
                    axes.plot(x[:, :3, layer], y[:, :3, layer], color=color, linewidth=0.5)
                mean = x[:, :, layer].mean(1), y[:, :, layer].mean(1)
                axes.plot(*mean, color=color, linewidth=1.5, label=f"layer {layer + 1}")
                axes.plot(mean[0][-1], mean[1][-1], "o", color=color, markersize=4)
            axes.set_title(f"{name}, {title}", fontsize=9)
            axes.set_xlabel("I(X;T), bits")
            axes.set_ylabel("I(T;Y), bits")
            axes.spines[["top", "right"]].set_visible(False)
    grid[-1, -1].legend(frameon=False, fontsize=6)


def halves_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`halves` of [t, members, layers]."""
    count = values.shape[1] // 2
    return values[:, :count], values[:, count:]
