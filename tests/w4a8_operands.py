"""Operands of the INT4 x FP8 products, shared by their tests."""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import w4a8


def weights(n, k, *, encoding="sm", scales=jnp.float32, experts=(), seed=0):
    """Canonical codes, the packed ones and scales [*experts, k / 128, n]."""
    random = np.random.default_rng(seed)
    low = -7 if encoding == "sm" else -8
    q = jnp.asarray(random.integers(low, 8, (*experts, k, n)), jnp.int8)
    codes = jax.vmap(w4a8.pack_nibbles)(q) if experts else w4a8.pack_nibbles(q)
    scales = jnp.asarray(random.uniform(0.004, 0.05, (*experts, k // 128, n)), scales)
    return codes, w4a8.pack(codes, encoding), scales


def tokens(m, k, dtype=jnp.float32, seed=1):
    """[m, k] of very different rows, the first all zeros where there are more."""
    x = np.random.default_rng(seed).normal(size=(m, k)) * np.logspace(-2, 2, m)[:, None]
    x[0] *= m == 1
    return jnp.asarray(x, dtype)


def error(y, expected):
    """Relative norm; a NaN anywhere makes it one."""
    y, expected = np.asarray(y, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)
