"""FireQ's array functions against the authors' code (recorded), the paper's figures and bad input.

`tests/fixtures/fireq/record.py` made the recording.
"""

import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffnlab.errors import ConfigError
from ffnlab.quantization import fireq_core as core
from ffnlab.weights import kv
from pallas_kernels import w4a8
from pallas_kernels.numerics import quantize_tokens

MATRICES = ("normal", "underflow", "subnormal", "mixed", "zeros", "tail", "large", "tiny")
# Sums in another order: relative 1e-6 covers float32 rounding of a mean of 24 terms.
ROUNDING = 1e-6
EXAMPLES = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def oracle(fixtures):
    with np.load(fixtures / "fireq" / "oracle.npz", allow_pickle=False) as file:
        return dict(file)


quantize = jax.jit(core.quantize, static_argnames=("group", "scales", "tensor_scale"))
search = jax.jit(core.search_tensor_scale, static_argnames="group")


@pytest.mark.parametrize("form", ["eager", "jit"])
@pytest.mark.parametrize("scales", ["e4m3", "float32"])
@pytest.mark.parametrize("name", MATRICES)
def test_weights_equal_the_official_quantizer_bit_for_bit(oracle, name, scales, form):
    w, group = jnp.asarray(oracle[f"w/{name}/w"].T), int(oracle[f"w/{name}/group"])
    run = core.quantize if form == "eager" else quantize
    result = run(w, group=group, scales=scales)
    record = f"w/{name}/{scales}"
    np.testing.assert_array_equal(result.codes, oracle[f"{record}/codes"].T)
    np.testing.assert_array_equal(result.scales.astype(jnp.float32), oracle[f"{record}/scales"].T)
    dense = core.dequantize(result, group=group)
    np.testing.assert_array_equal(dense, oracle[f"{record}/dense"].T)


@pytest.mark.parametrize("name", MATRICES)
def test_tensor_scale_codes_and_scales_equal_the_official_linear(oracle, name):
    w, group = jnp.asarray(oracle[f"w/{name}/w"].T), int(oracle[f"w/{name}/group"])
    result = quantize(w, group=group, tensor_scale=True)
    record = f"w/{name}/scaled"
    np.testing.assert_array_equal(result.divisor, oracle[f"{record}/divisor"][0])
    np.testing.assert_array_equal(result.codes, oracle[f"{record}/codes"].T)
    np.testing.assert_array_equal(result.scales.astype(jnp.float32), oracle[f"{record}/scales"].T)


def test_the_recording_covers_minus_eight_underflow_and_zero_groups(oracle):
    assert oracle["w/subnormal/e4m3/codes"].min() == -8
    assert not oracle["w/underflow/e4m3/codes"].any()
    assert not oracle["w/zeros/w"][::2, :128].any()
    assert oracle["w/mixed/scaled/divisor"] > 1


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("name", MATRICES)
def test_product_equals_the_official_linear(oracle, name, backend):
    group = int(oracle[f"w/{name}/group"])
    quantized = core.quantize(jnp.asarray(oracle[f"w/{name}/w"].T), group=group, tensor_scale=True)
    y = w4a8.matmul(
        jnp.asarray(oracle[f"w/{name}/x"]),
        w4a8.pack_nibbles(quantized.codes),
        quantized.scales,
        divisor=quantized.divisor,
        group=group,
        backend=backend,
    )
    expected = oracle[f"w/{name}/y"] - oracle[f"w/{name}/bias"]
    # The recorded bias is added before the division by c and taken off here: float32 rounding.
    tolerance = 3e-6 * max(np.abs(oracle[f"w/{name}/y"]).max(), 1)
    np.testing.assert_allclose(y, expected, rtol=0, atol=tolerance)


def test_activations_equal_the_official_quantizer(oracle):
    codes, scale = jax.jit(quantize_tokens)(jnp.asarray(oracle["act/x"]))
    np.testing.assert_array_equal(codes.astype(jnp.float32), oracle["act/float32/codes"])
    np.testing.assert_array_equal(scale, oracle["act/float32/scales"])
    # Their bfloat16 mode rounds the scale and the quotient to 8 bits first: one e4m3 step at most.
    narrow = oracle["act/bfloat16/codes"] * oracle["act/bfloat16/scales"]
    wide = np.asarray(codes.astype(jnp.float32)) * np.asarray(scale)
    assert (np.abs(narrow - wide) <= np.abs(wide) / 8 + np.asarray(scale) * 2.0**-8).all()


def test_cache_codes_equal_the_official_static_cache(oracle):
    codes, scales = jax.jit(kv.quantize_int4)(jnp.asarray(oracle["kv/x"]))
    np.testing.assert_array_equal(codes, oracle["kv/codes"])
    np.testing.assert_array_equal(scales.astype(jnp.float32), oracle["kv/scales"][..., 0])


@pytest.mark.parametrize("kind", ["constant", "absmax", "absmean"])
def test_channel_scale_equals_the_official_one(oracle, kind):
    number = {"constant": 0, "absmax": 1, "absmean": 2}[kind]
    scale = core.channel_scale(jnp.asarray(oracle["channel/w"].T), 0.0096, kind=kind)
    np.testing.assert_allclose(scale, oracle[f"channel/{number}"], rtol=ROUNDING)


@pytest.mark.parametrize("top_k", [1, 3, 4])
def test_rope_scales_equal_the_official_ones(oracle, top_k):
    kv_heads, width = 3, 16
    pre = jnp.asarray(oracle["rope/pre"]).reshape(-1, kv_heads, width)
    absmax = jnp.abs(jnp.asarray(oracle["rope/post"])).max(axis=(0, 2))
    post_scale = core.post_rope_scale(absmax, beta=6.0, top_k=top_k)
    pre_scale = core.pre_rope_scale(
        core.pair_norms(pre), alpha=8.0, untouched=core.largest_pairs(absmax, top_k)
    )
    for name, scale in (("post", post_scale), ("pre", pre_scale)):
        keys = oracle[f"rope/{top_k}/k_{name}"].reshape(kv_heads, width)
        np.testing.assert_allclose(scale, keys, rtol=ROUNDING)
        queries = oracle[f"rope/{top_k}/q_{name}"].reshape(kv_heads, 2, width)
        np.testing.assert_allclose(1 / scale[:, None].repeat(2, 1), queries, rtol=ROUNDING)


def relative_error(w, **options):
    dense = core.dequantize(core.quantize(w, **options), group=options["group"])
    return float(jnp.linalg.norm(dense - w) / jnp.linalg.norm(w))


def test_the_tensor_scale_rescues_weights_that_underflow(key):
    w = 2e-4 * jax.random.normal(key, (512, 256))
    plain = core.quantize(w, group=128)
    assert not plain.codes.any() and (plain.scales.astype(jnp.float32) == 2.0**-9).all()
    assert relative_error(w, group=128) == 1.0
    assert core.search_tensor_scale(w, group=128) in (32, 64)
    assert relative_error(w, group=128, tensor_scale=True) <= 0.125  # measured by the card: 0.121
    usual = 0.02 / 2e-4 * w
    assert core.search_tensor_scale(usual, group=128) == 1
    assert abs(relative_error(usual, group=128, tensor_scale=True) - 0.119) < 0.003


@pytest.mark.parametrize("run", [core.search_tensor_scale, search], ids=["eager", "jit"])
@pytest.mark.parametrize("power", range(15))
def test_every_tensor_scale_is_the_power_of_two_itself(power, run):
    # The smallest c whose groups reach 7 * 2^-9, the least that e4m3 scales can express.
    w = jnp.full((4, 2), math.ldexp(7 * 2.0**-9, -power), jnp.float32)
    c = np.asarray(run(w, group=4))
    assert c.tobytes() == np.float32(math.ldexp(1.0, power)).tobytes()


@pytest.mark.parametrize("power", range(15))
def test_scales_with_the_tensor_scale_folded_in_are_bfloat16(power, key):
    w = jnp.clip(jax.random.normal(key, (16, 4)), -1, 1).at[0].set(1)
    w = w * math.ldexp(7 * 2.0**-9, -power)
    q = quantize(w, group=8, tensor_scale=True)
    folded = np.asarray(q.scales, np.float32) / np.asarray(q.divisor)
    np.testing.assert_array_equal(folded.astype(ml_dtypes.bfloat16).astype(np.float32), folded)


def test_rounding_products_to_e4m3_adds_under_two_percent(key):
    w = 0.02 * jax.random.normal(key, (1024, 256))
    q = core.quantize(w, group=128)
    codes, norm = w4a8.pack_nibbles(q.codes), jnp.linalg.norm(w)
    promote, table = (
        float(jnp.linalg.norm(w4a8.dequantize(codes, q.scales, group=128, treatment=t) - w) / norm)
        for t in ("promote", "table")
    )
    assert promote < table < 1.02 * promote  # the card: 0.1187 -> 0.1190


# Few shapes, so that few programs are compiled: one row, padded groups, whole groups.
values = st.floats(-2e3, 2e3, width=32, allow_subnormal=False)
weights_and_group = st.sampled_from([((1, 1), 2), ((5, 3), 4), ((8, 2), 8)]).flatmap(
    lambda case: st.tuples(hnp.arrays(np.float32, case[0], elements=values), st.just(case[1]))
)


@EXAMPLES
@given(weights_and_group, st.sampled_from(["e4m3", "bfloat16", "float32"]), st.booleans())
def test_each_weight_is_within_half_a_step_or_clipped(case, scales, tensor_scale):
    w, group = case
    result = quantize(jnp.asarray(w), group=group, scales=scales, tensor_scale=tensor_scale)
    s = np.repeat(np.asarray(result.scales.astype(jnp.float32)), group, axis=0)[: len(w)]
    q, c = np.asarray(result.codes, np.float32), float(result.divisor)
    assert q.shape == w.shape and q.min() >= -8 and q.max() <= 7 and (s > 0).all()
    assert np.log2(c).is_integer() and (c == 1 or tensor_scale)
    inside = (w * c >= -8 * s) & (w * c <= 7 * s)
    error = np.abs(q * s - w * c)
    assert (error[inside] <= 0.5001 * s[inside]).all()
    np.testing.assert_array_equal(q[~inside], np.where(w[~inside] < 0, -8, 7))


def search_by_hand(w, group):
    """The search as the card states it, one candidate after the other."""
    w = np.pad(w, ((0, -len(w) % group), (0, 0))).reshape(-1, group, w.shape[1])
    best = None
    for power in range(15):
        m = np.abs(w * np.float32(2**power)).max(axis=1)
        if (m > 448).any():
            break
        low = 7 * 2.0**-9
        slack = ((low - m[m < low]) / low).sum()
        best = min(best or (slack, 2**power), (slack, 2**power))
    return best[1] if best else 1


@EXAMPLES
@given(
    hnp.arrays(np.float32, (6, 3), elements=st.floats(-1, 1, width=32, allow_subnormal=False)),
    st.integers(-12, 12),
    st.sampled_from([2, 4, 6]),
)
def test_the_search_equals_its_definition(w, power, group):
    w = w * np.float32(2.0**power)
    ours = float(search(jnp.asarray(w), group=group))
    # Tiny remainders vanish in a float32 sum beside whole zero groups; then a smaller c is as good.
    assert ours == search_by_hand(w, group) or slack(w, group, ours) <= ROUNDING + slack(
        w, group, search_by_hand(w, group)
    )


def test_a_group_may_reach_the_largest_e4m3():
    """16 * 28 is 448, which is in range; the tiny group needs that 16."""
    w = jnp.array([[28.0], [7 * 2.0**-13]])
    assert search(w, group=1) == 16
    assert search(w * jnp.array([[1 + 2.0**-20], [1.0]]), group=1) == 8


def slack(w, group, c):
    w = np.pad(w, ((0, -len(w) % group), (0, 0))).reshape(-1, group, w.shape[1])
    return np.maximum(0, 7 * 2.0**-9 - np.abs(w * c).max(axis=1)).sum() / (7 * 2.0**-9)


def test_bfloat16_weights_are_quantized_in_float32(key):
    w = jax.random.normal(key, (64, 8), jnp.bfloat16)
    narrow, wide = (core.quantize(v, group=32) for v in (w, w.astype(jnp.float32)))
    jax.tree.map(np.testing.assert_array_equal, narrow, wide)


def test_a_group_above_the_range_saturates_instead_of_giving_nan():
    result = core.quantize(jnp.full((4, 1), -1e4), group=4, tensor_scale=True)
    assert result.divisor == 1 and result.scales[0, 0] == jnp.asarray(448, core.E4M3)
    np.testing.assert_array_equal(result.codes, -8)


def test_quantizing_works_abstractly_and_compiles_once(key):
    w = jax.random.normal(key, (64, 8))
    run = jax.jit(functools.partial(core.quantize, group=32, tensor_scale=True))
    shapes = jax.eval_shape(run, w)
    assert shapes.codes.shape == (64, 8) and shapes.scales.dtype == ml_dtypes.float8_e4m3fn
    run(w)
    run(w + 1)
    assert run._cache_size() == 1


@pytest.mark.parametrize("dead", ["channel", "everything"])
def test_dead_channels_keep_scale_one(dead):
    absmax = jnp.zeros((2, 8)) if dead == "everything" else jnp.ones((2, 8)).at[0, 3].set(0)
    for scale in (
        core.post_rope_scale(absmax, top_k=4),
        core.pre_rope_scale(core.pair_norms(absmax)),
        core.channel_scale(absmax.T, 0.5),
    ):
        assert jnp.isfinite(scale).all() and (scale > 0).all()
    assert core.post_rope_scale(absmax, top_k=4)[0, 3] == 1


def test_channels_that_do_not_rotate_are_scaled_alone():
    keys = jnp.array([[[3.0, 0.0, 4.0, 0.0, -7.0, 0.0]]])
    np.testing.assert_array_equal(core.pair_norms(keys, rotated=4)[0], [5, 0, 5, 0, 7, 0])
    np.testing.assert_array_equal(
        core.largest_pairs(jnp.abs(keys[0]), 2, rotated=4)[0], [1, 0, 1, 0, 1, 0]
    )


def test_partners_follow_their_channels_once():
    absmax = jnp.array([[9.0, 1, 1, 1, 8, 1, 1, 7]])
    np.testing.assert_array_equal(core.largest_pairs(absmax, 2)[0], [1, 0, 0, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(core.largest_pairs(absmax, 3)[0], [1, 0, 0, 1, 1, 0, 0, 1])
    assert not core.largest_pairs(absmax, 0).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: core.quantize(jnp.ones((2, 2)), group=0), "group=0"),
        (lambda: core.quantize(jnp.ones((2, 2)), group=2, scales="fp8"), "e4m3, bfloat16, float32"),
        (lambda: core.channel_scale(jnp.ones((2, 2)), 0.0), "constant=0.0"),
        (lambda: core.channel_scale(jnp.ones((2, 2)), float("nan")), "constant=nan"),
        (lambda: core.channel_scale(jnp.ones((2, 2)), 1.0, kind="max"), "absmean, absmax"),
        (lambda: core.post_rope_scale(jnp.ones((1, 7))), "head_dim=7"),
        (lambda: core.post_rope_scale(jnp.ones((1, 8)), top_k=5), "top_k=5"),
        (lambda: core.post_rope_scale(jnp.ones((1, 8)), top_k=-1), "top_k=-1"),
        (lambda: core.post_rope_scale(jnp.ones((1, 8)), top_k=1, beta=0.0), "beta=0.0"),
        (lambda: core.pre_rope_scale(jnp.ones((1, 8)), alpha=-1.0), "alpha=-1.0"),
        (lambda: core.partner(8, 3), "3 rotating channels"),
        (lambda: core.partner(8, 10), "10 rotating channels"),
    ],
)
def test_bad_input_names_itself(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
