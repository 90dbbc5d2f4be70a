"""Batches of forward learning, made on the host from a graph with classes, or with hidden edges.

Only classes of nodes to learn from are written into features and edges; those of validation nodes
are in `held_out` alone, and those of test nodes nowhere. With them as context is asked what
`node_question` makes.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.data import LabelledNodes
from ffnlab.data.links import LinkSplit
from ffnlab.errors import ConfigError, check_seed
from ffnlab.graph import Graph, with_self_loops
from ffnlab.learning.forward_gnn.checks import check_classes, check_nodes
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs
from ffnlab.learning.forward_gnn.options import AUTHORS, ForwardGNNOptions

__all__ = ["link_batch", "link_question", "node_batch", "node_question", "with_virtual_nodes"]


def with_virtual_nodes(
    graph: Graph, y: Int[np.ndarray, "n"], classes: int, *, both_ways: bool = True
) -> Graph:
    """The graph with a node for each class, joined with the nodes of it.

    Args:
      graph: n nodes, e edges.
      y: class of each node, -1 for those that are joined with none.
      classes: how many (C).
      both_ways: edges go both ways; else from nodes to virtual nodes.
    Raises:
      ValueError: y of another length, or out of -1..C - 1.
    Returns:
      n + C nodes, the virtual ones last; e edges, and one or two for each node with a class.

    >>> found = with_virtual_nodes(Graph.make([0], [1], nodes=2), np.array([-1, 0]), 1)
    >>> found.num_nodes, found.senders.tolist(), found.receivers.tolist()
    (3, [0, 2, 1], [1, 1, 2])
    """
    n = graph.num_nodes
    if y.shape != (n,) or not ((y >= -1) & (y < classes)).all():
        raise ValueError(f"y must be [{n}] of -1 to {classes - 1}, a class or none for each node")
    nodes = np.flatnonzero(y >= 0)
    virtual = n + y[nodes]
    more = ([nodes, virtual], [virtual, nodes]) if both_ways else ([nodes], [virtual])
    ends = (graph.senders, graph.receivers)
    joined = [np.concatenate([np.asarray(a), *b]) for a, b in zip(ends, more, strict=True)]
    return Graph.make(*joined, nodes=n + classes)


def node_batch(
    nodes: LabelledNodes,
    options: ForwardGNNOptions = AUTHORS,
    *,
    seed: int = 0,
    loops: bool = True,
) -> GraphBatch:
    """The one batch of a graph whose classes are learned.

    Args:
      nodes: the graph with features, classes and parts.
      options: of the rule.
      seed: of the features of virtual nodes, N(0, 1), and of wrong classes.
      loops: add self loops, which layers of "gcn" and "gat" expect, and "sage" does not.
    Returns:
      the batch: of "single_forward" one copy of the graph, else the true copy and one for each
      wrong class written, and for validation one for each class.
    Raises:
      ValueError: classes that are not 0..C - 1, one without a node to learn from, features that
        are no finite numbers, parts that overlap, or arrays that are not of the graph's nodes.
      ConfigError: more wrong classes than there are, or an objective of pairs.
    """
    classes, learned = checked(nodes, options, seed)
    held_out = np.where(nodes.valid, nodes.y, -1).astype(np.int32)
    copies = [learned]
    if options.objective != "single_forward":
        copies += wrong(learned, classes, options.negatives, seed)
    inputs = shown(nodes, copies, classes, options, seed, loops)
    asked = None
    if options.objective != "single_forward":
        asked = question(nodes, nodes.train, nodes.valid, classes, options, seed, loops)
    return GraphBatch(inputs, learned, held_out, asked)


def node_question(
    nodes: LabelledNodes,
    options: ForwardGNNOptions = AUTHORS,
    *,
    seed: int = 0,
    loops: bool = True,
) -> GraphInputs:
    """What `predict` is given for the classes of test nodes.

    Arguments and errors as `node_batch`, of the same seed. Where classes are written to nodes,
    those of validation nodes are known here too; scores of other nodes than those of the test mean
    nothing then.
    """
    classes, learned = checked(nodes, options, seed)
    if options.objective == "single_forward":
        return shown(nodes, [learned], classes, options, seed, loops)
    known = nodes.train | nodes.valid
    return question(nodes, known, nodes.test, classes, options, seed, loops)


def link_batch(split: LinkSplit, *, loops: bool = True) -> GraphBatch:
    """The one batch of a graph some of whose edges are hidden; `loops` as for `node_batch`.

    Raises:
      ValueError: `split` is no LinkSplit.
    """
    check_split(split)
    graph = with_self_loops(split.graph) if loops else split.graph
    given, asked = (
        GraphInputs(split.x, graph, None, part.ends) for part in (split.train, split.valid)
    )
    targets, held_out = (part.joined.astype(np.int32) for part in (split.train, split.valid))
    return GraphBatch(given, targets, held_out, asked)


def link_question(split: LinkSplit, *, loops: bool = True) -> GraphInputs:
    """What `predict` is given for the pairs of the test: edges of validation are seen now.

    Raises:
      ValueError: `split` is no LinkSplit.
    """
    check_split(split)
    graph = with_self_loops(split.seen) if loops else split.seen
    return GraphInputs(split.x, graph, None, split.test.ends)


def check_split(split: LinkSplit) -> None:
    """Raises ValueError for another thing."""
    if not isinstance(split, LinkSplit):
        raise ValueError(f"split is a {type(split).__name__}; what link_split gives is accepted")


def checked(
    nodes: LabelledNodes, options: ForwardGNNOptions, seed: int
) -> tuple[int, Int[np.ndarray, "n"]]:
    """(how many classes, those of nodes to learn from and -1 for the others)."""
    check_seed(seed)
    check_nodes(nodes)
    if options.objective == "links":
        raise ConfigError("objective='links' learns from pairs: link_batch")
    if not nodes.y.size or nodes.y.min() < 0:
        least = min(nodes.y.tolist(), default=None)
        raise ValueError(f"y has classes from {least}; 0 and more are accepted")
    classes = int(nodes.y.max()) + 1
    learned = np.where(nodes.train, nodes.y, -1).astype(np.int32)
    check_classes("y of train", learned, classes)
    if classes < 2 or options.negatives >= classes:
        raise ConfigError(
            f"negatives={options.negatives}, classes={classes}: two classes or more, and fewer "
            "negatives than classes, are accepted"
        )
    return classes, learned


def wrong(
    y: Int[np.ndarray, "n"], classes: int, count: int, seed: int
) -> list[Int[np.ndarray, "n"]]:
    """Wrong classes of the nodes with a class, each another one: all, or so many at random."""
    chance = np.random.default_rng((seed, 1)).random((len(y), classes))
    chance[np.arange(len(y)), np.maximum(y, 0)] = np.inf  # the true one comes last
    order = chance.argsort(axis=1)[:, : count or classes - 1]
    return [np.where(y >= 0, column, -1).astype(np.int32) for column in order.T]


def question(
    nodes: LabelledNodes,
    known: Bool[np.ndarray, "n"],
    asked: Bool[np.ndarray, "n"],
    classes: int,
    options: ForwardGNNOptions,
    seed: int,
    loops: bool,
) -> GraphInputs:
    """The graph once for each class, which all nodes that are asked have."""
    context = np.where(known, nodes.y, -1)
    copies = [np.where(asked, c, context).astype(np.int32) for c in range(classes)]
    return shown(nodes, copies, classes, options, seed, loops)


def shown(
    nodes: LabelledNodes,
    copies: Sequence[Int[np.ndarray, "n"]],
    classes: int,
    options: ForwardGNNOptions,
    seed: int,
    loops: bool,
) -> GraphInputs:
    """A graph with classes written into it in several ways, -1 for none."""
    looped = with_self_loops if loops else (lambda graph: graph)
    if not options.has_virtual:
        labels = np.stack([shares(y, classes) for y in copies])
        return GraphInputs(nodes.x, looped(nodes.graph), labels)
    virtual = np.random.default_rng(seed).normal(size=(classes, nodes.x.shape[1]))
    x = np.concatenate([nodes.x, virtual.astype(np.float32)])
    graphs = [
        looped(with_virtual_nodes(nodes.graph, y, classes, both_ways=options.both_ways))
        for y in copies
    ]
    if options.objective == "virtual_nodes":
        return GraphInputs(x, jax.tree.map(lambda *arrays: jnp.stack(arrays), *graphs))
    top = None
    if options.top_down == "input":
        top = shares(np.concatenate([copies[0], np.arange(classes)]), classes)[None]
    return GraphInputs(x, graphs[0], top)


def shares(y: Int[np.ndarray, "n"], classes: int) -> Float[np.ndarray, "n C"]:
    """1 for a node's class and 0 for the others; 1 / C for all where it has none."""
    found = np.full((len(y), classes), 1 / classes, np.float32)
    found[y >= 0] = np.eye(classes, dtype=np.float32)[y[y >= 0]]
    return found
