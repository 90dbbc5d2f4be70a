"""Forward learning and backpropagation on one graph, each way in one program of many members.

A way of learning is tried at several rates, with several graphs or first weights each; all of them
are members that learn one after the other in one compiled loop. Every way keeps its best parameters
by accuracy on validation nodes, and its rate is the one with the best mean accuracy there; test
nodes are scored with that alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PyTree

from ffnlab.data import LabelledNodes, LinkSplit, block_model
from ffnlab.graph import pad, with_self_loops
from ffnlab.learning import (
    ForwardGNNOptions,
    backprop,
    early_stopping,
    forward_gnn,
    forward_gnn_answers,
    link_batch,
    link_question,
    members,
    node_batch,
    node_question,
)
from ffnlab.learning.forward_gnn.objectives import accuracy, rank_auc
from ffnlab.losses import masked
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from ffnlab.models.account import compiled_cost
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.scores import roc_auc
from ffnlab.studies.tuning import Tuned, numbers

__all__ = [
    "BLOCKS",
    "Budget",
    "Memory",
    "Way",
    "block_graphs",
    "by_backprop",
    "by_features",
    "by_forward",
    "links_by_backprop",
    "memory_of",
    "tuned",
]

# The card's: X = mean of the class + 4.5 N(0, I), parts of 64, 16 and 20 per cent.
BLOCKS = {"nodes": 600, "classes": 4, "inside": 0.03, "across": 0.006, "width": 32, "noise": 4.5}
PARTS = {"train": 384, "valid": 96}
DECAY = 5e-4  # of the parameters, added to gradients, as the authors have it on both sides


class Budget(NamedTuple):
    """What every way of learning has.

    Attributes:
      rates: of Adam, tried.
      limit: steps of a layer, or of all layers that learn at once.
      every, patience: see `ForwardGNNOptions`; both sides stop so.
      together: steps in one compiled loop.
    """

    rates: Sequence[float]
    limit: int
    every: int
    patience: int
    together: int


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of learning from a graph, or from a graph with hidden edges.

    Attributes:
      config: of the network.
      rule: (batch, rate) -> the rule; the rate may be traced.
      batch: (graph, seed) -> the one batch.
      asked: (graph, seed) -> what is asked on validation and on test.
      answers: batch -> a function (model, asked, depth) -> answers.
      scored: (graph, answers on validation, on test) -> two figures.
      steps: of a run.
      depths: networks of the first so many layers that are asked; they learned in one run.
    """

    config: GraphNetworkConfig
    rule: Callable[[PyTree, float | Array], Rule]
    batch: Callable[[Any, int], PyTree]
    asked: Callable[[Any, int], tuple[PyTree, PyTree]]
    answers: Callable[[PyTree], Callable[[GraphNetwork, PyTree, int], Array]]
    scored: Callable[[Any, np.ndarray, np.ndarray], tuple[float, float]]
    steps: int
    depths: tuple[int, ...]


def adam(rate: float | Array, options: ForwardGNNOptions | None = None) -> Any:
    """Adam with the decay in its gradient; clipped where layers are told from above in the loss."""
    is_clipped = options is not None and options.top_down == "loss"
    parts = [optax.clip_by_global_norm(1.0)] if is_clipped else []
    return optax.chain(*parts, optax.add_decayed_weights(DECAY), optax.adam(rate))


def accuracies(nodes: LabelledNodes, valid: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Accuracy on validation nodes and on test nodes, of scores."""
    pairs = ((valid, nodes.valid), (test, nodes.test))
    right = [np.mean((said.argmax(-1) == nodes.y)[part]) for said, part in pairs]
    return float(right[0]), float(right[1])


def areas(split: LinkSplit, valid: np.ndarray, test: np.ndarray) -> tuple[float, float]:
    """Areas under the curves of validation pairs and of test pairs."""
    return roc_auc(valid, split.valid.joined), roc_auc(test, split.test.joined)


def by_forward(
    options: ForwardGNNOptions,
    config: GraphNetworkConfig,
    budget: Budget,
    depths: tuple[int, ...] = (),
) -> Way:
    """Forward learning of a graph network.

    Args:
      options: the way; what ends layers is the budget's.
      config: of the network.
      budget: of the run.
      depths: see `Way`; all layers when empty.
    """
    ends = {"every": budget.every, "patience": budget.patience, "limit": budget.limit}
    options = dataclasses.replace(options, **ends)
    layers, loops = len(config.pairs), config.layer != "sage"
    has_pairs = options.objective == "links"

    def batch(graph: Any, seed: int) -> PyTree:
        if has_pairs:
            return link_batch(graph, loops=loops)
        return node_batch(graph, options, seed=seed, loops=loops)

    def asked(graph: Any, seed: int) -> tuple[PyTree, PyTree]:
        made = batch(graph, seed)
        valid = made.inputs if made.asked is None else made.asked
        if has_pairs:
            return valid, link_question(graph, loops=loops)
        return valid, node_question(graph, options, seed=seed, loops=loops)

    return Way(
        config,
        lambda like, rate: forward_gnn(like, options, adam(rate, options)),
        batch,
        asked,
        lambda like: forward_gnn_answers(like, options),
        areas if has_pairs else accuracies,
        budget.limit * (layers if options.top_down == "none" else 1),
        depths or (layers,),
    )


def called(model: GraphNetwork, inputs: Mapping[str, PyTree]) -> Float[Array, "n c"]:
    """A network's output."""
    return model(inputs["x"], inputs["graph"])


def by_backprop(config: GraphNetworkConfig, budget: Budget) -> Way:
    """Backpropagation through a graph network of scores, stopped early by the same validation."""

    def inputs(nodes: LabelledNodes) -> dict[str, PyTree]:
        graph = nodes.graph if config.layer == "sage" else with_self_loops(nodes.graph)
        return {"x": nodes.x, "graph": graph}

    def batch(nodes: LabelledNodes, seed: int) -> PyTree:
        parts = (np.where(p, nodes.y, -1).astype(np.int32) for p in (nodes.train, nodes.valid))
        return inputs(nodes), *parts

    def rule(like: PyTree, rate: float | Array) -> Rule:
        loss = lambda model, given: masked(functools.partial(called, model), given[:2])  # noqa: E731
        score = lambda model, given: accuracy(called(model, given[0]), given[2])  # noqa: E731
        ends = {"every": budget.every, "patience": budget.patience}
        return early_stopping(backprop(loss, adam(rate)), score, **ends)

    return Way(
        config,
        rule,
        batch,
        lambda nodes, seed: (inputs(nodes), inputs(nodes)),
        lambda like: lambda model, given, depth: called(model, given),
        accuracies,
        budget.limit * len(config.pairs),
        (len(config.pairs),),
    )


def links_by_backprop(config: GraphNetworkConfig, budget: Budget) -> Way:
    """Backpropagation of products of rows, whose edges are hidden, stopped early likewise."""

    def similarities(model: GraphNetwork, given: Mapping[str, PyTree]) -> Float[Array, "m"]:
        ends = called(model, given)[given["pairs"]]
        return jnp.sum(ends[:, 0] * ends[:, 1], -1)

    def shown(split: LinkSplit, part: str) -> dict[str, PyTree]:
        graph = with_self_loops(split.seen if part == "test" else split.graph)
        return {"x": split.x, "graph": graph, "pairs": getattr(split, part).ends}

    def batch(split: LinkSplit, seed: int) -> PyTree:
        given = [shown(split, part) for part in ("train", "valid")]
        return *given, *(p.joined.astype(np.int32) for p in (split.train, split.valid))

    def rule(like: PyTree, rate: float | Array) -> Rule:
        def loss(model: GraphNetwork, batch: PyTree) -> tuple[Array, dict[str, Array]]:
            wanted = batch[2].astype(jnp.float32)
            nats = optax.sigmoid_binary_cross_entropy(similarities(model, batch[0]), wanted)
            return nats.mean(), {}

        score = lambda model, batch: rank_auc(similarities(model, batch[1]), batch[3] > 0)  # noqa: E731
        ends = {"every": budget.every, "patience": budget.patience}
        return early_stopping(backprop(loss, adam(rate)), score, **ends)

    return Way(
        config,
        rule,
        batch,
        lambda split, seed: (shown(split, "valid"), shown(split, "test")),
        lambda like: lambda model, given, depth: similarities(model, given),
        areas,
        budget.limit * len(config.pairs),
        (len(config.pairs),),
    )


def block_graphs(seeds: Sequence[int], **changes: Any) -> list[LabelledNodes]:
    """Graphs of `BLOCKS` that are alike in size: what one lacks are loops of a node of no part."""
    found = [block_model(seed, **BLOCKS | PARTS | changes) for seed in seeds]
    edges = max(nodes.graph.num_edges for nodes in found) + 1

    def padded(nodes: LabelledNodes) -> LabelledNodes:
        graph = pad(nodes.graph, len(nodes.y) + 1, edges)
        x, *rest = (np.concatenate([part, np.zeros_like(part[:1])]) for part in nodes[1:])
        return LabelledNodes(graph, x, *rest)

    return [padded(nodes) for nodes in found]


def tuned(
    way: Way, budget: Budget, graphs: Sequence[Any], seeds: Sequence[int]
) -> dict[int, Tuned]:
    """What a way of learning reaches, by depth.

    Args:
      way: of learning.
      budget: rates tried, and steps.
      graphs: one for each seed, alike in size; the same object for all where only weights differ.
      seeds: of first weights, and of what a way draws for a graph.
    """
    count, is_shared = len(budget.rates) * len(seeds), all(g is graphs[0] for g in graphs)
    each = [
        way.batch(g, s) for g, s in zip(graphs, seeds[:1] if is_shared else seeds, strict=False)
    ]
    batch = each[0]
    if not is_shared:
        batch = jax.tree.map(lambda *leaves: np.stack(leaves * len(budget.rates)), *each)
    make = functools.partial(way.rule, each[0])
    rates = [rate for rate in budget.rates for _ in seeds]
    rule = members(make, count, vary={"rate": rates}, chunk=1, shared_batch=is_shared)
    keys = jax.vmap(jax.random.key)(jnp.tile(jnp.array(seeds), len(budget.rates)))
    start = jax.vmap(lambda key: way.config.make(key=key))(keys)
    batch = jax.tree.map(jnp.asarray, batch)  # checked and placed once
    outcome = train(
        rule,
        start,
        lambda position: batch,
        way.steps,
        key=jax.random.key(seeds[0]),
        options=LoopOptions(log_every=0, progress=False),
        together=budget.together,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {way.steps}")
    models = rule.model(outcome.state)
    del outcome
    return {
        depth: chosen(way, budget, depth, models, each[0], graphs, seeds) for depth in way.depths
    }


def chosen(
    way: Way,
    budget: Budget,
    depth: int,
    models: PyTree,
    like: PyTree,
    graphs: Sequence[Any],
    seeds: Sequence[int],
) -> Tuned:
    """The rate with the best mean validation, and its figures on test."""
    answers = jax.jit(way.answers(like), static_argnums=2)
    is_shared = all(graph is graphs[0] for graph in graphs)
    figures = np.zeros((len(budget.rates), len(seeds), 2))
    for j, (graph, seed) in enumerate(zip(graphs, seeds, strict=True)):
        valid, test = way.asked(graph, seeds[0] if is_shared else seed)
        for i in range(len(budget.rates)):
            k = i * len(seeds) + j
            model = jax.tree.map(lambda leaf, k=k: leaf[k], models)
            said = (np.asarray(answers(model, given, depth)) for given in (valid, test))
            figures[i, j] = way.scored(graph, *said)
    means = figures[..., 0].mean(1)
    best = int(means.argmax())
    tried = [({"rate": rate}, float(mean)) for rate, mean in zip(budget.rates, means, strict=True)]
    sizes = jax.eval_shape(lambda key: way.config.make(key=key), jax.random.key(0)).layers[:depth]
    scores = figures[best, :, 1].tolist()
    return Tuned(tried[best][0], tried, numbers(list(sizes)), 0, tuple(seeds), scores)


def by_features(graphs: Sequence[LabelledNodes], seeds: Sequence[int]) -> Tuned:
    """Nodes named by the nearest mean of features of a class, without looking at an edge."""

    def scored(nodes: LabelledNodes) -> float:
        classes = range(int(nodes.y.max()) + 1)
        means = [nodes.x[nodes.train & (nodes.y == c)].mean(0) for c in classes]
        apart = ((nodes.x[:, None] - np.stack(means)) ** 2).sum(-1)
        return float(np.mean((apart.argmin(-1) == nodes.y)[nodes.test]))

    return Tuned({}, [({}, 0.0)], 0, 0, tuple(seeds), [scored(nodes) for nodes in graphs])


class Memory(NamedTuple):
    """What a step needs.

    Attributes:
      temporary: bytes that its program keeps besides arguments and results.
      state: bytes of the rule's state.
    """

    temporary: int
    state: int


def memory_of(way: Way, nodes: LabelledNodes) -> Memory:
    """What a step of a way of learning needs, from its compiled program."""
    batch = way.batch(nodes, 0)
    rule, key = way.rule(batch, 1e-2), jax.random.key(0)
    state = jax.eval_shape(lambda key: rule.init(way.config.make(key=key), key), key)
    sizes = (
        leaf.size * (0 if leaf.dtype == key.dtype else leaf.dtype.itemsize)
        for leaf in jax.tree.leaves(state)
    )
    return Memory(compiled_cost(rule.step, state, batch).temporary, sum(sizes))
