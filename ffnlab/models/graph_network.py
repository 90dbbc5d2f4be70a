"""A stack of layers on a graph, one row for each node, in three forms.

    "scores":     h <- phi(layer(h)), without phi after the last layer, whose rows are scores
    "layerwise":  h <- phi(layer(h / |h|)) in all layers: each passes on a direction, as layers that
                  learn one by one do (`ffnlab.learning.forward_gnn`)
    "top_down":   h_i <- phi(layer_i([h_{i-1} / |h_{i-1}|, h_{i+1} / |h_{i+1}|])): a layer reads the
                  one above it too, zeros on the way up

Layers may have any widths. Runs of alike ones can be scanned (`stacked`), which compiles one of
them however many there are; `unstacked` is the way back, and both keep every bit.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, row_norm, symmetric_norm
from ffnlab.layers import GAT, GCN, GraphSAGE
from ffnlab.layers.activations import ACTIVATIONS
from ffnlab.layers.norms import unit_rows
from ffnlab.layers.stacking import run_stack, stack_modules, unstack_modules

__all__ = ["GraphNetwork", "GraphNetworkConfig", "Repeated"]

NORMS: Mapping[str, Callable[[Graph], Array]] = MappingProxyType(
    {"gcn": symmetric_norm, "sage": row_norm}
)
LAYERS = (*NORMS, "gat")
FORMS = ("scores", "layerwise", "top_down")


@dataclasses.dataclass(frozen=True)
class GraphNetworkConfig:
    """Sizes and kind of a network on graphs.

    Attributes:
      sizes: widths from input to output, at least two; of "top_down" at least three, the last that
        of what the last layer reads from above, which may be 0.
      layer: "gcn", "sage" or "gat" (`ffnlab.layers`).
      heads: of "gat": side by side in hidden layers, whose widths they divide; a last layer of
        scores is the mean of as many.
      activation: name of the nonlinearity, a key of `ACTIVATIONS`.
      form: "scores", "layerwise" or "top_down"; the last two have hidden layers alone.
    """

    sizes: tuple[int, ...]
    layer: str = "gcn"
    heads: int = 1
    activation: str = "relu"
    form: str = "scores"

    def __post_init__(self) -> None:
        for name, accepted in (
            ("layer", LAYERS),
            ("activation", sorted(ACTIVATIONS)),
            ("form", FORMS),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {list(accepted)}")
        is_fed_back = self.form == "top_down"
        positive = self.sizes[:-1] if is_fed_back else self.sizes
        if len(self.sizes) < 2 + is_fed_back or min(positive) < 1 or min(self.sizes) < 0:
            what = "two or more positive widths"
            if is_fed_back:
                what = "three or more widths, the last at least 0, all but the last positive"
            raise ConfigError(f"sizes={self.sizes} must be {what}")
        if self.heads < 1 or (self.heads > 1 and self.layer != "gat"):
            raise ConfigError(f"heads={self.heads} must be 1 but for layer='gat', at least 1 there")
        hidden = self.sizes[1:] if self.form == "layerwise" else self.sizes[1:-1]
        if any(size % self.heads for size in hidden):
            raise ConfigError(f"heads={self.heads} must divide hidden widths {hidden}")

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Widths of each layer, (in, out)."""
        if self.form != "top_down":
            return list(itertools.pairwise(self.sizes))
        each = zip(self.sizes, self.sizes[1:], self.sizes[2:], strict=False)
        return [(below + above, own) for below, own, above in each]

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "GraphNetwork":
        """A network of these sizes, drawn."""
        return jax.tree.map(lambda leaf: leaf.astype(dtype), GraphNetwork(self, key=key))


class Repeated(nnx.Module):
    """Alike layers as one, to be scanned.

    Attributes:
      layer: a layer whose every array has a leading axis of `count`, logically "layers".
      count: how many there are (static).
    """

    def __init__(self, layers: list[nnx.Module]):
        self.layer = stack_modules(layers)
        self.count = len(layers)

    def apart(self) -> list[nnx.Module]:
        """The layers, each for itself."""
        return unstack_modules(self.layer, self.count)

    def __call__(self, x: Float[Array, "n d"], step: Callable) -> Float[Array, "n d"]:
        """x through all layers; `step(layer, x)` is one of them with what follows it."""
        return run_stack(self.layer, x, lambda layer, x, _: (step(layer, x), None))[0]


class GraphNetwork(nnx.Module):
    """Layers one after the other, in the form of the configuration.

    Attributes:
      layers: nnx.List of layers; of `Repeated` too where it is stacked.
      config: GraphNetworkConfig (static).
    """

    def __init__(self, config: GraphNetworkConfig, *, key: Array):
        """Draws every layer as it draws itself."""
        pairs = config.pairs
        keys = jax.random.split(key, len(pairs))
        self.layers = nnx.List(
            [
                make_layer(
                    config,
                    *pair,
                    key=k,
                    is_joined=config.form != "scores" or i + 1 < len(pairs),
                )
                for i, (pair, k) in enumerate(zip(pairs, keys, strict=True))
            ]
        )
        self.config = config

    def __call__(
        self, x: Float[Array, "n in"], graph: Graph, weights: Float[Array, "e"] | None = None
    ) -> Float[Array, "n out"]:
        """The network's output, a row for each node; of "top_down" on the way up.

        Args:
          x: [n, in].
          graph: an argument of what is compiled; with its self loops for "gcn" and "gat".
          weights: of the edges, [e], the same in all layers; for "gcn" `symmetric_norm(graph)` and
            for "sage" `row_norm(graph)` when None.
        Raises:
          ConfigError: weights for "gat", which finds its own.
        """
        phi, norm = ACTIVATIONS[self.config.activation], NORMS.get(self.config.layer)
        if norm is None and weights is not None:
            raise ConfigError("weights: layers of attention take none, they find their own")
        more = () if norm is None else (norm(graph) if weights is None else weights,)

        def step(layer: nnx.Module, x: Array) -> Array:
            return phi(layer(self.read(layer, x), graph, *more))

        *inner, last = self.layers
        for part in inner:
            x = part(x, step) if isinstance(part, Repeated) else step(part, x)
        return last(x, graph, *more) if self.config.form == "scores" else step(last, x)

    def read(
        self, layer: nnx.Module, below: Float[Array, "n a"], above: Array | None = None
    ) -> Float[Array, "n in"]:
        """What a layer reads, in the form of the network.

        Args:
          layer: one of the network's own, by itself.
          below: rows of the layer below it, or the input.
          above: of "top_down", those of the layer above it, [n, in - a]; zeros when None.
        """
        if self.config.form == "scores":
            return below
        rows = unit_rows(below)
        if self.config.form == "layerwise":
            return rows
        if above is None:
            return jnp.pad(rows, ((0, 0), (0, layer.d_in - rows.shape[1])))
        return jnp.concatenate([rows, unit_rows(above)], axis=1)

    def stacked(self) -> "GraphNetwork":
        """The network with every run of two or more alike layers, but the last, as one."""
        *inner, last = self.unstacked().layers
        runs = [list(run) for _, run in itertools.groupby(inner, key=alike)]
        return with_layers(self, [run[0] if len(run) == 1 else Repeated(run) for run in runs], last)

    def unstacked(self) -> "GraphNetwork":
        """The network with every layer for itself."""
        *inner, last = self.layers
        apart = (part.apart() if isinstance(part, Repeated) else [part] for part in inner)
        return with_layers(self, list(itertools.chain.from_iterable(apart)), last)


def make_layer(
    config: GraphNetworkConfig, d_in: int, d_out: int, *, key: Array, is_joined: bool
) -> nnx.Module:
    """One layer of the configured kind; heads side by side, or their mean."""
    if config.layer == "gat":
        return GAT(d_in, d_out, key=key, heads=config.heads, is_joined=is_joined)
    return {"gcn": GCN, "sage": GraphSAGE}[config.layer](d_in, d_out, key=key)


def alike(layer: nnx.Module) -> tuple:
    """What layers that can be one have in common."""
    leaves, structure = jax.tree.flatten(layer)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def with_layers(model: GraphNetwork, inner: list[nnx.Module], last: nnx.Module) -> GraphNetwork:
    """A copy of a network with other layers."""
    new = jax.tree.map(lambda leaf: leaf, model)
    new.layers = nnx.List(jax.tree.map(lambda leaf: leaf, [*inner, last]))
    return new
