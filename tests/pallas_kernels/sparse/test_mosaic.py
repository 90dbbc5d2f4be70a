"""The GPU kernels of the sparse products: in the interpreter, and lowered for GPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import sparse
from pallas_kernels.aot import lower_for
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.sparse import GpuConfig
from tests.pallas_kernels.sparse.operands import KINDS, call, expected, operands

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason=f"jax {jax.__version__} has no interpreter for GPU kernels"
)
OPERATIONS = ("matvec", "take", "rows", "glu")
# Sums of up to 2048 products in float32, relative to the largest.
EXACT = 1e-5
# Few blocks and few rows at a time, so that small weights fill several turns of every loop.
SMALL = GpuConfig(blocks=3, unroll=2, unroll_pairs=1)
run = functools.partial(call, backend="mosaic_interpret", config=SMALL)


def error(found, wanted):
    """Largest difference, relative to the largest value; NaN if anything is."""
    return np.abs(np.asarray(found, np.float64) - wanted).max() / max(np.abs(wanted).max(), 1e-30)


@interpreted
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_equals_float64(name, kind):
    """Memory that nobody wrote is NaN in the interpreter."""
    args = operands(name, kind, m=1, f=13, units=1)
    assert error(run(name, args), expected(name, args)) < EXACT


@interpreted
@settings(max_examples=6)
@given(
    name=st.sampled_from(OPERATIONS),
    kind=st.sampled_from(KINDS),
    m=st.integers(1, 4),
    f=st.integers(1, 20),
    units=st.integers(1, 2),
    sparsity=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 9),
)
def test_any_shape(name, kind, m, f, units, sparsity, seed):
    args = operands(name, kind, m=m, f=f, units=units, sparsity=sparsity, seed=seed)
    y = run(name, args)
    assert error(y, expected(name, args)) < EXACT
    assert sparsity < 1 or not np.any(np.asarray(y))


@interpreted
@pytest.mark.parametrize("n", [128, 136, 300])
def test_rows_that_no_block_divides(n):
    """The last block overlaps its neighbour; both write the same numbers."""
    x, w = jnp.ones((1, 5)), jax.random.normal(jax.random.key(0), (5, n))
    y = sparse.matvec(x, w, backend="mosaic_interpret", config=SMALL)
    np.testing.assert_allclose(y, w.sum(0, keepdims=True), rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize("name", OPERATIONS)
def test_rows_that_are_off_are_not_read(name):
    """A skipped row may hold NaN."""
    args = list(operands(name, "float32", m=1, f=9, units=1, sparsity=0.6))
    wanted = expected(name, args)
    off = ~np.any(np.asarray(args[2 if name == "rows" else 0]), axis=0)
    for i in (1, 2) if name == "glu" else (1,):
        args[i] = jnp.where(off[:, None], jnp.nan, args[i])
    assert off.any() and error(run(name, args), wanted) < EXACT


@interpreted
def test_nan_in_the_gate_stays_visible_and_repeats_have_the_same_bits():
    args = operands("glu", "bfloat16", m=1, f=9, units=1)
    first, second = run("glu", args), run("glu", args)
    np.testing.assert_array_equal(first, second)
    gate = args[0].at[0, 4].set(jnp.nan)
    assert np.isnan(np.asarray(run("glu", (gate, *args[1:])))).all()


@interpreted
def test_list_may_be_short_repeated_or_out_of_range():
    x, w = jnp.arange(1.0, 7.0)[None], jax.random.normal(jax.random.key(0), (6, 128))
    take = functools.partial(sparse.take, x, w)
    for ids, count in (([4, 4, 1], 3), ([9, -1], 2), ([3, 2], 0), ([3, 2], 99)):
        ids, count = jnp.asarray(ids, jnp.int32), jnp.int32(count)
        y = take(ids, count, backend="mosaic_interpret", config=SMALL)
        np.testing.assert_allclose(y, take(ids, count, backend="reference"), rtol=1e-5, atol=1e-5)


@interpreted
def test_gradient_and_vmap():
    gate, up, down, x = operands("glu", "int4", m=1, f=5, units=1)

    def loss(backend):
        one = functools.partial(sparse.glu, backend=backend)
        return jax.grad(lambda g, x: (one(g, up, down, x) ** 2).sum(), argnums=(0, 1))

    for found, wanted in zip(
        loss("mosaic_interpret")(gate, x), loss("dense")(gate, x), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    two, w = jnp.stack([x, 2 * x])[..., :7], jnp.ones((7, 128))
    y = jax.vmap(lambda x: sparse.matvec(x, w, backend="mosaic_interpret"))(two)
    np.testing.assert_allclose(y, jnp.matmul(two, w), rtol=1e-5, atol=1e-5)


def abstract(name, kind, m, f=14336, d=4096):
    """Shapes of one FFN of Llama-3-8B."""
    shape = jax.ShapeDtypeStruct
    w = shape((f, d), jnp.float32 if kind == "int4" else kind)
    w = jax.eval_shape(sparse.pack, w) if kind == "int4" else w
    inner, outer = shape((m, f), jnp.bfloat16), shape((m, d), jnp.bfloat16)
    return {
        "matvec": (inner, w),
        "take": (inner, w, shape((f // 2,), jnp.int32), shape((), jnp.int32)),
        "rows": (outer, w, inner),
        "glu": (inner, w, w, outer),
    }[name]


def kernels(name, chip, kind="bfloat16", m=1, **options):
    """Mosaic kernels in the module of a product lowered for a chip."""
    text = lower_for(
        functools.partial(getattr(sparse, name), **options), abstract(name, kind, m), chip
    )
    return text.count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("kind", ["bfloat16", "int4"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_hopper_runs_one_kernel(name, kind):
    assert kernels(name, "h200", kind) == 1


def test_older_gpus_and_more_rows():
    has = JAX_VERSION >= (0, 11, 2)
    assert kernels("glu", "a100") == kernels("matvec", "t4", "float16") == int(has)
    assert kernels("glu", "h200", m=4) == 2  # `rows`, then `matvec`
    assert kernels("glu", "h200", m=5) == 0
    assert kernels("matvec", "h200", backend="dense") == 0
    assert kernels("matvec", "h200", config=GpuConfig(min_bytes=1 << 30)) == 0


W = jnp.ones((5, 128))
BAD = {
    "rows": (lambda b: sparse.matvec(jnp.ones((5, 5)), W, backend=b), "1 to 4 rows of x, got 5"),
    "narrow": (lambda b: sparse.matvec(jnp.ones(5), W[:, :99], backend=b), "128 columns or more"),
    "ragged": (
        lambda b: sparse.rows(jnp.ones(130), jnp.ones((5, 130)), jnp.ones(5), backend=b),
        "multiple of 128",
    ),
    "long": (
        lambda b: sparse.rows(
            jnp.ones((4, 8192)), jnp.ones((1, 8192)), jnp.ones((4, 1)), backend=b
        ),
        "holds 16384 numbers of x, got 4 rows of 8192",
    ),
}


@interpreted
@pytest.mark.parametrize("case", BAD)
def test_refusals_say_why(case):
    run, message = BAD[case]
    with pytest.raises(ValueError, match=f"mosaic_interpret: .*{message}"):
        run("mosaic_interpret")


def test_no_gpu_no_kernel():
    with pytest.raises(ValueError, match="mosaic: runs on gpu, this is cpu"):
        sparse.matvec(jnp.ones(5), W, backend="mosaic")
    with pytest.raises(ValueError, match="blocks >= 1"):
        GpuConfig(unroll=99)
