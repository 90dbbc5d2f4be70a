"""Codes two per byte: the canonical form, which no kernel is tied to."""

import jax
import jax.numpy as jnp


def pack_nibbles(q):
    """Codes two per byte along k, the opposite of `unpack_nibbles`.

    Args:
      q: [k, n] integers in -8..7, k even.
    Returns:
      [k / 2, n] uint8.
    """
    nibbles = q.astype(jnp.uint8) & jnp.uint8(15)
    return nibbles[0::2] | (nibbles[1::2] << jnp.uint8(4))


def unpack_nibbles(codes):
    """The codes -8..7 of a packed matrix.

    Args:
      codes: [k / 2, n] uint8.
    Returns:
      [k, n] int8.

    >>> unpack_nibbles(jnp.array([[0x8F]], jnp.uint8))
    Array([[-1],
           [-8]], dtype=int8)
    """
    low = jax.lax.bitcast_convert_type(codes << jnp.uint8(4), jnp.int8) >> jnp.int8(4)
    high = jax.lax.bitcast_convert_type(codes, jnp.int8) >> jnp.int8(4)
    return jnp.stack([low, high], axis=1).reshape(2 * codes.shape[0], codes.shape[1])
