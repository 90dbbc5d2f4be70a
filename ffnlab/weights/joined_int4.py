"""Gate and up of a gated FFN as one INT4 matrix, which a GPU multiplies in one pass over x."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.weights.base import (
    Axes,
    AxisNames,
    Weight,
    check_act,
    check_matrix,
    rebuild,
    register,
    static,
)
from ffnlab.weights.packed_int4 import GROUP, PackedInt4
from ffnlab.weights.quantized import Quantized
from pallas_kernels import w4a8


@register
@dataclasses.dataclass(frozen=True)
class JoinedInt4(Quantized):
    """Two `PackedInt4` of one shape side by side, [gate | up], their tiles of 64 columns in turn.

    Attributes:
      words: [2 * out_padded / 64, in_padded / 128, 8, 128] int32 (`pallas_kernels.w4a8.join`);
        out_padded is `columns` rounded up to a multiple of 128.
      scales: [in_padded / 128, 2 * out_padded], in the same turns.
      divisors: [2] float32, gate's and up's.
      rows: logical `in` (static).
      columns: of gate, and of up (static).
      encoding, act: see `PackedInt4` (static).
    """

    words: Array
    scales: Array
    divisors: Array
    rows: int = static()
    columns: int = static()
    encoding: str = static()
    act: str | None = static(None)

    def __post_init__(self) -> None:
        check_matrix("scales", self.scales)
        check_act(self.act)
        wide = 256 * -(-self.columns // 128)
        if self.scales.shape[-1] != wide or self.words.shape[-4] * 64 != wide:
            raise ValueError(
                f"words {tuple(self.words.shape)} and scales {tuple(self.scales.shape)} must have "
                f"{wide // 64} tiles and {wide} columns for twice columns={self.columns}"
            )

    @classmethod
    def join(cls, gate: PackedInt4, up: PackedInt4) -> "JoinedInt4":
        """Joins two weights.

        Raises:
          ValueError: they differ in shape, encoding, dtype of scales or act.
        """
        if not cls.fits(gate, up):
            raise ValueError(
                f"gate is {facts(gate)} and up {facts(up)}; both must have one shape, encoding, "
                "dtype of scales and act"
            )
        first, second = (w4a8.Fragments(w.words, w.encoding) for w in (gate, up))
        codes, scales = w4a8.join(first, second, gate.scales, up.scales)
        divisors = jnp.stack([gate.divisor, up.divisor], axis=-1)
        return cls(codes.words, scales, divisors, gate.rows, gate.shape[1], gate.encoding, gate.act)

    @staticmethod
    def fits(gate: Weight, up: Weight) -> bool:
        """Whether `join` takes two weights."""
        return isinstance(gate, PackedInt4) and facts(gate) == facts(up)

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, 2 * self.columns

    def halves(self) -> tuple[PackedInt4, PackedInt4]:
        """Gate and up."""
        fragments = w4a8.Fragments(self.words, self.encoding)
        *codes, gate, up = w4a8.split(fragments, self.scales)
        words = [half.words for half in codes]
        scales = [half[..., : self.columns] for half in (gate, up)]
        fields = self.rows, self.encoding, self.act
        first, second = (
            PackedInt4(w, s, self.divisors[..., i], *fields)
            for i, (w, s) in enumerate(zip(words, scales, strict=True))
        )
        return first, second

    def dense(self) -> Float[Array, "*stack in out"]:
        return jnp.concatenate([half.dense() for half in self.halves()], axis=-1)

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        return jnp.concatenate([half.matmul(x) for half in self.halves()], axis=-1)

    def glu(self, x: Float[Array, "*b in"]) -> Float[Array, "*b columns"]:
        """silu(x @ gate) * (x @ up) in x's dtype, rounded once.

        Args:
          x: [..., in].
        Returns:
          [..., columns].
        """
        fragments = w4a8.Fragments(self.words, self.encoding)
        divisors = (self.divisors[..., 0], self.divisors[..., 1])
        y = w4a8.glu(x, fragments, self.scales, divisors=divisors, group=GROUP, act=self.act)
        return y[..., : self.columns]

    def leaf_axes(self, axes: Axes) -> "JoinedInt4":
        stack, rows, columns = axes[:-2], axes[-2], axes[-1]
        words = AxisNames((*stack, columns, rows, None, None))
        divisors = AxisNames((*stack, None))
        return rebuild(self, words=words, scales=AxisNames(axes), divisors=divisors)


def facts(w: Weight) -> tuple[object, ...]:
    """What two weights must have in common to be joined."""
    kind = type(w).__name__, tuple(w.shape)
    if not isinstance(w, PackedInt4):
        return kind
    return *kind, tuple(w.words.shape), w.encoding, w.scales.dtype.name, w.act
