"""The kernels on the device itself: against float64, twice the same bits, no row forgotten."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import grouped, quantize, w4a8
from pallas_kernels.numerics import E4M3, quantize_tokens
from pallas_kernels.w4a8 import calls, plan

pytestmark = pytest.mark.gpu
CLOSE = 3e-3  # relative norm of the error of a bfloat16 result
FRESH = [0, 1]


def error(y, expected):
    """Relative norm; a NaN anywhere makes it one."""
    y, expected = np.asarray(y).astype(np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(y - expected) / np.linalg.norm(expected)


def poisoned(run, *operands):
    """A jitted call after the memory it may get was filled with NaN, twice: the same bits."""
    for _ in range(4):
        jnp.full((1 << 20,), jnp.nan, jnp.float32).block_until_ready()
    run = jax.jit(run)
    y = run(*operands)
    np.testing.assert_array_equal(
        np.asarray(y).view(np.uint8), np.asarray(run(*operands)).view(np.uint8)
    )
    return y


def weights(random, k, n, encoding, *, experts=(), scales=jnp.float32):
    """Packed codes, scales, and the matrices in float64."""
    low = -7 if encoding == "sm" else -8
    q = random.integers(low, 8, (*experts, k, n))
    s = jnp.asarray(random.uniform(0.004, 0.05, (*experts, k // 128, n)), scales)
    packed = jax.vmap(w4a8.pack_nibbles) if experts else w4a8.pack_nibbles
    codes = w4a8.pack(packed(jnp.asarray(q, jnp.int8)), encoding)
    return codes, s, q * np.repeat(np.asarray(s).astype(np.float64), 128, axis=-2)


def rounded(x):
    """Tokens as the product sees them, in float64."""
    codes, scale = quantize_tokens(x)
    return np.asarray(codes).astype(np.float64) * np.asarray(scale, np.float64)


@pytest.mark.parametrize("seed", FRESH)
@pytest.mark.parametrize("encoding", ["sm", "tc"])
@pytest.mark.parametrize("m", [1, 13, 64, 257])
@pytest.mark.parametrize("scales", [jnp.float32, jnp.bfloat16, E4M3])
def test_w4a8_matmul(kernel, large, seed, encoding, m, scales):
    random = np.random.default_rng(seed)
    codes, s, w = weights(random, 256 * large, 200 * large, encoding, scales=scales)
    x = jnp.asarray(random.normal(size=(m, w.shape[0])), jnp.bfloat16)
    y = poisoned(functools.partial(w4a8.matmul, group=128, backend=kernel), x, codes, s)
    assert error(y, rounded(x) @ w) < CLOSE


@pytest.mark.parametrize("m", [5, 150])  # finished by XLA, and on Hopper by the kernel
def test_w4a8_with_a_residual_and_squares(kernel, large, m):
    random = np.random.default_rng(0)
    codes, s, w = weights(random, 256 * large, 200 * large, "sm")
    x = jnp.asarray(random.normal(size=(m, w.shape[0])), jnp.bfloat16)
    residual = jnp.asarray(random.normal(size=(m, w.shape[1])), jnp.bfloat16)
    call = functools.partial(w4a8.matmul, group=128, with_sumsq=True, backend=kernel)

    def run(x, codes, s, residual):
        y, squares = call(x, codes, s, residual=residual)
        return jnp.concatenate([y.astype(jnp.float32), squares[:, None]], axis=1)

    y = np.asarray(poisoned(run, x, codes, s, residual))
    expected = rounded(x) @ w + np.asarray(residual).astype(np.float64)
    assert error(y[:, :-1], expected) < CLOSE
    assert error(y[:, -1], np.square(expected).sum(-1)) < CLOSE


@pytest.fixture
def four(kernel, interpreted):
    """A kernel that works with the blocks of four multiprocessors: each has several pieces."""

    def bound(function, **config):
        name = kernel.removesuffix("_interpret")
        config = plan.Config(**config, groups=plan.LIMITS[name]["groups"], cores=4)
        options = {"kernel": name, "treatment": "promote", "interpret": interpreted}
        return functools.partial(function, config=config, **options)

    return bound


@pytest.mark.parametrize(
    ("out", "config"),
    [
        (jnp.bfloat16, {"tile_m": 16}),
        (jnp.bfloat16, {"tile_m": 16, "columns": 128, "k_tiles": 2}),
        (jnp.bfloat16, {"tile_m": 16, "cluster": 2, "stages": 3}),  # pairs share their tokens
        (jnp.float32, {"tile_m": 8, "split_k": 3}),  # pieces of unequal length
        (jnp.float32, {"tile_m": 32, "split_k": 2, "k_tiles": 2, "stages": 2}),
    ],
)
def test_several_pieces_per_block(four, large, out, config):
    random = np.random.default_rng(0)
    codes, s, w = weights(random, 512 * large, 200 * large, "sm")
    x = jnp.asarray(random.normal(size=(70, w.shape[0])), jnp.bfloat16)
    run = four(calls.matmul, **config)
    y = poisoned(lambda x, c, s: run(x, None, c, s, jnp.float32(1), out_dtype=out), x, codes, s)
    assert error(y, rounded(x) @ w) < CLOSE


def test_several_pieces_per_block_with_a_residual_and_squares(four, large):
    random = np.random.default_rng(0)
    codes, s, w = weights(random, 256 * large, 200 * large, "sm")
    x = jnp.asarray(random.normal(size=(200, w.shape[0])), jnp.bfloat16)
    residual = jnp.asarray(random.normal(size=(200, w.shape[1])), jnp.bfloat16)
    call = functools.partial(four(calls.followed, tile_m=64), out_dtype=jnp.bfloat16)

    def run(x, c, s, residual):
        y, squares = call(x, None, c, s, jnp.float32(1), residual=residual, with_sumsq=True)
        return jnp.concatenate([y.astype(jnp.float32), squares[:, None]], axis=1)

    y = np.asarray(poisoned(run, x, codes, s, residual))
    expected = rounded(x) @ w + np.asarray(residual).astype(np.float64)
    assert error(y[:, :-1], expected) < CLOSE
    assert error(y[:, -1], np.square(expected).sum(-1)) < CLOSE


def test_several_pieces_per_block_with_an_empty_expert(four, large):
    random = np.random.default_rng(0)
    codes, s, w = weights(random, 128 * large, 256 * large, "sm", experts=(4,))
    x = jnp.asarray(random.normal(size=(70, 128 * large)), jnp.bfloat16)
    sizes = jnp.array([40, 0, 1, 26], jnp.int32)
    call = functools.partial(four(calls.grouped, tile_m=8), out_dtype=jnp.bfloat16)
    y = poisoned(lambda x, c, s, n: call(x, None, c, s, jnp.ones(4), n), x, codes, s, sizes)
    parts = [rounded(x)[:40] @ w[0], rounded(x)[40:41] @ w[2], rounded(x)[41:67] @ w[3]]
    assert error(y[:67], np.concatenate(parts)) < CLOSE and (np.asarray(y[67:]) == 0).all()


@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("m", [1, 30, 200])
def test_w4a8_by_triton(kernel, interpreted, large, group, m):
    if not kernel.startswith("sm80"):
        pytest.skip("the Triton kernel is for Ampere and Ada")
    if not interpreted:
        pytest.importorskip("jax_triton", reason="jax-triton is not installed")
    # No interpreter runs jax-triton's calls: there only the test is tested.
    backend = "reference" if interpreted else "triton"
    random = np.random.default_rng(0)
    k, n = 256 * large, 200 * large
    q = random.integers(-8, 8, (k, n))
    s = jnp.asarray(random.uniform(0.004, 0.05, (k // group, n)), jnp.float32)
    x = jnp.asarray(random.normal(size=(m, k)), jnp.bfloat16)
    call = functools.partial(w4a8.matmul, group=group, backend=backend)
    y = poisoned(call, x, w4a8.pack_nibbles(jnp.asarray(q, jnp.int8)), s)
    w = q * np.repeat(np.asarray(s).astype(np.float64), group, axis=0)
    assert error(y, rounded(x) @ w) < CLOSE


@pytest.mark.parametrize("m", [3, 130])
def test_w4a8_table(kernel, large, m):
    if kernel.startswith("sm80"):
        pytest.skip("the kernel of Ampere and Ada has no table")
    random = np.random.default_rng(0)
    codes, s, w = weights(random, 256 * large, 128 * large, "tc")
    x = jnp.asarray(random.normal(size=(m, w.shape[0])), jnp.bfloat16)
    call = functools.partial(w4a8.matmul, group=128, treatment="table", backend=kernel)
    exact = np.asarray(jnp.asarray(w, jnp.float32).astype(E4M3)).astype(np.float64)
    assert error(poisoned(call, x, codes, s), rounded(x) @ exact) < CLOSE


@pytest.mark.parametrize("m", [2, 16, 200])
def test_w4a8_glu(kernel, large, m):
    random = np.random.default_rng(0)
    gate, up = (weights(random, 256 * large, 128 * large, "sm") for _ in range(2))
    x = jnp.asarray(random.normal(size=(m, 256 * large)), jnp.bfloat16)
    codes, s = w4a8.join(gate[0], up[0], gate[1], up[1])
    g, u = rounded(x) @ gate[2], rounded(x) @ up[2]
    y = poisoned(functools.partial(w4a8.glu, backend=kernel), x, codes, s)
    assert error(y, g / (1 + np.exp(-g)) * u) < CLOSE


def test_w4a8_grouped(kernel, large):
    random = np.random.default_rng(0)
    codes, s, w = weights(random, 128 * large, 128 * large, "sm", experts=(4,))
    x = jnp.asarray(random.normal(size=(70, 128 * large)), jnp.bfloat16)
    sizes = jnp.array([40, 0, 1, 26], jnp.int32)  # one expert empty, three tokens without
    y = poisoned(functools.partial(w4a8.grouped, backend=kernel), x, codes, s, sizes)
    parts = [rounded(x)[:40] @ w[0], rounded(x)[40:41] @ w[2], rounded(x)[41:67] @ w[3]]
    assert error(y[:67], np.concatenate(parts)) < CLOSE and (np.asarray(y[67:]) == 0).all()


@pytest.mark.parametrize("k", [256, 4096])
def test_roundings_are_the_references_bits(kernel, k):
    backend = "mosaic_interpret" if "interpret" in kernel else None
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, k)), jnp.bfloat16).at[4].set(0)
    for call in (quantize.tokens, functools.partial(quantize.groups, group=2)):
        found, expected = call(x, backend=backend), call(x, backend="reference")
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_products_and_gradients(kernel, large, transposed):
    if kernel.startswith("sm80"):
        pytest.skip("grouped products have a kernel on Hopper only")
    random = np.random.default_rng(0)
    k, n, sizes = 128 * large, 128 * large, jnp.array([0, 150, 20], jnp.int32)
    w = jnp.asarray(random.normal(size=(3, n, k) if transposed else (3, k, n)), jnp.bfloat16)
    x = jnp.asarray(random.normal(size=(173, k)), jnp.bfloat16)

    def run(x, w, backend):
        call = functools.partial(grouped.matmul, transposed=transposed, backend=backend)
        y, pull = jax.vjp(lambda x, w: call(x, w, sizes), x, w)
        return y, *pull(y)

    ours = jax.jit(functools.partial(run, backend=kernel))(x, w)
    again = jax.jit(functools.partial(run, backend=kernel))(x, w)
    for a, b, expected in zip(ours, again, run(x, w, "reference"), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))
        assert error(a, expected) < 3 * CLOSE
