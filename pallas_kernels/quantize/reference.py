"""Rounding to FP8 and INT4: the meaning, in plain jnp and float32.

    tokens   scale = absmax_row / 448 (1 for zeros);  code = e4m3(x / scale)
    groups   m = max(absmax of a group, 1e-5);  scale = max(round(m / 7), 2**-9)
             code = clip(round(w / scale), -8, 7)

where round(m / 7) rounds to the scales' dtype (the floor is e4m3's) and the other rounds half to
even. Source: FireQ (arXiv 2505.20839), activation and weight quantizers.
"""

import jax.numpy as jnp

from pallas_kernels.numerics import E4M3, E4M3_MAX, E4M3_TINY, divide, quantize_tokens, quotient
from pallas_kernels.w4a8.nibbles import pack_nibbles

ABSMAX_FLOOR = 1e-5


def tokens(x, *, rows=None, divisors=None):
    """Rows of x [m, k] as e4m3 codes [m, k] and scales [m, 1] float32, or `rows` with zeros; with
    divisors [d] the scales by each, [d, m]."""
    codes, scale = quantize_tokens(jnp.pad(x, ((0, (rows or len(x)) - len(x)), (0, 0))))
    return codes, scale if divisors is None else quotient(scale.T, divisors[:, None])


def groups(w, *, group, dtype):
    """INT4 codes of w [k, n], k a multiple of `group`, and scales of `dtype`.

    Returns:
      codes [k / 2, n] uint8, scales [k / group, n].
    """
    w = w.astype(jnp.float32).reshape(-1, group, w.shape[1])
    scales = group_scale(jnp.max(jnp.abs(w), axis=1), dtype)
    q = jnp.clip(jnp.round(quotient(w, scales.astype(jnp.float32)[:, None])), -8, 7)
    return pack_nibbles(q.astype(jnp.int8).reshape(-1, w.shape[2])), scales


def group_scale(absmax, dtype):
    """The scale of groups with this absmax, in `dtype`."""
    scale = divide(jnp.maximum(absmax, jnp.float32(ABSMAX_FLOOR)), 7)
    if dtype == E4M3:
        scale = jnp.clip(scale, E4M3_TINY, E4M3_MAX)
    return scale.astype(dtype)
