"""The contract of a layer on graphs, beside that of any layer: which nodes are joined is all that
counts, not their order, nor what else is in the batch."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.graph import Graph, disjoint, pad, with_self_loops
from ffnlab.testing.compiling import counted
from ffnlab.testing.contract import hold, need

__all__ = ["check_graph_layer"]

Call = Callable[[nnx.Module, Array, Graph], Array]
NODES, EDGES = 9, 20
TOLERANCE = 1e-5  # sums of a few float32 products in another order
# bfloat16 has 8 bits: a few roundings of numbers of size 1.
HALF = 0.05


def drawn_graph(seed: int) -> Graph:
    """Edges with duplicates, of which none joins the last two nodes; loops at all but those."""
    random = np.random.default_rng(seed)
    ends = random.integers(NODES - 2, size=(2, EDGES))
    loops = np.arange(NODES - 2)
    return Graph.make(*np.concatenate([ends, [loops, loops]], axis=1), nodes=NODES)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer under check.

    Attributes:
      make: the layer of a key.
      width: channels in.
      call: how it is applied.
      tolerance: of outputs, over their largest.
    """

    make: Callable[[Array], nnx.Module]
    width: int
    call: Call
    tolerance: float

    @functools.cached_property
    def layer(self) -> nnx.Module:
        """The layer of a fixed key."""
        return self.make(jax.random.key(0))

    @functools.cached_property
    def run(self) -> Call:
        """How it is applied, jitted."""
        return jax.jit(self.call)

    def x(self, seed: int, nodes: int = NODES) -> Float[Array, "n width"]:
        """Features."""
        return jax.random.normal(jax.random.key(seed), (nodes, self.width))

    def far(self, found: Array, want: Array) -> float:
        """How far outputs lie apart, over the largest wanted and 1; infinite where it is NaN."""
        gap = np.abs(np.asarray(found, np.float64) - np.asarray(want, np.float64)).max()
        return float(np.nan_to_num(gap, nan=np.inf)) / max(1.0, float(np.abs(want).max()))


def check_graph_layer(
    make: Callable[[Array], nnx.Module],
    width: int,
    *,
    call: Call = lambda layer, x, graph: layer(x, graph),
    tolerance: float = TOLERANCE,
) -> None:
    """Holds a layer on graphs against their contract; takes a second or two.

    Args:
      make: key -> the layer.
      width: channels that it reads.
      call: (layer, x [n, width], graph) -> y [n, …]; of other graphs of as many nodes and edges
        too.
      tolerance: of outputs in float32, over their largest.
    Raises:
      AssertionError: names the line of the contract that is broken, and how.

    >>> from ffnlab.layers import GCN
    >>> check_graph_layer(lambda key: GCN(3, 2, key=key), 3)
    """
    lines = (
        it_gives_a_row_for_each_node,
        nodes_in_another_order_give_the_same_rows,
        padding_changes_nothing,
        graphs_side_by_side_are_each_as_they_are_alone,
        it_takes_bfloat16,
        gradients_are_finite_where_nodes_have_no_edge,
        another_graph_of_the_same_sizes_compiles_nothing,
    )
    hold("the layer on graphs", lines, Case(make, width, call, tolerance))


def it_gives_a_row_for_each_node(case: Case) -> None:
    y = case.run(case.layer, case.x(1), drawn_graph(0))
    need(y.shape[0] == NODES, f"of {NODES} nodes its output has shape {y.shape}")
    need(bool(jnp.isfinite(y).all()), "its output is not finite")
    alone = case.run(case.layer, case.x(1, 1), with_self_loops(Graph.make([], [], nodes=1)))
    need(alone.shape[0] == 1 and bool(jnp.isfinite(alone).all()), "not so of a single node")


def nodes_in_another_order_give_the_same_rows(case: Case) -> None:
    graph, x = drawn_graph(0), case.x(1)
    order = np.random.default_rng(3).permutation(NODES)
    where = np.argsort(order)
    ends = (where[np.asarray(side)] for side in (graph.senders, graph.receivers))
    found = case.run(case.layer, x[order], Graph.make(*ends, nodes=NODES))
    far = case.far(found, case.run(case.layer, x, graph)[order])
    need(far < case.tolerance, f"they lie {far:.2g} apart")


def padding_changes_nothing(case: Case) -> None:
    graph, x = drawn_graph(0), case.x(1)
    more = jnp.concatenate([x, 100 * case.x(2, 3)])
    found = case.run(case.layer, more, pad(graph, NODES + 3, graph.num_edges + 4))
    far = case.far(found[:NODES], case.run(case.layer, x, graph))
    need(far < case.tolerance, f"rows lie {far:.2g} from those without")


def graphs_side_by_side_are_each_as_they_are_alone(case: Case) -> None:
    graphs, xs = [drawn_graph(i) for i in range(2)], [case.x(i) for i in range(2)]
    found = case.run(case.layer, jnp.concatenate(xs), disjoint(graphs))
    pairs = zip(xs, graphs, strict=True)
    alone = jnp.concatenate([case.run(case.layer, x, graph) for x, graph in pairs])
    far = case.far(found, alone)
    need(far < case.tolerance, f"they lie {far:.2g} apart")


def it_takes_bfloat16(case: Case) -> None:
    graph, x = drawn_graph(0), case.x(1).astype(jnp.bfloat16)
    found = case.run(case.layer, x, graph)
    need(found.dtype == jnp.bfloat16, f"of bfloat16 it gives {found.dtype}")
    far = case.far(found, case.run(case.layer, x.astype(jnp.float32), graph))
    need(far < HALF, f"its rows lie {far:.2g} from those of float32")


def gradients_are_finite_where_nodes_have_no_edge(case: Case) -> None:
    trained, fixed = tree.trained(case.layer)

    def total(trained: nnx.Module, x: Array, graph: Graph) -> Array:
        return (case.call(tree.combine(trained, fixed), x, graph).astype(jnp.float32) ** 2).sum()

    gradient = jax.jit(jax.grad(total, (0, 1)))
    for graph in (drawn_graph(0), Graph.make([], [], nodes=NODES)):
        for x in (case.x(1), jnp.zeros((NODES, case.width))):
            found = jax.tree.leaves(gradient(trained, x, graph))
            finite = all(bool(jnp.isfinite(leaf).all()) for leaf in found)
            need(finite, f"they are not, with {graph.num_edges} edges")


def another_graph_of_the_same_sizes_compiles_nothing(case: Case) -> None:
    graphs = [drawn_graph(i) for i in range(2)]
    x = case.x(1)
    case.run(case.layer, x, graphs[0])
    with counted() as count:
        case.run(case.layer, x, graphs[1])
    need(count.programs == 0, f"{count.programs} programs were compiled")
