"""The Hopper kernel without a GPU: its body interpreted, and every call lowered for one.

Interpreted: everything but the decoding in registers (`test_fragment`). Memory that the kernel does
not write is NaN there, so a missed tile shows. Lowered: the public functions, for the devices they
are meant for, and that they hold the Mosaic kernel, not the reference.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from pallas_kernels import w4a8
from pallas_kernels.aot import CHIPS, lower_for, topology
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.numerics import E4M3, quantize_tokens
from pallas_kernels.w4a8 import plan
from tests.w4a8_operands import error, tokens, weights

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason="Pallas interprets GPU kernels from jax 0.11"
)
MOSAIC = "mosaic_gpu"
NARROW = 4e-3  # relative norm of the error of rounding to bfloat16, 2**-8 at most per element
WIDE = 1e-6  # the same for sums of k <= 512 float32 products in another order


@interpreted
@settings(max_examples=4, deadline=None)
@given(
    m=st.sampled_from([1, 3, 17]),
    n=st.sampled_from([1, 128, 200]),
    k=st.sampled_from([128, 384]),
    encoding=st.sampled_from(["sm", "tc"]),
    scales=st.sampled_from([jnp.float32, jnp.bfloat16, E4M3]),
    out_dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_matmul_equals_the_reference(m, n, k, encoding, scales, out_dtype):
    codes, fragments, scales = weights(n, k, encoding=encoding, scales=scales)
    x = tokens(m, k)
    call = functools.partial(
        w4a8.matmul, x, scales=scales, group=128, divisor=2.0, out_dtype=out_dtype
    )
    y = call(codes=fragments, backend="sm90_interpret")
    assert y.dtype == out_dtype and y.shape == (m, n)
    expected = call(codes=codes, backend="reference", out_dtype=jnp.float32)
    assert error(y, expected) < (WIDE if out_dtype == jnp.float32 else NARROW)


@interpreted
@pytest.mark.parametrize("chip", ["a100", "l4"])
@pytest.mark.parametrize(("m", "encoding"), [(3, "sm"), (70, "tc")])
def test_the_kernel_of_ampere_and_ada_equals_the_reference(chip, m, encoding):
    from pallas_kernels.w4a8 import calls, sm80

    codes, fragments, scales = weights(200, 256, encoding=encoding, scales=jnp.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sm80.backend, "device", lambda: ("gpu", CHIPS[chip].capability))
        y = calls.matmul(
            *quantize_tokens(tokens(m, 256)),
            fragments,
            scales,
            jnp.float32(2),
            kernel="sm80",
            treatment="promote",
            out_dtype=jnp.float32,
            interpret=True,
        )
    expected = w4a8.matmul(
        tokens(m, 256), codes, scales, divisor=2.0, group=128, backend="reference"
    )
    assert error(y, expected) < WIDE


@interpreted
def test_glu_and_grouped_of_ampere_equal_the_reference():
    gate, up = weights(128, 128, seed=2), weights(128, 128, seed=3)
    codes, scales = w4a8.join(gate[1], up[1], gate[2], up[2])
    call = functools.partial(w4a8.glu, tokens(3, 128), codes, scales)
    assert error(call(backend="sm80_interpret"), call(backend="reference")) < WIDE
    _, fragments, scales = weights(128, 128, experts=(2,))
    sizes = jnp.array([0, 4], jnp.int32)
    call = functools.partial(w4a8.grouped, tokens(5, 128), fragments, scales, sizes)
    assert error(call(backend="sm80_interpret"), call(backend="reference")) < WIDE


@interpreted
@pytest.mark.parametrize(
    "config",
    [
        plan.Config(tile_m=8, split_k=2, k_tiles=2, cores=3, stages=2),
        plan.Config(tile_m=8, split_k=3, cores=4, stages=2),  # 1, 1 and 2 steps
        plan.Config(tile_m=16, columns=128, cores=2),
        plan.Config(tile_m=16, cluster=2, cores=4, stages=2),
    ],
    ids=lambda config: f"split {config.split_k}, columns {config.columns}",
)
def test_every_way_to_cut_the_work(config):
    from pallas_kernels.w4a8 import calls

    codes, fragments, scales = weights(512, 512)
    x, out_dtype = tokens(20, 512), jnp.float32 if config.split_k > 1 else jnp.bfloat16
    run = functools.partial(
        calls.matmul,
        kernel="sm90",
        treatment="promote",
        out_dtype=out_dtype,
        config=config,
        interpret=True,
    )
    y = run(x, None, fragments, scales, jnp.float32(1))
    expected = w4a8.matmul(x, codes, scales, group=128, backend="reference")
    assert error(y, expected) < (WIDE if config.split_k > 1 else NARROW)
    np.testing.assert_array_equal(y, run(x, None, fragments, scales, jnp.float32(1)))


@interpreted
def test_ampere_cuts_rows_unevenly_too():
    from pallas_kernels.w4a8 import calls

    codes, fragments, scales = weights(128, 512)
    x, config = tokens(5, 512), plan.Config(tile_m=8, groups=1, split_k=3)
    options = {"kernel": "sm80", "treatment": "promote", "out_dtype": jnp.float32}
    y = calls.matmul(x, None, fragments, scales, 1.0, **options, config=config, interpret=True)
    assert error(y, w4a8.matmul(x, codes, scales, group=128, backend="reference")) < WIDE


@interpreted
def test_the_table_rounds_each_weight_as_the_reference_does():
    codes, fragments, scales = weights(128, 256, encoding="tc", scales=E4M3)
    scales = scales.at[0, :8].set(400.0)  # saturates
    call = functools.partial(w4a8.matmul, tokens(3, 256), group=128, treatment="table")
    y = call(fragments, scales, backend="sm90_interpret")
    assert error(y, call(codes, scales, backend="reference")) < WIDE


@interpreted
@pytest.mark.parametrize("m", [3, 70])  # cut along k, and fused
def test_glu_equals_the_reference(m):
    gate, up = weights(128, 256, seed=2), weights(128, 256, seed=3)
    codes, scales = w4a8.join(gate[1], up[1], gate[2], up[2])
    call = functools.partial(
        w4a8.glu, tokens(m, 256, jnp.bfloat16), codes, scales, divisors=(2.0, 4.0)
    )
    y = call(backend="sm90_interpret")
    expected = call(backend="reference", out_dtype=jnp.float32)
    assert y.dtype == jnp.bfloat16 and error(y, expected) < NARROW
    silu = jax.nn.silu(
        w4a8.matmul(tokens(m, 256, jnp.bfloat16), *gate[::2], divisor=2.0, group=128)
    )
    product = w4a8.matmul(tokens(m, 256, jnp.bfloat16), *up[::2], divisor=4.0, group=128)
    assert error(expected, silu * product) < 2 * NARROW


@interpreted
def test_grouped_equals_the_reference_and_leaves_dead_tiles_alone():
    codes, fragments, scales = weights(128, 128, experts=(4,))
    sizes = jnp.array([5, 0, 17, 1], jnp.int32)  # 23 of 25 tokens belong to an expert
    call = functools.partial(
        w4a8.grouped, tokens(25, 128), divisors=jnp.array([1.0, 2.0, 4.0, 8.0]), group_sizes=sizes
    )
    y = call(codes=fragments, scales=scales, backend="sm90_interpret")
    expected = call(codes=codes, scales=scales, backend="reference")
    assert error(y, expected) < WIDE and (y[23:] == 0).all()
    assert error(call(codes=codes, scales=scales, backend="xla"), expected) < WIDE
    one = w4a8.matmul(tokens(25, 128)[5:22], codes[2], scales[2], divisor=4.0, group=128)
    assert error(expected[5:22], one) < WIDE


@interpreted
def test_blocks_walk_over_several_experts_and_past_an_empty_one():
    from pallas_kernels.w4a8 import calls

    codes, fragments, scales = weights(128, 128, experts=(4,))
    sizes, x = jnp.array([5, 0, 17, 1], jnp.int32), tokens(25, 128)
    options = {"kernel": "sm90", "treatment": "promote", "out_dtype": jnp.bfloat16}
    config = plan.Config(tile_m=8, cores=2)  # 8 tiles of tokens, of which 5 are an expert's
    y = calls.grouped(
        *(x, None, fragments, scales, jnp.ones(4), sizes), **options, config=config, interpret=True
    )
    expected = w4a8.grouped(x, codes, scales, sizes, backend="reference")
    assert error(y, expected) < NARROW and (y[23:] == 0).all()


@interpreted
def test_a_dead_tile_of_the_kernel_is_never_written():
    from pallas_kernels.w4a8 import sm90

    _, fragments, scales = weights(128, 128, experts=(2,))
    y = sm90.multiply(
        jnp.ones((32, 128), E4M3),
        jnp.ones((1, 32)),
        fragments.words,
        scales,
        jnp.array([1, -1], jnp.int32),
        config=plan.Config(tile_m=16, cores=2),
        encoding="sm",
        glu=False,
        treatment="promote",
        out=jnp.bfloat16,
        interpret=True,
    )
    assert jnp.isfinite(y[:16]).all() and jnp.isnan(y[16:]).all()


@interpreted
def test_vmap_and_quantized_activations():
    codes, fragments, scales = weights(128, 128)
    x8, sx = quantize_tokens(tokens(4, 128).reshape(2, 2, 128))

    def call(x8, sx, codes, backend):
        return w4a8.matmul(x8, codes, scales, group=128, x_scale=sx, backend=backend)

    y = jax.vmap(functools.partial(call, codes=fragments, backend="sm90_interpret"))(x8, sx)
    assert error(y, call(x8, sx, codes, "reference")) < WIDE


@pytest.mark.parametrize("encoding", ["sm", "tc"])
def test_packed_codes_mean_the_same_everywhere(encoding):
    codes, fragments, scales = weights(40, 256, encoding=encoding)
    call = functools.partial(w4a8.matmul, tokens(3, 256), scales=scales, group=128)
    np.testing.assert_array_equal(call(codes=fragments), call(codes=codes))

    def loss(x, scales, codes):
        return (w4a8.matmul(x, codes, scales, group=128) ** 2).sum()

    x = tokens(3, 256)
    for a, b in zip(
        jax.grad(loss, (0, 1))(x, scales, fragments),
        jax.grad(loss, (0, 1))(x, scales, codes),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    grads = jax.grad(loss, 2, allow_int=True)(x, scales, fragments)
    assert grads.words.dtype == jax.dtypes.float0


@pytest.mark.parametrize("name", ["glu", "grouped"])
def test_gradients_by_finite_differences(name):
    if name == "glu":
        gate, up = weights(128, 128, seed=2), weights(128, 128, seed=3)
        codes, scales = w4a8.join(gate[1], up[1], gate[2], up[2])
        call, x = functools.partial(w4a8.glu, divisors=(2.0, 1.0)), tokens(2, 128)
    else:
        codes, _, scales = weights(5, 128, experts=(2,))
        sizes = jnp.array([1, 1], jnp.int32)
        call, x = functools.partial(w4a8.grouped, group_sizes=sizes), tokens(2, 128)
    x8, sx = quantize_tokens(x + 1)

    def loss(sx, scales):
        return (call(x8, codes, scales, x_scale=sx) ** 2).sum() / 1e4

    # Both are smooth in the scales; rounding's gradient in x is by convention the identity.
    grads = jax.jit(jax.grad(loss, (0, 1)))(sx, scales)
    steps = [jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate((sx, scales))]
    h = 1e-3 * min(float(sx.min()), float(jnp.abs(scales).max()))
    ahead, behind = (
        loss(*(a + sign * h * d for a, d in zip((sx, scales), steps, strict=True)))
        for sign in (1, -1)
    )
    slope = sum(float((g * d).sum()) for g, d in zip(grads, steps, strict=True))
    assert abs((float(ahead) - float(behind)) / (2 * h) - slope) < 0.02 * abs(slope)
    dx = jax.grad(lambda x: call(x, codes, scales).sum())(x)
    assert dx.shape == x.shape and jnp.isfinite(dx).all() and (dx != 0).any()


def abstract(tree):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


@pytest.mark.parametrize("chip", ["h200", "a100", "l4"])
@pytest.mark.parametrize("encoding", ["sm", "tc"])
def test_matmul_lowers_to_the_kernel_of_its_chip(chip, encoding):
    codes, fragments, scales = weights(128, 256, encoding=encoding)
    x = tokens(3, 256, jnp.bfloat16)
    call = functools.partial(w4a8.matmul, group=128)
    text = lower_for(call, abstract((x, fragments, scales)), chip)
    assert (MOSAIC in text) == (chip == "h200" or JAX_VERSION >= (0, 11, 2))
    assert MOSAIC not in lower_for(call, abstract((x, codes, scales)), chip)  # canonical codes
    if chip == "a100":
        with topology.abstract_mesh(chip, 1, "x"):
            with pytest.raises(ValueError, match=r"compute capability 9.x \(Hopper\); .* has 8.0"):
                call(x, fragments, scales, backend="sm90")


@pytest.mark.parametrize("name", ["glu", "grouped", "table", "gradient"])
def test_the_others_lower_to_the_kernel(name):
    x = tokens(70, 256, jnp.bfloat16)
    if name == "grouped":
        _, fragments, scales = weights(128, 256, experts=(3,))
        arguments = (x, fragments, scales, jnp.zeros((3,), jnp.int32))
        assert MOSAIC in lower_for(w4a8.grouped, abstract(arguments), "h200")
        return
    _, fragments, scales = weights(128, 256, encoding="tc" if name == "table" else "sm")
    call = functools.partial(w4a8.matmul, group=128)
    if name == "glu":
        fragments, scales = w4a8.join(fragments, fragments, scales, scales)
        call = w4a8.glu
    if name == "table":
        call = functools.partial(call, treatment="table")
    if name == "gradient":
        call = jax.value_and_grad(lambda x, f, s: w4a8.matmul(x, f, s, group=128).sum())
        x = x.astype(jnp.float32)
    assert MOSAIC in lower_for(call, abstract((x, fragments, scales)), "h200")


def test_pieces_of_unequal_length_lower_to_the_kernel():
    """Their number of steps is known on the device only."""
    assert plan.choose(1, 4096, 11008).split_k == 4  # of 43 steps
    array = jax.ShapeDtypeStruct
    codes = w4a8.Fragments(array((64, 86, 8, 128), jnp.int32), "sm")
    x, scales = array((1, 11008), jnp.bfloat16), array((86, 4096), jnp.bfloat16)
    text = lower_for(functools.partial(w4a8.matmul, group=128), (x, codes, scales), "h200")
    assert text.count(f"@{MOSAIC}") == 2  # tokens rounded, and the product


def feed_forward(x, gate_up, gate_up_scales, down, down_scales, axis=None):
    """A gated FFN whose hidden channels lie on the devices of `axis`, if any."""
    hidden = w4a8.glu(x, gate_up, gate_up_scales)
    absmax = jnp.max(jnp.abs(hidden.astype(jnp.float32)), axis=-1, keepdims=True)
    absmax = absmax if axis is None else jax.lax.pmax(absmax, axis)
    scale = absmax / 448
    x8 = (hidden.astype(jnp.float32) / scale).astype(E4M3)
    y = w4a8.matmul(x8, down, down_scales, group=128, x_scale=scale)
    return y if axis is None else jax.lax.psum(y, axis)


@pytest.fixture
def layer():
    """Operands of `feed_forward`: width 128, 512 hidden channels on 4 devices."""
    gate, up, down = weights(512, 128, seed=1), weights(512, 128, seed=2), weights(128, 512, seed=3)
    return (tokens(5, 128) + 0.1, *w4a8.join(gate[1], up[1], gate[2], up[2]), *down[1:])


SPECS = (P(), P("tp"), P(None, "tp"), P(None, "tp"), P("tp"))


def test_tensor_parallel_on_four_devices_equals_one(layer):
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    parallel = jax.shard_map(
        functools.partial(feed_forward, axis="tp"),
        mesh=mesh,
        in_specs=SPECS,
        out_specs=P(),
        check_vma=False,
    )
    assert error(jax.jit(parallel)(*layer), feed_forward(*layer)) < WIDE


def test_tensor_parallel_lowers_to_the_kernels(layer):
    with topology.abstract_mesh("h200", 4, "tp"):
        parallel = jax.shard_map(
            functools.partial(feed_forward, axis="tp"),
            in_specs=SPECS,
            out_specs=P(),
            check_vma=False,
        )
        text = (
            jax.jit(parallel).trace(*abstract(layer)).lower(lowering_platforms=("cuda",)).as_text()
        )
    assert text.count(f"@{MOSAIC}") == 2 and "all_reduce" in text
