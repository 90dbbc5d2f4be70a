"""INT8 codes with one scale per group of input rows: the round-to-nearest baseline."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab.weights.activations import fake_e4m3
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
from ffnlab.weights.quantized import Quantized, whole_groups
from pallas_kernels.numerics import divide

# On a CPU up to CPU_TOKENS rows of activations multiply CPU_ROWS rows of the dequantized matrix at
# a time; `pallas_kernels.w4a8.xla` says why. Measured there for [m, 2048] @ [2048, 5632]: 2.3 ms
# instead of 32 for one row, 21 instead of 51 for 64.
CPU_TOKENS, CPU_ROWS = 256, 128


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
        x = fake_e4m3(x) if self.act == "e4m3" else x
        rows = math.prod(x.shape[:-1])
        chunked = x.dtype == jnp.float32 and 0 < rows <= CPU_TOKENS and self.codes.ndim == 2
        if not (chunked and jax.default_backend() == "cpu" and self._fits_chunks()):
            return super().matmul(x)
        return self._in_chunks(x.reshape(rows, -1)).reshape(*x.shape[:-1], -1)

    def _fits_chunks(self) -> bool:
        """Whether chunks of CPU_ROWS rows fall on the groups."""
        aligned = self.group % CPU_ROWS == 0 or CPU_ROWS % self.group == 0
        return aligned and self.codes.shape[0] % CPU_ROWS == 0

    def _in_chunks(self, x: Float[Array, "m in"]) -> Float[Array, "m out"]:
        columns, chunks = self.codes.shape[1], self.codes.shape[0] // CPU_ROWS
        repeats = max(self.group // CPU_ROWS, 1)
        scales = jnp.repeat(self.scales.astype(jnp.float32), repeats, axis=0)
        parts = (
            jnp.swapaxes(x.reshape(-1, chunks, CPU_ROWS), 0, 1),
            self.codes.reshape(chunks, CPU_ROWS, columns),
            scales.reshape(chunks, -1, 1, columns),
        )

        def add(total: Array, part: tuple) -> tuple[Array, None]:
            x, codes, scales = part
            w = codes.astype(jnp.float32).reshape(scales.shape[0], -1, columns) * scales
            return total + x @ w.reshape(CPU_ROWS, columns), None

        return jax.lax.scan(add, jnp.zeros((x.shape[0], columns), jnp.float32), parts)[0]

    def take(self, rows: Indices = None, columns: Indices = None) -> "Int8":
        """See `Weight.take`; rows go by whole groups, or freely where all share one scale."""
        count, group, groups = self.shape[0], self.group, None
        if rows is not None and self.scales.shape[-2] > 1:
            groups = whole_groups(rows, group, count, "Int8: a group")
        elif rows is not None:
            group = min(group, len(rows))
        scales = taken(self.scales, groups, columns)
        return Int8(taken(self.codes, rows, columns), scales, group=group, act=self.act)

    def leaf_axes(self, axes: Axes) -> "Int8":
        # Groups follow the codes only where whole groups do: their axis stays unsharded.
        scale_axes = AxisNames((*axes[:-2], None, axes[-1]))
        return rebuild(self, codes=AxisNames(axes), scales=scale_axes)
