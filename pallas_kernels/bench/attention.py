"""Attention rows: Llama-3-8B's heads, one prompt, and one step of four sequences."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import attention
from pallas_kernels.bench import torch
from pallas_kernels.bench.measure import Row, Work
from pallas_kernels.numerics import E4M3

HEADS, KV_HEADS, D = 32, 8, 128
PROMPTS = (1024, 2048, 4096, 8192, 16384, 32768)
BY_TILE = (4096, 16384)  # prompts for which FP8 runs with tiles of 64 too
SEQUENCES, CACHES = 4, (4096, 32768)
BF16 = jnp.bfloat16


def rows():
    """All rows, a list of `Row`."""
    found = []
    for t in PROMPTS:
        forms = {"bfloat16 cuDNN": library, "attention bfloat16": half, "attention FP8": int4}
        if t in BY_TILE:
            forms["attention FP8, tiles of 64"] = functools.partial(int4, tile=64)
        for name, make in forms.items():
            row = Row(prompt_task(t), name, functools.partial(make, t), False)
            found.append(row._replace(early=make is not library))
        make = functools.partial(torch.prefill, t, HEADS, KV_HEADS, D, cost(t, 2))
        found.append(Row(prompt_task(t), "bfloat16 torch", make, False, torch.measure))
    for s in CACHES:
        task = f"decode, {SEQUENCES} sequences of {s} keys"
        for name, form in (("bfloat16 XLA", "xla"), ("bfloat16", "half"), ("INT4", "int4")):
            row = Row(task, name, functools.partial(step, form, s), False)
            found.append(row._replace(early=form != "xla"))
    return found


def prompt_task(t):
    """The task of the rows of a prompt of t tokens."""
    return f"prefill, {t} tokens"


def cost(t, key_bytes):
    """Bytes and operations of a prompt of t tokens."""
    return t * D * (4 * HEADS + 2 * key_bytes * KV_HEADS), 2 * t * t * HEADS * D


def normal(*shape):
    """Random bfloat16 numbers for a key."""
    return lambda key: jax.random.normal(key, shape, BF16)


def floats(b, s):
    """A function of a key: keys and values in bfloat16."""

    def make(key):
        return [normal(b, s, KV_HEADS, D)(k) for k in jax.random.split(key)]

    return make


def codes(b, s, dtype, last, scales):
    """A function of a key: INT4 codes and e4m3 scales of keys and values."""

    def make(key):
        keys, (low, high) = jax.random.split(key, 4), (-8, 8) if dtype == jnp.int8 else (0, 256)
        both = [jax.random.randint(k, (b, s, KV_HEADS, last), low, high, dtype) for k in keys[:2]]
        return both + [jax.random.uniform(k, scales, BF16, 0.1, 0.3).astype(E4M3) for k in keys[2:]]

    return make


def prompt(t, run, weights, key_bytes, fp8):
    """The work of one prompt of t tokens."""
    q = normal(1, t, HEADS, D)(jax.random.key(9))
    return Work(run, q, weights, *cost(t, key_bytes), fp8)


def library(t):
    """cuDNN's flash attention."""

    def run(q, cache):
        return jax.nn.dot_product_attention(q, *cache, is_causal=True, implementation="cudnn")

    return prompt(t, run, floats(1, t), 2, False)


def half(t):
    """Ours in bfloat16."""
    return prompt(t, lambda q, cache: attention.prefill(q, *cache), floats(1, t), 2, False)


def int4(t, tile=None):
    """Ours in FP8 over INT4 codes."""

    def run(q, cache):
        k, v, k_scale, v_scale = cache
        options = {"k_scale": k_scale, "v_scale": v_scale, "precision": "fp8", "tile": tile}
        return attention.prefill(q, k, v, **options)

    return prompt(t, run, codes(1, t, jnp.int8, D, (1, t, KV_HEADS)), 1, True)


def step(form, s):
    """One query per sequence over a cache of s keys: by XLA or ours, in bfloat16 or INT4."""
    lengths = jnp.full((SEQUENCES,), s, jnp.int32)

    def run(q, cache):
        k, v, *scales = cache
        options = dict(zip(("k_scale", "v_scale"), scales, strict=False))
        backend = "xla" if form == "xla" else None
        return attention.decode(q, k, v, lengths, **options, backend=backend)

    weights, key_bytes = floats(SEQUENCES, s), 2 * D
    if form == "int4":
        weights = codes(SEQUENCES, s, jnp.uint8, D // 2, (SEQUENCES, KV_HEADS, s))
        key_bytes = D / 2 + 1
    nbytes = 2 * SEQUENCES * s * KV_HEADS * key_bytes
    q = normal(SEQUENCES, HEADS, D)(jax.random.key(9))
    return Work(run, q, weights, nbytes, 4 * SEQUENCES * s * HEADS * D, False)
