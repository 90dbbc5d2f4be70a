"""The public prefill attention: checks, tile size, choice of backend."""

import jax.numpy as jnp

from pallas_kernels import backend as registry
from pallas_kernels.attention import reference, xla

# A GPU kernel is one more entry in front.
BACKENDS = (
    registry.Backend("xla", xla.prefill),
    registry.Backend("reference", reference.prefill, automatic=False),
)
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def prefill(
    q,
    k,
    v,
    *,
    k_scale=None,
    v_scale=None,
    scale=None,
    tile=None,
    precision="float32",
    out_dtype=None,
    backend=None,
):
    """Causal attention of a whole prompt over float or INT4 keys and values.

    y[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]   over keys j <= i + s - t

    A NaN in a query makes its row NaN, one in a key or value every row that sees it. A query of
    zeros sees all its keys alike.

    Args:
      q: [b, t, heads, d], float32, bfloat16 or float16, after RoPE.
      k, v: [b, s, kv, d], the same dtypes, or int8 codes -8..7 with their scales; s >= t >= 1 and
        heads a multiple of kv.
      k_scale, v_scale: [b, s, kv], float32, bfloat16 or float8_e4m3fn: per token and head.
      scale: multiplies the scores; 1 / sqrt(d) when None.
      tile: keys taken at a time, >= 1; when None 256 for d <= 64, 128 for d <= 128, else 64.
      precision: "float32"; or "fp8": queries to e4m3 per token and head, scores to float16,
        exponentials times 448 to e4m3.
      out_dtype: q's dtype when None.
      backend: None (chosen by platform), "xla" (FireQ's three-stage order) or "reference".
    Returns:
      [b, t, heads, d].
    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    Source:
      FireQ (arXiv 2505.20839), prefill kernel.

    >>> one = jnp.ones((1, 1, 1, 2))
    >>> prefill(one, one, one).tolist()
    [[[[1.0, 1.0]]]]
    """
    check(q, k, v, k_scale, v_scale, tile=tile, precision=precision)
    d = q.shape[-1]
    tile = tile or (256 if d <= 64 else 128 if d <= 128 else 64)
    chosen = registry.choose(BACKENDS, backend, q=q, k=k, tile=tile, precision=precision)
    ones = jnp.ones(k.shape[:-1], jnp.float32)
    k_scale, v_scale = (ones if x is None else x.astype(jnp.float32) for x in (k_scale, v_scale))
    scale = d**-0.5 if scale is None else scale
    y = chosen.run(q, k, v, k_scale, v_scale, scale=scale, tile=tile, precision=precision)
    return y.astype(out_dtype or q.dtype)


def check(q, k, v, k_scale, v_scale, *, tile, precision):
    """Raises ValueError unless the operands of `prefill` fit each other."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q must be [b, t, heads, d], k and v [b, s, kv, d] alike; got {tuple(q.shape)}, "
            f"{tuple(k.shape)} and {tuple(v.shape)}"
        )
    (b, t, heads, d), (kb, s, kv, kd) = q.shape, k.shape
    if (b, d) != (kb, kd) or not 1 <= t <= s or d < 1 or kv < 1 or heads % kv:
        raise ValueError(
            f"q {tuple(q.shape)} does not fit k {tuple(k.shape)}: same b and d, 1 <= t <= s, and "
            "heads a multiple of kv"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q has dtype {q.dtype}; accepted: float32, bfloat16, float16")
    for name, x, x_scale in (("k", k, k_scale), ("v", v, v_scale)):
        if x.dtype not in (*DTYPES, jnp.int8):
            raise ValueError(f"{name} has dtype {x.dtype}; accepted: floats, or int8 with scales")
        if x.dtype == jnp.int8 and x_scale is None:
            raise ValueError(f"{name} holds int8 codes: pass {name}_scale [b, s, kv]")
        if x_scale is not None and x_scale.shape != x.shape[:-1]:
            raise ValueError(f"{name}_scale must be {x.shape[:-1]}, got {tuple(x_scale.shape)}")
    if tile is not None and tile < 1:
        raise ValueError(f"tile={tile}; it takes a number of keys >= 1")
    if precision not in ("float32", "fp8"):
        raise ValueError(f"precision={precision!r}; accepted: 'float32', 'fp8'")
