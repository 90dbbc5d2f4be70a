"""Path ensembles: which paths of a vision transformer and of a decoder their heads live on.

Vision transformers of six layers learn digits: their heads read all paths alike, all but the first
four, or weighed by vectors or by numbers that learn too, or short paths are taught by the whole.
Each side tries as many rates, chosen on validation rows by the first seed. Of the trained networks
every path is left out alone, and some by a greedy search; so of the embedded decoder. The paper
gives no figures in what was at hand: its words are what is tested.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ffnlab.data import TextBatches, stdlib_text
from ffnlab.pruning import PathMap, path_map
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies.digit_images import DIGITS, digit_images
from ffnlab.studies.path_ensemble_measure import (
    BATCH,
    DEEP,
    DEPTHS,
    DROPPED,
    FULL,
    LAYERS,
    LENGTH,
    PLAIN,
    PRUNED,
    QUICK,
    SCALAR,
    TAUGHT,
    VECTOR,
    WIDTH,
    Cut,
    Found,
    Text,
    compared,
    cut_of,
    frequencies,
    gap_of,
    of_text,
    right_at_exits,
    start_gap,
)
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread

__all__ = ["run"]


def named(layers: int) -> tuple[str, ...]:
    """What the paths of so many layers are called, as `models.paths.path_names` has it."""
    return ("start", *(f"{slot} {i}" for i in range(layers) for slot in ("attn", "ffn")))


CLOSE = 0.01  # of accuracy: the card's point
EXACT = 1e-5  # of scores, relative: float32
CASE, DEEP_CASE = f"{LAYERS} layers", f"{DEEP} layers"
NAMES = named(LAYERS)
LATE = tuple(NAMES.index(f"ffn {layer}") for layer in (LAYERS - 2, LAYERS - 1))
UNSAID = "no figures in the abstract"

Exits = Mapping[str, Float[np.ndarray, "n m"]]  # side -> accuracy by seed and depth


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin, sizes = time.perf_counter(), QUICK if quick else FULL
    data, text = digit_images(seed), stdlib_text()
    found = compared(sizes, data, seed)
    deep = compared(sizes, data, seed, DEEP) if sizes.deep else {}
    nets, weighed = found[PLAIN].models, found[VECTOR].models
    cuts = cut_of(nets, data)
    short = {
        side: np.stack([right_at_exits(net, data.test) for net in found[side].models])
        for side in (PLAIN, TAUGHT)
    }
    bands = frequencies(weighed, data.test)
    windows = (
        TextBatches(part, batch=rows, length=LENGTH, seed=seed)(0)
        for part, rows in ((text.train, sizes.calibration), (text.held_out, sizes.held_out))
    )
    read = of_text(*windows)
    every = tuned(found, deep)
    gaps = [gap_of(net, data.test.x) for net in nets]
    return Result(
        slug="path-ensemble",
        title=STUDIES["path-ensemble"].title,
        settings={
            "data": DIGITS,
            "network": f"ViT of width {WIDTH}, {LAYERS} layers, 16 patches, their mean",
            "optimizer": "AdamW, 20 steps of warm-up, then a constant rate",
            "batch": BATCH,
            "sizes": sizes._asdict(),
            "validation": tuning.trials(every),
            "text": text.identity,
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *exact_claims(gaps, start_gap(data.validation, range(seed, seed + sizes.seeds))),
            *cut_claims(cuts, found[PLAIN].tuned.scores),
            *learned_claims(every),
            *taught_claims(short),
            frequency_claim(bands),
            *text_claims(read),
        ],
        table=[*tuning.table(every), *path_rows(cuts, read)],
        pictures={
            "digits": lambda figure: digit_map(figure, cuts),
            "text": lambda figure: text_map(figure, read),
            "frequencies": lambda figure: spectrum(figure, bands),
        },
    ).write(out)


def tuned(found: Found, deep: Found) -> tuning.Found:
    """What the sides reached, as other studies have it."""
    cases = {CASE: found} | ({DEEP_CASE: deep} if deep else {})
    return {case: {side: one.tuned for side, one in runs.items()} for case, runs in cases.items()}


def exact_claims(gaps: Sequence[float], begun: float) -> list[Claim]:
    """What has to be so."""
    seeds = len(gaps)
    return [
        Claim(
            "a vision transformer is the sum of its paths",
            "exact (abstract)",
            f"scores differ by {max(gaps):.1g} of the largest (0 to {max(gaps):.1g})",
            max(gaps) <= EXACT,
            f"trained networks, all test rows, float32: at most {EXACT:g}",
            seeds=seeds,
        ),
        Claim(
            "with weights of 1 training begins where it begins without",
            "-",
            f"losses differ by at most {begun:.1g} (0 to {begun:.1g})",
            begun <= EXACT,
            f"cross-entropy of validation rows at step 0, by vectors, by numbers and without: at "
            f"most {EXACT:g} apart",
            seeds=seeds,
        ),
    ]


def cut_claims(cuts: Sequence[Cut], before: Sequence[float]) -> list[Claim]:
    """Trained networks without some paths, not trained again."""
    seeds = len(cuts)
    worst = [int(np.nanargmin(cut.chosen.deltas)) for cut in cuts]
    moved = [float(cut.tested[j]) for cut, j in zip(cuts, worst, strict=True)]
    tested = np.stack([cut.tested for cut in cuts])
    most = int(tested.mean(0).argmax())
    gone = [np.flatnonzero(cut.chosen.step >= 0) for cut in cuts]
    depth = [float(g.mean()) for g in gone]
    after = [cut.after - b for cut, b in zip(cuts, before, strict=True)]
    return [
        Claim(
            "some paths hurt the classifier",
            f"some paths lower accuracy; {UNSAID}",
            f"without {', '.join(NAMES[j] for j in worst)} the test loss moves by {spread(moved)}",
            float(np.mean(moved)) < 0,
            "of each trained network the path without which the validation loss is least, left out "
            "of what the head reads: the mean change of the test loss is below 0",
            seeds=seeds,
        ),
        Claim(
            "the last FFN paths matter most",
            "the card's expectation",
            f"without {NAMES[most]} the test loss grows by {spread(tested[:, most].tolist())}",
            most in LATE,
            f"the path with the largest mean delta is one of {', '.join(NAMES[j] for j in LATE)}",
            seeds=seeds,
        ),
        Claim(
            "short paths are those that the classifier can do without",
            f"lets short paths focus on supplying features; {UNSAID}",
            f"mean number of those left out {spread(depth)}: "
            + "; ".join(", ".join(NAMES[j] for j in g) for g in gone),
            float(np.mean(depth)) < (len(NAMES) - 1) / 2,
            f"{len(gone[0])} of {len(NAMES)} paths by greedy search on validation rows; their mean "
            f"number is below {(len(NAMES) - 1) / 2:g}, that of all",
            seeds=seeds,
        ),
        Claim(
            "leaving paths out of a trained network costs no accuracy",
            f"pruning helps; {UNSAID}",
            f"accuracy moves by {spread(after)}",
            float(np.mean(after)) >= 0,
            f"the {len(gone[0])} paths of the greedy search, test rows, not trained again: at "
            "least 0 on the mean",
            seeds=seeds,
        ),
    ]


def learned_claims(every: tuning.Found) -> list[Claim]:
    """Trained so from the start."""
    plain = every[CASE][PLAIN].mean
    gains = {side: one.mean - plain for side, one in every[CASE].items() if side != PLAIN}
    only = {CASE: every[CASE]}

    def close(side: str, text: str, paper: str) -> Claim:
        rule = f"mean over seeds at most {CLOSE} below all paths alike; it is {gains[side]:+.4f}"
        holds = gains[side] >= -CLOSE - 1e-9
        return tuning.tuned_claim(text, paper, rule, holds, only, PLAIN, side)

    left = ", ".join(NAMES[j] for j in DROPPED)
    claims = [
        close(PRUNED, f"a network learns as well without {left} at its head", UNSAID),
        close(VECTOR, "a network whose paths are weighed by vectors learns as well", UNSAID),
        close(SCALAR, "a network whose paths are weighed by numbers learns as well", "ablation"),
        close(TAUGHT, "a network that teaches its short paths learns as well", UNSAID),
        tuning.tuned_claim(
            "pruning, weights of paths and distillation each help",
            f"each helps; {UNSAID}",
            "mean over seeds above all paths alike, of each of the three: "
            + ", ".join(f"{side} {gains[side]:+.4f}" for side in (PRUNED, VECTOR, TAUGHT)),
            min(gains[side] for side in (PRUNED, VECTOR, TAUGHT)) > 0,
            only,
            PLAIN,
            PRUNED,
            VECTOR,
            TAUGHT,
        ),
    ]
    if DEEP_CASE in every:
        deep = every[DEEP_CASE]
        gain = deep[VECTOR].mean - deep[PLAIN].mean
        claims.append(
            tuning.tuned_claim(
                "deeper networks learn better with weights of paths",
                f"deeper ViTs trainable; {UNSAID}",
                f"of {DEEP} layers, mean over seeds by {gain:+.4f} above all paths alike: above 0",
                gain > 0,
                {DEEP_CASE: deep},
                PLAIN,
                VECTOR,
            )
        )
    return claims


def taught_claims(short: Exits) -> list[Claim]:
    """Short paths, with and without a teacher."""
    return [
        Claim(
            f"taught paths through {depth} layers classify better",
            f"long paths teach short ones; {UNSAID}",
            f"accuracy {spread(short[TAUGHT][:, i].tolist())}, untaught "
            f"{spread(short[PLAIN][:, i].tolist())}",
            bool(short[TAUGHT][:, i].mean() >= short[PLAIN][:, i].mean()),
            "test rows, by the norm and the head of the whole; mean over seeds at least that of "
            "networks trained without distillation, each at its own best rate",
            seeds=len(short[PLAIN]),
        )
        for i, depth in enumerate(DEPTHS)
    ]


def frequency_claim(bands: Float[np.ndarray, "n 2 f"]) -> Claim:
    """What weights do to token maps."""
    moved = bands[:, 1, -1] - bands[:, 0, -1]
    return Claim(
        "weighing its paths is a high-pass filter",
        f"acts as a high-pass filter; {UNSAID}",
        f"log amplitude at the highest frequency less that at 0 moves by {spread(moved.tolist())}",
        bool(moved.mean() > 0),
        "token maps before the last norm, trained by vectors: weighed against the plain sum of the "
        "same components, mean over test images and channels; above 0, mean over seeds",
        seeds=len(bands),
    )


def text_claims(read: Text) -> list[Claim]:
    """The embedded decoder."""
    names = in_bits(read).names
    worst = int(np.nanargmin(read.chosen.deltas))
    moved = read.tested.deltas[worst] / np.log(2)
    gone = [names[j] for j in np.argsort(read.chosen.step) if read.chosen.step[j] >= 0]
    return [
        Claim(
            "some paths hurt a language model's head",
            "- (vision transformers)",
            f"without {names[worst]} held-out bits per byte move by {moved:+.5f}",
            bool(moved < 0),
            "embedded decoder: the path without which training text costs least, held-out text "
            "without it: below 0",
            seeds=1,
        ),
        Claim(
            "a language model's head can do without some paths, not trained again",
            "-",
            f"bits per byte without 0, 1, … of {', '.join(gone)}: "
            + ", ".join(f"{bits:.4f}" for bits in read.bits),
            read.bits[-1] <= read.bits[0],
            f"{len(gone)} paths by greedy search on training text; held-out text costs no more",
            seeds=1,
        ),
    ]


def in_bits(read: Text) -> PathMap:
    """The map of the embedded decoder on held-out text, in bits per byte."""
    layers = (len(read.tested.step) - 1) // 2
    names = named(layers)
    found = path_map(read.tested, names)
    bits = found.deltas / np.log(2)
    return PathMap(names, bits, read.chosen.step, found.loss / np.log(2))


def path_rows(cuts: Sequence[Cut], read: Text) -> list[dict[str, object]]:
    """A row for each path: what the loss grows by without it."""
    deltas = np.stack([cut.tested for cut in cuts])
    return [
        {
            "case": "digits, nats without a path",
            "side": name,
            "delta": float(deltas[:, j].mean()),
            "lowest": float(deltas[:, j].min()),
            "highest": float(deltas[:, j].max()),
        }
        for j, name in enumerate(NAMES)
    ] + [
        {"case": "text, bits per byte without a path", "side": name, "delta": float(delta)}
        for name, delta in zip(in_bits(read).names, in_bits(read).deltas, strict=True)
    ]


def digit_map(figure: Any, cuts: Sequence[Cut]) -> None:
    """Mean deltas on test rows; points are the seeds, hollow what most searches leave out."""
    deltas = np.stack([cut.tested for cut in cuts])
    often = np.mean([cut.chosen.step >= 0 for cut in cuts], axis=0) > 0.5
    loss = float(np.mean([cut.loss for cut in cuts]))
    PathMap(NAMES, deltas.mean(0), np.where(often, 0, -1), loss).draw(figure)
    for row in deltas:
        figure.axes[0].plot(range(len(NAMES)), row, ".", color="0.2", markersize=4)
    figure.axes[0].set_title("digits: test loss without a path", fontsize=10)


def text_map(figure: Any, read: Text) -> None:
    """Deltas of the embedded decoder; hollow what the search on training text leaves out."""
    in_bits(read).draw(figure)
    figure.axes[0].set_title("embedded decoder: held-out bits per byte without a path", fontsize=10)


def spectrum(figure: Any, bands: Float[np.ndarray, "n 2 f"]) -> None:
    """Log amplitudes by frequency, before and after weighing, and what that changes, by seed."""
    figure.set_size_inches(8, 3.4)
    left, right = figure.subplots(1, 2)
    places = np.linspace(0, 1, bands.shape[2])
    for i, name in enumerate(("all alike", "weighed")):
        left.plot(places, bands[:, i].mean(0), color=f"C{i}", marker="o", label=name)
    left.set_ylabel("log amplitude, less that of frequency 0")
    left.legend(frameon=False)
    right.plot(places, (bands[:, 1] - bands[:, 0]).T, color="0.6", marker=".")
    right.plot(places, (bands[:, 1] - bands[:, 0]).mean(0), color="C1", linewidth=2)
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set_ylabel("weighed, less all alike")
    for axes in (left, right):
        axes.set_xlabel("frequency along both axes, of the highest")
        axes.spines[["top", "right"]].set_visible(False)
