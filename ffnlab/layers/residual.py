"""A residual block of convolutions whose spatial step is an operation chosen by name.

    y = relu(expand(spatial(reduce(x))) + shortcut(x))

(arXiv 1512.03385.) `reduce` and `expand` are 1 x 1 convolutions with a batch norm (a bottleneck);
without `reduce` and with 3 x 3 in `expand` it is a basic block.
"""

from collections.abc import Callable
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.batch_norm import BatchNorm
from ffnlab.layers.conv import Conv
from ffnlab.layers.pooling import avg_pool, shifted_max_pool

__all__ = ["OPS", "ConvNorm", "Residual", "Spatial"]

EXPANSION = 4
HE = jax.nn.initializers.he_normal()
# What learns nothing: (x, stride) -> y.
FREE: MappingProxyType[str, Callable[[Array, int], Array]] = MappingProxyType(
    {
        "max": lambda x, stride: shifted_max_pool(x, 3, stride=stride, padding=1),
        "average": lambda x, stride: avg_pool(x, 3, stride=stride, padding=1),
        "identity": lambda x, stride: x[:, ::stride, ::stride],
    }
)
OPS = ("conv", "depthwise", *FREE, "hybrid")


class ConvNorm(nnx.Module):
    """norm(conv(x)), a convolution without bias whose padding keeps the grid, but for the stride.

    Attributes:
      conv: Conv; norm: BatchNorm, or what stands for one.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        key: Array,
        size: int = 3,
        stride: int = 1,
        groups: int = 1,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the kernel as He et al. (arXiv 1502.01852), by fan-in."""
        pad = size // 2 if size > 1 else "VALID"
        shape = {"size": size, "stride": stride, "padding": pad, "groups": groups}
        self.conv = Conv(d_in, d_out, key=key, init=HE, dtype=dtype, **shape)
        self.norm: nnx.Module = BatchNorm(d_out, unbiased=True, axis="mlp", dtype=dtype)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ d"]:
        return self.norm(self.conv(x))


class Spatial(nnx.Module):
    """y = op(x), the step of a block that sees neighbours: 3 x 3, of ceil(sides / stride).

    "conv" and "depthwise" are convolutions with batch norm and ReLU; "max" and "average" pool,
    "identity" leaves out what the stride does, and none of the three has parameters or an
    activation. "hybrid" is "max" of stride 1, and else the mean of every 2 x 2, then "conv" of
    stride 1 (arXiv 2202.02777).

    Attributes:
      conv: ConvNorm, or None of an op without parameters.
      op: name in `OPS` (static).
      stride: 1 or 2 (static).
    """

    def __init__(
        self,
        d: int,
        *,
        key: Array,
        op: str = "conv",
        stride: int = 1,
        dtype: DTypeLike = jnp.float32,
    ):
        """An op of d channels.

        Raises:
          ConfigError: an unknown op or stride.
        """
        if op not in OPS or stride not in (1, 2):
            raise ConfigError(f"op={op!r} is not one of {OPS}, or stride={stride} not 1 or 2")
        is_learned = op in ("conv", "depthwise") or (op == "hybrid" and stride == 2)
        groups = d if op == "depthwise" else 1
        own = 1 if op == "hybrid" else stride
        made = (
            ConvNorm(d, d, key=key, stride=own, groups=groups, dtype=dtype) if is_learned else None
        )
        self.conv = nnx.data(made)
        self.op, self.stride = op, stride

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ d"]:
        if self.conv is None:
            return FREE["max" if self.op == "hybrid" else self.op](x, self.stride)
        if self.op == "hybrid":
            x = avg_pool(x, self.stride, padding="SAME")
        return jax.nn.relu(self.conv(x))


class Residual(nnx.Module):
    """y = relu(expand(spatial(relu(reduce(x)))) + shortcut(x)).

    Attributes:
      reduce: ConvNorm of 1 x 1, or None in a basic block.
      spatial: Spatial; in a basic block a 3 x 3 convolution that changes the channels (`ConvNorm`).
      expand: ConvNorm.
      shortcut: ConvNorm of 1 x 1, or None: then x itself, every other pixel of it where the grid is
        halved, between zero channels where there are more (option A of the paper).
      stride: 1 or 2 (static).
      sources: of a shortcut without parameters, the channel of x that is added to each channel, -1
        for none; None for the usual ones (`usual_sources`) (static).
    """

    # Set only where they differ, so that blocks of older files have the same structure.
    sources: tuple[int, ...] | None = None

    def __init__(
        self,
        reduce: ConvNorm | None,
        spatial: nnx.Module,
        expand: ConvNorm,
        shortcut: ConvNorm | None,
        *,
        stride: int = 1,
    ):
        self.reduce = nnx.data(reduce)
        self.spatial, self.expand = spatial, expand
        self.shortcut = nnx.data(shortcut)
        self.stride = stride

    @classmethod
    def bottleneck(
        cls,
        d_in: int,
        d: int,
        *,
        key: Array,
        op: str = "conv",
        stride: int = 1,
        expansion: int = EXPANSION,
        dtype: DTypeLike = jnp.float32,
    ) -> "Residual":
        """d_in -> d -> d -> expansion * d channels, the stride in the spatial step."""
        keys, out, one = jax.random.split(key, 4), expansion * d, {"size": 1, "dtype": dtype}
        changes = stride > 1 or d_in != out
        shortcut = ConvNorm(d_in, out, key=keys[3], stride=stride, **one) if changes else None
        return cls(
            ConvNorm(d_in, d, key=keys[0], **one),
            Spatial(d, key=keys[1], op=op, stride=stride, dtype=dtype),
            ConvNorm(d, out, key=keys[2], **one),
            shortcut,
            stride=stride,
        )

    @classmethod
    def basic(
        cls,
        d_in: int,
        d: int,
        *,
        key: Array,
        stride: int = 1,
        projected: bool = False,
        dtype: DTypeLike = jnp.float32,
    ) -> "Residual":
        """d_in -> d -> d channels, two 3 x 3 convolutions.

        Args:
          projected: a convolution in the shortcut where sizes change; else option A.
        """
        keys = jax.random.split(key, 3)
        changes = projected and (stride > 1 or d_in != d)
        one = {"size": 1, "stride": stride, "dtype": dtype}
        return cls(
            None,
            ConvNorm(d_in, d, key=keys[0], stride=stride, dtype=dtype),
            ConvNorm(d, d, key=keys[1], dtype=dtype),
            ConvNorm(d_in, d, key=keys[2], **one) if changes else None,
            stride=stride,
        )

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ d"]:
        y = x if self.reduce is None else jax.nn.relu(self.reduce(x))
        y = self.spatial(y)
        y = jax.nn.relu(y) if isinstance(self.spatial, ConvNorm) else y
        y = self.expand(y)
        kept = (
            self.shortcut(x)
            if self.shortcut is not None
            else unlearned(x, self.stride, y.shape[-1], self.sources)
        )
        return jax.nn.relu(y + kept)


def usual_sources(d_in: int, d_out: int) -> tuple[int, ...]:
    """The channel of x that stands in each channel of a shortcut that learns nothing, -1 for zeros:
    x in the middle, one more zero after it than before where their number is odd.

    >>> usual_sources(2, 5)
    (-1, 0, 1, -1, -1)
    """
    before = (d_out - d_in) // 2
    return tuple(i - before if before <= i < before + d_in else -1 for i in range(d_out))


def unlearned(
    x: Float[Array, "n h w c"], stride: int, d: int, sources: tuple[int, ...] | None = None
) -> Float[Array, "n _ _ d"]:
    """Every `stride`-th pixel, between zero channels up to d of them.

    Args:
      sources: the channel that stands in each of d, -1 for zeros; the usual ones when None.
    Raises:
      ConfigError: sources that are not of d channels, or of more than x has.
    """
    x, missing = x[:, ::stride, ::stride], d - x.shape[-1]
    if sources is not None:
        if len(sources) != d or not all(-1 <= source < x.shape[-1] for source in sources):
            raise ConfigError(f"sources={sources} must be {d} numbers from -1 to {x.shape[-1] - 1}")
        zero = jnp.zeros((*x.shape[:-1], 1), x.dtype)
        return jnp.concatenate([x, zero], axis=-1)[..., np.array(sources)]
    if not missing:
        return x
    return jnp.pad(x, ((0, 0),) * 3 + ((missing // 2, missing - missing // 2),))
