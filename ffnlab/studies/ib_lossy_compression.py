"""Information after lossy compression: known information first, then layers along training.

Pairs of Gaussians and of images whose information is set by construction; images are compressed by
an autoencoder that learned others, by as many principal components, and not at all (their
parameters). Then networks with noise learn digits, three seeds side by side: what their layers know
of a compressed input and of the answer, and in how many phases that rises and falls.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ffnlab.data import Labelled, digits, mnist, mnist_folder
from ffnlab.layers import MLP
from ffnlab.models import ConvNetConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.lossy_measure import (
    Case,
    Compressor,
    Course,
    Curve,
    autoencoder,
    course,
    gaussian_errors,
    image_curve,
    phases,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

KNOWN = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0)  # nats
COUNT = 5000  # pairs
EXACT, NEAR, LOST = 0.12, 0.5, 0.5  # nats
SLACK = 0.3  # nats that an estimate of I(T;Y) may exceed H(Y) by
DENSE, CONV, MNIST = "digits, MLP", "digits, convolutions", "MNIST, convolutions"

Courses = Mapping[str, Course]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = tuple(range(seed, seed + (1 if quick else 3)))
    errors = gaussian_errors(KNOWN, COUNT, seed)
    kinds = ("blobs",) if quick else ("blobs", "boxes")
    known = (0.0, 1.0, 5.0, 10.0) if quick else tuple(float(nats) for nats in range(11))
    options = {"passes": 40, "rates": (3e-3,)} if quick else {"passes": 150}
    curves, compressors = {}, {}
    for kind in kinds:
        curves[kind], compressors[kind] = image_curve(kind, known, COUNT, seed, **options)
    found, compressors["digits"] = on_digits(seeds, quick, seed)
    if not quick and mnist_folder() is not None:
        found[MNIST], compressors["MNIST"] = on_mnist(seeds, seed)
    pictures: dict[str, Callable[[Any], None]] = {
        "known": lambda figure: curves_drawn(figure, curves),
        "planes": lambda figure: planes(figure, found),
    }
    return Result(
        slug="ib-lossy-compression",
        title=STUDIES["ib-lossy-compression"].title,
        settings={
            "estimator": "Kozachenko-Leonenko, whitened; five neighbours weighted beyond four "
            "dimensions",
            "pairs": COUNT,
            "images": "16 x 16; 6,000 others to learn from, a sixth of them held out",
            "compressors": "d-128-k-128-d, SiLU, Adam; the rate by the error on images held out",
            "mean squared error by rate": {
                name: {f"{rate:g}": error for rate, error in each.tried.items()}
                for name, each in compressors.items()
            },
            "of the variance lost": {n: c.share for n, c in compressors.items()},
            "networks": "noise of 1e-3 of each activation before every layer; four principal "
            "components of each layer, fitted anew at each epoch measured",
            "seeds": list(seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            gaussian_claim(errors),
            *image_claims(curves),
            *answer_claims(found, len(seeds)),
            *([] if quick else [phase_claim(found, len(seeds))]),
        ],
        table=rows_of(errors, curves, found),
        pictures=pictures,
    ).write(out)


def on_digits(seeds: Sequence[int], quick: bool, seed: int) -> tuple[dict[str, Course], Compressor]:
    """Networks that learn the 8 x 8 digits, all of which are looked at."""
    train, test = digits(seed)
    seen = Labelled(np.concatenate([train.x, test.x]), np.concatenate([train.y, test.y]))
    options = {"passes": 30, "rates": (3e-3,)} if quick else {}
    found = autoencoder(seen.x, 4, seed, **options)
    case = Case(
        lambda key: MLP((64, 32, 16, 10), activation="tanh", key=key),
        "maps[*]",
        epochs=40 if quick else 200,
    )
    points = 6 if quick else 24
    courses = {DENSE: course(case, train, seen, found.encode, seeds, points=points)}
    if not quick:
        case = Case(lambda key: ConvNetConfig((1, 8, 16, 32), 10).make(key=key), "**", epochs=60)
        courses[CONV] = course(
            case, as_images(train, 8), as_images(seen, 8), flat(found), seeds, points=16
        )
    return courses, found


def on_mnist(seeds: Sequence[int], seed: int) -> tuple[Course, Compressor]:
    """Convolutions that learn 10,000 of MNIST at 16 x 16; 2,000 others are looked at."""
    parts = []
    for part, count in zip(mnist(), (10_000, 2_000), strict=True):
        wide = np.pad(part.x[:count].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))
        small = wide.reshape(-1, 16, 2, 16, 2).mean((2, 4))
        parts.append(Labelled(small.reshape(len(small), -1), part.y[:count]))
    train, seen = parts
    found = autoencoder(train.x[:6000], 4, seed, passes=60)
    case = Case(lambda key: ConvNetConfig((1, 8, 16, 16, 32), 10).make(key=key), "**", epochs=10)
    images = as_images(train, 16), as_images(seen, 16)
    return course(case, *images, flat(found), seeds, points=10), found


def as_images(rows: Labelled, size: int) -> Labelled:
    """Rows as images of one channel."""
    return Labelled(rows.x.reshape(-1, size, size, 1), rows.y)


def flat(found: Compressor) -> Callable:
    """The compressor, of images."""
    return lambda x: found.encode(x.reshape(len(x), -1))


def gaussian_claim(errors: Mapping[int, Sequence[float]]) -> Claim:
    """The estimator, without anything to compress."""
    worst = {width: max(map(abs, each)) for width, each in errors.items()}
    return Claim(
        "the estimate follows the information of Gaussians",
        "follows the true MI",
        f"at most {worst[1]:.3f} nats off in one dimension each, {worst[2]:.3f} in two",
        bool(max(worst.values()) <= EXACT),
        f"within {EXACT:g} nats at each of {', '.join(f'{nats:g}' for nats in KNOWN)} nats, of "
        f"{COUNT:,} pairs; one draw of each",
        seeds=1,
    )


def image_claims(curves: Mapping[str, Curve]) -> list[Claim]:
    """What is left of known information once images are compressed."""
    off = {kind: np.abs(c.learned - c.known).max() for kind, c in curves.items()}
    linear = {kind: np.abs(c.linear - c.known).max() for kind, c in curves.items()}
    bare = {kind: np.abs(c.parameters - c.known).max() for kind, c in curves.items()}
    lost = {kind: np.abs(c.learned - c.parameters).max() for kind, c in curves.items()}
    rises = {kind: bool((np.diff(c.learned) > 0).all()) for kind, c in curves.items()}
    told = lambda each: ", ".join(f"{kind} {value:.2f}" for kind, value in each.items())  # noqa: E731
    return [
        Claim(
            "compressed images tell the information that their makers share",
            "follows the true MI",
            f"most nats off: {told(off)}; of the parameters themselves {told(bare)}",
            bool(max(off.values()) <= NEAR) and all(rises.values()),
            f"rising with it and within {NEAR:g} nats at every known information of 0 to 10; one "
            "compressor and one draw of each",
            seeds=1,
        ),
        Claim(
            "what a learned compressor loses is small beside the estimator's own bias",
            "-",
            f"most nats between images and parameters: {told(lost)}",
            bool(max(lost.values()) <= LOST),
            f"within {LOST:g} nats of the estimate from the parameters, everywhere",
            seeds=1,
        ),
        Claim(
            "a curved manifold of images wants a compressor that bends",
            "autoencoder in place of PCA",
            f"most nats off by as many principal components: {told(linear)}, learned {told(off)}",
            all(bool(linear[kind] > off[kind]) for kind in curves),
            "principal components miss by more, of every kind of image",
            seeds=1,
        ),
    ]


def answer_claims(found: Courses, seeds: int) -> list[Claim]:
    """What the last hidden layer knows of the answer."""
    last = {name: each.y[:, :, -2] for name, each in found.items()}
    most = {name: each.y.max((0, 2)) for name, each in found.items()}  # by seed
    gain = {name: each[-1] - each[0] for name, each in last.items()}
    return [
        Claim(
            "no layer knows more of the answer than there is to know",
            "-",
            "; ".join(f"{name}: most {spread(each.tolist())} nats" for name, each in most.items())
            + f" of {math.log(10):.2f}",
            all(bool((each <= math.log(10) + SLACK).all()) for each in most.values()),
            f"at most {SLACK:g} nats above log 10, of all layers at every epoch measured",
            seeds=seeds,
        ),
        Claim(
            "learning teaches the last hidden layer the answer",
            "-",
            "; ".join(
                f"{name}: {spread(each[0].tolist())} to {spread(each[-1].tolist())} nats"
                for name, each in last.items()
            ),
            all(bool((each > 0).all()) for each in gain.values()),
            "higher at the end than at the first, with each seed",
            seeds=seeds,
        ),
    ]


def phase_claim(found: Courses, seeds: int) -> Claim:
    """How often a convolutional classifier fits and compresses."""
    told = {}
    for name, each in found.items():
        if name == DENSE:
            continue
        for layer, label in enumerate(each.layers):
            counts = [
                float(
                    len(
                        phases(each.x[:, member, layer], float(each.error[:, member, layer].mean()))
                    )
                )
                for member in range(each.x.shape[1])
            ]
            told[f"{name}, {label}"] = counts
    most = max(told, key=lambda label: min(told[label]))
    return Claim(
        "a convolutional classifier fits and compresses more than once",
        "more than one phase of each",
        f"rises and falls of I(X;T): most in {most}, {spread(told[most])}; of all "
        + "; ".join(f"{label} {spread(counts)}" for label, counts in told.items()),
        min(told[most]) >= 3,
        "some layer rises, falls and rises again, or falls, rises and falls again, with each seed, "
        "each time by at least a standard deviation of the estimate",
        seeds=seeds,
    )


def rows_of(
    errors: Mapping[int, Sequence[float]], curves: Mapping[str, Curve], found: Courses
) -> list[dict[str, Any]]:
    """Lines of the table, in nats."""
    rows: list[dict[str, Any]] = [
        {"case": f"Gaussians, {width} each", "known": nats, "estimate": nats + error}
        for width, each in errors.items()
        for nats, error in zip(KNOWN, each, strict=True)
    ]
    for kind, curve in curves.items():
        rows += [
            {"case": kind, "known": float(known), "estimate": float(learned)}
            | {"principal components": float(linear), "parameters": float(bare)}
            for known, learned, linear, bare in zip(*curve, strict=True)
        ]
    for name, each in found.items():
        rows += [
            {"case": name, "layer": label, "I(X;T) first": float(each.x[0, :, i].mean())}
            | {"most": float(each.x[:, :, i].max(0).mean())}
            | {"last": float(each.x[-1, :, i].mean()), "+-": float(each.error[-1, :, i].mean())}
            | {"I(T;Y) first": float(each.y[0, :, i].mean())}
            | {"I(T;Y) last": float(each.y[-1, :, i].mean())}
            | {"accuracy": float(each.accuracy[-1].mean())}
            for i, label in enumerate(each.layers)
        ]
    return rows


def curves_drawn(figure: Any, curves: Mapping[str, Curve]) -> None:
    """Estimates over known information."""
    figure.set_size_inches(4 * len(curves), 3.6)
    for axes, (kind, curve) in zip(
        figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
    ):
        axes.plot(curve.known, curve.known, color="0.6", linestyle="--", linewidth=1)
        for label in ("parameters", "learned", "linear"):
            axes.plot(curve.known, getattr(curve, label), "o-", markersize=3, label=label)
        axes.set_xlabel("known information, nats")
        axes.set_ylabel("estimate, nats")
        axes.set_title(kind, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)


def planes(figure: Any, found: Courses) -> None:
    """Each case: single runs thin, their mean thick; a dot where it ends."""
    figure.set_size_inches(4 * len(found), 3.6)
    for axes, (name, each) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        for layer, label in enumerate(each.layers):
            color = f"C{layer}"
            for member in range(each.x.shape[1]):
                axes.plot(
                    each.x[:, member, layer],
                    each.y[:, member, layer],
                    color=color,
                    linewidth=0.4,
                )
            mean = each.x[:, :, layer].mean(1), each.y[:, :, layer].mean(1)
            axes.plot(*mean, color=color, linewidth=1.5, label=label)
            axes.plot(mean[0][-1], mean[1][-1], "o", color=color, markersize=4)
        axes.axhline(math.log(10), color="0.6", linestyle="--", linewidth=1)
        axes.set_xlabel("I(X;T), nats")
        axes.set_ylabel("I(T;Y), nats")
        axes.set_title(name, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=6)
