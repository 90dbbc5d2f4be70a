"""The public grouped product: checks, choice of backend, gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend as registry
from pallas_kernels.grouped import blocks, reference, xla
from pallas_kernels.numerics import E4M3, is_finite, known

TEST = registry.tested("grouped", "sm90")
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16, E4M3)


def refuse(*, dtype, shapes, out_dtype, **_):
    """Why the Hopper kernel cannot run a call; None when it can."""
    if dtype == jnp.float32 or jnp.dtype(out_dtype).itemsize == 1:
        return f"takes and gives 16-bit floats (and takes e4m3), not {dtype.name}"
    if any(size % 128 for size in shapes):
        return f"takes multiples of 128, k and n are {shapes}"
    return None


def table(name):
    """Backends of "multiply" or "outer", fastest first."""
    kernel = "pallas_kernels.grouped.sm90"
    return (
        registry.Backend(
            "sm90",
            registry.lazy(kernel, name),
            platforms=("gpu",),
            refuse=refuse,
            at_least=(9, 0),
            below=(10, 0),
            test=TEST,
        ),
        registry.Backend(
            "sm90_interpret",
            registry.lazy(kernel, name, interpret=True),
            refuse=refuse,
            automatic=False,
            jax=registry.INTERPRETER,
        ),
        registry.Backend("blocks", getattr(blocks, name), platforms=("cpu",)),
        registry.Backend("xla", getattr(xla, name)),
        registry.Backend("reference", getattr(reference, name), automatic=False),
    )


MULTIPLY, OUTER = table("multiply"), table("outer")


def plainest():
    """Name of the first backend that takes any operands on the device that is traced for."""
    return "blocks" if registry.device()[0] == "cpu" else "xla"


def matmul(
    x,
    w,
    group_sizes,
    *,
    transposed=False,
    x_scale=None,
    w_scale=None,
    out_dtype=None,
    backend=None,
):
    """y[i] = x[i] @ w[expert of i], tokens sorted by expert.

    The gradient in x is the product with the transposed matrices, that in w the sum over each
    expert's tokens of x[i]^T dy[i]; both run on the same backend. FP8 is for inference: there only
    the scales get a gradient.

    Args:
      x: [m, k], float32, bfloat16, float16, or float8_e4m3fn. The first group_sizes[0] rows are
        expert 0's, and so on.
      w: [e, k, n] of x's dtype, or [e, n, k] with `transposed` (which FP8 on a GPU wants).
      group_sizes: [e] int32, with a sum of at most m.
      transposed: w holds the transposed matrices.
      x_scale: [m, 1] float32, for FP8 and only for it.
      w_scale: [e] float32, for FP8 and only for it.
      out_dtype: x's dtype when None (bfloat16 for FP8).
      backend: None (chosen by device), "sm90", "blocks" (CPUs), "xla", "reference";
        "sm90_interpret" runs the Hopper kernel's body in Pallas' interpreter.
    Returns:
      [m, n] in `out_dtype`, accumulated in float32; zeros in rows beyond the last group.
    Raises:
      ValueError: shapes or dtypes that do not fit, or a backend that cannot run the call.

    >>> w = jnp.array([[[1.0]], [[10.0]]])
    >>> matmul(jnp.ones((3, 1)), w, jnp.array([1, 2]))[:, 0]
    Array([ 1., 10., 10.], dtype=float32)
    """
    check(x, w, group_sizes, transposed, x_scale, w_scale)
    narrow = x.dtype == E4M3
    out_dtype = jnp.dtype(out_dtype or (jnp.bfloat16 if narrow else x.dtype))
    if x.shape[0] == 0:
        return jnp.zeros((0, w.shape[1 if transposed else 2]), out_dtype)
    scale = None
    if x_scale is not None and w_scale is not None:
        expert = jnp.minimum(reference.experts_of(group_sizes, x.shape[0]), len(w) - 1)
        scale = x_scale[:, 0] * w_scale[expert]
    facts = {"dtype": x.dtype, "shapes": w.shape[1:], "out_dtype": out_dtype}
    name = registry.choose(MULTIPLY, backend, **facts).name
    return product(x, w, scale, group_sizes, transposed, out_dtype, name).astype(out_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def product(x, w, scale, group_sizes, transposed, out_dtype, name):
    """The product by the backend called `name`."""
    y = grouped_multiply(x, w, scale, group_sizes, transposed, out_dtype, name)
    return y.astype(out_dtype)


@functools.partial(jax.jit, static_argnames=("transposed", "out_dtype", "name"), inline=False)
def grouped_multiply(x, w, scale, group_sizes, transposed, out_dtype, name):
    """One backend's product; a jaxpr shows it by this name, whatever is inside."""
    run = next(b.run for b in MULTIPLY if b.name == name)
    return run(x, w, scale, group_sizes, transposed=transposed, out_dtype=out_dtype)


@functools.partial(jax.jit, static_argnames=("name",), inline=False)
def grouped_outer(x, dy, group_sizes, name):
    """One backend's gradient of the matrices; see `grouped_multiply`."""
    return next(b.run for b in OUTER if b.name == name)(x, dy, group_sizes)


def product_forward(x, w, scale, group_sizes, transposed, out_dtype, name):
    """The product, and what its gradient needs."""
    y = product(x, w, scale, group_sizes, transposed, out_dtype, name)
    return y, (x, w, scale, group_sizes)


def product_backward(transposed, out_dtype, name, residuals, dy):
    """Cotangents of x, w, scale and group_sizes (float0)."""
    x, w, scale, group_sizes = residuals
    none = np.zeros(group_sizes.shape, jax.dtypes.float0)
    if scale is not None:
        ones = product(x, w, jnp.ones_like(scale), group_sizes, transposed, out_dtype, name)
        dscale = jnp.sum(dy.astype(jnp.float32) * ones.astype(jnp.float32), axis=1)
        return jnp.zeros_like(x), jnp.zeros_like(w), dscale, none
    dy = dy.astype(x.dtype)
    dx = product(dy, w, None, group_sizes, not transposed, jnp.dtype(x.dtype), name)
    pair = (dy, x) if transposed else (x, dy)
    dw = grouped_outer(*pair, group_sizes, name)
    return dx.astype(x.dtype), dw.astype(w.dtype), None, none


product.defvjp(product_forward, product_backward)


def check(x, w, group_sizes, transposed, x_scale, w_scale):
    """Raises ValueError unless the operands of `matmul` fit each other."""
    if x.dtype not in DTYPES or w.dtype != x.dtype:
        accepted = ", ".join(jnp.dtype(d).name for d in DTYPES)
        raise ValueError(f"x is {x.dtype}, w {w.dtype}; both must be one of {accepted}")
    if x.ndim != 2 or w.ndim != 3 or w.shape[2 if transposed else 1] != x.shape[1]:
        wanted = "[e, n, k]" if transposed else "[e, k, n]"
        raise ValueError(
            f"x must be [m, k] and w {wanted}, got {tuple(x.shape)} and {tuple(w.shape)}"
        )
    e = w.shape[0]
    if group_sizes.shape != (e,) or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"group_sizes must be [e] = ({e},) integers, "
            f"got {tuple(group_sizes.shape)} {group_sizes.dtype}"
        )
    if known(group_sizes):
        sizes = np.asarray(group_sizes)
        if (sizes < 0).any() or sizes.sum() > len(x):
            raise ValueError(f"group_sizes={sizes.tolist()} are not parts of m={len(x)} rows of x")
    scales = (("x_scale", x_scale, (x.shape[0], 1)), ("w_scale", w_scale, (e,)))
    for name, scale, shape in scales:
        if (scale is None) == (x.dtype == E4M3):
            raise ValueError(f"{name} belongs to operands of float8_e4m3fn and only to them")
        if scale is not None and (scale.shape != shape or scale.dtype != jnp.float32):
            raise ValueError(
                f"{name} must be {shape} float32, got {tuple(scale.shape)} {scale.dtype}"
            )
    if w_scale is not None and not is_finite(w_scale):
        raise ValueError("w_scale holds a NaN or an infinity")
