"""Codes and scales in the layout of quantized checkpoints, as NumPy arrays.

A checkpoint holds a linear map as `[out, in]`. Codes of 4 or 8 bits stand there as q + 2^(bits - 1)
in words of 32 bits, element i of a row at bit i * bits; a row fills up its last word with zeros. As
bytes this is, but for the sign, what `Int4` and `Int8` hold: element 2i in the low nibble.
Scales are `[out, groups]`, and value = code * scale: `Int4.divisor` is divided into them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int8, Int32, Shaped, UInt8

from ffnlab.formats.stream import aligned
from ffnlab.weights import Int4
from ffnlab.weights import Int8 as Int8Weight

TILE = 64  # columns written at a time when turning: one cache line of bytes
GROUP_LIMIT = 4096  # largest group of a sidecar that is longer than the rows there are
WORD_BYTES = 4


def turn(array: Shaped[np.ndarray, "a b"]) -> Shaped[np.ndarray, "b a"]:
    """The transpose as an array of its own, whose buffer the CPU backend can take over."""
    out = aligned(array.shape[::-1], array.dtype)
    for start in range(0, len(array), TILE):
        out[:, start : start + TILE] = array[start : start + TILE].T
    return out


def int4_words(codes: UInt8[np.ndarray, "half out"], rows: int) -> Int32[np.ndarray, "out words"]:
    """The words of `Int4.codes`.

    Args:
      codes: [in_padded / 2, out], two's complement nibbles.
      rows: logical `in`; what lies beyond is dropped.
    Returns:
      [out, ceil(rows / 8)] int32.
    """
    half = -(-rows // 2)
    return _words(turn(codes[:half]) ^ np.uint8(0x88), 0x0F if rows % 2 else 0xFF)


def int4_codes(
    words: Int32[np.ndarray, "out words"], rows: int, padded: int
) -> UInt8[np.ndarray, "half out"]:
    """`Int4.codes` of words.

    Args:
      words: [out, ceil(rows / 8)] int32.
      rows: logical `in`.
      padded: rows with those that fill up the last group, even; codes beyond `rows` are 0.
    Returns:
      [padded / 2, out] uint8.
    """
    half = -(-rows // 2)
    data = words.view(np.uint8)[:, :half] ^ np.uint8(0x88)
    if rows % 2:
        data[:, -1] &= 0x0F
    return turn(np.pad(data, ((0, 0), (0, padded // 2 - half))))


def int8_words(codes: Int8[np.ndarray, "in out"]) -> Int32[np.ndarray, "out words"]:
    """The words of `Int8.codes` [in, out]: [out, ceil(in / 4)] int32."""
    return _words(turn(codes.view(np.uint8)) ^ np.uint8(0x80), 0xFF)


def int8_codes(words: Int32[np.ndarray, "out words"], rows: int) -> Int8[np.ndarray, "in out"]:
    """`Int8.codes` [in, out] of words [out, ceil(in / 4)]."""
    return turn(words.view(np.uint8)[:, :rows] ^ np.uint8(0x80)).view(np.int8)


def _words(data: UInt8[np.ndarray, "out bytes"], last: int) -> Int32[np.ndarray, "out words"]:
    """Rows of bytes, the last one of each masked, filled up to whole words."""
    filled = np.zeros((len(data), -(-data.shape[1] // WORD_BYTES) * WORD_BYTES), np.uint8)
    filled[:, : data.shape[1]] = data
    filled[:, data.shape[1] - 1] &= last
    return filled.view("<i4")


def folded_scales(weight: Int4 | Int8Weight) -> Float[np.ndarray, "groups out"]:
    """scales / divisor, [groups, out] float32, correctly rounded; infinite past its range."""
    scales = np.asarray(weight.scales).astype(np.float32)
    with np.errstate(over="ignore"):
        return scales / np.float32(weight.divisor) if isinstance(weight, Int4) else scales


def holds(dtype: np.dtype, values: Float[np.ndarray, "..."]) -> bool:
    """Whether a float dtype has every one of these float32 values."""
    with np.errstate(over="ignore"):
        return np.array_equal(values.astype(dtype).astype(np.float32), values)


def in_format(
    weight: Int4 | Int8Weight, group: int, dtype: str, divisor: float | tuple[float, ...]
) -> Int4 | Int8Weight:
    """The same weight with its scales in another form, the inverse of folding and splitting them.

    s = round(scale * divisor), one of every group / weight.group; round is to `dtype`.

    Args:
      weight: as its checkpoint says; its divisor is 1. Leaves of a mixture's have an axis of
        experts before the others.
      group: rows that share a scale: a multiple of those that share one in `weight`, which then are
        equal, or a number of rows not below all of them.
      dtype: of the scales, "float32", "bfloat16" or, not for `Int8`, "float8_e4m3fn".
      divisor: > 0; 1 for `Int8`; one of each expert where they differ.
    Raises:
      ValueError: the weight cannot have that form.
    """
    experts = weight.codes.shape[0] if weight.codes.ndim > 2 else 1
    divisors = divisor if isinstance(divisor, tuple) else (divisor,) * experts
    if len(divisors) != experts:
        raise ValueError(f"there are {len(divisors)} divisors of {experts} weights")
    if weight.codes.ndim == 2:
        return _in_format(weight, group, dtype, divisors[0])
    parts = (jax.tree.map(lambda leaf, e=e: leaf[e], weight) for e in range(experts))
    formed = [_in_format(w, group, dtype, d) for w, d in zip(parts, divisors, strict=True)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *formed)


def _in_format(
    weight: Int4 | Int8Weight, group: int, dtype: str, divisor: float
) -> Int4 | Int8Weight:
    rows, groups = weight.shape[0], weight.scales.shape[-2]
    whole = groups == 1 and rows <= group <= max(GROUP_LIMIT, rows + 1)
    if not whole and (group % weight.group or group > max(GROUP_LIMIT, rows + 1)):
        raise ValueError(f"group={group} does not consist of the groups of {weight.group} there")
    scales = weight.scales[:: 1 if whole else group // weight.group]
    scales = (scales.astype(jnp.float32) * jnp.float32(divisor)).astype(jnp.dtype(dtype))
    if isinstance(weight, Int8Weight):
        if divisor != 1 or dtype == "float8_e4m3fn":
            raise ValueError(f"INT8 weights have no divisor ({divisor}) and no {dtype} scales")
        return Int8Weight(weight.codes, scales, group=group, act=weight.act)
    half = -(-rows // 2)
    more = len(scales) * group // 2 - half
    codes = jnp.pad(weight.codes[:half], ((0, max(more, 0)), (0, 0)))
    return Int4(codes, scales, jnp.float32(divisor), group=group, rows=rows, act=weight.act)
