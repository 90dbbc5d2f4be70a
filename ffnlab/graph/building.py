"""Graphs from graphs, on the host: structure alone, their values are the caller's."""

from collections.abc import Sequence

import numpy as np

from ffnlab.errors import FFNLabError
from ffnlab.graph.edges import Graph, on_host

__all__ = ["disjoint", "pad", "undirected", "with_self_loops"]


def ends(graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """(senders, receivers) on the host."""
    return on_host("graph", graph.senders), on_host("graph", graph.receivers)


def with_self_loops(graph: Graph) -> Graph:
    """The graph with an edge from each node to itself; those that have one get no second.

    Args:
      graph: n nodes, e edges.
    Returns:
      the same nodes, e + n edges less those that were loops already.

    >>> with_self_loops(Graph.make([1, 0], [1, 1], nodes=2)).senders.tolist()
    [0, 0, 1]
    """
    senders, receivers = ends(graph)
    missing = np.setdiff1d(np.arange(graph.num_nodes), senders[senders == receivers])
    joined = (np.concatenate([side, missing]) for side in (senders, receivers))
    return Graph.make(*joined, nodes=graph.num_nodes)


def undirected(graph: Graph) -> Graph:
    """The graph with every edge in both directions, each once.

    Args:
      graph: n nodes; edges in one direction, in both, or several times.
    Returns:
      the same nodes; an edge j -> i for each pair joined in either direction.

    >>> undirected(Graph.make([0, 0], [1, 1], nodes=2)).senders.tolist()
    [1, 0]
    """
    senders, receivers = ends(graph)
    both = np.stack([np.append(senders, receivers), np.append(receivers, senders)])
    return Graph.make(*np.unique(both, axis=1), nodes=graph.num_nodes)


def disjoint(graphs: Sequence[Graph]) -> Graph:
    """Graphs side by side as one, none joined to another: a batch of graphs.

    Args:
      graphs: any number of them.
    Returns:
      a graph whose nodes and edges are those of the first, then those of the second, …: values of
      nodes and edges are concatenated likewise.

    >>> one = Graph.make([0], [1], nodes=2)
    >>> disjoint([one, one]).senders.tolist()
    [0, 2]
    """
    sizes = [graph.num_nodes for graph in graphs]
    shifts = np.cumsum([0, *sizes])[:-1]
    sides = zip(*map(ends, graphs), strict=True) if graphs else ((), ())
    moved = [
        np.concatenate([np.zeros(0, int), *(a + b for a, b in zip(side, shifts, strict=True))])
        for side in sides
    ]
    return Graph.make(*moved, nodes=sum(sizes))


def pad(graph: Graph, nodes: int, edges: int) -> Graph:
    """The graph with nodes and edges added, so that one program serves graphs of several sizes.

    Nodes are added after the others, and edges after the others as loops of the last node: no edge
    joins what was added to what was there. Values are padded at their ends, with anything.

    Args:
      graph: at most `nodes` nodes and `edges` edges.
      nodes: of the result; more than the graph's where edges are to be added.
      edges: of the result.
    Raises:
      FFNLabError: the graph is larger, or there is no added node for the edges added.

    >>> pad(Graph.make([0], [1], nodes=2), nodes=3, edges=2).senders.tolist()
    [0, 2]
    """
    more_nodes, more_edges = nodes - graph.num_nodes, edges - graph.num_edges
    if more_nodes < 0 or more_edges < 0:
        raise FFNLabError(
            f"nodes={nodes}, edges={edges} are fewer than the graph's "
            f"{graph.num_nodes} and {graph.num_edges}"
        )
    if more_edges and not more_nodes:
        raise FFNLabError(
            f"edges={edges} adds {more_edges} edges and nodes={nodes} no node for them; "
            f"use at least nodes={nodes + 1}"
        )
    loops = np.full(more_edges, nodes - 1)
    return Graph.make(*(np.append(side, loops) for side in ends(graph)), nodes=nodes)
