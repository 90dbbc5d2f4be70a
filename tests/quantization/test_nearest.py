"""Round-to-nearest baselines, and the INT8 weight that one of them fills."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.layers import Linear
from ffnlab.quantization import fireq_core as core
from ffnlab.quantization import nearest
from ffnlab.testing import batches, counted, tiny
from ffnlab.weights import Dense, Float8, Int4, Int8, SparseInput

FORMATS = {"int4": Int4, "int8": Int8, "float8": Float8}
logits = jax.jit(lambda model, tokens: model(tokens))


def linears(model):
    return tree.select(model, tree.of_type(Linear))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("activations", [None, "e4m3"])
@pytest.mark.parametrize("format", FORMATS)
def test_every_linear_in_the_blocks_is_replaced(format, activations, stacked):
    model = models.stack(tiny()) if stacked else tiny()
    before = jax.tree.map(np.array, model)
    result, stats = transform.apply(nearest(format=format, activations=activations), model)
    assert stats == () and isinstance(result.layers, models.Stacked) == stacked
    for linear in linears(models.unstack(result)).values():
        assert isinstance(linear.weight, FORMATS[format]) and linear.weight.act == activations
    assert isinstance(result.embed.weight, Dense)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, model))


def test_more_bits_err_less():
    model, tokens = tiny(), batches()[0]
    error = {}
    for format in FORMATS:
        result, _ = transform.apply(nearest(format=format, group=8), model)
        error[format] = float(jnp.linalg.norm(logits(result, tokens) - logits(model, tokens)))
    assert 0 < error["int8"] < error["float8"] < error["int4"]


def test_int4_is_the_official_grid_with_float32_scales():
    model = tiny()
    result, _ = transform.apply(nearest(group=8), model)
    w, weight = model.layers[1].ffn.down.weight.w, result.layers[1].ffn.down.weight
    expected = core.quantize(w, group=8, scales="float32")
    np.testing.assert_array_equal(weight.q(), expected.codes)
    np.testing.assert_array_equal(weight.dense(), core.dequantize(expected, group=8))
    assert weight.divisor == 1


def test_selection_thresholds_and_second_calls():
    model = tiny()
    o = model.layers[0].attn.o
    model = tree.replace(
        model, {"layers[0].attn.o": o.replace(SparseInput(o.weight, jnp.float32(0.1)))}
    )
    method = nearest(format="int8", select=tree.at("layers[0].attn.*"))
    result, _ = transform.apply(method, model)
    assert isinstance(result.layers[0].attn.o.weight, SparseInput)
    assert isinstance(result.layers[0].attn.o.weight.w, Int8)
    assert isinstance(result.layers[1].attn.o.weight, Dense)
    with counted() as count:
        transform.apply(method, model)
    assert count.programs == 0
    shapes = jax.eval_shape(method.rewrite, model, ())
    assert jax.tree.structure(shapes) == jax.tree.structure(result)


def test_bad_input_names_itself():
    with pytest.raises(ConfigError, match="group=7"):
        nearest(group=7)
    with pytest.raises(SelectionError, match="nothing"):
        transform.apply(nearest(select=tree.at("mlp")), tiny())
    with pytest.raises(SelectionError, match="nothing"):  # before any pass: no layer is in it
        nearest(select=tree.at("layers[0].ffn")).init(tiny())
    model = tiny()
    up = model.layers[2].ffn.up
    broken = tree.replace(
        model, {"layers[2].ffn.up": up.replace(Dense(up.weight.w.at[0, 0].set(jnp.inf)))}
    )
    with pytest.raises(NumericalError, match=r"layers\[2\].ffn.up"):
        transform.apply(nearest(format="float8"), broken)


quantize = jax.jit(Int8.quantize, static_argnames=("group", "act"))
finite = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([((1, 1), 2), ((5, 3), 4), ((8, 2), None), ((6, 2), 64)]).flatmap(
        lambda case: st.tuples(hnp.arrays(np.float32, case[0], elements=finite), st.just(case[1]))
    )
)
def test_int8_is_within_half_a_step(case):
    w, group = case
    weight = quantize(w, group=group)
    scales = np.repeat(np.asarray(weight.scales), weight.group, axis=0)[: len(w)]
    assert weight.shape == w.shape and np.abs(np.asarray(weight.codes, np.int32)).max() <= 127
    assert (np.abs(np.asarray(weight.dense()) - w) <= 0.5001 * scales).all()


@pytest.mark.parametrize(("kind", "largest"), [(Int8, 127), (Float8, 448)])
def test_scales_are_quotients_also_under_jit(kind, largest):
    w = np.random.default_rng(0).normal(size=(16, 300)).astype(np.float32)
    w[:, 7] = 0.0
    weight = jax.jit(kind.quantize)(jnp.asarray(w))
    expected = np.abs(w).max(axis=0, keepdims=True) / np.float32(largest)
    np.testing.assert_array_equal(weight.scales, np.where(expected == 0, 1, expected))
    eager = kind.quantize(jnp.asarray(w))
    np.testing.assert_array_equal(eager.codes, weight.codes)


def test_int8_checks_its_parts():
    codes, scales = jnp.zeros((10, 3), jnp.int8), jnp.ones((3, 3))
    assert Int8(codes, scales, group=4).dense().shape == (10, 3)
    with pytest.raises(ValueError, match=r"scales must have shape \(2, 3\)"):
        Int8(codes, scales, group=5)
    with pytest.raises(ValueError, match="group=0"):
        Int8(codes, scales, group=0)
    with pytest.raises(ValueError, match="act='int8'"):
        Int8(codes, scales, group=4, act="int8")
