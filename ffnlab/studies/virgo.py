"""Starts of graph networks that look at the graph, beside those that look at widths alone.

Signals and gradients of eight layers at the start, on a random graph; a race of eight layers on
block models; in the full form every start at its own best rate, and Cora at four depths. Starts,
rates and seeds are members of one program.

Why virgofor lets signals of centred features grow: its probe is a mean feature of any sign, most of
which a hop averages away (norms fall to .51, .65, .74 … of themselves, on ten such graphs), while
what follows a ReLU is not negative and keeps more (.62, .84, .92 …); weights make up for what the
probe loses. By the graph's seed the ratio of layer 7 to layer 1 is 1.6 to 7.
"""

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ffnlab.data import cora, find_folder
from ffnlab.graph import with_self_loops
from ffnlab.graphs import STARTS, Signals
from ffnlab.models import GraphNetworkConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies import virgo_measure as measure
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Tuned
from ffnlab.studies.virgo_measure import FEATURES, Budget, Raced

__all__ = ["run"]

OURS, USUAL = "virgo", ("xavier", "kaifor", "kaiback")
SBM, CORA = "block models", "cora"
WHOLE, HALF, GAT = "GraphSAGE", "GraphSAGE, halved", "GAT"
Measured = Mapping[str, Signals]  # features -> [starts, seeds, layers]
Races = Mapping[str, Mapping[str, Raced]]  # case -> start -> what it reached


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      seeds: of graphs and weights.
      starts: that race.
      blocks, cora: budgets.
      depths: of networks on Cora; none in the quick form.
    """

    seeds: Sequence[int]
    starts: Sequence[str]
    blocks: Budget
    cora: Budget
    depths: tuple[int, ...]


def sizes_of(seed: int, quick: bool) -> Sizes:
    """Of either form; the first rate is the card's."""
    seeds = range(seed, seed + 5)
    if quick:
        short = Budget((1e-3,), 100, 10, 50)
        return Sizes(seeds, ("virgo", "virgofor", "xavier", "kaifor"), short, short, ())
    blocks = Budget((1e-3, 3e-3, 1e-2), 100, 10, 50)
    of_cora = Budget((3e-3, 1e-2), 100, 5, 10)
    return Sizes(seeds, tuple(STARTS), blocks, of_cora, (2, 4, 8, 16))


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = sizes_of(seed, quick)
    starts = tuple(STARTS)
    seen = {kind: measure.signals(starts, kind, sizes.seeds) for kind in FEATURES}
    others = {} if quick else of_other_layers(sizes.seeds)
    races = {SBM: on_blocks(sizes)}
    if sizes.depths and find_folder("planetoid_cora") is not None:
        races |= on_cora(sizes)
    found = {
        case: {name: one.tuned for name, one in sides.items()} for case, sides in races.items()
    }
    pictures = {"signals_by_layer": lambda figure: draw_signals(figure, seen)}
    if len(races) > 1:
        pictures["accuracy_by_depth"] = lambda figure: draw_depths(figure, found, sizes)
    return Result(
        slug="virgo",
        title=STUDIES["virgo"].title,
        settings={
            "signals": "8 GCN layers of 128 on 400 nodes of mean degree 4, 64 features, 5 classes",
            "block models": dict(measure.BLOCKS) | measure.PARTS,
            "network on block models": "8 GCN layers of 64",
            "budget of block models": sizes.blocks._asdict(),
            "budget of cora": sizes.cora._asdict(),
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *signal_claims(seen, len(sizes.seeds)),
            *([halved_claim(others)] if others else []),
            race_claim(races[SBM]),
            *([tuned_claim(found), depth_claim(found, sizes)] if len(races) > 1 else []),
        ],
        table=[*signal_rows(seen), *other_rows(others), *race_rows(races)],
        pictures=pictures,
    ).write(out)


def of_other_layers(seeds: Sequence[int]) -> dict[str, Signals]:
    """Signals of other layers from our start, of features that are not negative."""
    look = functools.partial(measure.signals, (OURS,), FEATURES[0], seeds)
    return {
        WHOLE: look(layer="sage"),
        HALF: look(layer="sage", halved=True),
        GAT: look(layer="gat"),
    }


def on_blocks(sizes: Sizes) -> dict[str, Raced]:
    """The race on block models: another graph for each seed."""
    graphs = measure.block_graphs(sizes.seeds)
    config = GraphNetworkConfig((measure.BLOCKS["width"], *[64] * 7, measure.BLOCKS["classes"]))
    return measure.raced(sizes.starts, config, graphs, sizes.seeds, sizes.blocks)


def on_cora(sizes: Sizes) -> dict[str, dict[str, Raced]]:
    """Cora at every depth: other weights for each of three seeds."""
    nodes, seeds = cora(), sizes.seeds[:3]
    nodes = nodes._replace(graph=with_self_loops(nodes.graph))
    classes, starts = int(nodes.y.max()) + 1, ("virgo", "virgofor", "xavier", "kaifor")
    return {
        at_depth(depth): measure.raced(
            starts,
            GraphNetworkConfig((nodes.x.shape[1], *[64] * (depth - 1), classes)),
            [nodes] * len(seeds),
            seeds,
            sizes.cora,
        )
        for depth in sizes.depths
    }


def at_depth(depth: int) -> str:
    """A case of Cora."""
    return f"{CORA}, {depth} layers"


def ratios(seen: Measured, start: str, side: str) -> dict[str, np.ndarray]:
    """By features, of each seed: the hidden layer far from where a signal comes, over the near one.

    Args:
      side: "forward", the last hidden layer over the first, or "backward", the first over the last.
    """
    at = list(STARTS).index(start)
    far, near = (-2, 0) if side == "forward" else (0, -2)
    return {
        kind: getattr(found, side)[at, :, far] / getattr(found, side)[at, :, near]
        for kind, found in seen.items()
    }


def mean(values: np.ndarray) -> float:
    """Over seeds, of ratios: what their logarithms have in the middle."""
    return float(np.exp(np.mean(np.log(values))))


def off(value: float) -> float:
    """How many times a ratio is above or below 1."""
    return max(value, 1 / value)


def signal_claims(seen: Measured, seeds: int) -> list[Claim]:
    """What keeps its size."""
    forward, backward = (
        {start: ratios(seen, start, side) for start in STARTS} for side in ("forward", "backward")
    )

    def said(found: Mapping[str, Mapping[str, np.ndarray]], *names: str) -> str:
        each = (
            f"{name} {mean(v):.3g} ({v.min():.2g} to {v.max():.2g}), {kind}"
            for name in names
            for kind, v in found[name].items()
        )
        return "; ".join(each)

    kept = all(0.3 <= mean(v) <= 3 for v in forward["virgofor"].values())
    lost = all(mean(v) < 0.05 for v in forward["xavier"].values())
    nearer = [
        off(mean(backward["xavier"][kind])) / off(mean(backward[OURS][kind])) for kind in seen
    ]
    steadier = [
        off(mean(side[OURS][kind])) <= min(off(mean(side[name][kind])) for name in USUAL)
        for side in (forward, backward)
        for kind in seen
    ]
    what = "mean squares before ReLU of layer 7 over layer 1"
    how = f"geometric mean over {seeds} draws of weights on one graph, features of both kinds"
    return [
        Claim(
            "the forward start keeps signals of one size, Xavier's loses them",
            "card: virgofor .46 and 1.65, Xavier .010 and .007",
            said(forward, "virgofor", "xavier"),
            kept and lost,
            f"{what}: virgofor within .3 to 3 and Xavier below .05; {how}",
            seeds=seeds,
        ),
        Claim(
            "gradients are at least 50 times nearer to one size than Xavier's",
            "card: virgo .15 to .61, Xavier .0017 to .0021",
            said(backward, OURS, "xavier"),
            min(nearer) >= 50,
            f"mean squares of gradients there of layer 1 over layer 7, as many times off 1; {how}",
            seeds=seeds,
        ),
        Claim(
            "signals and gradients are steadier than from every usual start",
            "more stable variance than classic starts (abstract)",
            f"{sum(steadier)} of {len(steadier)} cases; forward "
            f"{said(forward, OURS, *USUAL[1:])}; backward {said(backward, OURS, *USUAL[1:])}",
            all(steadier),
            f"both ratios of virgo at most as far off 1 as those of {', '.join(USUAL)}; {how}",
            seeds=seeds,
        ),
    ]


def of_ends(found: Signals) -> tuple[np.ndarray, np.ndarray]:
    """Both ratios of one start, of each seed."""
    forward, backward = found.forward[0], found.backward[0]
    return forward[:, -2] / forward[:, 0], backward[:, 0] / backward[:, -2]


def halved_claim(others: Mapping[str, Signals]) -> Claim:
    """What the two maps of GraphSAGE need; ours, not the paper's."""
    ratio = {name: of_ends(found)[0] for name, found in others.items()}
    return Claim(
        "two maps that are added up keep signals of one size with half of the variance each",
        "- (the authors draw both with all of it)",
        "; ".join(f"{n} {mean(v):.3g} ({v.min():.2g} to {v.max():.2g})" for n, v in ratio.items()),
        0.3 <= mean(ratio[HALF]) <= 3 < mean(ratio[WHOLE]),
        "mean squares before ReLU of layer 7 over layer 1 of 8 GraphSAGE layers: within .3 to 3 "
        f"halved, above 3 whole; geometric mean over {len(ratio[HALF])} draws of weights",
        seeds=len(ratio[HALF]),
    )


def other_rows(others: Mapping[str, Signals]) -> list[dict[str, object]]:
    """Ratios of other layers."""
    return [
        {
            "case": f"signals, {FEATURES[0]}, {name}",
            "start": OURS,
            "forward": mean(of_ends(found)[0]),
            "backward": mean(of_ends(found)[1]),
        }
        for name, found in others.items()
    ]


def race_claim(raced: Mapping[str, Raced]) -> Claim:
    """The card's race, at one rate."""
    ours, theirs = raced[OURS], raced["xavier"]
    loss = [float(np.mean(one.losses)) for one in (ours, theirs)]
    right = [float(np.mean(one.scores)) for one in (ours, theirs)]
    seeds = len(ours.losses)

    def said(name: str) -> str:
        one = raced[name]
        return (
            f"{name} loss {np.mean(one.losses):.3f}, accuracy {np.mean(one.scores):.3f} "
            f"({min(one.scores):.3f} to {max(one.scores):.3f})"
        )

    return Claim(
        "eight layers learn further in 100 steps than from Xavier's start",
        "card: loss .750 and .965, test accuracy .79 and .55; Kaiming .725 and .74",
        "; ".join(said(name) for name in raced),
        loss[0] < loss[1] and right[0] >= right[1] + 0.10,
        "block models: mean loss on nodes learned from below Xavier's and mean test accuracy at "
        f"least .10 above, after the last step of Adam at 1e-3; {seeds} seeds of graphs and "
        "weights",
        seeds=seeds,
    )


def tuned_claim(found: Mapping[str, Mapping[str, Tuned]]) -> Claim:
    """The same race, every start at its own rate."""
    sides = found[SBM]
    usual = [name for name in USUAL if name in sides]
    best = max(sides[name].mean for name in usual)
    first = sides[OURS]
    rates = ", ".join(f"{setting['rate']:g}" for setting, _ in first.tried)
    return Claim(
        "eight layers on block models end better than from every usual start",
        "better than classic starts on 15 data sets (figures not available)",
        tuning.says({SBM: sides}, *sides),
        first.mean > best,
        f"mean test accuracy above each of {', '.join(usual)}; each the best of rates {rates} by "
        "mean accuracy on validation nodes, parameters of the best validation",
        seeds=len(first.seeds),
    )


def depth_claim(found: Mapping[str, Mapping[str, Tuned]], sizes: Sizes) -> Claim:
    """Cora by depth."""
    cases = {at_depth(d): found[at_depth(d)] for d in sizes.depths}
    usual = ("xavier", "kaifor")
    higher = [
        sides[OURS].mean > max(sides[name].mean for name in usual) for sides in cases.values()
    ]
    rates = ", ".join(f"{rate:g}" for rate in sizes.cora.rates)
    return Claim(
        "networks on Cora end better than from usual starts, at every depth",
        "better than classic starts on Cora (figure not available)",
        tuning.says(cases, OURS, "virgofor", *usual),
        all(higher),
        f"mean test accuracy above that of {' and '.join(usual)} at each of {len(cases)} depths; "
        f"each the best of rates {rates} by mean accuracy on validation nodes, parameters of the "
        "best validation",
        seeds=len(next(iter(cases.values()))[OURS].seeds),
    )


def signal_rows(seen: Measured) -> list[dict[str, object]]:
    """Ratios by features and start."""
    return [
        {
            "case": f"signals, {kind}",
            "start": start,
            "forward": mean(ratios(seen, start, "forward")[kind]),
            "backward": mean(ratios(seen, start, "backward")[kind]),
        }
        for kind in seen
        for start in STARTS
    ]


def race_rows(races: Races) -> list[dict[str, object]]:
    """Losses and accuracies by case and start."""
    return [
        {
            "case": case,
            "start": start,
            "loss": float(np.mean(one.losses)),
            "accuracy, first rate": float(np.mean(one.scores)),
            "rate": one.tuned.setting["rate"],
            "accuracy": one.tuned.mean,
        }
        for case, sides in races.items()
        for start, one in sides.items()
    ]


def draw_signals(figure: Any, seen: Measured) -> None:
    """Mean squares by layer, forward and backward, for each kind of features."""
    figure.set_size_inches(8, 6)
    grid = figure.subplots(2, len(seen), squeeze=False, sharex=True)
    for column, (kind, found) in zip(grid.T, seen.items(), strict=True):
        for axes, side in zip(column, ("forward", "backward"), strict=True):
            each = np.exp(np.mean(np.log(getattr(found, side)), axis=1))[:, :-1]
            for i, (start, line) in enumerate(zip(STARTS, each, strict=True)):
                near = line[0] if side == "forward" else line[-1]
                style = "-" if start.startswith("virgo") else "--"
                layers = range(1, len(line) + 1)
                axes.plot(layers, line / near, style, color=f"C{i}", label=start)
            axes.set_yscale("log")
            axes.spines[["top", "right"]].set_visible(False)
        column[0].set_title(kind, fontsize=9)
        column[1].set_xlabel("layer")
    grid[0, 0].set_ylabel("signal, over the first layer's")
    grid[1, 0].set_ylabel("gradient, over the last's")
    grid[0, 0].legend(frameon=False, fontsize=7)


def draw_depths(figure: Any, found: Mapping[str, Mapping[str, Tuned]], sizes: Sizes) -> None:
    """Test accuracy on Cora by depth."""
    axes = figure.subplots()
    for i, start in enumerate(found[at_depth(sizes.depths[0])]):
        each = [found[at_depth(d)][start] for d in sizes.depths]
        style = "o-" if start.startswith("virgo") else "o--"
        axes.plot(sizes.depths, [t.mean for t in each], style, color=f"C{i}", label=start)
        low, high = ([f(t.scores) for t in each] for f in (min, max))
        axes.fill_between(sizes.depths, low, high, color=f"C{i}", alpha=0.12, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes.depths, [str(d) for d in sizes.depths])
    axes.set_xlabel("layers")
    axes.set_ylabel("test accuracy on Cora")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
