"""Sparse products: identity with masked dense arithmetic, gradients, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import sparse
from pallas_kernels.sparse import Config, xla

# Blocks of 8 rows; the loop runs whatever the size and the share of active rows.
ALWAYS = Config(partial=2, unroll=4, lanes=8, rows_until=1.0, matvec_until=1.0, min_bytes=0)
HALF = Config(partial=2, unroll=4, lanes=8, rows_until=0.0, matvec_until=1.0, min_bytes=0)
NEVER = Config(rows_until=0.0, matvec_until=0.0, min_bytes=0)

# Sums of up to 64 products of standard normal numbers in float32, relative to their size.
TOLERANCE = 1e-5

compact = jax.jit(xla.compact, static_argnums=1)

# Of the masked dense product: 0, 0.5, 0.99 and 1.0 as the card asks.
SPARSITIES = (0.0, 0.5, 0.99, 1.0)


def operands(f, d, n, sparsity, m=1, seed=0, dtype=jnp.float32):
    """gate [m, f] with zeros, up_rows [f, d], down [f, n], x [m, d]."""
    rng = np.random.default_rng(seed)
    gate = np.where(rng.random((m, f)) < sparsity, 0.0, rng.normal(size=(m, f)))
    arrays = (gate, rng.normal(size=(f, d)), rng.normal(size=(f, n)), rng.normal(size=(m, d)))
    return tuple(jnp.asarray(a, dtype) for a in arrays)


def in_float64(gate, up_rows, down, x):
    """The three products by numpy in float64."""
    gate, up_rows, down, x = (np.asarray(a, np.float64) for a in (gate, up_rows, down, x))
    m = gate * (x @ up_rows.T)
    return {"rows": m, "matvec": gate @ down, "glu": m @ down}


@functools.partial(jax.jit, static_argnames=("backend", "config"))
def in_jax(gate, up_rows, down, x, **options):
    """The three products by the public functions."""
    return {
        "rows": sparse.rows(x, up_rows, gate, **options),
        "matvec": sparse.matvec(gate, down, **options),
        "glu": sparse.glu(gate, up_rows, down, x, **options),
    }


def assert_close(ours, expected, scale=1.0):
    for name, value in expected.items():
        size = max(np.abs(value).max(), 1e-30)
        error = np.abs(np.asarray(ours[name], np.float64) - value).max() / size
        assert error <= TOLERANCE * scale, f"{name}: {error}"


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("config", [ALWAYS, HALF, NEVER], ids=["always", "half", "never"])
@pytest.mark.parametrize("f, d, n", [(64, 16, 24), (61, 17, 5), (1, 1, 1)])
def test_equals_float64(f, d, n, sparsity, config):
    args = operands(f, d, n, sparsity)
    assert_close(in_jax(*args, config=config), in_float64(*args))


@pytest.mark.parametrize("backend", ["xla", "dense", "reference"])
@pytest.mark.parametrize("m", [1, 3])
def test_backends_agree(backend, m):
    args = operands(40, 16, 12, 0.6, m=m)
    assert_close(in_jax(*args, backend=backend, config=ALWAYS), in_float64(*args))


@pytest.mark.parametrize("config", [ALWAYS, HALF, NEVER], ids=["always", "half", "never"])
def test_no_active_row_gives_exact_zeros(config):
    gate, *rest = operands(30, 8, 6, 0.0)
    for name, value in in_jax(jnp.zeros_like(gate), *rest, config=config).items():
        assert not np.any(np.asarray(value)), name


def test_real_size_takes_the_loop_and_is_exact_to_rounding():
    gate, up_rows, down, x = operands(2050, 1030, 1024, 0.8)
    text = jax.jit(sparse.glu).lower(gate, up_rows, down, x).as_text()
    assert "while" in text
    expected = in_float64(gate, up_rows, down, x)
    assert_close({"glu": sparse.glu(gate, up_rows, down, x)}, {"glu": expected["glu"]})


def test_small_weights_and_several_rows_run_without_a_loop():
    few = operands(64, 16, 24, 0.5)
    many = operands(64, 16, 24, 0.5, m=2)
    assert "while" not in jax.jit(sparse.glu).lower(*few).as_text()
    run = jax.jit(lambda *a: sparse.glu(*a, config=ALWAYS))
    assert "while" not in run.lower(*many).as_text()


def test_padding_does_not_touch_inactive_rows():
    """A skipped row may hold anything: inf there reaches neither the sums nor the padding."""
    gate = jnp.zeros((1, 20)).at[0, 3].set(2.0)
    up_rows = jnp.full((20, 4), jnp.inf).at[3].set(1.0)
    y = in_jax(gate, up_rows, up_rows, jnp.ones((1, 4)), config=ALWAYS)
    np.testing.assert_array_equal(y["glu"], np.full((1, 4), 8.0))
    np.testing.assert_array_equal(y["matvec"], np.full((1, 4), 2.0))
    assert np.asarray(y["rows"]).sum() == 8.0


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        *({"config": config} for config in (ALWAYS, HALF, NEVER)),
        *({"backend": backend} for backend in ("dense", "reference")),
    ],
    ids=["always", "half", "never", "dense", "reference"],
)
def test_inf_in_a_dropped_row_of_up_reaches_nothing(options, m):
    """0 * inf is NaN: a dropped channel's product is left out, not multiplied by its gate."""
    gate = jnp.zeros((m, 20)).at[:, 3].set(2.0)
    up_rows = jnp.full((20, 4), jnp.inf).at[3].set(1.0)
    y = in_jax(gate, up_rows, jnp.ones((20, 5)), jnp.ones((m, 4)), **options)
    np.testing.assert_array_equal(y["rows"], jnp.zeros((m, 20)).at[:, 3].set(8.0))
    np.testing.assert_array_equal(y["glu"], np.full((m, 5), 8.0))


def test_nan_in_the_gate_stays_visible():
    gate, up_rows, down, x = operands(20, 4, 4, 0.5)
    for name, value in in_jax(gate.at[0, 7].set(jnp.nan), up_rows, down, x, config=ALWAYS).items():
        assert np.isnan(np.asarray(value)).any(), name


@settings(max_examples=6)
@given(
    f=st.integers(1, 70),
    d=st.integers(1, 40),
    n=st.integers(1, 20),
    sparsity=st.floats(0, 1),
    partial=st.integers(1, 5),
    unroll=st.sampled_from([4, 8]),
    lanes=st.integers(1, 50),
    seed=st.integers(0, 99),
)
def test_any_shape_and_block(f, d, n, sparsity, partial, unroll, lanes, seed):
    config = Config(partial, unroll, lanes, rows_until=1.0, matvec_until=1.0, min_bytes=0)
    args = operands(f, d, n, sparsity, seed=seed)
    assert_close(in_jax(*args, config=config), in_float64(*args))


@settings(max_examples=15)
@given(active=st.lists(st.booleans(), min_size=1, max_size=200), extra=st.integers(0, 70))
def test_compact(active, extra):
    expected = np.flatnonzero(active)
    ids, place, count = compact(jnp.asarray(active), len(active) + extra)
    assert int(count) == len(expected)
    np.testing.assert_array_equal(ids[: len(expected)], expected)
    np.testing.assert_array_equal(np.asarray(place)[expected], np.arange(len(expected)))
    padding = np.unique(ids[len(expected) :])
    assert set(padding) <= {expected[0] if len(expected) else 0}


@pytest.mark.parametrize("config", [ALWAYS, HALF, NEVER], ids=["always", "half", "never"])
def test_gradients_are_those_of_the_formula(config):
    args = operands(20, 8, 6, 0.5)

    def plain(gate, up_rows, down, x):
        m = gate * jnp.matmul(x, up_rows.T)
        return jnp.sum(m) + jnp.sum(jnp.matmul(gate, down) ** 2) + jnp.sum(jnp.matmul(m, down) ** 2)

    def ours(*arrays):
        y = in_jax(*arrays, config=config)
        return jnp.sum(y["rows"]) + jnp.sum(y["matvec"] ** 2) + jnp.sum(y["glu"] ** 2)

    expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2, 3)))(*args)
    found = jax.jit(jax.grad(ours, argnums=(0, 1, 2, 3)))(*args)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    tangents = operands(20, 8, 6, 0.0, seed=1)
    _, change = jax.jvp(ours, args, tangents)
    _, wanted = jax.jvp(plain, args, tangents)
    np.testing.assert_allclose(change, wanted, rtol=1e-4)


def test_frozen_weights_cost_no_product():
    """Only x has a tangent: the jaxpr multiplies no zero matrix of a weight's size."""
    gate, up_rows, down, x = operands(20, 8, 6, 0.5)
    text = str(jax.make_jaxpr(jax.grad(lambda x: sparse.glu(gate, up_rows, down, x).sum()))(x))
    assert "f32[20,8] = broadcast_in_dim" not in text


def test_vmap_and_leading_axes():
    gate, up_rows, down, x = operands(24, 8, 6, 0.5, m=4)
    expected = in_float64(gate, up_rows, down, x)["glu"]
    one = lambda g, x: sparse.glu(g, up_rows, down, x, config=ALWAYS)  # noqa: E731
    np.testing.assert_allclose(jax.vmap(one)(gate, x), expected, rtol=1e-4, atol=1e-4)
    cube = sparse.glu(gate.reshape(2, 2, 24), up_rows, down, x.reshape(2, 2, 8))
    np.testing.assert_allclose(cube.reshape(4, 6), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["xla", "dense", "reference"])
@pytest.mark.parametrize("m", [1, 2])
def test_half_precision_keeps_its_dtype(m, backend):
    args = operands(24, 8, 6, 0.5, m=m, dtype=jnp.bfloat16)
    found = in_jax(*args, backend=backend, config=ALWAYS)
    for name, value in found.items():
        assert value.dtype == jnp.bfloat16, name
    # bfloat16 has 8 bits of precision, and glu rounds twice.
    assert_close(found, in_float64(*args), scale=2e3)


def test_second_call_compiles_nothing():
    args = operands(24, 8, 6, 0.5)
    run = jax.jit(lambda *a: sparse.glu(*a, config=ALWAYS))
    run(*args)
    run(*operands(24, 8, 6, 0.9, seed=3))
    assert run._cache_size() == 1


def test_no_rows_at_all():
    gate, up_rows, down, x = jnp.zeros((0, 5)), jnp.ones((5, 3)), jnp.ones((5, 2)), jnp.ones((0, 3))
    assert sparse.glu(gate, up_rows, down, x).shape == (0, 2)
    empty = sparse.glu(jnp.zeros((1, 0)), jnp.ones((0, 3)), jnp.ones((0, 2)), jnp.ones((1, 3)))
    np.testing.assert_array_equal(empty, np.zeros((1, 2)))


W = jnp.ones((5, 3))
BAD = {
    "inner size": (lambda: sparse.matvec(jnp.ones(4), W), r"k=4"),
    "not a matrix": (lambda: sparse.matvec(jnp.ones(5), jnp.ones(5)), r"\[k, n\]"),
    "integers": (lambda: sparse.matvec(jnp.ones(5, jnp.int32), W), "int32"),
    "scalar": (lambda: sparse.matvec(jnp.float32(1), W), "scalar"),
    "gate and rows": (lambda: sparse.rows(jnp.ones(3), W, jnp.ones(4)), r"\(4, 3\)"),
    "leading axes": (lambda: sparse.rows(jnp.ones((2, 3)), W, jnp.ones((1, 5))), "leading axes"),
    "down": (lambda: sparse.glu(jnp.ones(5), W, jnp.ones((4, 3)), jnp.ones(3)), "f=5"),
    "backend": (lambda: sparse.matvec(jnp.ones(5), W, backend="cuda"), "accepted.*xla.*dense"),
    "unroll": (lambda: Config(unroll=5), "multiple of 4"),
    "share": (lambda: Config(rows_until=1.5), "from 0 to 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
