"""The public functions: checks, padding, choice of backend."""

import math

import jax.numpy as jnp

from pallas_kernels import backend as registry
from pallas_kernels.numerics import E4M3
from pallas_kernels.quantize import limits, reference

TEST = registry.tested("quantize", "mosaic")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
SCALE_DTYPES = (jnp.float32, jnp.bfloat16, E4M3)
OLDEST = (0, 11, 2)  # jax whose Mosaic GPU knows Ada


def table(name):
    """Backends of `name`; XLA's is the reference, which it fuses well for `tokens`."""
    plain, refuse = getattr(reference, name), getattr(limits, name)
    mosaic = registry.lazy("pallas_kernels.quantize.mosaic", name)
    interpreted = registry.lazy("pallas_kernels.quantize.mosaic", name, interpret=True)
    hopper = registry.Backend("mosaic", mosaic, ("gpu",), refuse, at_least=(9, 0), test=TEST)
    return (
        hopper,
        hopper._replace(at_least=(8, 9), below=(9, 0), jax=OLDEST),
        registry.Backend(
            "mosaic_interpret",
            interpreted,
            refuse=refuse,
            automatic=False,
            jax=registry.INTERPRETER,
        ),
        registry.Backend("xla", plain),
        registry.Backend("reference", plain, automatic=False),
    )


TOKENS, GROUPS = table("tokens"), table("groups")


def tokens(x, *, rows=None, backend=None):
    """Rounds each row of x to e4m3 with its own scale: x is close to codes * scale.

    scale = absmax / 448 (1 for an all-zero row);  codes = e4m3(x / scale)

    Args:
      x: [..., k], float32, bfloat16 or float16, k >= 1.
      rows: of x [m, k]: rows to return, at least m; those behind are zeros with scale 1 (whole
        tiles for a product, without a copy). As many as x has when None.
      backend: None (chosen by device), "mosaic", "xla", "reference"; "mosaic_interpret" runs the
        GPU kernel's body in Pallas' interpreter.
    Returns:
      codes [..., k] float8_e4m3fn, scale [..., 1] float32; the same bits from every backend. A NaN
      makes its row NaN.
    Raises:
      ValueError: no row, another dtype, fewer `rows`, or a backend that cannot run the call.
    Source:
      FireQ (arXiv 2505.20839), dynamic per-token activation quantization.

    >>> codes, scale = tokens(jnp.array([448.0, 7.0]))
    >>> codes.astype(jnp.float32), scale
    (Array([448.,   7.], dtype=float32), Array([1.], dtype=float32))
    """
    check("x", x, 1)
    if rows is not None and (x.ndim != 2 or rows < x.shape[0]):
        raise ValueError(f"rows={rows} must be at least m of x [m, k], which is {x.shape}")
    chosen = registry.choose(TOKENS, backend, x=x)
    m = math.prod(x.shape[:-1])
    if m == 0:
        shape = x.shape[:-1] if rows is None else (rows,)
        return jnp.zeros((*shape, x.shape[-1]), E4M3), jnp.ones((*shape, 1), jnp.float32)
    if rows is not None:
        return chosen.run(x, rows=rows)
    codes, scale = chosen.run(x.reshape(m, x.shape[-1]))
    return codes.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def divided(x, divisors, rows):
    """`tokens` of x [m, k] for a product whose result is divided: by one kernel, no launch beside.

    Args:
      x: see `tokens`; m >= 1.
      divisors: [d] float32.
      rows: see `tokens`.
    Returns:
      codes [rows, k] float8_e4m3fn, and the scale of each row by each divisor [d, rows] float32.

    >>> divided(jnp.array([[448.0, 7.0]]), jnp.array([1.0, 2.0]), 1)[1].tolist()
    [[1.0], [0.5]]
    """
    return registry.choose(TOKENS, x=x).run(x, rows=rows, divisors=divisors)


def groups(w, *, group=128, dtype=jnp.float32, backend=None):
    """Symmetric INT4 codes, two per byte, with one scale per group of rows and column.

    m = max(absmax of a group, 1e-5);  s = max(round(m / 7), 2**-9);  q = clip(round(w / s), -8, 7)

    Args:
      w: [k, n], float32, bfloat16 or float16.
      group: rows that share a scale, even; divides k.
      dtype: of the scales: float32, bfloat16 or float8_e4m3fn (whose floor 2**-9 is).
      backend: see `tokens`.
    Returns:
      codes [k / 2, n] uint8 (row 2i in the low nibble), scales [k / group, n]; the same bits from
      every backend. A NaN or infinity makes its group meaningless.
    Raises:
      ValueError: shapes, dtypes or options that do not fit.
    Source:
      FireQ (arXiv 2505.20839), weight quantizer.

    >>> codes, scales = groups(jnp.array([[7.0], [-3.0]]), group=2)
    >>> hex(codes[0, 0]), float(scales[0, 0])
    ('0xd7', 1.0)
    """
    check("w", w, 2)
    if not isinstance(group, int) or group < 2 or group % 2 or w.shape[0] % group:
        raise ValueError(f"group={group!r} must be even and divide k={w.shape[0]}")
    if dtype not in SCALE_DTYPES:
        accepted = ", ".join(jnp.dtype(d).name for d in SCALE_DTYPES)
        raise ValueError(f"dtype={jnp.dtype(dtype).name} of the scales; accepted: {accepted}")
    return registry.choose(GROUPS, backend, w=w).run(w, group=group, dtype=jnp.dtype(dtype))


def check(name, x, axes):
    """Raises ValueError unless x is a non-empty float array of at least (or two: exactly) axes."""
    if x.dtype not in DTYPES:
        accepted = ", ".join(jnp.dtype(d).name for d in DTYPES)
        raise ValueError(f"{name} has dtype {x.dtype}; accepted: {accepted}")
    wrong = x.ndim < 1 if axes == 1 else x.ndim != axes
    if wrong or x.shape[-1] == 0 or (axes == 2 and x.shape[0] == 0):
        wanted = "[..., k]" if axes == 1 else "[k, n]"
        raise ValueError(f"{name} must be {wanted} and not empty, got {tuple(x.shape)}")
