"""Links found by the linear model on embeddings, by each embedding alone, and by a trained GCN.

Problems (a graph and a seed) and settings are members of one program, settings within problems. All
sides learn from the same pairs: the edges to learn from, and as many pairs drawn from all nodes,
some of which may be joined, as the authors have it. All keep their best parameters by hits on
validation pairs, and the setting with the best mean there; test pairs are scored with that alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab.data import LabelledNodes, LinkPairs, LinkSplit, link_split
from ffnlab.graph import Graph, pad, undirected, with_self_loops
from ffnlab.graphs import (
    View,
    embeddings,
    fitting_pairs,
    netinfof,
    pair_rows,
    scored_pairs,
    sparse_group,
    view_of,
)
from ffnlab.layers import MLP
from ffnlab.learning import backprop, early_stopping, members
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.scores import hits_at
from ffnlab.studies.tuning import Setting, Tuned, numbers

__all__ = ["Budget", "Problem", "across", "by_each", "by_embeddings", "by_network", "prepared"]

NEVER = 10**6  # scores until a run would rest
VIEW = "alone"  # the one embedding of a problem: names are part of what is compiled
CLASSES = 32  # width of what a GCN gives for a node


class Budget(NamedTuple):
    """What both sides have.

    Attributes:
      combined: settings of the linear model, l1 and l2.
      network: as many of the GCN, rate and decay.
      steps: of the linear model, each one of L-BFGS and one of proximal gradient.
      epochs: of the GCN.
      k: of Hits@k.
      hidden: channels of the GCN.
    """

    combined: Sequence[Setting]
    network: Sequence[Setting]
    steps: int
    epochs: int
    k: int
    hidden: int


class Problem(NamedTuple):
    """A graph with hidden edges, and what is told of it before training.

    Attributes:
      case: what graph it is.
      seed: of the split and of all that is drawn.
      split: its parts.
      views: embeddings of the part to learn from.
      scores: of each view, of pairs to choose by.
      plain: the same of views without a compatibility.
    """

    case: str
    seed: int
    split: LinkSplit
    views: Mapping[str, View]
    scores: Mapping[str, float]
    plain: Mapping[str, float]


def prepared(
    case: str, nodes: LabelledNodes, seed: int, *, dimension: int, walks: int = 200
) -> Problem:
    """Splits a graph 70/10/20 and embeds what is to learn from.

    Args:
      case: its name.
      nodes: the graph, with the features that are embedded.
      seed: of everything.
      dimension: of embeddings.
      walks: from each node.
    """
    split = link_split(nodes, seed, valid=0.1, test=0.2)
    pairs = fitting_pairs(split.graph, seed)
    found = embeddings(split.x, split.graph, dimension=dimension, walks=walks, seed=seed)
    views = {name: view_of(z, pairs) for name, z in found.items()}
    batch = [scored_pairs(split, seed)]
    plain = {name: View(view.z, view.z) for name, view in views.items()}
    reports: list[Any] = [netinfof()(each, batch, progress=False) for each in (views, plain)]
    looks = (report.scores for report in reports)
    return Problem(case, seed, split, views, *looks)


def across(
    seed: int = 0, *, group: int = 100, degree: int = 6, noise: float = 0.5
) -> LabelledNodes:
    """Two groups of nodes that are joined to each other alone, told by a noisy direction.

    Args:
      seed: of everything.
      group: nodes of each.
      degree: edges of each node of the first.
      noise: deviation of the features around their group's.
    """
    random = np.random.default_rng(seed)
    y = np.repeat([0, 1], group)
    x = np.eye(2)[y] + noise * random.normal(size=(2 * group, 2))
    ends = np.repeat(np.arange(group), degree), random.integers(group, 2 * group, group * degree)
    none = np.zeros(2 * group, bool)
    graph = undirected(Graph.make(*ends, nodes=2 * group))
    return LabelledNodes(graph, x.astype(np.float32), y.astype(np.int32), none, none, none)


def learned_pairs(
    problem: Problem, count: int, valid: int
) -> tuple[Int[np.ndarray, "p 2"], Bool[np.ndarray, "p"], LinkPairs]:
    """(pairs to learn from, which are edges, pairs to choose by), of the same sizes for all."""
    random = np.random.default_rng([problem.seed, 7])
    known = problem.split.train.ends[problem.split.train.joined]
    known = known[random.permutation(len(known))[:count]]
    others = random.integers(len(problem.split.x), size=(count, 2)).astype(np.int32)
    asked = problem.split.valid
    half = [asked.ends[asked.joined == is_edge][:valid] for is_edge in (True, False)]
    return (
        np.concatenate([known, others]),
        np.repeat([True, False], count),
        LinkPairs(np.concatenate(half), np.repeat([True, False], valid)),
    )


def sizes_of(problems: Sequence[Problem]) -> tuple[int, int]:
    """Edges to learn from and to choose by that every problem has."""
    parts = [(p.split.train.joined.sum(), p.split.valid.joined.sum()) for p in problems]
    count, valid = np.min(parts, axis=0).tolist()
    return count, valid


def hits(scores: Float[Array, "p"], joined: Bool[Array, "p"], k: int) -> Float[Array, ""]:
    """`ffnlab.scores.hits_at` of scores that may be traced."""
    best = jnp.sort(jnp.where(joined, -jnp.inf, scores))[-k]
    return jnp.sum(joined & (scores > best)) / jnp.sum(joined)


def runs(
    make: Callable[..., Rule],
    settings: Sequence[Setting],
    start: PyTree,
    batches: Sequence[PyTree],
    steps: int,
) -> PyTree:
    """The best models of all settings of all problems, leaves [problems, settings, …].

    Args:
      make: setting -> the rule, called by the names of a setting.
      settings: tried.
      start: model that all start from.
      batches: one for each problem, alike in shape.
      steps: of every run.
    """
    vary = {name: [setting[name] for setting in settings] for name in settings[0]}
    inner = lambda: members(make, len(settings), vary=vary, chunk=1)  # noqa: E731
    rule = members(inner, len(batches), chunk=1, shared_batch=False)
    count = (len(batches), len(settings))
    models = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (*count, *leaf.shape)), start)
    batch = jax.tree.map(lambda *leaves: jnp.stack(list(map(jnp.asarray, leaves))), *batches)
    outcome = train(
        rule,
        models,
        lambda position: batch,
        steps,
        key=jax.random.key(0),
        options=LoopOptions(log_every=0, progress=False),
        together=min(steps, 10),
    )
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return rule.model(outcome.state)


def at(models: PyTree, i: int, j: int) -> PyTree:
    """The model of a problem at a setting."""
    return jax.tree.map(lambda leaf: leaf[i, j], models)


def by_each(problems: Sequence[Problem], budget: Budget) -> dict[str, dict[str, Tuned]]:
    """What the linear model reaches on each embedding alone, by its name and then by case.

    All are members of one program. Arguments as those of `by_embeddings`.
    """
    alone = {(name, p.case): f"{name} of {p.case}" for name in problems[0].views for p in problems}
    each = [
        p._replace(case=alone[name, p.case], views={VIEW: p.views[name]})
        for name in problems[0].views
        for p in problems
    ]
    found: dict[str, dict[str, Tuned]] = {name: {} for name in problems[0].views}
    reached = by_embeddings(each, budget)
    for (name, case), label in alone.items():
        found[name][case] = reached[label]
    return found


def by_embeddings(problems: Sequence[Problem], budget: Budget) -> dict[str, Tuned]:
    """What the linear model reaches on all embeddings of a problem, by case.

    Args:
      problems: graphs of one size, every case with the same seeds.
      budget: settings and steps.
    """
    count, valid = sizes_of(problems)
    rows_of = jax.jit(pair_rows)

    def batch(problem: Problem) -> tuple:
        ends, joined, asked = learned_pairs(problem, count, valid)
        views = problem.views
        shown = rows_of(views, jnp.asarray(ends)), jnp.asarray(joined, jnp.int32)
        return *shown, rows_of(views, jnp.asarray(asked.ends)), jnp.asarray(asked.joined)

    def score(model: MLP, batch: tuple) -> Float[Array, ""]:
        return hits(model(batch[2])[:, 0], batch[3], budget.k)

    def make(l1: float | Array, l2: float | Array) -> Rule:
        rule = sparse_group(len(problems[0].views), l1=l1, l2=l2)
        return early_stopping(rule, score, every=1, patience=NEVER)

    wide = sum(view.z.shape[1] for view in problems[0].views.values())
    start = MLP((wide, 1), key=jax.random.key(0), init=jax.nn.initializers.zeros)
    batches = [batch(problem) for problem in problems]
    models = runs(make, budget.combined, start, batches, budget.steps)
    call = jax.jit(lambda model, rows: model(rows)[:, 0])

    def judged(i: int, j: int, pairs: LinkPairs) -> float:
        said = call(at(models, i, j), rows_of(problems[i].views, jnp.asarray(pairs.ends)))
        return hits_at(budget.k, np.asarray(said), pairs.joined)

    return chosen(problems, budget.combined, judged, numbers(start))


def by_network(problems: Sequence[Problem], budget: Budget) -> dict[str, Tuned]:
    """What a GCN of two layers reaches, trained end to end on products of its rows, by case."""
    count, valid = sizes_of(problems)
    graphs = [with_self_loops(p.split.graph) for p in problems]
    edges, nodes = max(g.num_edges for g in graphs) + 1, len(problems[0].split.x) + 1

    def inputs(i: int) -> dict[str, PyTree]:
        x = np.pad(problems[i].split.x, ((0, 1), (0, 0)))
        return {"x": jnp.asarray(x), "graph": pad(graphs[i], nodes, edges)}

    def batch(i: int) -> tuple:
        ends, joined, asked = learned_pairs(problems[i], count, valid)
        return inputs(i), ends, joined, asked.ends, asked.joined

    def said(model: GraphNetwork, shown: Mapping[str, PyTree], ends: Array) -> Float[Array, "p"]:
        z = model(**shown)[ends]
        return jnp.sum(z[:, 0] * z[:, 1], axis=-1)

    def loss(model: GraphNetwork, batch: tuple) -> tuple[Array, dict[str, Array]]:
        wanted = batch[2].astype(jnp.float32)
        return optax.sigmoid_binary_cross_entropy(said(model, *batch[:2]), wanted).mean(), {}

    def score(model: GraphNetwork, batch: tuple) -> Float[Array, ""]:
        return hits(said(model, batch[0], batch[3]), batch[4], budget.k)

    def make(rate: float | Array, decay: float | Array) -> Rule:
        optimizer = optax.chain(optax.add_decayed_weights(decay), optax.adam(rate))
        return early_stopping(backprop(loss, optimizer), score, every=2, patience=NEVER)

    config = GraphNetworkConfig((problems[0].split.x.shape[1], budget.hidden, CLASSES))
    start = config.make(key=jax.random.key(problems[0].seed))
    batches = [batch(i) for i in range(len(problems))]
    models = runs(make, budget.network, start, batches, budget.epochs)
    call = jax.jit(said)

    def judged(i: int, j: int, pairs: LinkPairs) -> float:
        found = call(at(models, i, j), batches[i][0], jnp.asarray(pairs.ends))
        return hits_at(budget.k, np.asarray(found), pairs.joined)

    return chosen(problems, budget.network, judged, numbers(start))


def chosen(
    problems: Sequence[Problem],
    settings: Sequence[Setting],
    judged: Callable[[int, int, LinkPairs], float],
    size: int,
) -> dict[str, Tuned]:
    """By case, the setting of the best mean hits on pairs to choose by, and its hits on test."""
    found = {}
    for case in dict.fromkeys(problem.case for problem in problems):
        own = [i for i, problem in enumerate(problems) if problem.case == case]
        means = [
            float(np.mean([judged(i, j, problems[i].split.valid) for i in own]))
            for j in range(len(settings))
        ]
        best = int(np.argmax(means))
        found[case] = Tuned(
            settings[best],
            list(zip(settings, means, strict=True)),
            size,
            0,
            tuple(problems[i].seed for i in own),
            [judged(i, best, problems[i].split.test) for i in own],
        )
    return found
