"""Convolution over any number of dimensions, its kernel a matrix that any weight format can be."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers.convolve import DIMENSIONS, convolve
from ffnlab.layers.linear import Map, drawn
from ffnlab.layers.sliding import Padding, named_padding, pads, per_dimension
from ffnlab.weights import Dense, SparseInput, Weight

__all__ = ["Conv"]


class Window(NamedTuple):
    """Taps, stride and dilation of every dimension."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]


class Conv(Map):
    """y[i] = sum_k x[i * stride + k * dilation - before] @ w[k] + b, zeros beyond the edges.

    A convolution computes it (`convolve`), and patches are never laid out in memory. Its kernel is
    the dense matrix of the weight: a quantized one is dequantized once a call, so that its format
    saves memory at rest and no time. A kernel of one tap, ungrouped and without padding, is the
    weight's own product, in its own kernel and with what the format does to its input; elsewhere
    formats that change their input (`act="e4m3"`, `SparseInput`) are refused.

    Attributes:
      w: Param holding a Weight [taps * in / groups, out]; rows by tap, the last dimension fastest,
        then by channel; columns by group.
      b: Param holding [out], or None.
      size: taps of the kernel, of every dimension; one integer for two equal ones (static).
      stride, dilation: of every dimension, or 1 for all (static).
      groups: channels are cut into as many parts, each seeing its own; `in` of them is a depthwise
        convolution (static).
      padding: "SAME", "VALID", "causal" or (before, after) of every dimension (static).
    """

    # Set in a layer only where they differ, so that layers of older files have the same structure.
    b: nnx.Param | None = None
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    padding: str | tuple[tuple[int, int], ...] = "SAME"

    def __init__(
        self,
        d_in: int,
        d_out: int,
        *,
        key: Array,
        size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding: Padding = "SAME",
        bias: bool = False,
        init: Initializer | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws w from U(-1, 1) / sqrt(rows) and sets b, when asked for, to zero.

        Args:
          d_in, d_out: channels.
          key: of the draw.
          size: taps of the kernel, one integer for each dimension; an integer alone is both sides
            of a kernel over two.
          stride, dilation: one integer, or one for each dimension.
          groups: divides both numbers of channels.
          padding: "SAME" (ceil(size / stride) outputs), "VALID" (none), "causal" (before every
            dimension only), an integer, or for each dimension an integer or (before, after).
          bias: whether there is one.
          init: draws a kernel [*size, in / groups, out] instead, so that its fans count the taps.
          dtype: of the parameters.
        Raises:
          ConfigError: a setting of another form, or groups that do not divide the channels.
        """
        dims = 2 if isinstance(size, int) else len(size)
        if not 1 <= dims <= len(DIMENSIONS):
            raise ConfigError(f"size={size!r} must have 1 to {len(DIMENSIONS)} dimensions")
        size = per_dimension("size", size, dims)
        settings = {
            "stride": per_dimension("stride", stride, dims),
            "dilation": per_dimension("dilation", dilation, dims),
            "padding": named_padding(padding, dims),
            "groups": groups,
        }
        if groups < 1 or d_in % groups or d_out % groups:
            raise ConfigError(f"groups={groups} must divide the channels {d_in} -> {d_out}")
        rows = math.prod(size) * d_in // groups
        if init is None:
            w = jax.random.uniform(key, (rows, d_out), dtype, -(rows**-0.5), rows**-0.5)
        else:
            w = drawn(init, key, (*size, d_in // groups, d_out), dtype).reshape(rows, d_out)
        self.w = nnx.Param(Dense(w), axes=("embed", "mlp"))
        if bias:
            self.b = nnx.Param(jnp.zeros((d_out,), dtype), axes=("mlp",))
        self.size = size[0] if dims == 2 and size[0] == size[1] else size
        for name, value in settings.items():
            if value not in (getattr(Conv, name), (1,) * dims):
                setattr(self, name, value)

    @property
    def window(self) -> "Window":
        """Size, stride and dilation of every dimension."""
        dims = 2 if isinstance(self.size, int) else len(self.size)
        values = (self.size, self.stride, self.dilation)
        return Window(*((v,) * dims if isinstance(v, int) else v for v in values))

    @property
    def channels(self) -> tuple[int, int]:
        """Channels that come in and go out."""
        rows, out = self.weight.shape
        return rows // math.prod(self.window.size) * self.groups, out

    @property
    def is_padded(self) -> bool:
        """Whether zeros are added to a grid of any size."""
        if isinstance(self.padding, str):
            return self.padding != "VALID" and math.prod(self.window.size) > 1
        return any(map(any, self.padding))

    def pads(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Positions added (before, after) each dimension of a grid of such sizes.

        Raises:
          ValueError: the kernel does not fit.
        """
        size, stride, dilation = self.window
        reach = [(n - 1) * d + 1 for n, d in zip(size, dilation, strict=True)]
        return pads(self.padding, sizes, reach, stride)

    def __call__(self, x: Float[Array, "n *grid in"]) -> Float[Array, "n *cells out"]:
        dims = len(self.window.size)
        if x.ndim != dims + 2 or x.shape[-1] != self.channels[0]:
            raise ValueError(
                f"x has shape {x.shape}, expected [n, {dims} dimensions, {self.channels[0]}]"
            )
        alone = self.groups == 1 and math.prod(self.window.size) == 1 and not self.is_padded
        y = self.pointwise(x) if alone else self.convolved(x)
        return y if self.b is None else y + self.bias.astype(y.dtype)

    def pointwise(self, x: Float[Array, "n *grid in"]) -> Float[Array, "n *cells out"]:
        """The product of a kernel of one tap with every position that the stride meets."""
        steps = (slice(None, None, s) for s in self.window.stride)
        return self.weight.matmul(x[:, *steps])

    def convolved(self, x: Float[Array, "n *grid in"]) -> Float[Array, "n *cells out"]:
        """The convolution without its bias."""
        weight, (size, stride, dilation) = self.weight, self.window
        if changes_input(weight):
            raise ValueError(
                f"a convolution over {size} takes no {type(weight).__name__} that rounds or "
                "thresholds its input: there are no patches to do it to; use the weight without it"
            )
        kernel = weight.dense().astype(x.dtype).reshape(*size, -1, weight.shape[1])
        pads = self.pads(x.shape[1:-1])
        return convolve(x, kernel, stride, pads, dilation, self.groups)


def changes_input(weight: Weight) -> bool:
    """Whether a format, or one inside it, computes with something else than the x it is given."""
    nodes = [weight, *(node for _, node in tree.walk(weight))]
    return any(isinstance(n, SparseInput) or getattr(n, "act", None) is not None for n in nodes)
