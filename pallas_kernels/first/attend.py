"""Attention on Hopper against its reference; the INT4 cache last."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import attention
from pallas_kernels.first.machine import error
from pallas_kernels.numerics import E4M3


def cache(random, b, s, kv, d):
    """INT4 codes -8..7 of keys and values [b, s, kv, d], and e4m3 scales [b, s, kv]."""
    codes = [jnp.asarray(random.integers(-8, 8, (b, s, kv, d)), jnp.int8) for _ in range(2)]
    return codes, [jnp.asarray(random.uniform(0.1, 0.3, (b, s, kv)), E4M3) for _ in range(2)]


def both(here, run, *operands):
    """Relative error of the kernel from the reference."""
    names = here.backend("sm90"), "reference"
    return error(*(jax.jit(functools.partial(run, backend=b))(*operands) for b in names))


def prefill(here):
    """Causal attention in both precisions, every form of register use.

    The smallest case is open: another library guards chained loops like `softmax.attend`'s against
    a compiler's error where one of them runs zero times.
    """
    random = np.random.default_rng(0)
    more = ((128, 129, None, 128), (1000, 1300, 70, 128), (1000, 1300, None, 64))
    for t, s, window, d in ((128, 129, None, 64), *here.size(more, ())):
        (k, v), (k_scale, v_scale) = cache(random, 1, s, 1, d)
        q = jnp.asarray(random.normal(size=(1, t, 2, d)), jnp.bfloat16)
        for precision, keys, scales in (
            ("float32", [x.astype(jnp.bfloat16) for x in (k, v)], (None, None)),
            ("float32", (k, v), (k_scale, v_scale)),
            ("fp8", (k, v), (k_scale, v_scale)),
        ):

            def run(q, k, v, a, b, backend, precision=precision, window=window):
                options = {"precision": precision, "window": window, "backend": backend}
                return attention.prefill(q, k, v, k_scale=a, v_scale=b, **options)

            keyed = f"{keys[0].dtype.name} keys, heads of {d}, t = {t}, s = {s}, window {window}"
            here.show(f"{precision}, {keyed}", error=both(here, run, q, *keys, *scales))


def decode(here):
    """One step over a bfloat16 cache."""
    random = np.random.default_rng(1)
    for d in here.size((64, 128), (64,)):
        b, s, kv = 2, here.size(2048, 128), here.size(8, 1)
        q = jnp.asarray(random.normal(size=(b, 2 * kv, d)), jnp.bfloat16)
        k, v = (jnp.asarray(random.normal(size=(b, s, kv, d)), jnp.bfloat16) for _ in range(2))
        lengths = jnp.array([s, s // 2 - 5], jnp.int32)
        here.show(f"bfloat16, heads of {d}", error=both(here, attention.decode, q, k, v, lengths))


def int4(here):
    """One step over an INT4 cache with e4m3 scales."""
    random = np.random.default_rng(2)
    for d in here.size((64, 128), (64,)):
        b, s, kv = 2, here.size(2048, 128), here.size(8, 1)
        codes, scales = cache(random, b, s, kv, d)
        k, v = (((x[..., ::2] & 15) | x[..., 1::2] << 4).astype(jnp.uint8) for x in codes)
        q = jnp.asarray(random.normal(size=(b, 2 * kv, d)), jnp.bfloat16)
        lengths = jnp.array([s, s // 2 - 5], jnp.int32)
        for window in here.size((None, 70), (None,)):

            def run(q, k, v, lengths, a, b, backend, window=window):
                options = {"window": window, "backend": backend}
                return attention.decode(q, k, v, lengths, k_scale=a, v_scale=b, **options)

            by_head = [jnp.moveaxis(x, 1, 2) for x in scales]
            found = both(here, run, q, k, v, lengths, *by_head)
            here.show(f"heads of {d}, window {window}", error=found)
