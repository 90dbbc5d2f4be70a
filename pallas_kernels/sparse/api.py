"""The public sparse products: checks, choice of backend, gradient.

All are multilinear, so each tangent is the same dense product with one operand replaced.
That serves forward and reverse mode alike and never differentiates the loop. The derivative is
that of the formula, also at a zero: whoever sets entries to 0 masks their gradient there.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import backend as registry
from pallas_kernels.numerics import is_finite
from pallas_kernels.sparse import blocks, dense, reference, xla
from pallas_kernels.sparse.packed import PLANES, Int4Rows, unpack, values

OPERATIONS = ("matvec", "take", "rows", "glu")
MOSAIC, TRITON = "pallas_kernels.sparse.mosaic", "pallas_kernels.sparse.triton"
TEST = registry.tested("sparse", "mosaic")
TPU = "pallas_kernels.sparse.tpu"


def table(name):
    """The backends of one product, in order of preference."""
    kernel, refuse = registry.lazy(MOSAIC, name), functools.partial(blocks.refuse, name)
    interpreter = registry.lazy(MOSAIC, name, interpret=True)
    hopper = registry.Backend("mosaic", kernel, ("gpu",), refuse, at_least=(9, 0), test=TEST)
    older = hopper._replace(at_least=(7, 5), below=(9, 0), jax=(0, 11, 2))
    triton = older._replace(
        name="triton", run=registry.lazy(TRITON, name), refuse=blocks.refuse_triton, jax=()
    )._replace(test=None)
    tpu = registry.Backend(
        "tpu", registry.lazy(TPU, name), ("tpu",), functools.partial(blocks.refuse_tpu, name)
    )
    return (
        hopper,
        older,
        *((triton,) if name != "take" else ()),
        tpu,
        tpu._replace(
            name="tpu_interpret",
            run=registry.lazy(TPU, name, interpret=True),
            platforms=(),
            automatic=False,
        ),
        # Off the CPU the loop is slower than masking.
        registry.Backend("xla", getattr(xla, name), platforms=("cpu",)),
        registry.Backend("dense", getattr(dense, name)),
        registry.Backend("reference", getattr(reference, name), automatic=False),
        registry.Backend(
            "mosaic_interpret",
            interpreter,
            refuse=refuse,
            automatic=False,
            jax=registry.INTERPRETER,
        ),
    )


BACKENDS = {name: table(name) for name in OPERATIONS}
# Which operands are weights, and which are [..., k] and are flattened to [m, k].
WEIGHTS = {"matvec": (1,), "take": (1,), "rows": (1,), "glu": (1, 2)}
VECTORS = {"matvec": (0,), "take": (0,), "rows": (0, 2), "glu": (0, 3)}
# What `config` means to a backend; the others have nothing to set.
CONFIGS = {
    "xla": xla.Config,
    "mosaic": blocks.GpuConfig,
    "mosaic_interpret": blocks.GpuConfig,
}


def matvec(x, w, *, backend=None, config=None):
    """y = x @ w, reading only the rows of w whose x is not 0 (a decoding step).

    y = sum over i with x_i != 0 of x_i * w[i, :]

    Rows are skipped for one row of x on a CPU, up to four on a GPU or TPU, and a large w; other
    calls run the masked dense product.

    Args:
      x: [..., k], floating point.
      w: [k, n], floating point, row-contiguous; or `Int4Rows`.
      backend: None (chosen by platform), "mosaic" (GPUs), "triton" (GPUs before Hopper, by
        jax-triton, not for `take`), "tpu", "mosaic_interpret" and "tpu_interpret" (the kernels'
        bodies on any device, slowly), "xla" (CPUs), "dense" or "reference".
      config: `Config` of the loop on a CPU or `GpuConfig` of the kernel; None is the default of
        the backend that runs, as is the other one's.
    Returns:
      [..., n] in x's dtype, accumulated in float32; exact zeros where x is all zeros.
    Raises:
      ValueError: shapes or dtypes that do not fit, unknown backend.
    Source:
      CHESS (arXiv 2409.01366), kernel spvmm; TEAL (arXiv 2408.14690).

    >>> matvec(jnp.array([0.0, 2.0]), jnp.array([[1.0, 1.0], [3.0, 5.0]]))
    Array([ 6., 10.], dtype=float32)
    """
    check_float(x=x)
    check_weights(w=w)
    check_matrix("w", w, "[k, n]", x.shape[-1:], "k", "x")
    return run("matvec", (x, w), backend, config).astype(x.dtype)


def take(x, w, ids, count, *, backend=None, config=None):
    """The part of x @ w that a list of channels contributes: what a predictor of active rows needs.

    y = sum over the first `count` entries i of ids of x_i * w[i, :]

    Args:
      x: [..., k], floating point.
      w: [k, n], floating point, row-contiguous; or `Int4Rows`.
      ids: [c], int32, rows of w in any order, the same list for every row of x; an entry outside
        0..k-1 counts as the nearest row, a row listed twice counts twice.
      count: [] int32; entries from there on are not looked at.
      backend, config: see `matvec`.
    Returns:
      [..., n] in x's dtype, accumulated in float32; exact zeros where count is 0.
    Raises:
      ValueError: shapes or dtypes that do not fit, unknown backend.
    Source:
      Deja Vu (arXiv 2310.17157), sparse products from a predicted list of neurons.

    >>> w = jnp.array([[1.0, 1.0], [3.0, 5.0]])
    >>> take(jnp.array([4.0, 2.0]), w, jnp.array([1, 0]), jnp.int32(1))
    Array([ 6., 10.], dtype=float32)
    """
    check_float(x=x)
    check_weights(w=w)
    check_matrix("w", w, "[k, n]", x.shape[-1:], "k", "x")
    ids, count = jnp.asarray(ids), jnp.asarray(count)
    if ids.ndim != 1 or ids.dtype != jnp.int32 or not ids.size or not x.shape[-1]:
        raise ValueError(
            f"ids must be [c] int32 with c >= 1, rows of a w that has some; got {ids.shape} "
            f"{ids.dtype} for k={x.shape[-1]}"
        )
    if count.shape != () or count.dtype != jnp.int32:
        raise ValueError(f"count must be an int32 scalar, got {count.shape} {count.dtype}")
    return run("take", (x, w, ids, count), backend, config).astype(x.dtype)


def rows(x, w_rows, gate, *, backend=None, config=None):
    """m_i = gate_i * <w_rows[i, :], x>, reading only the rows of w_rows whose gate is not 0.

    Args:
      x: [..., d], floating point.
      w_rows: [f, d], floating point or `Int4Rows`: one contiguous row per output.
      gate: [..., f], floating point, leading axes as x.
      backend, config: see `matvec`.
    Returns:
      [..., f] in x's dtype, exactly 0 where gate is 0.
    Raises:
      ValueError: shapes or dtypes that do not fit, unknown backend.
    Source:
      CHESS (arXiv 2409.01366), kernel vmmsp.

    >>> rows(jnp.array([1.0, 2.0]), jnp.array([[1.0, 1.0], [3.0, 5.0]]), jnp.array([0.0, 10.0]))
    Array([  0., 130.], dtype=float32)
    """
    check_float(x=x, gate=gate)
    check_weights(w_rows=w_rows)
    check_gate(gate, x, w_rows, "w_rows")
    return run("rows", (x, w_rows, gate), backend, config).astype(x.dtype)


def glu(gate, up_rows, down, x, *, backend=None, config=None):
    """A gated FFN without its gate product, reading only the rows whose gate is not 0.

    y = sum over i with gate_i != 0 of gate_i * <up_rows[i, :], x> * down[i, :]

    Args:
      gate: [..., f], floating point: the activation, with dropped channels set to 0.
      up_rows: [f, d], floating point or `Int4Rows`: the up projection, one contiguous row per
        channel.
      down: [f, n], floating point or `Int4Rows`.
      x: [..., d], floating point, leading axes as gate.
      backend, config: see `matvec`.
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
    check_float(x=x, gate=gate)
    check_weights(up_rows=up_rows, down=down)
    check_gate(gate, x, up_rows, "up_rows")
    check_matrix("down", down, "[f, n]", gate.shape[-1:], "f", "gate")
    return run("glu", (gate, up_rows, down, x), backend, config).astype(x.dtype)


def run(name, operands, backend, config):
    """Flattens leading axes, picks the backend and calls it; returns float32."""
    accepted = {type(None): "None", xla.Config: "Config", blocks.GpuConfig: "GpuConfig"}
    if type(config) not in accepted:
        raise ValueError(f"config={config!r}; accepted: {', '.join(accepted.values())}")
    lead = operands[0].shape[:-1]
    flat = tuple(flatten(a) if i in VECTORS[name] else a for i, a in enumerate(operands))
    chosen = registry.choose(
        BACKENDS[name],
        backend,
        weights=tuple(flat[i] for i in WEIGHTS[name]),
        m=flat[0].shape[0],
        config=config if isinstance(config, blocks.GpuConfig) else blocks.GpuConfig(),
        named=backend is not None,
    )
    kind = CONFIGS.get(chosen.name)
    options = () if kind is None or not isinstance(config, kind) else (("config", config),)
    y = product(name, chosen.run, options, *flat)
    return y.reshape(*lead, y.shape[-1])


def flatten(x):
    """[..., k] -> [m, k]."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2))
def product(name, implementation, options, *operands):
    """The named product on [m, ...] operands by one backend -> [m, n] float32."""
    return implementation(*operands, **dict(options))


def product_tangent(name, implementation, options, primals, tangents):
    """The product, and the sum of the dense products with one operand replaced by its tangent."""
    out = product(name, implementation, options, *primals)
    change = jnp.zeros_like(out)
    for i, (primal, tangent) in enumerate(zip(primals, tangents, strict=True)):
        if isinstance(primal, Int4Rows):
            still = isinstance(tangent.scales, SymbolicZero)
            tangent = tangent.scales if still else unpack(primal._replace(scales=tangent.scales))
        if not isinstance(tangent, SymbolicZero):
            replaced = (*primals[:i], tangent, *primals[i + 1 :])
            change = change + unmasked(name, *map(in_float32, replaced))
    return out, change


product.defjvp(product_tangent, symbolic_zeros=True)


def in_float32(operand):
    """An operand's values in float32; integers as they are."""
    array = values(operand)
    return array.astype(jnp.float32) if jnp.issubdtype(array.dtype, jnp.floating) else array


def unmasked(name, *operands):
    """The named product in float32 with no mask, which would hide the tangent of a zero gate."""
    if name == "matvec":
        return jnp.matmul(*operands)
    if name == "take":
        return reference.take(*operands)
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


def check_weights(**weights):
    """Raises ValueError unless all are floating-point arrays or well-formed `Int4Rows`."""
    for name, w in weights.items():
        if not isinstance(w, Int4Rows):
            check_float(**{name: w})
        elif (
            (w.words.ndim, w.words.dtype, w.scales.dtype) != (2, jnp.int32, jnp.float32)
        ) or w.scales.shape != (w.words.shape[0], PLANES):
            raise ValueError(
                f"{name} must hold words [k, n / {PLANES}] int32 and scales [k, {PLANES}] float32; "
                f"got {w.words.shape} {w.words.dtype} and {w.scales.shape} {w.scales.dtype}"
            )
        elif not is_finite(w.scales):
            raise ValueError(f"{name}.scales hold a NaN or an infinity")


def check_matrix(name, w, form, first, axis, other):
    """Raises ValueError unless w is a matrix whose first axis is `first` (a 1-tuple)."""
    if len(w.shape) != 2 or w.shape[:1] != first:
        raise ValueError(
            f"{name} must be {form} with {axis}={first[0]}, the last axis of {other}; "
            f"got {tuple(w.shape)}"
        )


def check_gate(gate, x, w_rows, name):
    """Raises ValueError unless gate [..., f], x [..., d] and w_rows [f, d] fit each other."""
    if len(w_rows.shape) != 2 or w_rows.shape != (*gate.shape[-1:], *x.shape[-1:]):
        raise ValueError(
            f"{name} must be [f, d] = {(*gate.shape[-1:], *x.shape[-1:])}, from the last axes of "
            f"gate and x; got {tuple(w_rows.shape)}"
        )
    if gate.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"gate and x must have the same leading axes, got {tuple(gate.shape[:-1])} and "
            f"{tuple(x.shape[:-1])}"
        )
