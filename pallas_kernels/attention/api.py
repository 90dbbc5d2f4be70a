"""The public prefill attention: checks, tile size, choice of backend, gradient."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import backend as registry
from pallas_kernels.attention import reference, xla
from pallas_kernels.numerics import E4M3, is_finite

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SCALE_DTYPES = (jnp.float32, jnp.bfloat16, E4M3)
SM90 = "pallas_kernels.attention.sm90"
SM90_TILE = 128  # more keys at a time spill registers
SHORT = 64  # fewer queries than this leave most of a block of 128 idle


def refuse_sm90(*, q, k, v, tile, precision, named):
    """Why the Hopper kernel cannot take a call, or None."""
    d, tile = q.shape[-1], tile or SM90_TILE
    codes = (k.dtype, v.dtype) == (jnp.int8, jnp.int8)
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes bfloat16 or float16 queries, got {q.dtype}"
    if precision == "fp8" and not codes:
        return f"takes int8 codes with precision 'fp8', got {k.dtype} and {v.dtype}"
    if not codes and not k.dtype == v.dtype == q.dtype:
        return f"takes keys and values in q's dtype or int8 codes, got {k.dtype} and {v.dtype}"
    if d not in (64, 128) or tile % 64 or not 64 <= tile <= SM90_TILE:
        return f"takes heads of 64 or 128 channels and tiles of 64 or 128 keys, got {d} and {tile}"
    if not named and q.shape[1] < SHORT:
        return f"takes {SHORT} queries or more unless asked for by name, got {q.shape[1]}"
    return None


BACKENDS = (
    registry.Backend(
        "sm90",
        registry.lazy(SM90, "prefill"),
        platforms=("gpu",),
        refuse=refuse_sm90,
        at_least=(9, 0),
        below=(10, 0),
        test=registry.tested("prefill", "sm90"),
    ),
    registry.Backend("xla", xla.prefill),
    registry.Backend("reference", reference.prefill, automatic=False),
    registry.Backend(
        "sm90_interpret",
        registry.lazy(SM90, "prefill", interpret=True),
        refuse=refuse_sm90,
        automatic=False,
        jax=registry.INTERPRETER,
    ),
)


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
    window=None,
    out_dtype=None,
    backend=None,
):
    """Causal attention of a whole prompt over float or INT4 keys and values.

    y[i] = sum_j softmax_j(scale * q[i] . k[j]) v[j]   over keys p - window < j <= p = i + s - t

    A NaN in a query makes its row NaN, one in a key or value every row that sees it. A query of
    zeros sees all its keys alike.

    Args:
      q: [b, t, heads, d], float32, bfloat16 or float16, after RoPE.
      k, v: [b, s, kv, d], the same dtypes, or int8 codes -8..7 with their scales; s >= t >= 1 and
        heads a multiple of kv.
      k_scale, v_scale: [b, s, kv], float32, bfloat16 or float8_e4m3fn: per token and head.
      scale: multiplies the scores; 1 / sqrt(d) when None.
      tile: keys taken at a time, >= 1; when None 128 or 64 on Hopper (see `usual_tile`), elsewhere
        256 for d <= 64, 128 for d <= 128, else 64.
      precision: "float32" (sums; a GPU multiplies 16-bit operands as they are, and exponentials in
        their dtype); or "fp8": queries to e4m3 per token and head, scores to float16, exponentials
        times 448 to e4m3.
      window: how many keys up to its own position a query sees, >= 1; all when None.
      out_dtype: q's dtype when None.
      backend: None (chosen by platform), "sm90" (Hopper), "sm90_interpret" (its body on any device,
        slowly), "xla" (FireQ's three-stage order) or "reference".
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
    check(q, k, v, k_scale, v_scale, precision=precision)
    check_options(scale, tile=tile, window=window)
    facts = {"q": q, "k": k, "v": v, "tile": tile, "precision": precision}
    chosen = registry.choose(BACKENDS, backend, **facts, named=backend is not None)
    fused, d = chosen.name.startswith("sm90"), q.shape[-1]
    if not fused or k_scale is not None or v_scale is not None:
        k_scale, v_scale = scales(k, k_scale, v_scale)
    options = {
        "scale": d**-0.5 if scale is None else scale,
        "tile": tile or usual_tile(fused, d, precision, k_scale is not None),
        "precision": precision,
        "window": window,
    }
    operands = q, k, v, k_scale, v_scale
    if fused:
        y = attend(chosen.run, plain, tuple(options.items()), *operands)
    else:
        y = chosen.run(*operands, **options)
    return y.astype(out_dtype or q.dtype)


def scales(k, k_scale, v_scale):
    """The scales of keys and values, [b, s, kv] float32; ones where there are none."""
    ones = jnp.ones(k.shape[:-1], jnp.float32)
    return tuple(ones if x is None else x.astype(jnp.float32) for x in (k_scale, v_scale))


def plain(q, k, v, k_scale, v_scale, **options):
    """What the gradient of a prefill is taken of."""
    return xla.prefill(q, k, v, *scales(k, k_scale, v_scale), **options)


def usual_tile(fused, d, precision, scaled):
    """Keys taken at a time where the caller does not say.

    On Hopper 16-bit products take the time, which the scores of the next tile must overlap: as many
    keys as let registers hold those (`sm90.Call.ahead`). FP8 is bound by the instructions of the
    softmax, of which larger tiles need fewer for a key (compiled: RESULTS.md).
    """
    if fused:
        return 64 if scaled and precision == "float32" else SM90_TILE
    return 256 if d <= 64 else 128 if d <= 128 else 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def attend(run, plain, options, *operands):
    """run(*operands, **options) with the gradient of `plain`, which is computed again for it."""
    return run(*operands, **dict(options))


def attend_forward(run, plain, options, *operands):
    """The output, and the operands for the gradient."""
    return attend(run, plain, options, *operands), operands


def attend_backward(run, plain, options, operands, dy):
    """Cotangents of the operands; integers get float0."""
    y, pull = jax.vjp(functools.partial(plain, **dict(options)), *operands)
    return pull(dy.astype(y.dtype))


attend.defvjp(attend_forward, attend_backward)


def check_scale(name, scale, shape):
    """Raises ValueError unless the scales of keys or values, if any, are as they must be."""
    if scale is None:
        return
    if scale.shape != shape or scale.dtype not in SCALE_DTYPES:
        accepted = ", ".join(jnp.dtype(x).name for x in SCALE_DTYPES)
        raise ValueError(
            f"{name}_scale must be {shape} in {accepted}; got {tuple(scale.shape)} {scale.dtype}"
        )


def check_options(scale, **counts):
    """Raises ValueError unless `scale` is finite and the others, where given, are at least 1."""
    if scale is not None and not is_finite(scale):
        raise ValueError(f"scale={scale}; it takes a finite number, or None")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; it takes a number >= 1, or None")


def check(q, k, v, k_scale, v_scale, *, precision):
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
        check_scale(name, x_scale, x.shape[:-1])
    if precision not in ("float32", "fp8"):
        raise ValueError(f"precision={precision!r}; accepted: 'float32', 'fp8'")
