"""Fragment-major INT4: codes in the order in which a Hopper tensor core's lanes want them.

A tile of 64 columns of w and 128 rows (a wgmma's A operand, transposed) is 1024 words of int32 in
8 x 128: word (r, 4 * thread + l) belongs to that thread of the warp group, so a thread reads its
32 codes of half a tile with one 128-bit load, and a tile is 4 contiguous KB. Thread 32 w + 4 g + t,
word l of half r holds, for j = 0..3, the codes of columns 16 w + g and 16 w + g + 8 in row
64 r + 16 l + 4 t + j. Two encodings of those eight codes:

  "tc"  two's complement, -8..7: the nibble at bit 16 h + 4 j, h = 1 for column g + 8
  "sm"  sign and magnitude, -7..7: placed so that an AND (after a rotation by 4 for h = 1) leaves
        four bytes, each the e4m3 subnormal q * 2**-9: 3 integer operations for 8 codes

Columns are padded with zeros to whole pairs of tiles. Along k there is no padding: k is a multiple
of 128.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.w4a8.nibbles import pack_nibbles, unpack_nibbles

TILE_COLUMNS, TILE_ROWS = 64, 128
PAIR = 2 * TILE_COLUMNS  # columns that one thread block takes
ENCODINGS = ("sm", "tc")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fragments:
    """INT4 codes as the GPU kernel reads them.

    Attributes:
      words: [..., n / 64, k / 128, 8, 128] int32, n rounded up to a multiple of 128 (an array, or
        its `jax.ShapeDtypeStruct`).
      encoding: "sm" or "tc" (static).
    """

    words: Any
    encoding: str = dataclasses.field(metadata={"static": True})

    @property
    def rows(self) -> int:
        """k, the rows of the matrix."""
        return self.words.shape[-3] * TILE_ROWS


def pack(codes, encoding="sm"):
    """Fragment-major codes, the opposite of `unpack`.

    Args:
      codes: [..., k / 2, n] uint8, canonical; k a multiple of 128.
      encoding: "sm" (-7..7, decodes fastest) or "tc" (-8..7).
    Returns:
      `Fragments`.
    Raises:
      ValueError: shape or dtype, unknown encoding, or a code -8 for "sm" (seen only outside jit).

    >>> pack(jnp.zeros((64, 100), jnp.uint8)).words.shape
    (2, 1, 8, 128)
    """
    check_codes(codes, encoding)
    *stack, half, n = codes.shape
    flat = codes.reshape(-1, half, n)
    words = jax.lax.map(lambda one: pack_one(one, encoding), flat)
    return Fragments(words.reshape(*stack, *words.shape[1:]), encoding)


def pack_one(codes, encoding):
    """[k / 2, n] uint8 -> [n / 64, k / 128, 8, 128] int32."""
    q = unpack_nibbles(codes).T
    q = jnp.pad(q, ((0, -q.shape[0] % PAIR), (0, 0))).astype(jnp.int32)
    n, k = q.shape
    # n tile, warp, h, g | k tile, r, l, t, j
    q = q.reshape(n // 64, 4, 2, 8, k // 128, 2, 4, 4, 4).transpose(0, 4, 5, 1, 3, 7, 6, 2, 8)
    h, j = half_and_byte()
    if encoding == "tc":
        bits = (q.astype(jnp.uint32) & jnp.uint32(15)) << (16 * h + 4 * j)
    else:
        sign, size = (q < 0).astype(jnp.uint32), jnp.abs(q).astype(jnp.uint32)
        low = ((sign << 7) | size) << (8 * j)
        high = (size << (8 * j + 4)) | (sign << (8 * ((j + 1) % 4) + 3))
        bits = jnp.where(h == 0, low, high)
    words = jnp.sum(bits, axis=(-1, -2), dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(words, jnp.int32).reshape(n // 64, k // 128, 8, 128)


def unpack(fragments, columns):
    """Canonical codes of a fragment-major matrix.

    Args:
      fragments: `Fragments`.
      columns: n, the columns that are not padding.
    Returns:
      [..., k / 2, n] uint8.
    """
    words = fragments.words
    flat = words.reshape(-1, *words.shape[-4:])
    q = jax.lax.map(lambda one: unpack_tiles(one, fragments.encoding), flat)
    codes = jax.vmap(pack_nibbles)(q.swapaxes(1, 2)[:, :, :columns])
    return codes.reshape(*words.shape[:-4], *codes.shape[1:])


def canonical(codes, columns):
    """Canonical codes of a matrix of `columns` columns, whichever form it has."""
    return unpack(codes, columns) if isinstance(codes, Fragments) else codes


def unpack_tiles(words, encoding):
    """[a, b, 8, 128] int32 -> codes [64 a, 128 b] int8: columns of the matrix along axis 0."""
    a, b = words.shape[:2]
    bits = jax.lax.bitcast_convert_type(words, jnp.uint32).reshape(a, b, 2, 4, 8, 4, 4, 1, 1)
    h, j = half_and_byte()
    if encoding == "tc":
        q = ((bits >> (16 * h + 4 * j)) & jnp.uint32(15)).astype(jnp.int32)
        q = jnp.where(q > 7, q - 16, q)
    else:
        bits = jnp.where(h == 0, bits, (bits >> 4) | (bits << 28)) >> (8 * j)
        size = (bits & jnp.uint32(7)).astype(jnp.int32)
        q = jnp.where((bits & jnp.uint32(0x80)) == 0, size, -size)
    return q.transpose(0, 3, 7, 4, 1, 2, 6, 5, 8).reshape(64 * a, 128 * b).astype(jnp.int8)


def half_and_byte():
    """h = 0, 1 for columns g and g + 8, and the byte j = 0..3, as uint32 that broadcast."""
    return jnp.arange(2, dtype=jnp.uint32)[:, None], jnp.arange(4, dtype=jnp.uint32)[None]


def join(gate, up, gate_scales, up_scales):
    """One matrix whose tiles of 64 columns are gate's and up's in turn, as `glu` reads it.

    Args:
      gate, up: `Fragments` of one shape and encoding.
      gate_scales, up_scales: [..., k / group, n] of one dtype.
    Returns:
      codes: `Fragments` [..., 2 * n / 64, k / 128, 8, 128].
      scales: [..., k / group, 2 * n], n rounded up to a multiple of 128 with zeros.
    Raises:
      ValueError: shapes, dtypes or encodings differ.
    """
    if gate.words.shape != up.words.shape or gate.encoding != up.encoding:
        raise ValueError(
            f"gate is {gate.words.shape} {gate.encoding!r}, up {up.words.shape} {up.encoding!r}; "
            "both must have one shape and encoding"
        )
    facts = [(tuple(scale.shape), scale.dtype) for scale in (gate_scales, up_scales)]
    if facts[0] != facts[1]:
        raise ValueError(f"gate_scales and up_scales differ: {facts[0]} and {facts[1]}")
    both = jnp.stack([gate.words, up.words], axis=-4)
    *stack, tiles, _, k_tiles, lanes, words = both.shape
    codes = Fragments(both.reshape(*stack, 2 * tiles, k_tiles, lanes, words), gate.encoding)
    extra = tiles * TILE_COLUMNS - gate_scales.shape[-1]
    halves = [
        jnp.pad(scale, [(0, 0)] * (scale.ndim - 1) + [(0, extra)]).reshape(
            *scale.shape[:-1], tiles, TILE_COLUMNS
        )
        for scale in (gate_scales, up_scales)
    ]
    scales = jnp.stack(halves, axis=-2)
    return codes, scales.reshape(*gate_scales.shape[:-1], 2 * tiles * TILE_COLUMNS)


def split(codes, scales):
    """What `join` joined, with its padding.

    Args:
      codes, scales: see `join`.
    Returns:
      gate, up, gate_scales, up_scales; the scales are [..., k / group, n], n a multiple of 128.
    """
    *stack, tiles, k_tiles, lanes, words = codes.words.shape
    both = codes.words.reshape(*stack, tiles // 2, 2, k_tiles, lanes, words)
    gate, up = (Fragments(both[..., i, :, :, :], codes.encoding) for i in range(2))
    return gate, up, *split_columns(scales)


def split_columns(joined):
    """The columns [..., n] of gate and of up from [..., 2 * n] in turns of 64."""
    halves = joined.reshape(*joined.shape[:-1], -1, 2, TILE_COLUMNS)
    wide = (*joined.shape[:-1], joined.shape[-1] // 2)
    return halves[..., 0, :].reshape(wide), halves[..., 1, :].reshape(wide)


def check_codes(codes, encoding):
    """Raises ValueError unless `pack` can pack the codes."""
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding={encoding!r}; accepted: {', '.join(map(repr, ENCODINGS))}")
    if codes.ndim < 2 or codes.dtype != jnp.uint8:
        raise ValueError(f"codes must be [..., k / 2, n] uint8, got {codes.shape} {codes.dtype}")
    if codes.shape[-2] == 0 or codes.shape[-2] % (TILE_ROWS // 2) or codes.shape[-1] == 0:
        raise ValueError(
            f"codes of shape {tuple(codes.shape)} hold k={2 * codes.shape[-2]} rows and "
            f"n={codes.shape[-1]} columns; k must be a multiple of {TILE_ROWS} and n at least 1"
        )
    if encoding == "sm" and not traced(codes) and has_minus_eight(codes):
        raise ValueError("codes hold a -8, which encoding='sm' (-7..7) has no bits for; use 'tc'")


def narrowest_encoding(codes):
    """The faster "sm" for codes that are known to be -7..7, else "tc"."""
    return "tc" if traced(codes) or has_minus_eight(codes) else "sm"


def traced(codes):
    """Whether the values of codes cannot be looked at."""
    return isinstance(codes, jax.core.Tracer)


def has_minus_eight(codes):
    """Whether a canonical code is -8; codes must be values, not traced."""
    codes = np.asarray(codes)
    return bool((((codes & 15) == 8) | ((codes >> 4) == 8)).any())
