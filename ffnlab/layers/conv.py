"""Convolution over any number of dimensions, its kernel a matrix that any weight format can be."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Map, drawn
from ffnlab.layers.sliding import Padding, named_padding, pads, per_dimension
from ffnlab.weights import Dense, SparseInput, Weight

__all__ = ["Conv"]

DIMENSIONS = "DHW"  # names that XLA's dimension numbers give them, the last first


class Conv(Map):
    """y[i] = sum_k x[i * stride + k * dilation - before] @ w[k] + b, zeros beyond the edges.

    One convolution of XLA computes it, and patches are never laid out in memory. Its kernel is the
    dense matrix of the weight: a quantized one is dequantized once a call, so that its format saves
    memory at rest and no time. A kernel of one tap, ungrouped and without padding, is the weight's
    own product, in its own kernel and with what the format does to its input; elsewhere formats
    that change their input (`act="e4m3"`, `SparseInput`) are refused.

    Attributes:
      w: Param holding a Weight [taps * in / groups, out]; rows by tap, the last dimension fastest,
        then by channel; columns by group.
      b: Param holding [out], or None.
      size, stride, dilation: of every dimension (static).
      groups: channels are cut into as many parts, each seeing its own; `in` of them is a depthwise
        convolution (static).
      padding: "SAME", "VALID", "causal" or (before, after) of every dimension (static).
    """

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
        self.size = per_dimension("size", size, dims)
        self.stride = per_dimension("stride", stride, dims)
        self.dilation = per_dimension("dilation", dilation, dims)
        self.padding = named_padding(padding, dims)
        if groups < 1 or d_in % groups or d_out % groups:
            raise ConfigError(f"groups={groups} must divide the channels {d_in} -> {d_out}")
        self.groups = groups
        taps = math.prod(self.size)
        rows = taps * d_in // groups
        if init is None:
            w = jax.random.uniform(key, (rows, d_out), dtype, -(rows**-0.5), rows**-0.5)
        else:
            w = drawn(init, key, (*self.size, d_in // groups, d_out), dtype).reshape(rows, d_out)
        self.w = nnx.Param(Dense(w), axes=("embed", "mlp"))
        self.b = nnx.data(nnx.Param(jnp.zeros((d_out,), dtype), axes=("mlp",)) if bias else None)

    @property
    def channels(self) -> tuple[int, int]:
        """Channels that come in and go out."""
        rows, out = self.weight.shape
        return rows // math.prod(self.size) * self.groups, out

    @property
    def is_padded(self) -> bool:
        """Whether zeros are added to a grid of any size."""
        if isinstance(self.padding, str):
            return self.padding != "VALID" and math.prod(self.size) > 1
        return any(map(any, self.padding))

    def pads(self, sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """Positions added (before, after) each dimension of a grid of such sizes.

        Raises:
          ValueError: the kernel does not fit.
        """
        reach = [(n - 1) * d + 1 for n, d in zip(self.size, self.dilation, strict=True)]
        return pads(self.padding, sizes, reach, self.stride)

    def __call__(self, x: Float[Array, "n *grid in"]) -> Float[Array, "n *cells out"]:
        dims = len(self.size)
        if x.ndim != dims + 2 or x.shape[-1] != self.channels[0]:
            raise ValueError(
                f"x has shape {x.shape}, expected [n, {dims} dimensions, {self.channels[0]}]"
            )
        alone = self.groups == 1 and math.prod(self.size) == 1 and not self.is_padded
        y = self.pointwise(x) if alone else self.convolved(x)
        return y if self.b is None else y + self.bias.astype(y.dtype)

    def pointwise(self, x: Float[Array, "n *grid in"]) -> Float[Array, "n *cells out"]:
        """The product of a kernel of one tap with every position that the stride meets."""
        steps = (slice(None, None, s) for s in self.stride)
        return self.weight.matmul(x[:, *steps])

    def convolved(self, x: Float[Array, "n *grid in"]) -> Float[Array, "n *cells out"]:
        """The convolution without its bias."""
        weight = self.weight
        if changes_input(weight):
            raise ValueError(
                f"a convolution over {self.size} takes no {type(weight).__name__} that rounds or "
                "thresholds its input: there are no patches to do it to; use the weight without it"
            )
        kernel = weight.dense().astype(x.dtype).reshape(*self.size, -1, weight.shape[1])
        letters = DIMENSIONS[-len(self.size) :]
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            self.stride,
            self.pads(x.shape[1:-1]),
            rhs_dilation=self.dilation,
            dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
            feature_group_count=self.groups,
        )


def changes_input(weight: Weight) -> bool:
    """Whether a format, or one inside it, computes with something else than the x it is given."""
    nodes = [weight, *(node for _, node in tree.walk(weight))]
    return any(isinstance(n, SparseInput) or getattr(n, "act", None) is not None for n in nodes)
