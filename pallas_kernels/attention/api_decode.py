"""The public decode attention: checks, pages of a contiguous cache, choice of backend."""

import functools

import jax.numpy as jnp

from pallas_kernels import backend as registry
from pallas_kernels.attention import reference, xla
from pallas_kernels.attention.api import DTYPES, attend, check_options, check_scale

DECODE = "pallas_kernels.attention.decode_sm90"
TILE = 64  # keys a block takes at a time
START = 4  # tiles whose time a block takes to fill its pipeline and to write what is merged
PLAIN = functools.partial(xla.decode, whole=True)


def refuse_sm90(*, q, k, v, page):
    """Why the Hopper kernel cannot take a call, or None."""
    d, group = q.shape[-1], q.shape[1] // k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16 queries, got {q.dtype}"
    if k.dtype != v.dtype or k.dtype not in (q.dtype, jnp.uint8):
        return f"takes a cache in q's dtype or packed in uint8, got {k.dtype} and {v.dtype}"
    if d not in (64, 128) or page % TILE or group > 64:
        return (
            f"takes heads of 64 or 128 channels, pages of a multiple of {TILE} keys and up to 64 "
            f"heads per key head; got {d}, {page} and {group}"
        )
    return None


BACKENDS = (
    registry.Backend(
        "sm90",
        registry.lazy(DECODE, "decode"),
        platforms=("gpu",),
        refuse=refuse_sm90,
        at_least=(9, 0),
        below=(10, 0),
        test=registry.tested("decode", "sm90"),
        jax=(0, 11),  # the layouts of older ones do not reach shared memory
    ),
    registry.Backend("xla", xla.decode),
    registry.Backend("reference", reference.decode, automatic=False),
    registry.Backend(
        "sm90_interpret",
        registry.lazy(DECODE, "decode", interpret=True),
        refuse=refuse_sm90,
        automatic=False,
        jax=registry.INTERPRETER,
    ),
)


def decode(
    q,
    k,
    v,
    lengths,
    *,
    k_scale=None,
    v_scale=None,
    pages=None,
    scale=None,
    window=None,
    splits=None,
    out_dtype=None,
    backend=None,
):
    """Attention of one query per sequence, the last of its keys, over a cache.

    y = sum_j softmax_j(scale * q . k[j]) v[j]   over keys length - window <= j < length

    What the cache holds from `length` on is not looked at and may be NaN. The gradient, in q,
    scales, and keys and values that are floats, is that of XLA's form, computed again (reverse
    mode only).

    Args:
      q: [b, heads, d], float32, bfloat16 or float16, after RoPE.
      k, v: [b, s, kv, d] in those dtypes or int8 codes, or INT4 codes two per byte [b, s, kv, d/2]
        uint8, channel 2i in the low nibble of byte i; heads a multiple of kv. With `pages`
        [p, page, kv, d or d/2].
      lengths: [b] int32, the keys each sequence has, at least 1 (not checked).
      k_scale, v_scale: per head and token, [b, kv, s] or [p, kv, page], float32, bfloat16 or
        float8_e4m3fn; needed by codes. Tokens are last (unlike in `prefill`): a block reads a run
        of one head's scales.
      pages: [b, n] int32: which pages of the cache a sequence has, in order; None: contiguous.
      scale: multiplies the scores; 1 / sqrt(d) when None.
      window: how many keys up to the last one a query sees, >= 1; all when None.
      splits: thread blocks that share a sequence's keys on a GPU; when None enough to fill it.
      out_dtype: q's dtype when None.
      backend: None (chosen by device), "sm90" (Hopper), "sm90_interpret" (its body on any device,
        slowly), "xla" (one page after another, up to the longest sequence) or "reference".
    Returns:
      [b, heads, d].
    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    Source:
      FireQ (arXiv 2505.20839), INT4 cache; split keys as in Flash-Decoding (2023).

    >>> one = jnp.ones((1, 3, 1, 2))
    >>> decode(one[:, 0], one, 2 * one, jnp.array([2])).tolist()
    [[[2.0, 2.0]]]
    """
    check(q, k, v, lengths, k_scale, v_scale, pages)
    check_options(scale, window=window, splits=splits)
    if (k_scale is None) != (v_scale is None):
        ones = jnp.ones(scale_shape(k), jnp.float32)
        k_scale, v_scale = (ones if x is None else x for x in (k_scale, v_scale))
    if pages is None:  # each sequence has one page
        pages = jnp.arange(q.shape[0], dtype=jnp.int32)[:, None]
    cache = k, v, k_scale, v_scale
    page, blocks = k.shape[1], q.shape[0] * k.shape[2]
    chosen = registry.choose(BACKENDS, backend, q=q, k=k, v=v, page=page)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    splits = splits or shares(blocks, seen(pages.shape[1] * page, window), registry.cores())
    options = (("scale", scale), ("window", window), ("splits", splits))
    y = attend(chosen.run, PLAIN, options, q, *cache, pages, lengths)
    return y.astype(out_dtype or q.dtype)


def seen(keys, window):
    """Tiles of keys that a query sees at most, of a cache of `keys`."""
    return -(-keys // TILE) if window is None else min(-(-keys // TILE), -(-window // TILE) + 1)


def shares(blocks, tiles, cores):
    """Blocks that share a sequence's keys: what takes the GPU the shortest.

    A multiprocessor holds one block, whose registers are more than half of what it has (compiled).

    Args:
      blocks: sequences times key heads; tiles: of keys.
      cores: multiprocessors.

    >>> shares(32, 512, 132), shares(8, 64, 132), shares(256, 64, 132), shares(1, 1, 132)
    (4, 16, 1, 1)
    """

    def turns(split):
        return -(-blocks * split // cores) * (-(-tiles // split) + START)

    return min(range(1, min(tiles, cores) + 1), key=turns)


def scale_shape(x):
    """Shape of the scales of keys or values [p, page, kv, d]."""
    return (x.shape[0], x.shape[2], x.shape[1])


def check(q, k, v, lengths, k_scale, v_scale, pages):
    """Raises ValueError unless the operands of `decode` fit each other."""
    if q.ndim != 3 or q.dtype not in DTYPES:
        raise ValueError(
            f"q must be [b, heads, d], float32, bfloat16 or float16; got {tuple(q.shape)} {q.dtype}"
        )
    b, heads, d = q.shape
    for name, x, x_scale in (("k", k, k_scale), ("v", v, v_scale)):
        if x.dtype not in (*DTYPES, jnp.int8, jnp.uint8):
            raise ValueError(f"{name} has dtype {x.dtype}; accepted: floats, int8, uint8")
        last = d // 2 if x.dtype == jnp.uint8 else d
        if x.ndim != 4 or x.shape[3] != last or x.shape[:3] != k.shape[:3] or 0 in x.shape:
            raise ValueError(
                f"{name} must be [b, s, kv, {last}], or [p, page, kv, {last}] with pages, k and v "
                f"alike; got {tuple(x.shape)} {x.dtype}"
            )
        if x.dtype in (jnp.int8, jnp.uint8) and x_scale is None:
            raise ValueError(f"{name} holds codes: pass {name}_scale {scale_shape(x)}")
        check_scale(name, x_scale, scale_shape(x))
    if heads % k.shape[2] or (pages is None and k.shape[0] != b):
        raise ValueError(f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: heads, sequences")
    if lengths.shape != (b,) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths must be [{b}] int32, got {lengths.shape} {lengths.dtype}")
    if pages is not None and (
        pages.ndim != 2 or pages.shape[0] != b or not pages.size or pages.dtype != jnp.int32
    ):
        raise ValueError(f"pages must be [{b}, n] int32, got {pages.shape} {pages.dtype}")
