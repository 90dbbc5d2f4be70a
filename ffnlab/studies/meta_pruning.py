"""Meta pruning: networks that a graph network has corrected, pruned beside others.

A metanetwork learns from four nets of digits to keep them good and to make their channels unequal,
and corrects nets that it never saw. Those are pruned by group norms to 2, 4, 8 and 16 times fewer
multiplications, beside the same nets without the correction: as they are, and trained on as long.
The full form also corrects real ResNets of CIFAR-10. There are no images of CIFAR here, so that
they are held against their own originals, on patches of photographs: no accuracy is claimed.
"""

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ffnlab.pruning.meta import layout_of
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES
from ffnlab.studies.meta_pruning_measure import (
    BATCH,
    CORRECTED,
    META,
    PLAIN,
    RATES,
    REG,
    SIDES,
    SIZES,
    SPEED_UPS,
    TRAINED,
    Meta,
    Point,
    data_of,
    left_of,
    meta_trained,
    networks,
    points,
    work_left,
)
from ffnlab.studies.meta_pruning_resnets import Pruned, pruned_resnets, resnets_are_there
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.side_by_side import spread
from ffnlab.studies.tried import at_ends
from ffnlab.testing import equal

__all__ = ["run"]

TAUGHT, HELD, EPOCHS, STEPS = 4, 3, 25, 300
GAIN, SLACK = 0.05, 0.005  # of accuracy, the card's
CHOSEN = "every net's rates of training on chosen on its validation rows, before and after pruning"


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    held, epochs = (1, EPOCHS // 2) if quick else (HELD, EPOCHS)
    data = data_of(seed)
    nets = networks(data, TAUGHT + held, seed)
    meta = meta_trained(nets[:TAUGHT], data, epochs, seed)
    found = points(nets[TAUGHT:], meta.network, data, STEPS, seed)
    real = pruned_resnets(seed) if not quick and resnets_are_there() else []
    return Result(
        slug="meta-pruning",
        title=STUDIES["meta-pruning"].title,
        settings={
            "data": "scikit-learn's digits, a fifth of the training rows for validation",
            "nets": f"{'-'.join(map(str, SIZES))}; {TAUGHT} to learn from, {held} held out",
            "metanetwork": f"{META.layers} rounds, width {META.width}, ratio {META.ratio}",
            "meta-training": f"{epochs} epochs, AdamW, mean cross-entropy + {REG} penalty",
            "training on": f"SGD, {STEPS} steps of {BATCH} before and after pruning, {2 * STEPS} "
            f"after it where none are before; rates {', '.join(map(str, RATES))}",
            "rates": rates_of(found),
            "parts": ["digits", *(["resnets"] if real else [])],
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[*digit_claims(nets[TAUGHT], meta, found), *resnet_claims(real)],
        table=[*rows_of(found), *(each.row() for each in real)],
        pictures={"speed_ups": lambda figure: curves(figure, found)},
    ).write(out)


Figures = Mapping[tuple[str, float], np.ndarray]  # (side, speed-up) -> of the nets, in their order


def figures(found: Sequence[Point], name: str) -> Figures:
    """One figure of all points, by side and speed-up."""
    values: dict[tuple[str, float], list[float]] = {}
    for point in sorted(found, key=lambda point: point.net):
        values.setdefault((point.side, point.speed_up), []).append(getattr(point, name))
    return {key: np.array(each) for key, each in values.items()}


def digit_claims(net, meta: Meta, found: Sequence[Point]) -> list[Claim]:
    """Claims about the nets of digits."""
    raw, tuned = figures(found, "raw"), figures(found, "tuned")
    return [
        exact_claim(net),
        learning_claim(meta),
        whole_claim(found),
        gain_claim(raw, PLAIN),
        gain_claim(raw, TRAINED),
        tuned_claim(tuned, PLAIN),
        tuned_claim(tuned, TRAINED),
        every_claim(raw, "raw", "before it is trained on again"),
        every_claim(tuned, "tuned", "after it is trained on again"),
        at_once_claim(found),
        cut_claim([point for point in found if (point.side, point.net) == (CORRECTED, 0)]),
    ]


def exact_claim(net) -> Claim:
    """Whether a net is what its graph says."""
    layout = layout_of(net)
    is_same = equal(layout.write(net, *layout.read(net)), net)
    return Claim(
        "a network comes back from its graph bit for bit",
        "a graph of neurons and weights",
        f"{layout.nodes} nodes and {layout.edges} edges, {'all' if is_same else 'not all'} bits",
        is_same,
        "a held-out net read as a graph and written back",
        seeds=0,
    )


def learning_claim(meta: Meta) -> Claim:
    """What meta-training does to the nets that it learns from."""
    data, penalty = ((meta.before[k], meta.after[k]) for k in ("data", "penalty"))
    return Claim(
        "the metanetwork makes channels unequal at a small loss",
        "prototype: cross-entropy .010 to .297, penalty 931 to 340 after 25 epochs",
        f"cross-entropy {data[0]:.3f} to {data[1]:.3f}, penalty {penalty[0]:.0f} to "
        f"{penalty[1]:.0f}",
        penalty[1] <= penalty[0] / 2 and data[1] <= 0.5,
        f"means over the {TAUGHT} nets that it learns from; half the penalty, for at most .5 nats",
        seeds=1,
    )


def whole_claim(found: Sequence[Point]) -> Claim:
    """Whether a corrected net that was never seen can be trained back."""
    at = figures(found, "whole")
    before, after = at[PLAIN, SPEED_UPS[0]], at[CORRECTED, SPEED_UPS[0]]
    return Claim(
        "a corrected net that it never saw is as good as before once it is trained on",
        "prototype: 97.3 % before, 97.7 % after",
        f"{spread(list(before))} before, {spread(list(after))} after",
        bool((after >= before - 0.01).all()),
        f"test accuracy at the rate chosen for {SPEED_UPS[0]:g} times; at most one point less, "
        "every held-out net",
        seeds=len(before),
    )


def gain_claim(raw: Figures, side: str) -> Claim:
    """Whether what is cut at 2 times hurts less."""
    ours, theirs = raw[CORRECTED, 2.0], raw[side, 2.0]
    return Claim(
        f"cut to half its work, a corrected net loses less than one {side}",
        "prototype: 92.3 % against 81.7 % of group norm",
        f"{spread(list(ours))} against {spread(list(theirs))}",
        bool((ours - theirs).mean() >= GAIN),
        f"test accuracy after pruning, without training after it; {GAIN:.0%} more in the mean over "
        f"held-out nets; {CHOSEN}",
        seeds=len(ours),
    )


def tuned_claim(tuned: Figures, side: str) -> Claim:
    """Whether what is left at 8 times is as good after training on."""
    ours, theirs = tuned[CORRECTED, 8.0], tuned[side, 8.0]
    return Claim(
        f"with an eighth of its work, trained on, it is no worse than one {side}",
        "prototype: 95.0 % against 94.1 % of group norm",
        f"{spread(list(ours))} against {spread(list(theirs))}",
        bool((ours - theirs).mean() >= -SLACK),
        f"test accuracy after training on; at most {SLACK:.1%} less in the mean over held-out "
        f"nets; {CHOSEN}",
        seeds=len(ours),
    )


def every_claim(values: Figures, name: str, when: str) -> Claim:
    """Whether it is ahead of both other sides wherever it was asked."""
    parts, holds = [], True
    for speed_up in SPEED_UPS:
        means = [values[side, speed_up].mean() for side in (CORRECTED, TRAINED, PLAIN)]
        parts.append(
            f"{speed_up:g} times: {means[0]:.3f} against {means[1]:.3f} and {means[2]:.3f}"
        )
        holds &= bool(means[0] >= max(means[1:]) - SLACK)
    count = len(values[CORRECTED, SPEED_UPS[0]])
    wide = max(float(np.ptp(each)) for each in values.values())
    spreads = f"; ranges of nets up to {wide:.3f}, 0 to {wide:.3f}" if count > 1 else ""
    paper = {
        "raw": "prototype: worse at 4 times (56 % against 65 %)",
        "tuned": "prototype: 97.7, 97.0, 95.0, 88.9 % against 97.8, 97.0, 94.1, 82.9 %",
    }[name]
    return Claim(
        f"it is no worse at any speed-up {when}",
        paper,
        "; ".join(parts) + spreads,
        holds,
        "means over held-out nets, of the corrected nets against those trained on and those pruned "
        f"as they are; at most {SLACK:.1%} less at every speed-up; {CHOSEN}",
        seeds=count,
    )


def at_once_claim(found: Sequence[Point]) -> Claim:
    """Whether the correction alone, without any training, helps."""
    once = figures(found, "at_once")
    ours, theirs = once[CORRECTED, 2.0], once[PLAIN, 2.0]
    return Claim(
        "the correction helps without any training on",
        "not claimed: the authors train on before they prune",
        f"{spread(list(ours))} against {spread(list(theirs))} at 2 times",
        bool(ours.mean() > theirs.mean()),
        "test accuracy of the corrected nets, pruned at once, against the nets pruned as they are",
        seeds=len(ours),
    )


def cut_claim(found: Sequence[Point]) -> Claim:
    """Whether the nets that are left are real."""
    cut = [(point, *left_of(point)) for point in found]
    far = max(error for *_, error in cut)
    least = min(work_left(point, small) / point.speed_up for point, small, _ in cut)
    return Claim(
        "what is left is a smaller network of the work that was asked for",
        "-",
        f"scores of nets that were cut, saved and loaded are within {far:.0e} of the masked ones'; "
        f"the speed-ups are at least {least:.3f} of those asked for",
        far <= 1e-4 and least >= 1,
        f"multiplications by the counter, all {len(cut)} speed-ups of a corrected held-out net",
        seeds=0,
    )


def resnet_claims(real: Sequence[Pruned]) -> list[Claim]:
    """Claims about the ResNets of CIFAR-10, where they were pruned."""
    return [claim for each in real for claim in each.claims()]


def rates_of(found: Sequence[Point]) -> str:
    """Whether other rates of training on might have been better still; 0 is none at all."""
    chosen = [rate for point in found for rate in point.rates if rate]
    return at_ends(chosen, RATES)


def rows_of(found: Sequence[Point]) -> list[dict[str, object]]:
    """Lines of the table: a side at a speed-up, means over nets."""
    rows = []
    for side in SIDES:
        for speed_up in SPEED_UPS:
            own = [p for p in found if (p.side, p.speed_up) == (side, speed_up)]
            mean: Callable[[str], float] = lambda name, own=own: float(  # noqa: E731
                np.mean([getattr(p, name) for p in own])
            )
            rows.append(
                {
                    "side": side,
                    "speed-up": speed_up,
                    "before": mean("whole"),
                    "pruned at once": mean("at_once"),
                    "raw": mean("raw"),
                    "trained on": mean("tuned"),
                    "rates": " ".join("/".join(f"{r:g}" for r in p.rates) for p in own),
                    "widths": " ".join("-".join(map(str, p.sizes)) for p in own),
                }
            )
    return rows


def curves(figure, found: Sequence[Point]) -> None:
    """Accuracy by speed-up, raw and after training on: means and ranges over nets."""
    figure.set_size_inches(8, 3.6)
    for axes, name, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("raw", "tuned"),
        ("pruned", "pruned and trained on"),
        strict=True,
    ):
        values = figures(found, name)
        for side, color in zip(SIDES, ("0.5", "C0", "C3"), strict=True):
            each = np.array([values[side, speed_up] for speed_up in SPEED_UPS])
            axes.plot(SPEED_UPS, each.mean(1), "o-", color=color, label=side, markersize=4)
            axes.fill_between(SPEED_UPS, each.min(1), each.max(1), color=color, alpha=0.15, lw=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(SPEED_UPS, [f"{s:g}" for s in SPEED_UPS])
        axes.set_xlabel("times fewer multiplications")
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("test accuracy")
    figure.axes[1].legend(frameon=False, fontsize=8, loc="lower left")
