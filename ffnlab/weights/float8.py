"""Float8 (e4m3) matrices with a scale per output channel."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.weights.activations import fake_e4m3, quantize_e4m3
from ffnlab.weights.base import (
    Axes,
    AxisNames,
    Indices,
    check_act,
    check_matrix,
    rebuild,
    register,
    static,
    taken,
)
from ffnlab.weights.quantized import Quantized


@register
@dataclasses.dataclass(frozen=True)
class Float8(Quantized):
    """A matrix in float8_e4m3fn: w[i, j] = codes[i, j] * scales[0, j].

    Attributes:
      codes: [in, out] float8_e4m3fn.
      scales: [1, out] float32, one per output channel.
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    codes: Array
    scales: Array
    act: str | None = static(None)

    def __post_init__(self) -> None:
        check_matrix("codes", self.codes)
        check_act(self.act)
        expected = (*self.codes.shape[:-2], 1, self.codes.shape[-1])
        if getattr(self.scales, "shape", None) != expected:
            raise ValueError(f"scales must have shape {expected}, got {self.scales.shape}")

    @classmethod
    def quantize(cls, w: Float[Array, "in out"], *, act: str | None = None) -> "Float8":
        """Rounds w [in, out] to e4m3 with scale absmax / 448 per output channel (1 if all zero)."""
        codes, scales = quantize_e4m3(w.T)
        return cls(codes.T, scales.T, act)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[-2:]

    def dense(self) -> Float[Array, "*stack in out"]:
        return self.codes.astype(jnp.float32) * self.scales

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        x = fake_e4m3(x) if self.act == "e4m3" else x
        product = jnp.matmul(x, self.codes.astype(x.dtype))
        return (product * self.scales[..., 0, :]).astype(x.dtype)

    def take(self, rows: Indices = None, columns: Indices = None) -> "Float8":
        scales = taken(self.scales, columns=columns)
        return Float8(taken(self.codes, rows, columns), scales, self.act)

    def leaf_axes(self, axes: Axes) -> "Float8":
        scale_axes = AxisNames((*axes[:-2], None, axes[-1]))
        return rebuild(self, codes=AxisNames(axes), scales=scale_axes)
