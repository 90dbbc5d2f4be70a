"""INT4 codes in the order in which the GPU kernel of `pallas_kernels.w4a8` reads them."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

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
from pallas_kernels import backend, w4a8

GROUP = 128  # rows that share a scale, and rows of a tile of words


@register
@dataclasses.dataclass(frozen=True)
class PackedInt4(Quantized):
    """The values of an `Int4` of groups of 128, packed for a GPU's tensor cores.

    Attributes:
      words: [out_padded / 64, in_padded / 128, 8, 128] int32 (`pallas_kernels.w4a8.pack`);
        in_padded and out_padded are `in` and `out` rounded up to multiples of 128.
      scales: [in_padded / 128, out], float32, bfloat16 or float8_e4m3fn.
      divisor: [] float32.
      rows: logical `in` (static).
      encoding: of the words, "sm" or "tc" (static).
      act: None, or "e4m3": `matmul` first rounds x to e4m3 with one scale per row (static).
    """

    words: Array
    scales: Array
    divisor: Array
    rows: int = static()
    encoding: str = static()
    act: str | None = static(None)

    def __post_init__(self) -> None:
        check_matrix("scales", self.scales)
        check_act(self.act)
        if len(self.words.shape) < 4 or self.words.shape[-2:] != (8, 128):
            raise ValueError(f"words must be [out / 64, in / 128, 8, 128], got {self.words.shape}")
        tiles, groups = self.words.shape[-4:-2]
        n = self.scales.shape[-1]
        if self.scales.shape[-2] != groups or tiles != 2 * -(-n // 128):
            raise ValueError(
                f"scales of shape {tuple(self.scales.shape)} do not fit {tiles} tiles of 64 "
                f"columns and {groups} of {GROUP} rows"
            )
        if not (groups - 1) * GROUP < self.rows <= groups * GROUP:
            raise ValueError(f"rows={self.rows} does not fit {groups} groups of {GROUP} rows")

    @classmethod
    def pack(
        cls, codes: Array, scales: Array, divisor: Array, *, rows: int, act: str | None = None
    ) -> "PackedInt4":
        """Packs the arrays of an `Int4` whose group is 128.

        Args:
          codes, scales, divisor, rows, act: see `Int4`.
        Returns:
          the packed weight, of the fast encoding "sm" unless a code is -8 or codes are traced.
        """
        fragments = w4a8.pack(codes, w4a8.narrowest_encoding(codes))
        return cls(fragments.words, scales, divisor, rows, fragments.encoding, act)

    @staticmethod
    def pays(platform: str, group: int, act: str | None) -> bool:
        """Whether `platform` has a kernel that reads packed words of this format.

        The device at hand decides if it is a GPU; without one, "cuda" means a Hopper GPU.
        """
        here, capability = backend.device()
        has_kernel = here != "gpu" or w4a8.reads_fragments(here, capability)
        return platform == "cuda" and has_kernel and group == GROUP and act == "e4m3"

    @property
    def shape(self) -> tuple[int, int]:
        return self.rows, self.scales.shape[-1]

    def codes(self) -> Array:
        """The codes of the `Int4` that was packed, [in_padded / 2, out] uint8."""
        return w4a8.unpack(w4a8.Fragments(self.words, self.encoding), self.scales.shape[-1])

    def dense(self) -> Float[Array, "*stack in out"]:
        codes = self.codes()
        low = (codes << 4).astype(jnp.int8) >> 4
        high = codes.astype(jnp.int8) >> 4
        q = jnp.stack([low, high], axis=-2).reshape(*codes.shape[:-2], -1, codes.shape[-1])
        scales = jnp.repeat(self.scales.astype(jnp.float32), GROUP, axis=-2)
        values = q[..., : self.rows, :].astype(jnp.float32) * scales[..., : self.rows, :]
        return values / self.divisor[..., None, None]

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        fragments = w4a8.Fragments(self.words, self.encoding)
        return w4a8.matmul(
            x, fragments, self.scales, divisor=self.divisor, group=GROUP, act=self.act
        )

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        fragments = w4a8.Fragments(self.words, self.encoding)
        options = {"divisors": self.divisor, "group": GROUP, "act": self.act}
        return w4a8.grouped(x, fragments, self.scales, sizes, **options)

    def leaf_axes(self, axes: Axes) -> "PackedInt4":
        stack, rows, columns = axes[:-2], axes[-2], axes[-1]
        words = AxisNames((*stack, columns, rows, None, None))
        return rebuild(self, words=words, scales=AxisNames(axes), divisor=AxisNames(stack))
