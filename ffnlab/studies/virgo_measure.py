"""Starts of deep graph networks: how large signals are in them, and what is learned from there.

Starts, rates and seeds are members of one program. A start's rate is the one with the best mean
accuracy on validation nodes, the same for all seeds; every start tries as many.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key, PyTree

from ffnlab.data import LabelledNodes, block_model
from ffnlab.graph import Graph, pad, undirected, with_self_loops
from ffnlab.graphs import Signals, hop_norms, layer_signals, redrawn, variances
from ffnlab.learning import backprop, early_stopping, members
from ffnlab.losses import masked
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from ffnlab.parallel import LoopOptions, train
from ffnlab.studies.tuning import Tuned, numbers

__all__ = [
    "BLOCKS",
    "CLASSES",
    "FEATURES",
    "Budget",
    "Raced",
    "block_graphs",
    "raced",
    "signals",
]

# The card's: 400 nodes of mean degree 4, 64 features, five classes.
NODES, DEGREE, WIDTH, CLASSES = 400, 4, 64, 5
FEATURES = ("sparse, not negative", "centred")
# The card's block model: four classes of about 100, features half a class and half noise.
BLOCKS = {"nodes": 400, "classes": 4, "inside": 0.08, "across": 0.01, "width": 32}
PARTS = {"train": 80, "valid": 80}


class Budget(NamedTuple):
    """What every start has.

    Attributes:
      rates: of Adam, tried.
      steps: of a run.
      every: steps between scores on validation nodes, of which the best parameters are kept.
      together: steps in one compiled loop.
    """

    rates: Sequence[float]
    steps: int
    every: int
    together: int


class Raced(NamedTuple):
    """What a start reached.

    Attributes:
      tuned: with the parameters and the rate of the best validation.
      losses: of the first rate after the last step, by seed.
      scores: test accuracy there, by seed.
    """

    tuned: Tuned
    losses: Sequence[float]
    scores: Sequence[float]


def by_name(model: GraphNetwork, batch: tuple) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the nodes that are learned from."""
    return masked(lambda inputs: model(**inputs), batch[:2])


def accuracy(model: GraphNetwork, batch: tuple) -> Float[Array, ""]:
    """Of the nodes held out."""
    found, wanted = model(**batch[0]).argmax(-1), batch[2]
    counted = wanted >= 0
    return jnp.sum(counted & (found == wanted)) / jnp.maximum(counted.sum(), 1)


def random_nodes(kind: str, seed: int) -> tuple[dict[str, PyTree], Array]:
    """A random graph with features of a kind and classes that mean nothing.

    Args:
      kind: one of `FEATURES`.
      seed: of everything.
    """
    random = np.random.default_rng(seed)
    ends = random.integers(NODES, size=(2, NODES * DEGREE // 2))
    x = random.normal(size=(NODES, WIDTH))
    if kind == FEATURES[0]:
        x = random.random(x.shape) * (random.random(x.shape) < 0.1)
    graph = with_self_loops(undirected(Graph.make(*ends, nodes=NODES)))
    y = random.integers(CLASSES, size=NODES)
    return {"x": jnp.asarray(x, jnp.float32), "graph": graph}, jnp.asarray(y, jnp.int32)


def signals(
    starts: Sequence[str],
    kind: str,
    seeds: Sequence[int],
    *,
    layer: str = "gcn",
    halved: bool = False,
    hidden: int = 128,
    depth: int = 8,
) -> Signals:
    """Mean squares in every layer, [starts, seeds, layers].

    Args:
      starts: names of `ffnlab.graphs.STARTS`.
      kind: of features.
      seeds: of weights; the first is that of the graph.
      layer: of the network.
      halved: see `ffnlab.graphs.virgo`.
      hidden, depth: of the network.
    """
    config = GraphNetworkConfig((WIDTH, *[hidden] * (depth - 1), CLASSES), layer)
    batch, model = random_nodes(kind, seeds[0]), config.make(key=jax.random.key(0))
    norms = hop_norms(**batch[0], hops=depth)
    share = 0.5 if halved else 1.0
    each = jnp.stack([share * variances(start, config.pairs, norms) for start in starts])
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))

    @jax.jit
    def look(each: Array, keys: Key[Array, "s"], batch: PyTree) -> Signals:
        one = lambda variance, key: layer_signals(redrawn(model, variance, key), batch, by_name)  # noqa: E731
        return jax.vmap(lambda variance: jax.vmap(lambda key: one(variance, key))(keys))(each)

    return jax.tree.map(np.asarray, look(each, keys, batch))


def block_graphs(seeds: Sequence[int], **changes: Any) -> list[LabelledNodes]:
    """Graphs of `BLOCKS` with loops, alike in size: what one lacks are loops of a node of no part.

    Features are half the class and half noise of U(0, 1) of each, as the card has them.
    """
    given = BLOCKS | PARTS | changes
    found = []
    for seed in seeds:
        nodes = block_model(seed, **given)
        random = np.random.default_rng([seed, 1])
        told = nodes.y[:, None] == np.arange(given["width"])
        x = 0.5 * told + random.random(told.shape, np.float32)
        found.append(nodes._replace(x=x, graph=with_self_loops(nodes.graph)))
    return found


def alike(graphs: Sequence[LabelledNodes]) -> list[LabelledNodes]:
    """The same graphs, padded to one size."""
    edges = max(nodes.graph.num_edges for nodes in graphs) + 1

    def padded(nodes: LabelledNodes) -> LabelledNodes:
        graph = pad(nodes.graph, len(nodes.y) + 1, edges)
        x, *rest = (np.concatenate([part, np.zeros_like(part[:1])]) for part in nodes[1:])
        return LabelledNodes(graph, x, *rest)

    return [padded(nodes) for nodes in graphs]


def batch_of(nodes: LabelledNodes) -> tuple:
    """(inputs, classes to learn from, classes held out, classes to test on); others negative."""
    parts = (nodes.train, nodes.valid, nodes.test)
    wanted = (np.where(part, nodes.y, -1).astype(np.int32) for part in parts)
    return {"x": nodes.x, "graph": nodes.graph}, *wanted


def raced(
    starts: Sequence[str],
    config: GraphNetworkConfig,
    graphs: Sequence[LabelledNodes],
    seeds: Sequence[int],
    budget: Budget,
) -> dict[str, Raced]:
    """What networks learn from each start.

    Args:
      starts: names of `ffnlab.graphs.STARTS`.
      config: of the network.
      graphs: with loops, one for each seed; the same object for all where only weights differ.
      seeds: of weights.
      budget: rates tried, and steps.
    """
    is_shared = all(nodes is graphs[0] for nodes in graphs)
    each = [batch_of(n) for n in (graphs[:1] if is_shared else alike(graphs))]
    rates = [r for _ in starts for r in budget.rates for _ in seeds]
    models = drawn(starts, config, graphs, seeds, len(budget.rates))
    batch = each[0]
    if not is_shared:
        repeats = len(rates) // len(seeds)
        batch = jax.tree.map(lambda *leaves: np.stack(leaves * repeats), *each)
    batch = jax.tree.map(jnp.asarray, batch)

    def rule_at(rate: float | Array) -> Any:
        patience = budget.steps // budget.every + 1  # never
        inner = backprop(by_name, optax.adam(rate))
        return early_stopping(inner, accuracy, every=budget.every, patience=patience)

    rule = members(rule_at, len(rates), vary={"rate": rates}, chunk=1, shared_batch=is_shared)
    outcome = train(
        rule,
        models,
        lambda position: batch,
        budget.steps,
        key=jax.random.key(seeds[0]),
        options=LoopOptions(log_every=0, progress=False),
        together=budget.together,
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {budget.steps}")
    both = {"best": outcome.state.best, "last": outcome.state.inner.model}
    figures = {name: judged(found, batch, is_shared) for name, found in both.items()}
    shape = (len(starts), len(budget.rates), len(seeds), 3)
    best, last = (figures[name].reshape(shape) for name in ("best", "last"))
    size = numbers(jax.eval_shape(lambda key: config.make(key=key), jax.random.key(0)))
    return {
        start: Raced(
            chosen(best[i], budget, seeds, size),
            last[i, 0, :, 0].tolist(),
            last[i, 0, :, 2].tolist(),
        )
        for i, start in enumerate(starts)
    }


def drawn(
    starts: Sequence[str],
    config: GraphNetworkConfig,
    graphs: Sequence[LabelledNodes],
    seeds: Sequence[int],
    repeats: int,
) -> GraphNetwork:
    """First weights of all members, in order of starts, then rates, then seeds."""
    depth = len(config.pairs)
    norms = [hop_norms(jnp.asarray(nodes.x), nodes.graph, hops=depth) for nodes in graphs]
    each = [[variances(start, config.pairs, n) for n in norms] for start in starts]
    variance = jnp.repeat(jnp.array(each), repeats, axis=0).reshape(-1, depth)
    keys = jnp.tile(jnp.array(seeds), len(starts) * repeats)
    model = config.make(key=jax.random.key(0)).stacked()
    return jax.vmap(lambda v, seed: redrawn(model, v, jax.random.key(seed)))(variance, keys)


def judged(models: PyTree, batch: tuple, is_shared: bool) -> np.ndarray:
    """(loss on nodes learned from, accuracy on those held out, on test nodes) of members."""

    @jax.jit
    def all_of(models: PyTree, batch: tuple) -> Array:
        def one(model: GraphNetwork, batch: tuple) -> Array:
            scores = [accuracy(model, (batch[0], None, wanted)) for wanted in batch[2:]]
            return jnp.stack([by_name(model, batch)[0], *scores])

        if is_shared:
            return jax.lax.map(lambda model: one(model, batch), models)
        return jax.lax.map(lambda both: one(*both), (models, batch))

    return np.asarray(all_of(models, batch))


def chosen(figures: np.ndarray, budget: Budget, seeds: Sequence[int], size: int) -> Tuned:
    """The rate with the best mean validation, [rates, seeds, 3], and its test scores."""
    means = figures[..., 1].mean(1)
    tried = [({"rate": rate}, float(mean)) for rate, mean in zip(budget.rates, means, strict=True)]
    best = int(means.argmax())
    return Tuned(tried[best][0], tried, size, 0, tuple(seeds), figures[best, :, 2].tolist())
