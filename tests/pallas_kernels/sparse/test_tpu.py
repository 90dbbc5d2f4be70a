"""The TPU kernels of the sparse products: interpreted on a CPU and lowered for TPUs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import sparse
from pallas_kernels.aot import lower_for
from pallas_kernels.sparse import GpuConfig, blocks
from tests.pallas_kernels.sparse.operands import call, expected, operands
from tests.pallas_kernels.sparse.test_mosaic import abstract, error

EXACT = 1e-5  # float32 sums of up to 1024 products, relative to the largest
run = functools.partial(call, backend="tpu_interpret")
CALLS = [("matvec", "int4", 1), ("take", "float32", 3), ("rows", "float32", 2)]
CALLS += [("glu", "bfloat16", 1)]


@pytest.mark.parametrize(("name", "kind", "m"), CALLS)
def test_equals_float64(name, kind, m):
    """260 rows are three blocks of float32, two of bfloat16; the last of each is not full."""
    args = operands(name, kind, m=m, f=260, units=1, sparsity=0.6)
    assert error(run(name, args), expected(name, args)) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int4"])
@pytest.mark.parametrize("name", ["matvec", "take", "rows", "glu"])
def test_equals_float64_in_every_form(name, kind, m):
    for sparsity in (0.0, 0.9, 1.0):
        args = operands(name, kind, m=m, f=140, units=2, sparsity=sparsity)
        y = run(name, args)
        assert error(y, expected(name, args)) < EXACT
        assert sparsity < 1 or not np.any(np.asarray(y))


def test_rows_that_are_off_are_not_read_and_nan_stays_visible():
    """A skipped row may hold NaN where both rows of a unit are off."""
    x, w = operands("matvec", "bfloat16", m=1, f=40, units=1, sparsity=0.8)
    wanted = expected("matvec", (x, w))
    off = np.repeat(~np.asarray(x[0] != 0).reshape(-1, 2).any(1), 2)
    w = jnp.where(off[:, None], jnp.bfloat16(jnp.nan), w)
    product = jax.jit(functools.partial(sparse.matvec, backend="tpu_interpret"))
    assert off.any() and error(product(x, w), wanted) < EXACT
    first = int(np.flatnonzero(~off)[0])
    assert np.isnan(product(x.at[0, first].set(jnp.nan), w)).all()


@pytest.mark.slow
def test_vmap():
    x, w = jnp.arange(12.0).reshape(2, 1, 6), jax.random.normal(jax.random.key(0), (6, 128))
    y = jax.vmap(lambda x: sparse.matvec(x, w, backend="tpu_interpret"))(x)
    np.testing.assert_allclose(y, jnp.matmul(x, w), rtol=1e-5, atol=1e-4)


def kernels(name, chip, kind="bfloat16", m=1, **options):
    """TPU kernels in the module of a product lowered for a chip."""
    product = functools.partial(getattr(sparse, name), **options)
    return lower_for(product, abstract(name, kind, m), chip).count("@tpu_custom_call")


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
@pytest.mark.parametrize(("name", "count"), [("matvec", 1), ("take", 1), ("rows", 1), ("glu", 2)])
def test_calls_lower_to_the_kernels_on_a_tpu(name, count, chip):
    assert kernels(name, chip) == count


def test_other_calls_run_without_them():
    assert kernels("matvec", "v5e", "int4", m=4) == 1
    assert kernels("matvec", "v5e", m=5) == kernels("matvec", "h200") == 0
    assert kernels("matvec", "v5e", "float16") == 0
    assert kernels("matvec", "v5e", config=GpuConfig(min_bytes=1 << 30)) == 0


@pytest.mark.parametrize(
    ("rows", "w", "message"),
    [
        (5, jnp.ones((6, 128)), "takes 1 to 4 rows of x, got 5"),
        (1, jnp.ones((6, 128), jnp.float16), "no float16"),
        (1, jnp.ones((7, 128), jnp.bfloat16), r"a multiple of 2 rows .* got \(7, 128\)"),
        (1, jnp.ones((6, 100)), r"of 128 columns, got \(6, 100\)"),
        (1, sparse.pack(jnp.ones((6, 512))), r"of 1024 columns, got \(6, 512\)"),
    ],
)
def test_refusals_say_why(rows, w, message):
    with pytest.raises(ValueError, match=f"tpu_interpret: .*{message}"):
        sparse.matvec(jnp.ones((rows, w.shape[0])), w, backend="tpu_interpret")


def test_rows_too_long_to_hold():
    w = jax.ShapeDtypeStruct((8, 16384), jnp.bfloat16)
    refused = blocks.refuse_tpu("rows", weights=(w,), m=1, config=GpuConfig(), named=True)
    assert refused == "holds rows of 8192 columns, got 16384"
