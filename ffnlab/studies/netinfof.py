"""Which information of a graph says what is joined, and what a linear model makes of it.

Six generated graphs, whose features say nothing, or where a node lies, or that in columns of its
class, and whose edges join like or unlike; in the full form Cora too. Scores are told before any
training; then the linear model on all embeddings, on each alone, and a GCN trained end to end all
try as many settings.
"""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.data import cora, find_folder
from ffnlab.graphs import (
    VIEWS,
    FittingPairs,
    compatibility,
    fitting_pairs,
    informative_graph,
    normalised_features,
)
from ffnlab.graphs.informative_graphs import EDGES, FEATURES
from ffnlab.models.account import compiled_cost
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies import netinfof_measure as measure
from ffnlab.studies.classify import grouped_bars
from ffnlab.studies.netinfof_measure import Budget, Problem
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Found, grid

__all__ = ["run"]

ALL, GCN, CORA = "all embeddings", "GCN", "cora"
USABLE = 0.55  # what the card calls clearly usable
GRAPH = {"nodes": 600, "width": 200, "density": 0.05, "walks": 1000}
LARGEST = (2708, 128, 200_000)  # nodes, dimension and edges of the fit whose memory is told


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much is run.

    Attributes:
      seeds: of graphs and splits.
      dimension: of embeddings of generated graphs.
      budget: of generated graphs.
      cora: of Cora, where it is run, with embeddings of 128 numbers.
      is_full: whether it is.
    """

    seeds: Sequence[int]
    dimension: int
    budget: Budget
    cora: Budget
    is_full: bool


def sizes_of(seed: int, quick: bool) -> Sizes:
    """Of either form; the full grid is the authors'."""
    if quick:
        few = grid(l1=(1e-4,), l2=(1e-3, 1e-5))
        short = Budget(few, grid(rate=(3e-3, 1e-2), decay=(5e-4,)), 20, 200, 20, 64)
        return Sizes([seed], 32, short, short, False)
    settings = grid(l1=(1e-4, 1e-5), l2=(1e-3, 1e-4, 1e-5, 1e-6))
    rates = grid(rate=(1e-3, 3e-3, 1e-2, 3e-2), decay=(0.0, 5e-4))
    long = Budget(settings, rates, 25, 300, 20, 64)
    return Sizes([seed, seed + 1, seed + 2], 48, long, long._replace(k=100), True)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = sizes_of(seed, quick)
    problems = generated(sizes)
    found = reached(problems, sizes.budget)
    if sizes.is_full and find_folder("planetoid_cora") is not None:
        nodes = cora()
        nodes = nodes._replace(x=normalised_features(nodes.x))
        more = [measure.prepared(CORA, nodes, s, dimension=128) for s in sizes.seeds]
        problems, found = [*problems, *more], found | reached(more, sizes.cora)
    return Result(
        slug="netinfof",
        title=STUDIES["netinfof"].title,
        settings={
            "generated graphs": GRAPH,
            "dimension": {"generated": sizes.dimension, CORA: 128},
            "budget": sizes.budget._asdict(),
            "budget of cora": sizes.cora._asdict(),
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            across_claim(seed),
            *score_claims(problems, sizes),
            *hit_claims(found, sizes),
            memory_claim(*LARGEST),
        ],
        table=[*score_rows(problems), *tuning.table(found)],
        pictures={
            "usable_information": lambda figure: draw_scores(figure, problems),
            "hits": lambda figure: draw_hits(figure, found),
        },
    ).write(out)


def generated(sizes: Sizes) -> list[Problem]:
    """The six graphs, of every seed."""
    return [
        measure.prepared(
            f"{features}-{edges}",
            informative_graph(features, edges, seed, **GRAPH),
            seed,
            dimension=sizes.dimension,
            walks=GRAPH["walks"],
        )
        for features in FEATURES
        for edges in EDGES
        for seed in sizes.seeds
    ]


def reached(problems: Sequence[Problem], budget: Budget) -> dict[str, dict[str, tuning.Tuned]]:
    """All sides, by case."""
    sides = {ALL: measure.by_embeddings(problems, budget)}
    sides |= measure.by_each(problems, budget)
    sides[GCN] = measure.by_network(problems, budget)
    return {case: {name: side[case] for name, side in sides.items()} for case in sides[ALL]}


def across_claim(seed: int) -> Claim:
    """The card's check of heterophily."""
    nodes = measure.across(seed)
    z = nodes.x / np.linalg.norm(nodes.x, axis=1, keepdims=True)
    h = np.asarray(compatibility(jnp.asarray(z), fitting_pairs(nodes.graph, seed)))
    problem = measure.prepared("across", nodes, seed, dimension=2)
    told, plain = problem.scores["F"], problem.plain["F"]
    return Claim(
        "a compatibility sees that unlike nodes are joined",
        "card: off the diagonal 1.04, on it -.09 and -.03; score .595 and .562 without",
        f"off the diagonal {h[0, 1]:.2f}, on it {h[0, 0]:.2f} and {h[1, 1]:.2f}; score "
        f"{told:.3f} and {plain:.3f} without",
        bool(h[0, 1] > 0.5 and max(abs(h[0, 0]), abs(h[1, 1])) <= 0.3 and told > plain),
        "two groups of 100 nodes that are joined to each other alone: above .5, within .3 of 0, "
        "and a higher score of validation pairs",
        seeds=1,
    )


def means(problems: Sequence[Problem], plain: bool = False) -> dict[str, dict[str, float]]:
    """Scores by case and view, means over seeds."""
    found: dict[str, dict[str, float]] = {}
    for case in dict.fromkeys(p.case for p in problems):
        own = [p.plain if plain else p.scores for p in problems if p.case == case]
        found[case] = {name: float(np.mean([s[name] for s in own])) for name in VIEWS}
    return found


def said(problems: Sequence[Problem], case: str) -> str:
    """Scores of a case, with their range."""
    parts = []
    for name in VIEWS:
        own = [p.scores[name] for p in problems if p.case == case]
        parts.append(f"{name} {np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})")
    return f"{case}: {', '.join(parts)}"


def score_claims(problems: Sequence[Problem], sizes: Sizes) -> list[Claim]:
    """What scores say of graphs whose information is known."""
    found, seeds = means(problems), len(sizes.seeds)
    structure = found["random-diag"]
    local = [f"local-{edges}" for edges in EDGES]
    how = f"mean of scores of validation pairs over {seeds} seeds of graphs and splits"
    return [
        Claim(
            "where features are coins, structure has the information",
            "scores reveal which component carries information (abstract)",
            said(problems, "random-diag"),
            bool(min(structure["U"], structure["R"]) > structure["F"]),
            f"U and R above F; {how}",
            seeds=seeds,
        ),
        Claim(
            "where features are local, all three embeddings of them are usable",
            "scores reveal which component carries information (abstract)",
            "; ".join(said(problems, case) for case in local),
            bool(all(found[case][name] > USABLE for case in local for name in "FPS")),
            f"F, P and S above {USABLE} for edges of both kinds; {how}",
            seeds=seeds,
        ),
    ]


def hit_claims(found: Found, sizes: Sizes) -> list[Claim]:
    """What is found of hidden edges."""
    graphs = {case: sides for case, sides in found.items() if case != CORA}
    best = [sides[ALL].mean >= max(sides[name].mean for name in VIEWS) for sides in graphs.values()]
    beats = [sides[ALL].mean > sides[GCN].mean for sides in found.values()]
    seeds = ", ".join(map(str, sizes.seeds))
    how = (
        f"each side the best of {len(sizes.budget.combined)} settings by mean hits on validation "
        f"pairs, parameters of the best validation; seeds {seeds} of graphs and splits; Hits@"
        f"{sizes.budget.k}" + (f", of Cora Hits@{sizes.cora.k}" if CORA in found else "")
    )
    return [
        Claim(
            "all embeddings together are as good as the best alone",
            "card: on 5 of 6 generated graphs",
            f"on {sum(best)} of {len(best)}; {tuning.says(graphs, ALL, *VIEWS)}",
            bool(sum(best) >= len(best) - 1),
            f"mean hits on test pairs at least those of each embedding, on all but one; {how}",
            seeds=len(sizes.seeds),
        ),
        Claim(
            "a linear model of embeddings beats a GCN trained end to end",
            "beats general GNNs on 11 of 12 real graphs, the only one robust on six generated ones",
            f"on {sum(beats)} of {len(beats)}; {tuning.says(found, ALL, GCN)}",
            bool(sum(beats) >= len(beats) - 1),
            f"higher mean hits on test pairs, on all but one; {how}",
            seeds=len(sizes.seeds),
        ),
    ]


def memory_claim(nodes: int, dimension: int, edges: int) -> Claim:
    """What the least squares of a compatibility keep."""
    shapes = ((2 * edges, 2), jnp.int32), ((3 * edges, 2), jnp.int32), ((3 * edges,), bool)
    pairs = FittingPairs(*(jax.ShapeDtypeStruct(*each) for each in shapes))
    z = jax.ShapeDtypeStruct((nodes, dimension), jnp.float32)
    cost = compiled_cost(compatibility, z, pairs)
    design = 3 * edges * dimension * (dimension + 1) // 2 * 4
    return Claim(
        "the fit keeps no design matrix",
        "cost linear in the size of the input (abstract)",
        f"{cost.temporary / 2**20:.1f} MiB beside its arguments; a design matrix in float32 has "
        f"{design / 2**30:.1f} GiB",
        cost.temporary < 0.01 * design,
        f"temporary memory of the compiled program of {dimension} dimensions, {edges:,} edges and "
        "twice as many random pairs, below a hundredth of the matrix",
        seeds=0,
    )


def score_rows(problems: Sequence[Problem]) -> list[dict[str, object]]:
    """Scores by case and view, with and without a compatibility."""
    told, plain = means(problems), means(problems, plain=True)
    return [
        {
            "case": case,
            "side": name,
            "usable information": score,
            "without compatibility": plain[case][name],
        }
        for case, each in told.items()
        for name, score in each.items()
    ]


def draw_scores(figure: Any, problems: Sequence[Problem]) -> None:
    """A bar per view of every graph."""
    figure.set_size_inches(9, 5)
    axes = figure.subplots()
    found: dict[tuple[str, str], list[float]] = {}
    for problem in problems:
        for name, score in problem.scores.items():
            found.setdefault((problem.case, name), []).append(score)
    grouped_bars(axes, found)
    axes.axhline(0.5, color="0.4", linestyle=":")
    axes.set_ylim(0.45, 1)
    axes.set_ylabel("usable information")


def draw_hits(figure: Any, found: Found) -> None:
    """Hits of all embeddings, the best alone and the GCN."""
    figure.set_size_inches(9, 5)
    axes = figure.subplots()
    bars = {}
    for case, sides in found.items():
        best = max(VIEWS, key=lambda name: sides[name].mean)
        for name, label in ((GCN, GCN), (ALL, ALL), (best, "best alone")):
            bars[case, label] = sides[name].scores
    grouped_bars(axes, bars)
    axes.set_ylabel("hits on test pairs")
    axes.set_ylim(0, 1.2)  # room for figures and legend
