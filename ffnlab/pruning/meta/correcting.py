"""What a metanetwork makes of a network: read as a graph, corrected, and written back."""

from typing import Any, TypeVar

import jax

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph
from ffnlab.models.meta_network import MetaNetwork, MetaNetworkConfig
from ffnlab.pruning.meta.graphs import Layout
from ffnlab.pruning.meta.layouts import layout_of

__all__ = ["check_fits", "correct", "corrected"]

M = TypeVar("M")


def check_fits(config: MetaNetworkConfig, layout: Layout) -> None:
    """Raises ConfigError where a metanetwork has other numbers of nodes or edges than a layout."""
    mine = (config.nodes, config.edges)
    wanted = (len(layout.defaults), layout.edge_numbers)
    if mine != wanted:
        raise ConfigError(
            f"the metanetwork has {mine[0]} numbers of a node and {mine[1]} of an edge; a model of "
            f"layout {layout.name!r} has {wanted[0]} and {wanted[1]}"
        )


def correct(network: MetaNetwork, model: M, graph: Graph) -> M:
    """The corrected model, inside what is compiled.

    Args:
      network: with as many numbers of nodes and edges as the model's layout.
      model: see `layout_of`; any part of it may be traced.
      graph: `layout_of(model).graph()`, an argument of what is compiled.
    """
    layout = layout_of(model)
    return layout.write(model, *network(*layout.read(model), graph))


run = jax.jit(correct)


def corrected(network: MetaNetwork, model: Any) -> Any:
    """The model with the weights that a metanetwork gives it; one compiled call.

    Args:
      network: a metanetwork.
      model: see `layout_of`; it is not changed.
    Raises:
      ConfigError: as `layout_of`; the metanetwork is of another layout.

    >>> from ffnlab.layers import MLP
    >>> from ffnlab.models import MetaNetworkConfig
    >>> net = MetaNetworkConfig(nodes=1, edges=1, width=4).make(key=jax.random.key(0))
    >>> corrected(net, MLP((4, 3, 2), key=jax.random.key(1))).sizes
    [4, 3, 2]
    """
    layout = layout_of(model)
    check_fits(network.config, layout)
    return run(network, model, layout.graph())
