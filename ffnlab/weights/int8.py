"""INT8 codes with one scale per group of input rows: the round-to-nearest baseline."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.weights.activations import fake_e4m3
from ffnlab.weights.base import (
    Axes,
    AxisNames,
    check_act,
    check_matrix,
    rebuild,
    register,
    static,
)
from ffnlab.weights.quantized import Quantized
from pallas_kernels.numerics import divide


@register
@dataclasses.dataclass(frozen=True)
class Int8(Quantized):
    """A matrix in symmetric INT8 with group scales: w[i, j] = codes[i, j] * scales[i // group, j].

    Attributes:
      codes: [in, out] int8.
      scales: [ceil(in / group), out], float32 or bfloat16.
      group: rows that share a scale; the last group may be shorter (static).
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    codes: Array
    scales: Array
    group: int = static()  # type: ignore[assignment]
    act: str | None = static(None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        check_matrix("codes", self.codes)
        check_matrix("scales", self.scales)
        check_act(self.act)
        if self.group < 1:
            raise ValueError(f"group={self.group}; it takes a number of rows >= 1")
        *stack, rows, columns = self.codes.shape
        expected = (*stack, -(-rows // self.group), columns)
        if tuple(self.scales.shape) != expected:
            raise ValueError(
                f"scales must have shape {expected} for {rows} rows in groups of {self.group}, "
                f"got {tuple(self.scales.shape)}"
            )

    @classmethod
    def quantize(
        cls, w: Float[Array, "in out"], *, group: int | None = None, act: str | None = None
    ) -> "Int8":
        """Rounds w half to even, scale absmax / 127 per group and column (1 where all zero).

        Args:
          w: [in, out], any float dtype.
          group: rows that share a scale; None for whole columns.
          act: see the class.
        """
        rows, columns = w.shape
        group = min(group or rows, rows)
        padded = jnp.pad(w.astype(jnp.float32), ((0, -rows % group), (0, 0)))
        grouped = padded.reshape(-1, group, columns)
        scales = divide(jnp.max(jnp.abs(grouped), axis=1), 127)
        scales = jnp.where(scales == 0, 1.0, scales)
        codes = jnp.clip(jnp.round(grouped / scales[:, None]), -127, 127).astype(jnp.int8)
        return cls(codes.reshape(-1, columns)[:rows], scales, group=group, act=act)

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[-2:]

    def q(self) -> Int[Array, "*stack in out"]:
        """The integer codes, [in, out] int8."""
        return self.codes

    def dense(self) -> Float[Array, "*stack in out"]:
        scales = jnp.repeat(self.scales.astype(jnp.float32), self.group, axis=-2)
        return self.codes.astype(jnp.float32) * scales[..., : self.codes.shape[-2], :]

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return super().matmul(fake_e4m3(x) if self.act == "e4m3" else x)

    def leaf_axes(self, axes: Axes) -> "Int8":
        # Groups follow the codes only where whole groups do: their axis stays unsharded.
        scale_axes = AxisNames((*axes[:-2], None, axes[-1]))
        return rebuild(self, codes=AxisNames(axes), scales=scale_axes)
