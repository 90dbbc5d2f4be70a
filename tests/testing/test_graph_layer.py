"""`check_graph_layer` passes a plain layer, and fails one broken layer for each of its lines."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ffnlab.graph import aggregate
from ffnlab.testing import check_graph_layer


class Sums(nnx.Module):
    """The least that a layer on graphs is; the broken ones differ from it in one thing."""

    def __init__(self, key):
        self.scale = nnx.Param(jax.random.normal(key, (3,)), axes=("embed",))

    def __call__(self, x, graph):
        return x + aggregate(graph, None, x * self.scale[...].astype(x.dtype))


class Reduced(Sums):
    """One row for all."""

    def __call__(self, x, graph):
        return super().__call__(x, graph).sum(0, keepdims=True)


class Ordered(Sums):
    """Nodes know their place."""

    def __call__(self, x, graph):
        return super().__call__(x, graph) + jnp.arange(len(x))[:, None].astype(x.dtype)


class Normed(Sums):
    """All nodes are seen, the added ones too."""

    def __call__(self, x, graph):
        return super().__call__(x, graph) - x.mean(0).astype(x.dtype)


class Counted(Sums):
    """How many nodes there are makes a difference, but not below twelve of them."""

    def __call__(self, x, graph):
        return super().__call__(x, graph) * (2 if len(x) > 12 else 1)


class Wide(Sums):
    """float32 whatever comes."""

    def __call__(self, x, graph):
        return super().__call__(x.astype(jnp.float32), graph)


class Divided(Sums):
    """A root without a gradient at 0."""

    def __call__(self, x, graph):
        return x + jnp.sqrt(aggregate(graph, None, jnp.abs(x * self.scale[...].astype(x.dtype))))


BROKEN = {
    Reduced: "it gives a row for each node",
    Ordered: "nodes in another order give the same rows",
    Normed: "padding changes nothing",
    Counted: "graphs side by side are each as they are alone",
    Wide: "it takes bfloat16",
    Divided: "gradients are finite where nodes have no edge",
}


def test_a_plain_layer_passes():
    check_graph_layer(Sums, 3)


@pytest.mark.parametrize("kind", BROKEN)
def test_each_line_is_broken_by_one(kind):
    with pytest.raises(AssertionError, match=f"breaks its contract: {BROKEN[kind]}: "):
        check_graph_layer(kind, 3)
