"""Linear interpreters: what is left of a network where one input has decided for all its units.

Drawn networks of all kinds in float64, for exactness; perceptrons that learned digits, for votes of
pixels and the weight of constants; an autoencoder that takes noise off digits, for copies and
bases; the published ResNet-20 on patches of photographs, where its weights are there; and the small
language model that comes with ffnlab, for votes of bytes. Votes are held against what happens when
pixels and bytes are taken away.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ffnlab.analysis import interpret, votes
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.linear_interpreter_measure import (
    BATCH,
    LENGTH,
    NETS,
    NOISE,
    PIECEWISE,
    REMOVED,
    WIDTHS,
    Bytes,
    Exact,
    Patches,
    Voted,
    bases,
    bytes_of,
    classifiers,
    denoisers,
    exactness,
    member,
    photographs,
    resnet,
    voted,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]

EXACT = {"decoder": 1e-4}  # computes norms and patterns in float32, of whatever parameters
IN_FLOAT64 = 1e-10  # all others
SAME, OTHER = 1e-12, 1e-3
REBUILT = 1e-5  # of a logit
LEARNED = 0.95
EPOCHS, QUICK_EPOCHS = 60, 30
IMAGES = 24
CONTEXTS, QUICK_CONTEXTS = 96, 16


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    seeds = [seed] if quick else [seed, seed + 1, seed + 2]
    epochs = QUICK_EPOCHS if quick else EPOCHS
    exact = exactness(NETS[:-1] if quick else NETS, seed)
    nets, (x, y) = classifiers(seeds, epochs)
    found = [
        jax.device_get(voted(member(nets, i), x, y, jax.random.key(s))) for i, s in enumerate(seeds)
    ]
    noiseless, noisy = denoisers(seeds, epochs)
    seen = [
        [
            jax.device_get(bases(member(noiseless, i), image, jax.random.key(s)))
            for image in noisy[:8]
        ]
        for i, s in enumerate(seeds)
    ]
    images = photographs(IMAGES, seed)
    patches = None if quick else resnet(images, seed)
    read = bytes_of(QUICK_CONTEXTS if quick else CONTEXTS, seed)
    pictures = {
        "digits": lambda figure: digit_votes(figure, member(nets, 0), x),
        "bytes": lambda figure: byte_votes(figure, read),
        "bases": lambda figure: vectors(figure, seen[0][0][1]),
    }
    if patches is not None:
        pictures["photographs"] = lambda figure: patch_votes(figure, images, patches)
    return Result(
        slug="linear-interpreter",
        title=STUDIES["linear-interpreter"].title,
        settings={
            "exactness": f"drawn networks in float64: {', '.join(exact)}",
            "classifiers": f"MLP {list(WIDTHS)}, digits, Adam at 1e-3, batch {BATCH}",
            "denoisers": f"ConvAutoencoder of 32 channels, noise of {NOISE}, Adam at 3e-3",
            "photographs": f"{len(images)} patches of 32 x 32, ResNet-20 of CIFAR"
            if patches
            else "-",
            "language model": f"embedded_small, {len(read.named)} contexts of {LENGTH} bytes",
            "epochs": epochs,
            "seeds": seeds,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *exact_claims(exact),
            *vote_claims(found, patches),
            copy_claim([float(np.mean([around for around, _ in row])) for row in seen]),
            *byte_claims(read),
        ],
        table=rows_of(exact, found, seen, patches, read),
        pictures=pictures,
    ).write(out)


def exact_claims(exact: Mapping[str, Exact]) -> list[Claim]:
    """What an interpreter is, of every kind of network."""
    errors = {name: max(each[:3]) for name, each in exact.items()}
    same = {name: exact[name].jacobian for name in PIECEWISE}
    other = {name: each.jacobian for name, each in exact.items() if name not in PIECEWISE}
    return [
        Claim(
            "an interpreter is exact at its input, affine everywhere, and has a transpose",
            "exact at x = x0",
            "; ".join(f"{name} {value:.1e}" for name, value in errors.items()),
            all(error <= EXACT.get(name, IN_FLOAT64) for name, error in errors.items()),
            f"the largest of three errors of each drawn network at most {IN_FLOAT64:g} in float64, "
            "1e-4 of a decoder, which computes norms and patterns in float32; mixtures of inputs "
            "up to 100 times as large",
            seeds=1,
        ),
        Claim(
            "of a network that is linear by parts it is the Jacobian, of another one it is not",
            "-",
            "; ".join(f"{name} {value:.1e}" for name, value in (same | other).items()),
            max(same.values()) <= SAME and min(other.values()) >= OTHER,
            f"|F - J| / |J|: at most {SAME:g} of {', '.join(same)}, at least {OTHER:g} of others, "
            "where masks, norms, gates and patterns are frozen",
            seeds=1,
        ),
    ]


def vote_claims(found: Sequence[Voted], patches: Patches | None) -> list[Claim]:
    """What classifiers do with pixels and with their constants."""
    worst = max(v.rebuilt for v in found)
    shares, changed = ([getattr(v, name) for v in found] for name in ("share", "changed"))
    removed = {name: [v.removed[name] for v in found] for name in found[0].removed}
    rivals = [name for name in removed if name != "most votes"]
    real = "" if patches is None else f"; ResNet-20 on photographs {spread(patches.share)}"
    return [
        Claim(
            "votes of pixels and a constant are the logits",
            "a pixel-wise vote for each class",
            f"largest error {worst:.1e}; accuracy {spread([v.accuracy for v in found])}",
            worst <= REBUILT and min(v.accuracy for v in found) >= LEARNED,
            f"all logits of all test digits within {REBUILT:g}, float32, of networks that name at "
            f"least {LEARNED} of them, with each seed",
            seeds=len(found),
        ),
        Claim(
            "classifiers lean heavily on their constants",
            "heavily (no figure)",
            f"share of the constant in the named class's logit: digits {spread(shares)}{real}; "
            f"without it the class changes for {spread(changed)} of digits",
            min(shares) >= 0.5 and min(changed) >= 0.5,
            "|r| / (|r| + |votes|) at least a half on the mean of digits, and more than half of "
            "their classes changed without r, with each seed",
            seeds=len(found),
        ),
        Claim(
            "pixels with the most votes are those that the class depends on",
            "-",
            "class changes: " + ", ".join(f"{name} {spread(v)}" for name, v in removed.items()),
            all(
                best > other
                for rival in rivals
                for best, other in zip(removed["most votes"], removed[rival], strict=True)
            ),
            f"{REMOVED} of 64 pixels made black: those with the most votes for the class change it "
            "more often than the brightest and than any that are lit, with each seed",
            seeds=len(found),
        ),
    ]


def copy_claim(around: Sequence[float]) -> Claim:
    """What an image-to-image network does with its input."""
    return Claim(
        "an image-to-image network copies parts of its input from near",
        "outputs arise by copying and moving parts of the input, or from templates",
        f"{spread(around)} of the squares of a pixel's row lie on the 3 x 3 pixels around it",
        min(around) >= 0.5,
        "autoencoders without biases, so that no template is added, that take noise off digits: "
        f"at least half, where evenly spread rows would have {9 / 64:.2f}; eight noisy test "
        "images, with each seed. Bases are drawn, not judged",
        seeds=len(around),
    )


def byte_claims(read: Bytes) -> list[Claim]:
    """Which bytes vote for the next one."""
    drops = {name: float(np.mean(each)) for name, each in read.drops.items()}
    last = float(np.mean(read.votes.argmax(-1) == LENGTH - 1))
    return [
        Claim(
            "a whole language model is interpreted with its patterns and norms frozen",
            "-",
            f"largest error of a logit {read.rebuilt:.1e}; share of the constant "
            f"{read.share.mean():.2f}; the last byte has the most votes in {last:.2f} of contexts",
            read.rebuilt <= 1e-3,
            f"float32, {len(read.named)} held-out contexts, at most 1e-3",
            seeds=1,
        ),
        Claim(
            "the byte with the most votes is one that the prediction depends on",
            "-",
            "fall of its logit: " + ", ".join(f"{name} {drop:.2f}" for name, drop in drops.items()),
            drops["most votes"] > max(v for name, v in drops.items() if name != "most votes"),
            "mean over contexts where a space stands in the place of a byte: more for the one with "
            "the most votes than for the last and for one drawn",
            seeds=1,
        ),
    ]


def rows_of(
    exact: Mapping[str, Exact],
    found: Sequence[Voted],
    seen: Sequence[Sequence[tuple]],
    patches: Patches | None,
    read: Bytes,
) -> list[dict[str, Any]]:
    """Lines of the table."""
    exactly: list[dict[str, Any]] = [
        {"network": name} | {field: getattr(each, field) for field in Exact._fields}
        for name, each in exact.items()
    ]
    digits: list[dict[str, Any]] = [
        {"network": f"digits, member {i}", "accuracy": float(v.accuracy)}
        | {"constant": float(v.share), "accuracy without": float(v.without)}
        | {f"changed, {name}": float(value) for name, value in v.removed.items()}
        for i, v in enumerate(found)
    ]
    near: list[dict[str, Any]] = [
        {"network": f"denoiser, member {i}", "near": float(np.mean([around for around, _ in row]))}
        for i, row in enumerate(seen)
    ]
    constants = {"embedded_small": read.share}
    if patches is not None:
        constants["ResNet-20, photographs"] = patches.share
    real = ({"network": name, "constant": float(s.mean())} for name, s in constants.items())
    return [*exactly, *digits, *near, *real]


def shown(axes: Any, values: np.ndarray, title: str = "") -> None:
    """Votes as an image: red for, blue against."""
    most = max(float(np.abs(values).max()), 1e-12)
    axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most)
    axes.set_title(title, fontsize=8)


def plain(figure: Any, rows: int, columns: int) -> Any:
    """Axes without ticks."""
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.ravel():
        axes.set_xticks([])
        axes.set_yticks([])
    return grid


def digit_votes(figure: Any, net: Any, x: Any) -> None:
    """Test digits, and the votes of their pixels for the class that is named and for the next."""
    figure.set_size_inches(9, 4)
    grid = plain(figure, 3, 8)
    for j in range(8):
        at, order = interpret(net, x[j]), np.argsort(np.asarray(net(x[j])))[::-1]
        grid[0, j].imshow(np.asarray(x[j]).reshape(8, 8), cmap="gray")
        for i, label in enumerate(order[:2]):
            of = votes(at, int(label)).of
            shown(grid[i + 1, j], np.asarray(of).reshape(8, 8), f"votes for {label}")
    figure.suptitle("Digits, and votes of their pixels for the two likeliest classes")


def byte_votes(figure: Any, read: Bytes, rows: int = 12) -> None:
    """Contexts, and the votes of their bytes for the byte that is predicted."""
    figure.set_size_inches(11, 0.3 * rows + 1)
    axes = figure.subplots()
    parts = read.votes[:rows] / np.abs(read.votes[:rows]).max(-1, keepdims=True)
    axes.imshow(parts, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto")
    for i, context in enumerate(read.contexts[:rows]):
        for j, byte in enumerate(context):
            letter = chr(byte) if 32 < byte < 127 else {10: "¶"}.get(byte, "")
            axes.text(j, i, letter, ha="center", va="center", fontsize=7, family="monospace")
    names = [f"→ {bytes([byte])!r}"[3:] for byte in map(int, read.named[:rows])]
    axes.set_yticks(range(len(parts)), names, fontsize=7)
    axes.yaxis.tick_right()
    axes.set_xticks([])
    figure.suptitle("Votes of bytes for the next one (right): red for, blue against")


def vectors(figure: Any, leading: np.ndarray) -> None:
    """Leading right singular vectors."""
    figure.set_size_inches(9, 1.8)
    for i, axes in enumerate(plain(figure, 1, len(leading))[0]):
        shown(axes, leading[i], str(i + 1))
    figure.suptitle("What a denoiser passes on: leading singular vectors at one image")


def patch_votes(figure: Any, images: np.ndarray, patches: Patches, columns: int = 4) -> None:
    """Patches, the votes of their pixels, and the leading singular vectors at the first."""
    figure.set_size_inches(5, 4)
    columns = min(columns, len(images))
    grid = plain(figure, 3, columns)
    for j in range(columns):
        vector = patches.bases[j]
        grid[0, j].imshow(images[j])
        shown(grid[1, j], patches.votes[j].sum(-1), f"constant {patches.share[j]:.2f}")
        grid[2, j].imshow(0.5 + 0.5 * vector / np.abs(vector).max())
    figure.suptitle("Patches, votes of pixels, singular vectors at the first", fontsize=9)
