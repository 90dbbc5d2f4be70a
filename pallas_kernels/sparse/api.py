"""The public sparse products: checks, choice of backend, gradient.

All three are multilinear, so each tangent is the same dense product with one operand replaced.
That serves forward and reverse mode alike and never differentiates the loop. The derivative is
that of the formula, also at a zero: whoever sets entries to 0 masks their gradient there.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import backend as registry
from pallas_kernels.sparse import dense, reference, xla

OPERATIONS = ("matvec", "rows", "glu")
# A GPU or TPU kernel is one more entry in front. Off the CPU the loop is slower than masking.
BACKENDS = {
    name: (
        registry.Backend("xla", getattr(xla, name), platforms=("cpu",)),
        registry.Backend("dense", getattr(dense, name)),
        registry.Backend("reference", getattr(reference, name), automatic=False),
    )
    for name in OPERATIONS
}
# Which operands are weights; the others are [..., k] and are flattened to [m, k].
WEIGHTS = {
    "matvec": (False, True),
    "rows": (False, True, False),
    "glu": (False, True, True, False),
}


def matvec(x, w, *, backend=None, config=None):
    """y = x @ w, reading only the rows of w whose x is not 0 (a decoding step on a CPU).

    y = sum over i with x_i != 0 of x_i * w[i, :]

    Rows are skipped for one row of x and a large w; other calls run the masked dense product.

    Args:
      x: [..., k], floating point.
      w: [k, n], floating point, row-contiguous.
      backend: None (chosen by platform), "xla", "dense" or "reference".
      config: `Config` of the loop; None is the measured one.
    Returns:
      [..., n] in x's dtype, accumulated in float32; exact zeros where x is all zeros.
    Raises:
      ValueError: shapes or dtypes that do not fit, unknown backend.
    Source:
      CHESS (arXiv 2409.01366), kernel spvmm.

    >>> matvec(jnp.array([0.0, 2.0]), jnp.array([[1.0, 1.0], [3.0, 5.0]]))
    Array([ 6., 10.], dtype=float32)
    """
    check_float(x=x, w=w)
    check_matrix("w", w, "[k, n]", x.shape[-1:], "k", "x")
    return run("matvec", (x, w), backend, config).astype(x.dtype)


def rows(x, w_rows, gate, *, backend=None, config=None):
    """m_i = gate_i * <w_rows[i, :], x>, reading only the rows of w_rows whose gate is not 0.

    Args:
      x: [..., d], floating point.
      w_rows: [f, d], floating point: one contiguous row per output.
      gate: [..., f], floating point, leading axes as x.
      backend: None (chosen by platform), "xla", "dense" or "reference".
      config: `Config` of the loop; None is the measured one.
    Returns:
      [..., f] in x's dtype, exactly 0 where gate is 0.
    Raises:
      ValueError: shapes or dtypes that do not fit, unknown backend.
    Source:
      CHESS (arXiv 2409.01366), kernel vmmsp.

    >>> rows(jnp.array([1.0, 2.0]), jnp.array([[1.0, 1.0], [3.0, 5.0]]), jnp.array([0.0, 10.0]))
    Array([  0., 130.], dtype=float32)
    """
    check_float(x=x, w_rows=w_rows, gate=gate)
    check_gate(gate, x, w_rows, "w_rows")
    return run("rows", (x, w_rows, gate), backend, config).astype(x.dtype)


def glu(gate, up_rows, down, x, *, backend=None, config=None):
    """A gated FFN without its gate product, reading only the rows whose gate is not 0.

    y = sum over i with gate_i != 0 of gate_i * <up_rows[i, :], x> * down[i, :]

    Args:
      gate: [..., f], floating point: the activation, with dropped channels set to 0.
      up_rows: [f, d], floating point: the up projection, one contiguous row per channel.
      down: [f, n], floating point.
      x: [..., d], floating point, leading axes as gate.
      backend: None (chosen by platform), "xla", "dense" or "reference".
      config: `Config` of the loop; None is the measured one.
    Returns:
      [..., n] in x's dtype; exact zeros where gate is all zeros.
    Raises:
      ValueError: shapes or dtypes that do not fit, unknown backend.
    Source:
      CHESS (arXiv 2409.01366), kernels vmmsp and spvmm in one pass.

    >>> eye = jnp.eye(2)
    >>> glu(jnp.array([0.0, 3.0]), eye, eye, jnp.array([1.0, 2.0]))
    Array([0., 6.], dtype=float32)
    """
    check_float(x=x, up_rows=up_rows, down=down, gate=gate)
    check_gate(gate, x, up_rows, "up_rows")
    check_matrix("down", down, "[f, n]", gate.shape[-1:], "f", "gate")
    return run("glu", (gate, up_rows, down, x), backend, config).astype(x.dtype)


def run(name, operands, backend, config):
    """Flattens leading axes, picks the backend and calls it; returns float32."""
    chosen = registry.choose(BACKENDS[name], backend).name
    lead = operands[0].shape[:-1]
    kinds = zip(operands, WEIGHTS[name], strict=True)
    flat = tuple(a if is_weight else flatten(a) for a, is_weight in kinds)
    y = product(name, chosen, config or xla.Config(), *flat)
    return y.reshape(*lead, y.shape[-1])


def flatten(x):
    """[..., k] -> [m, k]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def product(name, backend, config, *operands):
    """The named product on [m, ...] operands by the named backend -> [m, n] float32."""
    if backend == "xla":
        return getattr(xla, name)(*operands, config=config)
    return getattr(dense if backend == "dense" else reference, name)(*operands)


def product_tangent(name, backend, config, primals, tangents):
    """The product, and the sum of the dense products with one operand replaced by its tangent."""
    out = product(name, backend, config, *primals)
    change = jnp.zeros_like(out)
    for i, tangent in enumerate(tangents):
        if not isinstance(tangent, SymbolicZero):
            replaced = (*primals[:i], tangent, *primals[i + 1 :])
            change = change + unmasked(name, *(a.astype(jnp.float32) for a in replaced))
    return out, change


product.defjvp(product_tangent, symbolic_zeros=True)


def unmasked(name, *operands):
    """The named product in float32 with no mask, which would hide the tangent of a zero gate."""
    if name == "matvec":
        return jnp.matmul(*operands)
    if name == "rows":
        x, w_rows, gate = operands
        return gate * jnp.matmul(x, w_rows.T)
    gate, up_rows, down, x = operands
    return jnp.matmul(gate * jnp.matmul(x, up_rows.T), down)


def check_float(**arrays):
    """Raises ValueError unless all arrays are floating point and have an axis."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}; accepted: floating point")
        if array.ndim < 1:
            raise ValueError(f"{name} is a scalar; it must have at least one axis")


def check_matrix(name, w, form, first, axis, other):
    """Raises ValueError unless w is a matrix whose first axis is `first` (a 1-tuple)."""
    if w.ndim != 2 or w.shape[:1] != first:
        raise ValueError(
            f"{name} must be {form} with {axis}={first[0]}, the last axis of {other}; "
            f"got {tuple(w.shape)}"
        )


def check_gate(gate, x, w_rows, name):
    """Raises ValueError unless gate [..., f], x [..., d] and w_rows [f, d] fit each other."""
    if w_rows.ndim != 2 or w_rows.shape != (*gate.shape[-1:], *x.shape[-1:]):
        raise ValueError(
            f"{name} must be [f, d] = {(*gate.shape[-1:], *x.shape[-1:])}, from the last axes of "
            f"gate and x; got {tuple(w_rows.shape)}"
        )
    if gate.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"gate and x must have the same leading axes, got {tuple(gate.shape[:-1])} and "
            f"{tuple(x.shape[:-1])}"
        )
