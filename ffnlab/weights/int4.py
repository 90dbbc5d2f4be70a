"""INT4 codes, two per byte, with one scale per group of input rows."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8, UInt8

from ffnlab.weights.base import (
    Axes,
    AxisNames,
    Indices,
    Weight,
    check_act,
    check_matrix,
    rebuild,
    register,
    static,
    taken,
)
from ffnlab.weights.packed_int4 import PackedInt4
from ffnlab.weights.quantized import Quantized, whole_groups
from pallas_kernels import w4a8


def pack(q: Int8[Array, "*stack in out"]) -> UInt8[Array, "*stack half out"]:
    """Packs codes -8..7 two per byte along `in`: row 2i in the low nibble, row 2i+1 in the high.

    Raises:
      ValueError: `in` is odd.
    """
    if q.shape[-2] % 2:
        raise ValueError(f"q has {q.shape[-2]} rows; int4 packing needs an even number of rows")
    nibbles = q.astype(jnp.uint8) & 0xF
    return nibbles[..., 0::2, :] | (nibbles[..., 1::2, :] << 4)


def unpack(codes: UInt8[Array, "*stack half out"]) -> Int8[Array, "*stack 2*half out"]:
    """The codes -8..7 that `pack` packed, int8, twice as many rows."""
    low = (codes << 4).astype(jnp.int8) >> 4
    high = codes.astype(jnp.int8) >> 4
    both = jnp.stack([low, high], axis=-2)
    return both.reshape(*codes.shape[:-2], 2 * codes.shape[-2], codes.shape[-1])


@register
@dataclasses.dataclass(frozen=True)
class Int4(Quantized):
    """A matrix in symmetric INT4 with group scales: w[i, j] = q[i, j] * scales[i // group, j] /
    divisor.

    Attributes:
      codes: [in_padded / 2, out] uint8, two's complement nibbles -8..7 packed along `in` (`pack`);
        in_padded is `rows` rounded up to a whole number of groups, padding codes are 0.
      scales: [in_padded / group, out], float32, bfloat16 or float8_e4m3fn.
      divisor: [] float32, one per matrix (FireQ's per-tensor scale c).
      group: rows that share a scale, even (static).
      rows: logical `in` (static).
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    codes: Array
    scales: Array
    divisor: Array
    group: int = static()
    rows: int = static()
    act: str | None = static(None)

    def __post_init__(self) -> None:
        check_matrix("codes", self.codes)
        check_matrix("scales", self.scales)
        check_act(self.act)
        padded, groups = 2 * self.codes.shape[-2], self.scales.shape[-2]
        if self.group < 2 or self.group % 2 or groups * self.group != padded:
            raise ValueError(
                f"group={self.group} with {groups} rows of scales does not cover the {padded} rows "
                "of codes; group must be even and groups * group equal the packed rows"
            )
        if not padded - self.group < self.rows <= padded:
            raise ValueError(
                f"rows={self.rows} does not fit {padded} packed rows of groups of {self.group}"
            )
        if self.scales.shape[-1] != self.codes.shape[-1]:
            raise ValueError(
                f"scales have {self.scales.shape[-1]} columns, codes {self.codes.shape[-1]}"
            )

    @classmethod
    def from_codes(
        cls,
        q: Int8[Array, "in out"],
        scales: Float[Array, "groups out"],
        *,
        group: int,
        divisor: float | Array = 1.0,
        act: str | None = None,
    ) -> "Int4":
        """Packs codes [in, out] int8 in -8..7; `in` is padded with zeros to whole groups."""
        rows = q.shape[0]
        q = jnp.pad(q, ((0, -rows % group), (0, 0)))
        divisor = jnp.asarray(divisor, jnp.float32)
        return cls(pack(q), scales, divisor, group=group, rows=rows, act=act)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.codes.shape[-1]

    def q(self) -> Int8[Array, "*stack in out"]:
        """The integer codes, [in, out] int8."""
        return unpack(self.codes)[..., : self.rows, :]

    def dense(self) -> Float[Array, "*stack in out"]:
        scales = jnp.repeat(self.scales.astype(jnp.float32), self.group, axis=-2)
        values = self.q().astype(jnp.float32) * scales[..., : self.rows, :]
        return values / self.divisor[..., None, None]

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        # Scales rounded inputs after the sum, the prepared weight before it: the last bits differ,
        # and so may the codes of later activations that lie between two e4m3 values.
        return w4a8.matmul(
            x, self.codes, self.scales, divisor=self.divisor, group=self.group, act=self.act
        )

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        options = {"divisors": self.divisor, "group": self.group, "act": self.act}
        return w4a8.grouped(x, self.codes, self.scales, sizes, **options)

    def take(self, rows: Indices = None, columns: Indices = None) -> "Int4":
        """See `Weight.take`; rows go by whole groups, by whole bytes where all share a scale."""
        group, groups, pairs = self.group, None, None
        if rows is not None and self.scales.shape[-2] > 1:
            groups = whole_groups(rows, group, self.rows, "Int4: a group")
            pairs = (groups[:, None] * (group // 2) + np.arange(group // 2)).reshape(-1)
        elif rows is not None:
            pairs = whole_groups(rows, 2, self.rows, "Int4: a byte")
            group = 2 * len(pairs)
        return Int4(
            taken(self.codes, pairs, columns),
            taken(self.scales, groups, columns),
            self.divisor,
            group=group,
            rows=self.rows if rows is None else len(rows),
            act=self.act,
        )

    def prepare(self, backend: str) -> Weight:
        if PackedInt4.pays(backend, self.group, self.act):
            return PackedInt4.pack(
                self.codes, self.scales, self.divisor, rows=self.rows, act=self.act
            )
        return super().prepare(backend)

    def leaf_axes(self, axes: Axes) -> "Int4":
        names = AxisNames(axes)
        stacked = AxisNames(axes[:-2])
        return rebuild(self, codes=names, scales=names, divisor=stacked)
