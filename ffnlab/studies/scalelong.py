"""ScaleLong: what scaled long skips do to a U-ViT, from its first step to the images it draws.

U-ViTs that find noise in digits have their skips as they are, or scaled in four ways. As they are
drawn, noise is added to their images and their gradients are looked at, of 12 and of 64 blocks.
Then all are trained, each at the best of the same rates by validation images with the first seed:
how far they come, how soon and how steadily, what noise does to them after, and what they draw. One
that is trained for longer draws a grid; the quick form trains no other.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.digit_images import DIGITS, digit_images
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.scalelong_measure import (
    BATCH,
    COUNTS,
    FULL,
    HIDDEN,
    KAPPA,
    QUICK,
    WAYS,
    WIDTH,
    Run,
    Start,
    compared,
    distances,
    frechet,
    gains,
    longer,
    starts,
    steps_to,
)
from ffnlab.studies.tuning import Splits

__all__ = ["run"]

PLAIN, CONSTANT, LEARNED = (WAYS[i] for i in (0, 2, 3))
DIGITS_DRAWN, PIXELS = "digits", "pixels"  # what drawn images are held against
CLOSE = 0.015  # of the mean squared error of noise: what counts as no worse
FASTER = 1.5  # the paper's figure
EXACT = 1e-6  # of a gain, relative
SHOWN, GRID = 14, (4, 12)  # images in a row; rows and columns

Drawn = Mapping[int, Mapping[str, Start]]  # blocks -> way -> what it is at its start
Found = Mapping[str, Run]  # way -> what it reached
Distances = Mapping[str, Sequence[float]]


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin, sizes = time.perf_counter(), QUICK if quick else FULL
    data = Splits(*(part.x for part in digit_images(seed)))
    linear = {count: gains(count) for count in COUNTS}
    seeds = range(seed, seed + sizes.seeds)
    begun = {d: starts(sizes.ways, d, seeds, data.train[:BATCH]) for d in sizes.depths}
    found = compared(sizes, data, seed) if sizes.rates else {}
    far = distances(found, data, seed) if found else {}
    images = longer(sizes, data, seed)
    pictures = {
        "gradients": lambda figure: blocks(figure, begun[sizes.depths[-1]]),
        "grid": lambda figure: grid(figure, images),
    }
    if found:
        pictures |= {
            "training": lambda figure: curves(figure, found, sizes.every),
            "samples": lambda figure: samples(figure, found, data),
        }
    return Result(
        slug="scalelong",
        title=STUDIES["scalelong"].title,
        settings={
            "data": DIGITS,
            "network": f"U-ViT, width {WIDTH}, FFNs of {HIDDEN}, patches of 2 x 2",
            "kappa": KAPPA,
            "optimizer": "AdamW, decay 0.03, 30 steps of warm-up, then a constant rate; mean of "
            "the weights at looks in the second half",
            "batch": BATCH,
            "sizes": sizes._asdict(),
            "validation": tuning.trials(tuned(found)) if found else {},
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            linear_claim(linear),
            *start_claims(begun),
            *(learning_claims(found, sizes.every) if found else []),
            *(after_claims(found, far) if found else []),
        ],
        table=[
            *start_rows(begun),
            *rows(found, far, sizes.every),
            {"case": f"trained for {sizes.longer} steps", "way": CONSTANT}
            | {"distance": frechet(images, data.test)},
        ],
        pictures=pictures,
    ).write(out)


def tuned(found: Found) -> tuning.Found:
    """What the rates reached, as other studies have it."""
    return {"digits": {way: one.tuned for way, one in found.items()}}


def scaled(found: Mapping[str, Any]) -> list[str]:
    """The ways that scale."""
    return [way for way in WAYS[1:] if way in found]


def said(values: Sequence[float] | Float[np.ndarray, "n"]) -> str:
    """One value, or a mean with its range."""
    mean = f"{np.mean(values):.3g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3g} to {max(values):.3g})"


def each(values: Mapping[str, Sequence[float] | Float[np.ndarray, "n"]]) -> str:
    """Values by way in words."""
    return ", ".join(f"{way} {said(value)}" for way, value in values.items())


def linear_claim(found: Mapping[int, Mapping[str, float]]) -> Claim:
    """Networks that add their skips, all of the input: y = x + sum of kappa_j x."""
    limit = 1 + 1 / (1 - KAPPA)
    wanted = {n: {PLAIN: 1 + n, CONSTANT: 1 + (1 - KAPPA**n) / (1 - KAPPA)} for n in found}
    off = max(abs(found[n][way] / wanted[n][way] - 1) for n in found for way in wanted[n])
    most = max(gains[CONSTANT] for gains in found.values())
    return Claim(
        "constant factors keep a linear network's response below a limit at any depth; without "
        "them it grows with every skip",
        "bounds by sums of the factors: of powers of kappa at most 1 / (1 - kappa)",
        ", ".join(f"{n} skips: {g[PLAIN]:g} and {g[CONSTANT]:.4f}" for n, g in found.items()),
        off <= EXACT and most <= limit * (1 + EXACT),
        f"dy/dx = 1 + N as they are, 1 + (1 - kappa^N) / (1 - kappa) with kappa {KAPPA}, within "
        f"{EXACT:g}; at most {limit:.4f}",
        seeds=0,
    )


MEASURES: Mapping[str, Callable[[Start], Any]] = {  # -> values by seed [n]
    "stream": lambda start: start.response.stream,
    "output": lambda start: start.response.output,
    "gradients": lambda start: start.gradients.max(-1) / start.gradients.min(-1),
}


def start_claims(found: Drawn) -> list[Claim]:
    """Networks as they are drawn."""
    seeds = len(next(iter(found.values()))[PLAIN].gradients)
    figures = {
        name: {depth: {way: of(one) for way, one in ways.items()} for depth, ways in found.items()}
        for name, of in MEASURES.items()
    }

    def claim(name: str, text: str, paper: str, what: str) -> Claim:
        by_depth = figures[name]
        holds = all((v[way] < v[PLAIN]).all() for v in by_depth.values() for way in scaled(v))
        return Claim(
            text,
            paper,
            "; ".join(f"{depth} blocks: {each(ways)}" for depth, ways in by_depth.items()),
            holds,
            f"{what}; below original's of every way, depth and seed; kappa {KAPPA}",
            seeds=seeds,
        )

    response = "noise of size .01 in noised digits: root mean square of the change over the noise's"
    return [
        claim(
            "stream",
            "at its start a scaled network's stream responds less to noise in the images",
            "robust to perturbed inputs: a bound by the sum of kappa_i M^i",
            f"{response}, of the stream before the last norm",
        ),
        claim(
            "output",
            "at its start a scaled network's output responds less to noise in the images",
            "robust to perturbed inputs: a bound by the sum of kappa_i M^i",
            f"{response}, of the noise that is predicted",
        ),
        claim(
            "gradients",
            "at its start a scaled network's gradients are more even from block to block",
            "gradients bounded by the sum of kappa_i^2",
            "largest norm of a block's gradient over the smallest, of the loss of 32 digits",
        ),
    ]


def speeds(found: Found, way: str, every: int) -> list[float]:
    """How many times as soon a way comes to the least error that the unscaled one comes to.

    By seed; 0 where it never does.
    """
    pairs = zip(found[PLAIN].curves, found[way].curves, strict=True)
    return [
        steps_to(plain, every, plain.min()) / steps_to(curve, every, plain.min())
        for plain, curve in pairs
    ]


def wobble(streams: Float[np.ndarray, "n k"]) -> Float[np.ndarray, "n"]:
    """How much the size of a stream changes from look to look, relative, in the second half."""
    later = np.log(streams[:, streams.shape[1] // 2 :])
    return np.abs(np.diff(later, axis=1)).mean(1)


def learning_claims(found: Found, every: int) -> list[Claim]:
    """What is learned in as many steps, how soon, and how steadily."""
    as_found, ways = tuned(found), scaled(found)
    plain = found[PLAIN].tuned.mean
    far = max(found[way].tuned.mean - plain for way in ways)
    paper = [way for way in (CONSTANT, LEARNED) if way in found]
    faster = {way: speeds(found, way, every) for way in ways}
    moves = {way: wobble(one.streams) for way, one in found.items()}
    seeds = len(found[PLAIN].tuned.seeds)
    steps = every * found[PLAIN].curves.shape[1]
    rates = ", ".join(f"{way} {one.tuned.setting['rate']:g}" for way, one in found.items())
    return [
        tuning.tuned_claim(
            "scaled networks learn to find noise as well",
            "FID no worse on four data sets; tables not available",
            f"mean squared error of test images after {steps} steps, the mean over seeds at most "
            f"{CLOSE} above original's for every way",
            far <= CLOSE,
            as_found,
            PLAIN,
            *ways,
        ),
        Claim(
            "scaled networks learn 1.5 times as fast",
            "about 1.5 times, U-ViT and UNet on four data sets",
            f"{each(faster)} times",
            all(np.mean(faster[way]) >= FASTER for way in paper),
            f"steps until the least test error that original comes to in {steps}, looked at every "
            f"{every} on fixed noise, weights as they are, over the steps of each (0: never); "
            f"mean over seeds at least {FASTER} for {' and '.join(paper)}; rates {rates}",
            seeds=seeds,
        ),
        Claim(
            "the streams of scaled networks change less from step to step while they learn",
            "hidden features oscillate less, in figures",
            each(moves),
            all(moves[way].mean() < moves[PLAIN].mean() for way in ways),
            f"mean change of the logarithm of the stream's size in {every} steps, second half of "
            f"{steps}; mean over seeds below original's for every way; rates {rates}",
            seeds=seeds,
        ),
    ]


def after_claims(found: Found, far: Distances) -> list[Claim]:
    """Trained networks: noise, and what they draw."""
    ways, seeds = scaled(found), len(found[PLAIN].tuned.seeds)
    response = {way: one.response.output for way, one in found.items()}
    drawn = {way: far[way] for way in found}
    (pixels,), (digits,) = far[PIXELS], far[DIGITS_DRAWN]
    how = "Frechet distance to test digits of normal distributions of the pixels"
    return [
        Claim(
            "a trained scaled network's output responds less to noise in the images",
            "robust to perturbed inputs, in figures",
            each(response),
            all(response[way].mean() < response[PLAIN].mean() for way in ways),
            "noise of size .01 in noised test digits: root mean square of the change over the "
            "noise's; mean over seeds below original's for every way",
            seeds=seeds,
        ),
        Claim(
            "trained networks draw images that are nearer to digits than pixels drawn alone",
            "-",
            f"{each(drawn)}; pixels {pixels:.3g}, training digits {digits:.3g}",
            max(max(values) for values in drawn.values()) < pixels,
            f"{how}; all below that of independent pixels with the digits' means and deviations",
            seeds=seeds,
        ),
        Claim(
            "scaled networks draw better images",
            "better FID, tables not available",
            each(drawn),
            all(np.mean(drawn[way]) < np.mean(drawn[PLAIN]) for way in ways),
            f"{how}; mean over seeds below original's for every way",
            seeds=seeds,
        ),
    ]


def start_rows(found: Drawn) -> list[dict[str, object]]:
    """A row for each network as it is drawn: means over seeds."""
    return [
        {"case": f"drawn, {depth} blocks", "way": way}
        | {name: float(of(one).mean()) for name, of in MEASURES.items()}
        for depth, ways in found.items()
        for way, one in ways.items()
    ]


def rows(found: Found, far: Distances, every: int) -> list[dict[str, object]]:
    """A row for each way of training: means over seeds."""
    return [
        {
            "case": "trained",
            "way": way,
            "parameters": one.tuned.parameters,
            "rate": one.tuned.setting["rate"],
            "error": one.tuned.mean,
            "lowest": min(one.tuned.scores),
            "highest": max(one.tuned.scores),
            "speed": float(np.mean(speeds(found, way, every))),
            "output": float(one.response.output.mean()),
            "stream": float(one.response.stream.mean()),
            "distance": float(np.mean(far[way])),
        }
        for way, one in found.items()
    ]


def blocks(figure: Any, found: Mapping[str, Start]) -> None:
    """Norms of gradients by block, of drawn networks; geometric means over seeds."""
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for way, one in found.items():
        axes.semilogy(np.exp(np.log(one.gradients).mean(0)), label=way)
    axes.set_xlabel("block")
    axes.set_ylabel("norm of the gradient")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def curves(figure: Any, found: Found, every: int) -> None:
    """Test errors while networks are trained; means over seeds."""
    figure.set_size_inches(6, 4)
    axes = figure.subplots()
    for way, one in found.items():
        steps = every * np.arange(1, one.curves.shape[1] + 1)
        rate = one.tuned.setting["rate"]
        axes.plot(steps, one.curves.mean(0), label=f"{way}, rate {rate:g}")
    axes.set_xlabel("steps")
    axes.set_ylabel("mean squared error of the noise, test digits")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def grid(figure: Any, images: Float[np.ndarray, "n h w c"]) -> None:
    """What the network draws that was trained longer."""
    figure.set_size_inches(6, 2.2)
    axes = figure.subplots()
    rows, columns = GRID
    padded = np.pad(images[: rows * columns, :, :, 0], ((0, 0), (1, 1), (1, 1)))
    tiles = padded.reshape(rows, columns, *padded.shape[1:]).swapaxes(1, 2)
    axes.imshow(tiles.reshape(rows * padded.shape[1], -1), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def samples(figure: Any, found: Found, data: Splits) -> None:
    """Test digits, and below what the first network of each way draws."""
    shown = {"test digits": data.test} | {way: one.samples[0] for way, one in found.items()}
    figure.set_size_inches(8, 0.6 * len(shown))
    for axes, (name, images) in zip(figure.subplots(len(shown), 1), shown.items(), strict=True):
        gap = np.pad(images[:SHOWN, :, :, 0], ((0, 0), (0, 0), (1, 1)))
        axes.imshow(np.concatenate(list(gap), axis=1), cmap="gray_r", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[])
        axes.set_ylabel(name, rotation=0, ha="right", va="center")
        axes.spines[:].set_visible(False)
