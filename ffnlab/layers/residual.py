"""A residual block of convolutions whose spatial step is an operation chosen by name.

    y = relu(expand(spatial(reduce(x))) + shortcut(x))

(arXiv 1512.03385.) `reduce` and `expand` are 1 x 1 convolutions with a batch norm (a bottleneck);
without `reduce` and with 3 x 3 in `expand` it is a basic block.
"""

from collections.abc import Callable, Sequence
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

__all__ = ["OPS", "SHORTCUTS", "ConvNorm", "Residual", "Spatial"]

EXPANSION = 4
SHORTCUTS = ("padded", "projected", "pooled")
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
        out: int | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """An op of d channels.

        Args:
          out: channels that "conv" gives; d when None, and of every other op.
        Raises:
          ConfigError: an unknown op or stride, or other channels of an op that keeps them.
        """
        out = d if out is None else out
        if op not in OPS or stride not in (1, 2):
            raise ConfigError(f"op={op!r} is not one of {OPS}, or stride={stride} not 1 or 2")
        if op != "conv" and out != d:
            raise ConfigError(f"op={op!r} gives as many channels as it reads, {d}, not {out}")
        is_learned = op in ("conv", "depthwise") or (op == "hybrid" and stride == 2)
        groups = d if op == "depthwise" else 1
        own = 1 if op == "hybrid" else stride
        made = (
            ConvNorm(d, out, key=key, stride=own, groups=groups, dtype=dtype)
            if is_learned
            else None
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
      pooled: whether the shortcut's convolution reads means of stride x stride pixels instead of
        every stride-th one (static).
    """

    # Set only where they differ, so that blocks of older files have the same structure.
    sources: tuple[int, ...] | None = None
    pooled: bool = False

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
        more = {"op": op, "stride": stride, "shortcut": "projected", "dtype": dtype}
        return cls.of_sizes((d_in, d, d, expansion * d), key=key, **more)

    @classmethod
    def basic(
        cls,
        d_in: int,
        d: int,
        *,
        key: Array,
        stride: int = 1,
        dtype: DTypeLike = jnp.float32,
    ) -> "Residual":
        """d_in -> d -> d channels, two 3 x 3 convolutions, a shortcut that learns nothing."""
        more = {"stride": stride, "shortcut": "padded", "dtype": dtype}
        return cls.of_sizes((d_in, d, d), key=key, **more)

    @classmethod
    def of_sizes(
        cls,
        sizes: Sequence[int],
        *,
        key: Array,
        op: str = "conv",
        stride: int = 1,
        shortcut: str = "projected",
        dtype: DTypeLike = jnp.float32,
    ) -> "Residual":
        """A block by its channels: of two convolutions a basic one, of three a bottleneck.

        Args:
          sizes: channels of its input and after each convolution, three or four.
          key: of the draw.
          op, stride: of the spatial step; a basic block has the op "conv".
          shortcut: what changes the sizes, where they change: "projected" (a convolution of 1 x 1
            with that stride), "pooled" (means of stride x stride pixels, then one of 1 x 1) or
            "padded" (no parameters: option A of the paper).
          dtype: of the parameters.
        Raises:
          ConfigError: another shortcut, op or number of sizes.
        """
        if len(sizes) not in (3, 4) or shortcut not in SHORTCUTS:
            raise ConfigError(
                f"sizes={tuple(sizes)} must be three or four, shortcut={shortcut!r} one of "
                f"{SHORTCUTS}"
            )
        (d_in, *inner, out), keys = sizes, jax.random.split(key, len(sizes))
        changes = shortcut != "padded" and (stride > 1 or d_in != out)
        pooled = shortcut == "pooled" and stride > 1
        one = {"size": 1, "dtype": dtype}
        joined = {"key": keys[-1], "stride": 1 if pooled else stride}
        kept = ConvNorm(d_in, out, **joined, **one) if changes else None
        a, b = inner[0], inner[-1]
        if len(inner) == 1:
            reduce = None
            spatial = ConvNorm(d_in, a, key=keys[0], stride=stride, dtype=dtype)
            expand = ConvNorm(a, out, key=keys[1], dtype=dtype)
        else:
            reduce = ConvNorm(d_in, a, key=keys[0], **one)
            spatial = Spatial(a, key=keys[1], op=op, stride=stride, out=b, dtype=dtype)
            expand = ConvNorm(b, out, key=keys[2], **one)
        made = cls(reduce, spatial, expand, kept, stride=stride)
        if pooled:
            made.pooled = True
        return made

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n _ _ d"]:
        y = x if self.reduce is None else jax.nn.relu(self.reduce(x))
        y = self.spatial(y)
        y = jax.nn.relu(y) if isinstance(self.spatial, ConvNorm) else y
        y = self.expand(y)
        if self.shortcut is None:
            return jax.nn.relu(y + unlearned(x, self.stride, y.shape[-1], self.sources))
        x = avg_pool(x, self.stride, padding="SAME") if self.pooled else x
        return jax.nn.relu(y + self.shortcut(x))


def usual_sources(d_in: int, d_out: int) -> tuple[int, ...]:
    """The channel of x that stands in each channel of a shortcut that learns nothing, -1 for zeros:
    x in the middle, one more zero after it than before where their number is odd.

    >>> usual_sources(2, 5)
    (-1, 0, 1, -1, -1)
    """
    before = (d_out - d_in) // 2  # where there are fewer, those in the middle stay
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
    if sources is None and missing < 0:
        sources = usual_sources(x.shape[-1], d)
    if sources is not None:
        if len(sources) != d or not all(-1 <= source < x.shape[-1] for source in sources):
            raise ConfigError(f"sources={sources} must be {d} numbers from -1 to {x.shape[-1] - 1}")
        zero = jnp.zeros((*x.shape[:-1], 1), x.dtype)
        return jnp.concatenate([x, zero], axis=-1)[..., np.array(sources)]
    if not missing:
        return x
    return jnp.pad(x, ((0, 0),) * 3 + ((missing // 2, missing - missing // 2),))
