"""RpHGNN on generated academic graphs and on Cora's papers and words.

Graphs are summarized before learning; networks of groups then learn rows in batches, all with as
many rates of the same optimizer, which validation nodes choose. Beside RpHGNN: one round, odd
summaries alone in as many propagations, the mean over all two-hop paths with own features, own
features alone; on Cora a GCN trained end to end. What is heard is held against dense products, what
it costs against rounds, and groups of labels against a node's own class.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ffnlab.data import HeteroNodes, academic, cora, cora_words, find_folder
from ffnlab.models import GraphNetworkConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, forward_gnn_measure, tuning
from ffnlab.studies import rphgnn_measure as measure
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.rphgnn_measure import Budget, Costs, Rows
from ffnlab.studies.tuning import Found, Tuned

__all__ = ["run"]

ACADEMIC, CORA = "academic", "Cora's papers and words"
OURS, ONE, ODD = "RpHGNN, 3 rounds", "RpHGNN, 1 round", "odd alone, 6 rounds"
LABELS, TWO_HOP, OWN = "RpHGNN with labels", "two hops merged, own features", "own features"
GCN = "GCN, end to end"
TEN, ONE_POINT = 0.10, 0.01  # of accuracy, the card's bars
RATIO = (1.6, 2.4)  # of 8 rounds over 4, linear growth by the card
SLACK = 1e-9  # of rounding, where a difference of accuracies meets a bar


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      seeds: of graphs, first weights, rows and projections.
      budget: on academic graphs.
      width: of rows of kinds without features.
      rounds: whose costs are measured.
      scale: of the graph for that.
      turns: of times.
      shuffled: nodes whose class is changed.
      cora: budget on Cora; None to leave it out.
      cora_width: of rows there.
      beside: whether ways are run that no claim is about.
    """

    seeds: Sequence[int]
    budget: Budget
    width: int
    rounds: Sequence[int]
    scale: int
    turns: int
    shuffled: int
    cora: Budget | None
    cora_width: int
    beside: bool = True


def sizes_of(seed: int, quick: bool) -> Sizes:
    """Of either form."""
    rates = (1e-3, 3e-3, 1e-2)
    if quick:
        budget = Budget(rates, 150, 120, 10, 64, 0.3, 0.5)
        return Sizes([seed], budget, 32, (1, 2, 4, 8), 4, 5, 5, None, 0, beside=False)
    budget = Budget(rates, 450, 120, 10, 64, 0.3, 0.5)
    on_cora = Budget(rates, 300, 140, 10, 64, 0.5, 0.5)
    seeds = [seed, seed + 1, seed + 2]
    return Sizes(seeds, budget, 32, (1, 2, 3, 4, 6, 8), 5, 21, 50, on_cora, 256)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = sizes_of(seed, quick)
    graphs = [academic(s) for s in sizes.seeds]
    found: dict[str, Mapping[str, Tuned]] = {ACADEMIC: on_academic(graphs, sizes)}
    if sizes.cora is not None and find_folder("planetoid_cora") is not None:
        found[CORA] = on_cora(sizes, sizes.cora)
    nodes = measure.large(sizes.scale)
    widths = dict.fromkeys(nodes.graph.counts, sizes.width)
    whole = measure.unsquashed(nodes.graph, nodes.target, widths, max(sizes.rounds))
    costs = measure.costs(nodes, sizes.rounds, sizes.width, sizes.turns)
    return Result(
        slug="rphgnn",
        title=STUDIES["rphgnn"].title,
        settings={
            "academic graphs": "the generator's own sizes",
            "budget": sizes.budget._asdict(),
            "width of rows without features": sizes.width,
            "cora": None if sizes.cora is None else sizes.cora._asdict(),
            "width there": sizes.cora_width,
            "graph of costs": {"edges": costs.edges, **dict(nodes.graph.counts)},
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *accuracy_claims(found, sizes),
            *cost_claims(costs, whole, sizes),
            *heard_claims(graphs[0], sizes),
        ],
        table=[*tuning.table(found), *cost_rows(costs, whole)],
        pictures={
            "accuracy": lambda figure: draw_accuracy(figure, found),
            "memory_by_rounds": lambda figure: draw_memory(figure, costs, whole),
            "time_by_rounds": lambda figure: draw_time(figure, costs),
        },
    ).write(out)


def on_academic(graphs: Sequence[HeteroNodes], sizes: Sizes) -> dict[str, Tuned]:
    """All ways on academic graphs, another one for each seed."""

    def rows(**options: Any) -> list[Rows]:
        pairs = zip(graphs, sizes.seeds, strict=True)
        return [measure.summarized(g, s, width=sizes.width, **options) for g, s in pairs]

    sides: dict[str, Callable[[], list[Rows]]] = {
        OURS: lambda: rows(rounds=3),
        ONE: lambda: rows(rounds=1),
        ODD: lambda: rows(rounds=6, hears="odd"),
        LABELS: lambda: rows(rounds=3, labels=True),
        TWO_HOP: lambda: [measure.merged(g) for g in graphs],
        OWN: lambda: [measure.own(g, np.asarray(g.x[g.target])) for g in graphs],
    }
    chosen = [name for name in sides if sizes.beside or name not in (ONE, LABELS)]
    return {name: measure.tuned(sides[name](), sizes.budget, sizes.seeds) for name in chosen}


def on_cora(sizes: Sizes, budget: Budget) -> dict[str, Tuned]:
    """RpHGNN on papers and words, their words alone, and a GCN on the same split."""
    nodes, plain = cora_words(), cora()
    count = len(sizes.seeds)
    ours = measure.summarized(nodes, sizes.seeds[0], width=sizes.cora_width, rounds=3)
    words = measure.own(nodes, plain.x)
    config = GraphNetworkConfig((plain.x.shape[1], budget.hidden, int(plain.y.max()) + 1))
    same = forward_gnn_measure.Budget(budget.rates, budget.steps // 2, budget.every, 30, 1)
    way = forward_gnn_measure.by_backprop(config, same)
    by_depth = forward_gnn_measure.tuned(way, same, [plain] * count, sizes.seeds)
    return {
        OURS: measure.tuned([ours] * count, budget, sizes.seeds),
        OWN: measure.tuned([words] * count, budget, sizes.seeds),
        GCN: next(iter(by_depth.values())),
    }


def evidence(found: Found, sizes: Sizes, rule: str, *names: str) -> str:
    """How a claim about accuracy was decided."""
    parts = [
        f"{rule}. Rates {', '.join(f'{r:g}' for r in sizes.budget.rates)} of every side, chosen by "
        f"mean accuracy on validation nodes; seeds {', '.join(map(str, sizes.seeds))} of graphs, "
        "first weights, rows and projections"
    ]
    for case, sides in found.items():
        said = (f"{n} {sides[n].size}, rate {sides[n].setting['rate']:g}" for n in names)
        parts.append(f"{case}: " + "; ".join(said))
    return ". ".join(parts)


def claim_of(
    words: tuple[str, str], holds: bool, rule: str, found: Found, sizes: Sizes, *names: str
) -> Claim:
    """A claim about accuracy, its figures and evidence those of the runs."""
    how = evidence(found, sizes, rule, *names)
    return Claim(*words, tuning.says(found, *names), holds, how, seeds=len(sizes.seeds))


def accuracy_claims(found: Found, sizes: Sizes) -> list[Claim]:
    """What summaries are good for."""
    sides = found[ACADEMIC]
    here = {ACADEMIC: sides}
    gain = {name: sides[OURS].mean - sides[name].mean + SLACK for name in sides}
    claims = [
        claim_of(
            ("summaries beat own features", ".944 and .783 by the authors' code, 3 seeds"),
            gain[OWN] >= TEN,
            "mean test accuracy at least 10 points above",
            here,
            sizes,
            *(OURS, OWN),
        ),
        claim_of(
            ("relations apart beat paths merged", ".944 and .903 by the authors' code, 3 seeds"),
            gain[TWO_HOP] >= ONE_POINT,
            "mean test accuracy at least 1 point above",
            here,
            sizes,
            *(OURS, TWO_HOP),
        ),
        claim_of(
            ("even and odd in 3 rounds are no worse than odd in 6", ".944 and .917, 3 seeds"),
            gain[ODD] >= -ONE_POINT,
            "mean test accuracy at most 1 point below, with as many propagations",
            here,
            sizes,
            *(OURS, ODD),
        ),
    ]
    if CORA in found:
        there = {CORA: found[CORA]}
        claims.append(
            claim_of(
                ("on real papers and words too, summaries beat own features", "-"),
                found[CORA][OURS].mean - found[CORA][OWN].mean + SLACK >= TEN,
                "mean test accuracy at least 10 points above; a GCN stands beside them",
                there,
                sizes,
                *(OURS, OWN, GCN),
            )
        )
    return claims


def growth_of(peaks: Mapping[int, float]) -> float:
    """How many times as far a peak rises from 4 to 8 rounds as from 2 to 4."""
    return (peaks[8] - peaks[4]) / max(peaks[4] - peaks[2], 1)


def in_mebibytes(peaks: Mapping[int, float]) -> str:
    """Peaks in words."""
    return ", ".join(f"{k} rounds {v / 2**20:.0f} MiB" for k, v in peaks.items())


def cost_claims(costs: Costs, whole: Sequence[int], sizes: Sizes) -> list[Claim]:
    """How costs grow with rounds."""
    times = costs.times.over(8, 4)
    stored = costs.stored[8] / costs.stored[4]
    added = [
        (costs.compiled[b].multiply_adds - costs.compiled[a].multiply_adds) / (b - a)
        for a, b in itertools.pairwise(costs.compiled)
    ]
    risen, held = (growth_of(each) for each in (costs.peaks, costs.held))
    results = costs.compiled[8].results / costs.compiled[4].results
    grown = whole[7] / whole[3]
    return [
        Claim(
            "time is linear in rounds",
            "8 rounds over 4 within 1.6 to 2.4",
            f"{times.median:.2f} (quartiles {times.low:.2f} to {times.high:.2f})",
            RATIO[0] <= times.median <= RATIO[1],
            f"median over {sizes.turns} turns of the ratio of whole runs, {costs.edges:,} edges",
            seeds=1,
            timed=True,
        ),
        Claim(
            "memory is linear in rounds",
            "8 rounds over 4 within 1.6 to 2.4",
            f"stored {stored:.2f}, results of the compiled rounds {results:.2f}; from 4 to 8 the "
            f"peak of a process rises {risen:.2f} times as far as from 2 to 4, and {held:.2f} "
            "times where what is freed is returned at once",
            all(RATIO[0] <= ratio <= RATIO[1] for ratio in (stored, results, risen, held)),
            "bytes of the rows written, and of what one program of all rounds returns; peaks in a "
            f"process each, {measure.LARGER:,} papers of 64 channels: {in_mebibytes(costs.peaks)}; "
            f"with MALLOC_MMAP_THRESHOLD_=131072 {in_mebibytes(costs.held)}",
            seeds=1,
        ),
        Claim(
            "every round adds the same products",
            "cost linear in rounds",
            f"{min(added):,.0f} to {max(added):,.0f} multiply-adds a round",
            max(added) == min(added) > 0,
            f"counted in the programs of {', '.join(map(str, costs.compiled))} rounds",
            seeds=1,
        ),
        Claim(
            "without squashing, paths multiply",
            "exponential in rounds",
            f"8 rounds would store {grown:,.0f} times what 4 do, against {stored:.2f}",
            grown > RATIO[1] ** 2,
            "numbers of summaries by recursion over relations; holds above 2.4 squared",
            seeds=0,
        ),
    ]


def heard_claims(nodes: HeteroNodes, sizes: Sizes) -> list[Claim]:
    """What is heard, squashed and left out."""
    seed = sizes.seeds[0]
    apart = measure.farthest_from_oracle(nodes, sizes.width, seed)
    entries = measure.summarized(nodes, seed, width=sizes.width, rounds=3).features
    wanted = sum((r[0] == "paper") + (r[2] == "paper") for r in nodes.graph.relations)
    error, length = measure.projected(256, seed)
    mine, others = measure.leak(nodes, seed, sizes.shuffled)
    return [
        Claim(
            "a round is two row-normalized products",
            "odd M x, even M' (M x), to 1e-6",
            f"{apart:.1e} apart at most",
            apart <= 1e-6,
            "largest difference from dense matrices in float64, all groups of one graph",
            seeds=1,
        ),
        Claim(
            "the target has a group for each relation that ends or begins at it",
            "(N, K, d) each",
            f"{len(entries.sizes)} groups of {entries.sizes[0]}, {wanted} relations and reverses",
            len(entries.sizes) == wanted and set(entries.sizes) == {(3, sizes.width)},
            "counted on one graph, 3 rounds",
            seeds=1,
        ),
        Claim(
            "random projections keep inner products",
            "mean error below .1 at width 256; lengths 1",
            f"{error:.3f}; lengths {length:.0e} off at most",
            error < 0.1 and length < 1e-5,
            "of 200 unit rows of 64 numbers, products divided by the width",
            seeds=1,
        ),
        Claim(
            "groups of labels hold nothing of a node's own class",
            "unchanged to 1e-5",
            f"own groups move by {mine:.1e}, others' by up to {others:.2f}",
            mine <= 1e-5 < others,
            f"{sizes.shuffled} nodes to learn from given another class, one by one",
            seeds=1,
        ),
    ]


def cost_rows(costs: Costs, whole: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the table: what rounds cost."""
    return [
        {
            "case": f"costs, {costs.edges:,} edges",
            "rounds": k,
            "seconds": costs.times.of(k).median,
            "stored MiB": costs.stored[k] / 2**20,
            "unsquashed MiB": whole[k - 1] / 2**20,
        }
        | (
            {
                "multiply-adds": costs.compiled[k].multiply_adds,
                "peak MiB, larger": costs.peaks[k] / 2**20,
            }
            if k in costs.compiled
            else {}
        )
        for k in costs.stored
    ]


def draw_accuracy(figure: Any, found: Found) -> None:
    """Test accuracy by case and side."""
    figure.set_size_inches(9, 4)
    axes = figure.subplots()
    grouped_bars(axes, tuning.values(found))
    axes.set_ylim(0.5, 1.15)  # room for the legend
    axes.set_ylabel("test accuracy")


def draw_memory(figure: Any, costs: Costs, whole: Sequence[int]) -> None:
    """What is stored by rounds, beside what would be without squashing."""
    axes, rounds = figure.subplots(), list(costs.stored)
    stored = [costs.stored[k] / 2**20 for k in rounds]
    axes.plot(rounds, stored, "o-", label="squashed, stored")
    unsquashed = [whole[k - 1] / 2**20 for k in rounds]
    axes.plot(rounds, unsquashed, "o:", color="0.5", label="unsquashed, counted")
    finish(axes, "MiB of summaries", rounds)
    axes.set_yscale("log")


def draw_time(figure: Any, costs: Costs) -> None:
    """Seconds by rounds with quartiles, and a line through the first and the last."""
    axes, rounds = figure.subplots(), list(costs.stored)
    spreads = [costs.times.of(k) for k in rounds]
    medians = np.array([s.median for s in spreads])
    ends = np.abs(np.array([(s.low, s.high) for s in spreads]).T - medians)
    axes.errorbar(rounds, medians, yerr=ends, fmt="o", label="measured")
    line = np.interp(rounds, [rounds[0], rounds[-1]], [medians[0], medians[-1]])
    axes.plot(rounds, line, ":", color="0.5", label="linear")
    axes.set_ylim(bottom=0)
    finish(axes, "seconds", rounds)


def finish(axes: Any, what: str, rounds: Sequence[int]) -> None:
    """Labels of an axis over rounds."""
    axes.set_xticks(rounds)
    axes.set_xlabel("rounds")
    axes.set_ylabel(what)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
