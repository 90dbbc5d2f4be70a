"""The information plane: what layers know of their input and of the answer, along training.

Networks learn a finite world of 4,096 inputs, all of which are looked at, so that information is
counted; tanh and, as the control, ReLU, three seeds side by side. A run in small batches also has
the drift and diffusion of its gradients; one of soft labels is held against the information
bottleneck's curve, which a label that follows from the input makes a straight line; networks of one
to five hidden layers are timed; and digits are the real inputs.
"""

import math
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ffnlab.analysis import Cells
from ffnlab.data import digits, ring
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.information_measure import Bound, Case, Course, World, bounded, course, world_of
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

HIDDEN = (10, 7, 5, 4, 3)
TANH, RELU, SMALL, SOFT, DIGITS = (
    "tanh",
    "ReLU",
    "tanh, batches of 64",
    "tanh, soft labels",
    "digits",
)
LAYER = 4  # the fifth, of three units: the card's
GAIN = 3.0  # of soft labels
GRID = Cells()  # 30 edges from -1 to 1, the authors'
RELU_GRID = Cells(30, 0.0, 5.0)
DROP, KNOWN, LEARNED = 4.0, 0.9, 0.95  # bits, bits, accuracy: the card's
EARLY, LATE = 5, 1000  # epochs between which the most is known of the input
INEQUALITY = 0.1  # bits
SETTLED, STILL = 177, 1.5  # bits that layers of a ReLU network may lose after an epoch
PEAK, QUIET = 3.0, 0.6  # of mean over deviation: before epoch 30, after 300
APART = 4.0  # times, epochs that are called the same
ABOVE, ON = 0.02, 0.1  # bits from the curve

Courses = Mapping[str, Course]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = (seed,) if quick else (seed, seed + 1, seed + 2)
    points = 30 if quick else 60
    epochs = 1500 if quick else 4000
    alone = (0.0,) * len(seeds)
    world, soft = world_of(ring(), seed), ring(GAIN)
    sizes = (12, *HIDDEN, 2)
    both = {
        TANH: Case(sizes, "tanh", 512, epochs, penalties=alone),
        RELU: Case(sizes, "relu", 512, epochs, penalties=alone),
    }
    found = {
        name: course(case, world, GRID if name == TANH else RELU_GRID, seeds, points=points)
        for name, case in both.items()
    }
    bound, depths = None, {}
    if not quick:
        small = Case(sizes, "tanh", 64, 1000, penalties=alone, drift=True)
        found[SMALL] = course(small, world, GRID, seeds, points=points)
        found[SOFT] = course(both[TANH], world_of(soft, seed), GRID, seeds, points=points)
        bound = bounded(found[SOFT], soft, GRID, seed)
        real, classes = real_world(seed)
        case = Case((64, 20, 10, 7, 5, classes), "tanh", 128, 1000, rate=1e-3, penalties=alone)
        found[DIGITS] = course(case, real, GRID, seeds, points=points)
        for count in range(1, 6):
            case = Case((12, *HIDDEN[:count], 2), "tanh", 512, 2000, penalties=alone)
            depths[count] = course(case, world, GRID, seeds, points=points)
    pictures = {"plane": lambda figure: planes(figure, found)}
    if SMALL in found:
        pictures["drift"] = lambda figure: drift_curves(figure, found[SMALL])
    if bound is not None:
        pictures["bottleneck"] = lambda figure: beside_curve(figure, bound)
    return Result(
        slug="information-plane",
        title=STUDIES["information-plane"].title,
        settings={
            "world": "all 4,096 binary inputs of twelve points on a ring, our own rule",
            "network": f"12, {', '.join(map(str, HIDDEN))}, 2; Adam at 4e-4, batches of 512",
            "epochs": epochs,
            "cells": "30 edges from -1 to 1; from 0 to 5 of ReLU",
            "ceilings in bits": {"ring": 12.0, "digits": math.log2(1797)},
            "seeds": list(seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=claims_of(found, bound, depths, len(seeds)),
        table=rows_of(found, bound, depths),
        pictures=pictures,
    ).write(out)


def real_world(seed: int) -> tuple[World, int]:
    """Digits: all of them, those of the training part learned; and how many classes."""
    train, test = digits(seed)
    x, y = np.concatenate([train.x, test.x]), np.concatenate([train.y, test.y])
    return World(x, y, np.arange(len(train.x)), y), 10


def claims_of(
    found: Courses, bound: Bound | None, depths: Mapping[int, Course], seeds: int
) -> list[Claim]:
    """All claims of a form."""
    claims = [*phase_claims(found[TANH], seeds), control_claim(found, seeds)]
    claims.append(inequality_claim(found[TANH], seeds))
    if SMALL in found:
        claims += drift_claims(found[SMALL], seeds)
    if bound is not None:
        claims.append(bound_claim(bound, seeds))
    if depths:
        claims.append(depth_claim(depths, seeds))
    if DIGITS in found:
        claims.append(digits_claim(found[DIGITS], seeds))
    return claims


def peaks(found: Course, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """(bits lost since the maximum of I(X;T), its epoch), by member."""
    x = found.x[:, :, layer]
    return x.max(0) - x[-1], found.epochs[x.argmax(0)]


def phase_claims(found: Course, seeds: int) -> list[Claim]:
    """Fitting first, then compression, of a tanh network."""
    drop, epoch = peaks(found, LAYER)
    known, test = found.y[-1, :, LAYER], found.test[-1]
    last = found.epochs[-1]
    return [
        Claim(
            "a tanh network comes to know the answer and forgets its input",
            "I(X;T) rises, then falls for long, while I(T;Y) stays",
            f"layer of three units: {spread(drop.tolist())} bits of I(X;T) lost, I(T;Y) "
            f"{spread(known.tolist())}, test accuracy {spread(test.tolist())}",
            bool(drop.min() >= DROP and known.min() >= KNOWN and test.min() >= LEARNED),
            f"after {last:.0f} epochs at least {DROP:g} bits below the maximum, I(T;Y) at least "
            f"{KNOWN:g} and accuracy {LEARNED:g}, with each seed; 30 fixed cells",
            seeds=seeds,
        ),
        Claim(
            "most epochs compress",
            "most epochs compress the input rather than fit the labels",
            f"most is known of the input at epoch {spread(epoch.tolist())} of {last:.0f}",
            bool(epoch.min() >= EARLY and epoch.max() <= min(LATE, last / 2)),
            f"in {EARLY} to {LATE} and before half of all epochs, with each seed",
            seeds=seeds,
        ),
    ]


def control_claim(found: Courses, seeds: int) -> Claim:
    """ReLU, which does not saturate, on the same world."""
    lost = {name: lost_late(each) for name, each in found.items() if name in (TANH, RELU)}
    test = found[RELU].test[-1]
    return Claim(
        "compression is not what learning needs: a ReLU network learns with hardly any",
        "-",
        f"most bits lost after epoch {SETTLED} by a layer of 2 to 5: ReLU "
        f"{spread(lost[RELU].tolist())}, tanh {spread(lost[TANH].tolist())}; test accuracy of ReLU "
        f"{spread(test.tolist())}",
        bool(lost[RELU].max() < STILL and test.min() >= KNOWN),
        f"the control: less than {STILL:g} bits of I(X;T) lost by any of these layers and accuracy "
        f"at least {KNOWN:g}, with each seed; 30 fixed cells from 0 to 5",
        seeds=seeds,
    )


def lost_late(found: Course) -> np.ndarray:
    """Most bits of I(X;T) that a layer of 2 to 5 loses once the network has settled, by member."""
    begin = int(np.searchsorted(found.epochs, SETTLED))
    return (found.x[begin, :, 1:5] - found.x[-1, :, 1:5]).max(1)


def inequality_claim(found: Course, seeds: int) -> Claim:
    """The data processing inequality on binned states."""
    rise = np.diff(found.x, axis=2).max((0, 2))
    return Claim(
        "no layer knows more of the input than the one before",
        "data processing inequality",
        f"most that I(X;T) rises from layer to layer: {spread(rise.tolist())} bits",
        bool(rise.max() <= INEQUALITY),
        f"at most {INEQUALITY:g} bits at every epoch measured, with each seed: cells are no "
        "function of cells, so that rounding may break it",
        seeds=seeds,
    )


def drift_claims(found: Course, seeds: int) -> list[Claim]:
    """Gradients that agree, then noise; and whether compression begins there."""
    ratio, epochs = found.ratio[:, :, -1], found.epochs
    first = ratio[epochs <= 30].max(0)
    later = np.median(ratio[(epochs >= 300) & (epochs <= 1000)], 0)
    places = np.arange(len(epochs))
    switch = np.array([epochs[np.argmax((r < 1) & (places > r.argmax()))] for r in ratio.T])
    _, peak = peaks(found, LAYER)
    apart = np.maximum(switch / np.maximum(peak, 1), peak / np.maximum(switch, 1))
    return [
        Claim(
            "gradients drift first and diffuse later",
            "high, then low signal to noise",
            f"output layer, mean over deviation: most before epoch 30 {spread(first.tolist())}, "
            f"median after 300 {spread(later.tolist())}",
            bool(first.min() >= PEAK and later.max() <= QUIET),
            f"batches of 64: at least {PEAK:g} and at most {QUIET:g}, with each seed",
            seeds=seeds,
        ),
        Claim(
            "compression begins where gradients begin to diffuse",
            "aligned with the switch",
            f"mean below deviation, after its peak, from epoch {spread(switch.tolist())}, most "
            f"known of the input at epoch {spread(peak.tolist())}",
            bool(apart.max() <= APART),
            f"the two epochs within a factor of {APART:g} of each other, with each seed",
            seeds=seeds,
        ),
    ]


def bound_claim(found: Bound, seeds: int) -> Claim:
    """Final layers beside the bottleneck's curve."""
    above, last = (-found.gaps).max(1), found.gaps[:, LAYER]
    return Claim(
        "layers that have converged lie on or near the information bottleneck's curve",
        "on or close to the bound",
        f"layer of three units {spread(last.tolist())} bits below the curve; all layers at most "
        f"{above.max():.3f} above it",
        bool(above.max() <= ABOVE and last.max() <= ON),
        f"soft labels with I(X;Y) = {found.known:.2f} bits: at most {ON:g} below, none more than "
        f"{ABOVE:g} above, with each seed; the curve by Blahut-Arimoto",
        seeds=seeds,
    )


def depth_claim(depths: Mapping[int, Course], seeds: int) -> Claim:
    """Epochs until a network has learned, by its number of hidden layers."""
    taken = {
        count: [
            float(each.epochs[hit.argmax()]) if (hit := col >= LEARNED).any() else math.inf
            for col in each.train.T
        ]
        for count, each in depths.items()
    }
    means = [float(np.mean(each)) for each in taken.values()]
    said = {
        count: spread(each) if np.isfinite(each).all() else "never by some seed"
        for count, each in taken.items()
    }
    return Claim(
        "more hidden layers learn in fewer epochs",
        "more layers dramatically reduce the training time",
        "; ".join(f"{count} hidden {text}" for count, text in said.items()),
        all(a >= b for a, b in zip(means, means[1:], strict=False)) and means[-1] < means[0],
        f"mean epoch at which training accuracy reaches {LEARNED:g}, not rising with the number of "
        "layers; one rate for all, 2,000 epochs",
        seeds=seeds,
    )


def digits_claim(found: Course, seeds: int) -> Claim:
    """The same of real inputs."""
    drop, epoch = peaks(found, 3)
    return Claim(
        "on digits too the last hidden layer forgets its input",
        "-",
        f"{spread(drop.tolist())} bits lost since epoch {spread(epoch.tolist())}, I(T;Y) "
        f"{spread(found.y[-1, :, 3].tolist())} of 3.32, test accuracy "
        f"{spread(found.test[-1].tolist())}",
        bool(drop.min() >= 0.5),
        f"at least half a bit of {math.log2(1797):.1f}, with each seed; 1,797 inputs, of which "
        "I(T;Y) of a wide layer says little",
        seeds=seeds,
    )


def rows_of(
    found: Courses, bound: Bound | None, depths: Mapping[int, Course]
) -> list[dict[str, Any]]:
    """Lines of the table."""
    rows = []
    for name, each in {**found, **{f"{n} hidden": c for n, c in depths.items()}}.items():
        for layer in range(each.x.shape[2]):
            x = each.x[:, :, layer]
            rows.append(
                {"case": name, "layer": layer + 1, "I(X;T) first": x[0].mean()}
                | {"most": x.max(0).mean(), "last": x[-1].mean()}
                | {"I(T;Y) last": each.y[-1, :, layer].mean(), "test": each.test[-1].mean()}
            )
    if bound is not None:
        gaps = bound.gaps.mean(0)
        rows += [{"case": "below the curve", "layer": i + 1, "bits": g} for i, g in enumerate(gaps)]
    return [
        {key: float(v) if isinstance(v, np.floating) else v for key, v in row.items()}
        for row in rows
    ]


def planes(figure: Any, found: Courses) -> None:
    """Each case: single runs thin, their mean thick, epochs from dark to bright."""
    shown = [name for name in (TANH, RELU, DIGITS) if name in found]
    figure.set_size_inches(4 * len(shown), 3.6)
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        each = found[name]
        for layer in range(each.x.shape[2]):
            color = f"C{layer}"
            for member in range(each.x.shape[1]):
                axes.plot(
                    each.x[:, member, layer],
                    each.y[:, member, layer],
                    color=color,
                    linewidth=0.5,
                    alpha=0.5,
                )
            mean = each.x[:, :, layer].mean(1), each.y[:, :, layer].mean(1)
            axes.plot(*mean, color=color, linewidth=1.5, label=f"layer {layer + 1}")
            axes.plot(mean[0][-1], mean[1][-1], "o", color=color, markersize=4)
        axes.set_xlabel("I(X;T), bits")
        axes.set_ylabel("I(T;Y), bits")
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=6)
    figure.suptitle("What layers know along training; a dot where it ends")


def drift_curves(figure: Any, found: Course) -> None:
    """Mean over deviation by layer, and I(X;T) of the fifth."""
    axes = figure.subplots()
    at = np.maximum(found.epochs, 0.5)
    for layer in range(found.ratio.shape[2]):
        mean = found.ratio[:, :, layer].mean(1)
        axes.plot(at, mean, color=f"C{layer}", label=f"layer {layer + 1}")
    axes.axhline(1, color="0.6", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean over deviation of gradients")
    axes.legend(frameon=False, fontsize=7)
    other = axes.twinx()
    other.plot(at, found.x[:, :, LAYER].mean(1), color="black", linewidth=1.5)
    other.set_ylabel("I(X;T) of layer 5, bits (black)")


def beside_curve(figure: Any, found: Bound) -> None:
    """The curve, and where the layers of all members ended."""
    axes = figure.subplots()
    axes.plot(*found.curve.T, color="black", label="information bottleneck")
    for layer in range(found.x.shape[1]):
        axes.plot(found.x[:, layer], found.y[:, layer], "o", label=f"layer {layer + 1}")
    axes.set_xlabel("I(X;T), bits")
    axes.set_ylabel("I(T;Y), bits")
    axes.legend(frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
