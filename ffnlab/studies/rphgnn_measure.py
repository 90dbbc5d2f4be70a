"""What the study of RpHGNN measures: graphs summarized, networks of groups tuned alike, costs."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.bench import summaries
from ffnlab.clock import Times, in_turns
from ffnlab.data import ArrayBatches, HeteroNodes, Labelled, academic
from ffnlab.graph import Hetero, aggregate
from ffnlab.graphs import (
    Entry,
    Features,
    RpHGNNOptions,
    featured,
    keyed,
    label_groups,
    precomputed,
    propagated,
)
from ffnlab.graphs.squashing import PROJECTIONS, SQUASHES, direction
from ffnlab.learning import backprop, early_stopping, members
from ffnlab.losses import labelled
from ffnlab.models import GroupNetwork, GroupNetworkConfig
from ffnlab.models.account import CompiledCost, compiled_cost
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.studies.tuning import Tuned, numbers

__all__ = [
    "Budget",
    "Rows",
    "costs",
    "farthest_from_oracle",
    "leak",
    "large",
    "merged",
    "own",
    "projected",
    "summarized",
    "tuned",
    "unsquashed",
]


class Budget(NamedTuple):
    """What every network of a case has.

    Attributes:
      rates: of Adam, tried.
      steps, batch: of a run.
      every: steps between looks at validation nodes, the best of which is kept.
      hidden: units of every layer.
      input_drop, drop: rates of dropping.
    """

    rates: Sequence[float]
    steps: int
    batch: int
    every: int
    hidden: int
    input_drop: float
    drop: float


class Rows(NamedTuple):
    """What a network is shown of a graph.

    Attributes:
      features: groups of the target's nodes.
      nodes: their classes and parts.
    """

    features: Features
    nodes: HeteroNodes

    def part(self, name: str) -> Labelled:
        """Rows and classes of the nodes of a part."""
        mask = getattr(self.nodes, name)
        return Labelled(self.features.rows[mask], self.nodes.y[mask])


def summarized(
    nodes: HeteroNodes, seed: int, *, width: int, labels: bool = False, **options: object
) -> Rows:
    """A graph's target as RpHGNN summarizes it; rows and projections drawn by the seed."""
    features, projections = jax.random.split(jax.random.key(seed))
    x = featured(nodes.graph, nodes.x, width=width, key=features)
    found = precomputed(
        nodes.graph,
        x,
        nodes.target,
        RpHGNNOptions(**options),  # type: ignore[arg-type]
        key=projections,
    )
    if labels:
        classes = int(nodes.y.max()) + 1
        found = found.beside(label_groups(nodes.graph, nodes.target, nodes.y, nodes.train, classes))
    return Rows(found, nodes)


def own(nodes: HeteroNodes, x: Float[np.ndarray, "n d"]) -> Rows:
    """The target's own features and nothing else."""
    found = Features(x.astype(np.float16), (Entry("own"),), ((1, x.shape[1]),))
    return Rows(found, nodes)


def merged(nodes: HeteroNodes) -> Rows:
    """The target's features, and their mean over all paths of two hops, whatever the relation."""
    x = jnp.asarray(nodes.x[nodes.target])
    total, count = jnp.zeros_like(x), jnp.zeros((len(x), 1))
    for relation in nodes.graph.touching(nodes.target):
        inward = nodes.graph.edges_of(relation)
        inward = inward if relation[2] == nodes.target else inward.transpose()
        outward = inward if relation[0] == relation[2] else inward.transpose()
        total = total + aggregate(inward, None, aggregate(outward, None, x))
        count = count + aggregate(inward, None, aggregate(outward, None, jnp.ones_like(count)))
    near = np.asarray(total / jnp.maximum(count, 1))
    two = Features(near.astype(np.float16), (Entry("even"),), ((1, x.shape[1]),))
    return Rows(own(nodes, np.asarray(x)).features.beside(two), nodes)


def tuned(rows: Sequence[Rows], budget: Budget, seeds: Sequence[int], **sizes: object) -> Tuned:
    """What a network of groups reaches with the rate that is best on validation nodes.

    Args:
      rows: one for each seed, alike in size; the same object where only first weights differ.
      budget: rates tried, steps, sizes.
      seeds: of first weights, order of rows and what is dropped.
      sizes: more of the configuration.
    """
    classes = int(rows[0].nodes.y.max()) + 1
    drops = {"input_drop": budget.input_drop, "drop": budget.drop}
    config = GroupNetworkConfig(
        rows[0].features.sizes,
        classes,
        budget.hidden,
        **drops | sizes,  # type: ignore[arg-type]
    )
    models = learned(rows, config, budget, seeds)
    means, scores = [], []
    for i in range(len(budget.rates)):
        places = range(i * len(seeds), (i + 1) * len(seeds))
        pairs = [(jax.tree.map(lambda leaf, k=k: leaf[k], models), k % len(seeds)) for k in places]
        right = [
            [accuracy(model, rows[j].part(p)) for p in ("valid", "test")] for model, j in pairs
        ]
        means.append(float(np.mean(right, axis=0)[0]))
        scores.append([test for _, test in right])
    best = int(np.argmax(means))
    tried = [({"rate": rate}, mean) for rate, mean in zip(budget.rates, means, strict=True)]
    sized = jax.eval_shape(lambda key: config.make(key=key), jax.random.key(0))
    return Tuned(tried[best][0], tried, numbers(sized), 0, tuple(seeds), scores[best])


def stopped(budget: Budget, rate: float | Array) -> Rule:
    """Backpropagation of (batch, validation nodes), the best of which is kept."""
    loss = keyed(labelled)
    rule = backprop(
        lambda model, batch, moment: loss(model, batch[0], moment), optax.adam(rate), informed=True
    )
    score = lambda model, batch: jnp.mean(model(batch[1].x).argmax(-1) == batch[1].y)  # noqa: E731
    return early_stopping(rule, score, every=budget.every, patience=budget.steps)


def learned(
    rows: Sequence[Rows], config: GroupNetworkConfig, budget: Budget, seeds: Sequence[int]
) -> PyTree:
    """The models of all rates and seeds, members of one program."""
    count, is_shared = len(budget.rates) * len(seeds), all(r is rows[0] for r in rows)
    rates = [rate for rate in budget.rates for _ in seeds]
    rule = members(
        functools.partial(stopped, budget), count, vary={"rate": rates}, shared_batch=is_shared
    )
    keys = jax.vmap(jax.random.key)(jnp.tile(jnp.array(seeds), len(budget.rates)))
    start = jax.vmap(lambda key: config.make(key=key))(keys)
    each = rows[:1] if is_shared else rows
    sources = [
        ArrayBatches(r.part("train"), budget.batch, s) for r, s in zip(each, seeds, strict=False)
    ]
    valid = [r.part("valid") for r in each]

    def batches(position: int) -> PyTree:
        pairs = [(source(position), held) for source, held in zip(sources, valid, strict=True)]
        if is_shared:
            return pairs[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves * len(budget.rates)), *pairs)

    outcome = train(
        rule,
        start,
        batches,
        budget.steps,
        key=jax.random.key(seeds[0]),
        options=LoopOptions(log_every=0, progress=False),
        together=10,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {budget.steps}")
    return rule.model(outcome.state)


scores_of = jax.jit(lambda model, x: model(x))


def accuracy(model: GroupNetwork, part: Labelled) -> float:
    """The share of nodes whose class has the largest score."""
    return float(np.mean(np.asarray(scores_of(model, part.x)).argmax(-1) == part.y))


# What summaries are, and what they cost.


def dense(graph: Hetero, relation: tuple[str, str, str]) -> Float[np.ndarray, "n m"]:
    """The row-normalized matrix of a relation in float64, the oracle."""
    edges = graph.edges_of(relation)
    matrix = np.zeros((edges.num_receivers, edges.num_senders))
    np.add.at(matrix, (np.asarray(edges.receivers), np.asarray(edges.senders)), 1)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def farthest_from_oracle(nodes: HeteroNodes, width: int, seed: int) -> float:
    """The largest difference of a round from dense row-normalized products."""
    graph, target = nodes.graph, nodes.target
    x = featured(graph, nodes.x, width=width, key=jax.random.key(seed))
    options = RpHGNNOptions(1, dtype="float32")
    found = propagated(graph, x, target, options, key=jax.random.key(seed))
    apart = 0.0
    for entry, heard in found.items():
        first, _, last = entry.relation
        matrix = dense(graph, entry.relation)
        edges = graph.edges_of(entry.relation).transpose()
        count = np.zeros((edges.num_receivers, edges.num_senders))
        np.add.at(count, (np.asarray(edges.receivers), np.asarray(edges.senders)), 1)
        back = count / np.maximum(count.sum(1, keepdims=True), 1)
        inward, outward = (matrix, back) if last == target else (back, matrix)
        other = first if last == target else last
        own_rows, others = np.asarray(x[target], np.float64), np.asarray(x[other], np.float64)
        expected = inward @ (others if entry.parity == "odd" else outward @ own_rows)
        apart = max(apart, float(np.abs(np.asarray(heard[:, 0]) - expected).max()))
    return apart


def projected(width: int, seed: int, rows: int = 200, inputs: int = 64) -> tuple[float, float]:
    """Mean error of inner products of unit rows after a projection, and of lengths after its norm.

    Args:
      width: to which is projected; products are divided by it.
      seed: of rows and projections.
      rows, inputs: of what is projected.
    """
    first, second = jax.random.split(jax.random.key(seed))
    h = direction(jax.random.normal(first, (rows, inputs)))
    matrix = PROJECTIONS["sparse"](second, inputs, width)
    apart = (h @ matrix) @ (h @ matrix).T / width - h @ h.T
    lengths = jnp.linalg.norm(SQUASHES["project_norm_sum"].term(h, matrix), axis=1)
    return float(jnp.abs(apart).mean()), float(jnp.abs(lengths - 1).max())


def leak(nodes: HeteroNodes, seed: int, shuffled: int) -> tuple[float, float]:
    """How far a node's groups of labels move when its own class does, and others' at the most.

    Args:
      nodes: a graph.
      seed: of which nodes, and of their new classes.
      shuffled: how many nodes of those to learn from are given another class, one by one.
    """
    classes, random = int(nodes.y.max()) + 1, np.random.default_rng(seed)

    def groups(y: Int[np.ndarray, "n"]) -> np.ndarray:
        given = (nodes.graph, nodes.target, y, nodes.train, classes)
        return label_groups(*given, dtype="float32").rows

    before, mine, others = groups(nodes.y), 0.0, 0.0
    for i in random.permutation(np.flatnonzero(nodes.train))[:shuffled]:
        y = nodes.y.copy()
        y[i] = (y[i] + random.integers(1, classes)) % classes
        moved = np.abs(groups(y) - before).max(axis=1)
        mine, others = max(mine, float(moved[i])), max(others, float(moved.max()))
    return mine, others


def large(scale: int) -> HeteroNodes:
    """The academic graph with more nodes of every kind, whose work is not that of starting it."""
    sizes = {"papers": 600, "authors": 400, "venues": 20, "terms": 150}
    return academic(0, **{name: scale * n for name, n in sizes.items()})


class Costs(NamedTuple):
    """What summaries cost, by rounds.

    Attributes:
      times: seconds of whole runs, in turns.
      stored: bytes of rows that were written.
      compiled: of all rounds as one program.
      edges: of the graph.
      peaks: bytes by which the peak of a process rose while it summarized a larger graph once.
      held: the same in processes whose glibc returns at once what is freed
        (MALLOC_MMAP_THRESHOLD_ of 128 KiB); by default it keeps some of it.
    """

    times: Times[int]
    stored: Mapping[int, int]
    compiled: Mapping[int, CompiledCost]
    edges: int
    peaks: Mapping[int, float]
    held: Mapping[int, float]


MEASURED = (2, 4, 8)  # rounds of which memory and compiled programs are compared
LARGER = 20_000  # papers, of 14 edges each; 8 rounds store 123 MB


def costs(nodes: HeteroNodes, rounds: Sequence[int], width: int, turns: int) -> Costs:
    """Measures summaries of a graph; memory in a process each, of drawn graphs of 64 channels."""
    x = featured(nodes.graph, nodes.x, width=width, key=jax.random.key(0))
    key = jax.random.key(1)

    def run(k: int) -> Features:
        return precomputed(nodes.graph, x, nodes.target, RpHGNNOptions(k), key=key)

    def traced(k: int) -> CompiledCost:
        options = RpHGNNOptions(k)
        fn = lambda g, x, key: propagated(g, x, nodes.target, options, key=key)  # noqa: E731
        return compiled_cost(fn, nodes.graph, x, key)

    def risen(k: int, *, held: bool) -> float:
        return summaries.in_process("ours", summaries.Settings(LARGER, 64, k), held=held)

    return Costs(
        in_turns({k: functools.partial(run, k) for k in rounds}, turns),
        {k: run(k).rows.nbytes for k in rounds},
        {k: traced(k) for k in MEASURED},
        sum(edges.num_edges for edges in nodes.graph.edges),
        {k: risen(k, held=False) for k in MEASURED},
        {k: risen(k, held=True) for k in MEASURED},
    )


def unsquashed(graph: Hetero, target: str, widths: Mapping[str, int], rounds: int) -> list[int]:
    """Bytes of half precision that all that a kind hears has by round, were nothing squashed.

    Each round every kind would hear all that the other end holds, and its own echo of all it holds.

    Args:
      graph: whose relations are heard.
      target: the kind whose summaries are counted.
      widths: of first rows.
      rounds: how many.
    Returns:
      bytes of rounds 1, 1 and 2, …
    """
    held, found = dict(widths), [0]
    for _ in range(rounds):
        heard = dict.fromkeys(held, 0)
        for first, _, last in graph.names:
            for kind, other in dict.fromkeys(((first, last), (last, first))):
                heard[kind] += held[other] + held[kind]
        held = heard
        found.append(found[-1] + 2 * graph.counts[target] * held[target])
    return found[1:]
