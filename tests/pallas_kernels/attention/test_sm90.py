"""The Hopper kernel of prefill attention: in the interpreter, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.weights import kv
from pallas_kernels.aot import lower_for
from pallas_kernels.attention import prefill
from pallas_kernels.attention.cases import make
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from tests.pallas_kernels.w4a8.test_fragment import held_by_lane

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason=f"jax {jax.__version__} has no interpreter for GPU kernels"
)
# P has 8 significant bits in bfloat16 and 11 in float16; the output is rounded once more.
CLOSE = {"bfloat16": 2.0**-7, "float16": 2.0**-10}


def operands(dtype, t, s, heads, kv_heads, d=64, *, codes, seed=0):
    """q, and k and v as INT4 codes with scales, or as floats; then exact k and v."""
    keys = jax.random.split(jax.random.key(seed), 3)
    q = jax.random.normal(keys[0], (1, t, heads, d), dtype)
    k, v = (jax.random.normal(x, (1, s, kv_heads, d), dtype) for x in keys[1:])
    if not codes:
        return q, k, v, {}, (k, v)
    (k8, k_scale), (v8, v_scale) = kv.quantize_int4(k), kv.quantize_int4(v)
    exact = tuple(kv.fake("int4", x.astype(jnp.float32)) for x in (k, v))
    return q, k8, v8, {"k_scale": k_scale, "v_scale": v_scale}, exact


def error(found, wanted):
    """Largest difference relative to the largest value."""
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return np.abs(found - wanted).max() / np.abs(wanted).max()


def check(dtype, t, s, heads, kv_heads, window, *, codes, fp8, scale=None, d=64, tile=64, seed=0):
    """Compares the kernel's body with the reference."""
    q, k, v, scales, exact = operands(dtype, t, s, heads, kv_heads, d, codes=codes, seed=seed)
    options = {"window": window, "precision": "fp8" if fp8 else "float32", "scale": scale}
    y = prefill(q, k, v, **scales, **options, tile=tile, backend="sm90_interpret")
    assert y.dtype == q.dtype and y.shape == q.shape
    reference = functools.partial(
        prefill, q.astype(jnp.float32), window=window, scale=scale, backend="reference"
    )
    ideal = reference(*(x.astype(jnp.float32) for x in exact))
    if not fp8:
        assert error(y, ideal) < CLOSE[dtype]
        return
    # e4m3 moves a weight by up to 2^-4 of itself, here after the values' scale, there before.
    assert error(y, reference(k, v, **scales, precision="fp8")) < 2.0**-4 + CLOSE[dtype]
    # Queries are rounded as well.
    assert 1e-4 < error(y, ideal) < 2.0**-3


@interpreted
@pytest.mark.parametrize(
    ("dtype", "t", "s", "heads", "kv_heads", "window", "codes", "fp8", "scale"),
    [
        ("bfloat16", 70, 150, 2, 1, None, False, False, -0.2),
        ("float16", 130, 130, 1, 1, 70, True, True, None),
    ],
)
def test_equals_reference(dtype, t, s, heads, kv_heads, window, codes, fp8, scale):
    """Memory that nobody wrote is NaN in the interpreter."""
    check(dtype, t, s, heads, kv_heads, window, codes=codes, fp8=fp8, scale=scale)


@pytest.mark.slow
@interpreted
@settings(max_examples=10)
@given(
    dtype=st.sampled_from(["bfloat16", "float16"]),
    t=st.integers(1, 260),
    more=st.integers(0, 200),
    group=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    window=st.none() | st.integers(1, 300),
    mode=st.sampled_from([(False, False), (True, False), (True, True)]),
    scale=st.sampled_from([None, -0.1, 0.0, 0.3]),
    d=st.sampled_from([64, 128]),
    tile=st.sampled_from([None, 64, 128]),
    seed=st.integers(0, 9),
)
def test_any_shape(dtype, t, more, group, kv_heads, window, mode, seed, **options):
    codes, fp8 = mode
    options |= {"codes": codes, "fp8": fp8, "seed": seed}
    check(dtype, t, t + more, group * kv_heads, kv_heads, window, **options)


@interpreted
def test_repeats_and_the_gradient():
    q, k, v, _, _ = operands("bfloat16", 40, 40, 1, 1, codes=False)
    run = functools.partial(prefill, tile=64, backend="sm90_interpret")
    np.testing.assert_array_equal(run(q, k, v), run(q, k, v))
    wanted = jax.grad(lambda q: (prefill(q, k, v, backend="xla").astype(jnp.float32)).sum())(q)
    found = jax.grad(lambda q: (run(q, k, v).astype(jnp.float32)).sum())(q)
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=1e-2)


def kernels(chip, function, arguments):
    """Mosaic kernels in the module lowered for a chip."""
    return lower_for(function, arguments, chip).count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("precision", ["fp8", "float32"])
@pytest.mark.parametrize("window", [None, 1024])
def test_hopper_runs_one_kernel(precision, window):
    assert kernels("h200", *make(precision, 128, window)) == 1


def test_chosen_for_prompts_on_hopper_only():
    def q(t, dtype=jnp.bfloat16):
        return (jax.ShapeDtypeStruct((1, t, 2, 128), dtype),) * 3

    assert kernels("h200", prefill, q(256)) == 1
    assert kernels("h200", prefill, q(8)) == 0
    assert kernels("h200", prefill, q(256, jnp.float32)) == 0
    assert kernels("l4", prefill, q(256)) == 0


@pytest.mark.skipif(JAX_VERSION < INTERPRETER, reason="refused for the jax version first")
@pytest.mark.parametrize(
    ("d", "options", "message"),
    [
        (32, {}, "heads of 64 or 128 channels"),
        (64, {"tile": 48}, "tiles of 64 or 128 keys, got 64 and 48"),
        (64, {"precision": "fp8"}, "takes int8 codes with precision 'fp8'"),
        (64, {"dtype": jnp.float32}, "bfloat16 or float16 queries, got float32"),
    ],
)
def test_refusals_say_why(d, options, message):
    q = jnp.ones((1, 4, 1, d), options.pop("dtype", jnp.bfloat16))
    with pytest.raises(ValueError, match=f"sm90_interpret: .*{message}"):
        prefill(q, q, q, backend="sm90_interpret", **options)


def test_registers_of_scores_are_an_operand_of_bytes():
    """Lane by lane: what a thread hands over is what the tensor core takes from it, in `key_order`.

    The interpreter does not know registers, so this stands in for `fragments.bytes_of`.
    """
    fragments = pytest.importorskip("pallas_kernels.attention.fragments")
    layout, shape = fragments.plgpu.Layout, (64, 128)
    scores = held_by_lane(layout.WGMMA.to_mgpu(), shape, count=2)
    # Registers by tile of 16 keys, its half, and the half of 16 rows: halves side by side.
    handed = scores.reshape(4, 32, -1, 2, 2, 2).swapaxes(3, 4).reshape(4, 32, -1, 4)
    taken = held_by_lane(layout.WGMMA_8BIT.to_mgpu(), shape)
    order = np.asarray(fragments.key_order(jnp.arange(64 * 128).reshape(shape)))
    np.testing.assert_array_equal(handed, order.flat[taken])


@pytest.mark.parametrize("t", [1024, 2048, 4096])
def test_the_longest_blocks_of_all_heads_start_first(t):
    """A GPU starts blocks of threads by the grid's last axis first; 132 run at a time."""
    from pallas_kernels.attention import sm90

    heads, tile = 32, 64
    grid, busy = sm90.order(t // sm90.BLOCK, heads, 1), np.zeros(132)
    for block, _, _ in np.ndindex(grid):  # the last index fastest
        last = (grid[0] - block) * sm90.BLOCK  # see `sm90.body`: block 0 has the last queries
        busy[busy.argmin()] += -(-last // tile)
    assert grid[0] * grid[1] == t // sm90.BLOCK * heads
    assert busy.max() <= 1.05 * busy.mean()
