"""A network of rows that are groups of repeated measurements: the encoder of RpHGNN.

A row holds groups x_g [K_g, d_g] one after the other (`ffnlab.graphs.precomputed`). Each group has
its K_g repetitions mixed to a few filters, which lie one after the other, and an MLP of its own;
groups are fused and an MLP gives scores of classes:

    f_g = W_g' x_g + b_g                 [filters, d_g], by a convolution of one tap over K_g; one
                                         filter where K_g = 1
    h_g = (drop . prelu . affine)^n1 (f_g)
    y   = affine ((drop . prelu . affine)^(n2 - 1) (fuse_g h_g))

(RpHGNN, arXiv 2310.14481, and its code's RpHGNNEncoder.) Inputs are dropped too. Affine maps are
drawn as theirs, Xavier normal with biases 0; slopes of PReLU begin at 0.25, one for each layer.
What differs: a key says that something is to be dropped, without one nothing is.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import Linear
from ffnlab.layers.activations import PReLU
from ffnlab.layers.dropout import dropout

__all__ = ["Branch", "GroupNetwork", "GroupNetworkConfig", "PReLUMap"]

INIT = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal")  # Xavier normal
FUSES = ("concat", "mean")


@dataclasses.dataclass(frozen=True)
class GroupNetworkConfig:
    """Sizes of a network of groups; defaults are the authors' where these are alike everywhere.

    Attributes:
      groups: (K_g, d_g) of each, in the order of a row; `Features.sizes` of `ffnlab.graphs`.
      classes: how many.
      hidden: width of all hidden layers.
      filters: of repetitions, where a group has more than one.
      group_layers: n1, of each group.
      fused_layers: n2, the last of which gives scores.
      fuse: "concat" or "mean".
      input_drop: rate of inputs that are dropped while learning.
      drop: of hidden units, after every hidden layer.
    """

    groups: tuple[tuple[int, ...], ...]
    classes: int
    hidden: int = 64
    filters: int = 2
    group_layers: int = 2
    fused_layers: int = 2
    fuse: str = "concat"
    input_drop: float = 0.0
    drop: float = 0.0

    def __post_init__(self) -> None:
        names = ("classes", "hidden", "filters", "group_layers", "fused_layers")
        at_least(1, **{name: getattr(self, name) for name in names})
        if not self.groups or any(len(g) != 2 or min(g) < 1 for g in self.groups):
            raise ConfigError(
                f"groups={self.groups} must be one or more pairs (repetitions, width), at least 1"
            )
        if self.fuse not in FUSES:
            raise ConfigError(f"fuse={self.fuse!r} is not one of {list(FUSES)}")
        for name in ("input_drop", "drop"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must lie in 0..1, below 1")

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return sum(k * d for k, d in self.groups)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "GroupNetwork":
        """A network of these sizes, drawn."""
        return GroupNetwork(self, key=key, dtype=dtype)


class PReLUMap(nnx.Module):
    """drop(prelu(x @ w + b)).

    Attributes:
      linear: Linear [in, out] with a bias.
      act: PReLU of one slope.
    """

    def __init__(self, d_in: int, d_out: int, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws the map."""
        self.linear = affine(d_in, d_out, key, dtype)
        self.act = PReLU(dtype=dtype)

    def __call__(
        self, x: Float[Array, "b in"], rate: float = 0.0, key: Array | None = None
    ) -> Float[Array, "b out"]:
        """The hidden units; none is dropped without a key."""
        return dropout(self.act(self.linear(x)), rate, key)


class Branch(nnx.Module):
    """What is made of one group: filters over its repetitions, and layers.

    Attributes:
      mix: Linear [K, filters] with a bias for each filter.
      layers: nnx.List of `PReLUMap`s, the first from filters * d.
    """

    def __init__(
        self, config: GroupNetworkConfig, place: int, *, key: Array, dtype: DTypeLike = jnp.float32
    ):
        """Draws the maps of the group at a place."""
        (repeats, width), keys = (
            config.groups[place],
            jax.random.split(key, config.group_layers + 1),
        )
        filters = 1 if repeats == 1 else config.filters
        self.mix = affine(repeats, filters, keys[0], dtype, axes=("repeats", "filters"))
        sizes = [filters * width, *[config.hidden] * config.group_layers]
        pairs = zip(sizes, sizes[1:], keys[1:], strict=False)
        self.layers = nnx.List([PReLUMap(a, b, key=k, dtype=dtype) for a, b, k in pairs])

    def __call__(
        self, x: Float[Array, "b k d"], rate: float = 0.0, key: Array | None = None
    ) -> Float[Array, "b h"]:
        """The group's hidden units."""
        mixed = self.mix(x.swapaxes(1, 2)).swapaxes(1, 2)  # a filter, then its d numbers
        h = mixed.reshape(len(x), -1)
        for i, layer in enumerate(self.layers):
            h = layer(h, rate, folded(key, i))
        return h


class GroupNetwork(nnx.Module):
    """Rows of groups [b, w] to scores of classes [b, classes].

    Attributes:
      groups: nnx.List of `Branch`es.
      layers: nnx.List of `PReLUMap`s, of the fused units.
      out: Linear [hidden, classes] with a bias.
      config: GroupNetworkConfig (static).
    """

    def __init__(self, config: GroupNetworkConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws every map."""
        count = len(config.groups)
        keys = jax.random.split(key, count + config.fused_layers)
        self.groups = nnx.List(
            [Branch(config, i, key=k, dtype=dtype) for i, k in enumerate(keys[:count])]
        )
        fused = config.hidden * (count if config.fuse == "concat" else 1)
        sizes = [fused, *[config.hidden] * (config.fused_layers - 1)]
        pairs = zip(sizes, sizes[1:], keys[count:], strict=False)
        self.layers = nnx.List([PReLUMap(a, b, key=k, dtype=dtype) for a, b, k in pairs])
        self.out = affine(sizes[-1], config.classes, keys[-1], dtype)
        self.config = config

    def __call__(self, x: Float[Array, "b w"], *, key: Array | None = None) -> Float[Array, "b c"]:
        """Scores of classes.

        Args:
          x: rows, of any floats; they are computed with in the dtype of the maps, where narrower.
          key: of what is dropped, while learning; None drops nothing.
        Raises:
          ConfigError: rows of another width.
        """
        config = self.config
        if x.ndim != 2 or x.shape[1] != config.width:
            raise ConfigError(
                f"x {list(x.shape)}: groups {config.groups} are rows of {config.width} numbers"
            )
        x = x.astype(jnp.promote_types(x.dtype, self.out.weight.dtype))
        x = dropout(x, config.input_drop, folded(key, 0))
        found, start = [], 0
        for i, (group, (k, d)) in enumerate(zip(self.groups, config.groups, strict=True)):
            part = x[:, start : start + k * d].reshape(len(x), k, d)
            found.append(group(part, config.drop, folded(key, i + 1)))
            start += k * d
        is_mean = config.fuse == "mean"
        h = jnp.mean(jnp.stack(found), axis=0) if is_mean else jnp.concatenate(found, axis=1)
        for i, layer in enumerate(self.layers):
            h = layer(h, config.drop, folded(key, len(found) + 1 + i))
        return self.out(h)


def affine(
    d_in: int,
    d_out: int,
    key: Array,
    dtype: DTypeLike,
    axes: tuple[str, str] = ("embed", "mlp"),
) -> Linear:
    """A map with a bias, drawn as the authors'; no layout cuts the small one of repetitions."""
    return Linear(d_in, d_out, key=key, axes=axes, bias=True, init=INIT, dtype=dtype)


def folded(key: Array | None, i: int) -> Array | None:
    """A key of its own for a place; None of none."""
    return None if key is None else jax.random.fold_in(key, i)
