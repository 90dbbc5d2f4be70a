"""Training around quantized weights: they pass through whole, a LoRA around them trains."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import quantization, transform, tree
from ffnlab.errors import SelectionError
from ffnlab.layers import MLP, Linear, RMSNorm, Statistic
from ffnlab.learning import backprop, computed_in, counter_current, next_token
from ffnlab.parallel import skip_bad_steps
from ffnlab.testing import batches, tiny
from ffnlab.weights import LoRA, SparseInput, is_weight
from ffnlab.weights.quantized import Quantized
from tests.contracts import WEIGHTS, sparse_ffn

FORMATS = {
    "int4": lambda: quantization.nearest(format="int4", group=8),
    "int8": lambda: quantization.nearest(format="int8"),
    "float8": lambda: quantization.nearest(format="float8", activations="e4m3"),
    "fireq": lambda: quantization.fireq(group=8, top_k=1),
}


def quantized(name: str):
    return transform.apply(FORMATS[name](), tiny(), batches())[0]


def weights_of(model) -> dict:
    """The quantized weights of a model, the bases of LoRAs among them, by path."""
    return tree.select(model, tree.of_type(Quantized))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantized_weights_stay_whole_and_the_rest_learns(name, compute, key):
    model = quantized(name)
    loss = next_token if compute == "float32" else computed_in(compute, next_token)
    rule = backprop(loss, optax.adamw(1e-2, weight_decay=0.1))
    state, batch = rule.init(model, key), batches()[0]
    losses = []
    for _ in range(4):
        state, metrics = rule.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    held, kept = weights_of(model), weights_of(state.model)
    assert held.keys() == kept.keys() and held
    for path, before in held.items():
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(kept[path]), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    norms = lambda m: jax.tree.leaves(tree.select(m, tree.of_type(RMSNorm)))  # noqa: E731
    for a, b in zip(norms(model), norms(state.model), strict=True):
        assert (np.asarray(a) != b).any(), "norms learn"


def test_a_lora_around_a_quantized_weight_learns_alone(key):
    model = quantized("fireq")
    keys = iter(jax.random.split(key, 99))
    wrap = lambda linear: linear.replace(LoRA.init(linear.weight, 2, next(keys)))  # noqa: E731
    model = tree.map_at(model, tree.at("layers[*].ffn.**") & tree.of_type(Linear), wrap)
    rule = backprop(
        optimizer=optax.adamw(1e-2, weight_decay=0.1), trainable=tree.at("layers[*].ffn.*.w")
    )
    state = rule.init(model, key)
    for _ in range(3):
        state, _ = rule.step(state, batches()[0])
    before, after = (tree.select(m, tree.of_type(LoRA)) for m in (model, state.model))
    assert len(before) == 9
    for path, lora in before.items():
        assert (np.asarray(lora.a) != after[path].a).any()
        assert (np.asarray(after[path].b) != 0).any()
        same = jax.tree.map(np.array_equal, lora.base, after[path].base)
        assert all(jax.tree.leaves(same))
    rest = lambda m: jax.tree.leaves(tree.partition(m, tree.of_type(LoRA))[1])  # noqa: E731
    for a, b in zip(rest(model), rest(state.model), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_base_of_a_lora_does_not_decay(key):
    model = MLP((6, 5, 4), key=key)
    wrap = lambda linear: linear.replace(LoRA.init(linear.weight, 2, key))  # noqa: E731
    model = tree.map_at(model, tree.of_type(Linear), wrap)
    loss = lambda model, x: (jnp.mean(model(x) ** 2), {})  # noqa: E731
    rule = backprop(loss, optax.adamw(1e-2, weight_decay=0.5))
    state = rule.init(model, key)
    state, _ = rule.step(state, jnp.ones((3, 6)))
    for path, lora in tree.select(model, tree.of_type(LoRA)).items():
        after = tree.select(state.model, tree.at(path))[path]
        np.testing.assert_array_equal(lora.base.w, after.base.w)
        assert (np.asarray(lora.a) != after.a).any()


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_each_weight_trains(name, key):
    """Floating leaves of at least 16 bits that are no codes, scales, thresholds or frozen bases."""
    weight = WEIGHTS[name](key)
    trained, fixed = tree.trained({"w": weight, "b": jnp.ones(2)})
    found = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    fields = {
        "BlockDense": [".b", ".blocks"],
        "BlockDiagonal": [".blocks"],
        "BlockShuffle": [".first", ".second"],
        "Dense": [".w"],
        "LoRA": [".a", ".b"],
        "LowRank": [".a", ".b"],
        "Masked": [".w.w"],
        "SparseInput": [".w.w"],
        "Transposed": [".w.w"],
    }.get(type(weight).__name__, [])
    fields = [] if isinstance(getattr(weight, "w", None), Quantized) else fields
    assert found == {"['b']"} | {f"['w']{field}" for field in fields}
    assert jax.tree.structure(tree.combine(trained, fixed)) == jax.tree.structure(
        {"w": weight, "b": jnp.ones(2)}
    )


def test_nothing_left_to_train_names_the_option(key):
    model = quantized("int4")
    for where in ("layers[*].ffn.*", "layers[0].attn.q"):
        with pytest.raises(
            SelectionError, match=r"trainable=at\('layers.*none can be trained.*LoRA"
        ):
            backprop(trainable=tree.at(where)).init(model, key)
    with pytest.raises(SelectionError, match="trainable=None"):
        backprop().init({"codes": jnp.arange(3), "scales": jnp.ones(2, jnp.float8_e4m3fn)}, key)


def test_counter_current_takes_a_quantized_last_map(key):
    model = MLP((5, 8, 7, 4), bias=False, key=key)
    last = tree.at("maps[2]")
    to_float8 = lambda linear: linear.replace(  # noqa: E731
        WEIGHTS["Float8"](key).quantize(linear.weight.dense())
    )
    model = tree.map_at(model, last, to_float8)
    rule = counter_current(mirror=lambda model, key: MLP((4, 7, 8, 5), bias=False, key=key))
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    state = rule.init(model, key)
    state, metrics = rule.step(state, (x, np.arange(6) % 4))
    assert np.isfinite(metrics["loss"])
    before, after = (m.maps[2].weight for m in (model, state.model))
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, after)))
    assert (np.asarray(model.maps[0].weight.w) != state.model.maps[0].weight.w).any()


def test_thresholds_of_inputs_do_not_decay(key):
    dense = WEIGHTS["Dense"](key)
    model = {"w": SparseInput(dense, jnp.float32(0.4))}
    loss = lambda model, x: (jnp.mean(model["w"].matmul(x) ** 2), {})  # noqa: E731
    rule = backprop(loss, optax.adamw(1e-2, weight_decay=0.5))
    state = rule.init(model, key)
    state, _ = rule.step(state, jnp.ones((3, dense.shape[0])))
    assert state.model["w"].threshold == jnp.float32(0.4)
    assert is_weight(state.model["w"]) and (state.model["w"].w.w != dense.w).any()


def thresholded(key):
    """A gated FFN of which one channel is always dropped."""
    layer = sparse_ffn(key)
    layer.threshold = Statistic(jnp.array([jnp.inf, *[0.1234567] * 15]), axes=("mlp",))
    return layer


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_thresholds_of_channels_neither_decay_nor_round_nor_stop_a_step(compute, key):
    model, seen = thresholded(key), []

    def loss(model, x):
        seen.append((model.threshold.get_value().dtype, model.gate.weight.w.dtype))
        return jnp.mean(model(x).astype(jnp.float32) ** 2), {}

    rule = backprop(computed_in(compute, loss), optax.adamw(1e-2, weight_decay=0.5))
    rule = skip_bad_steps(rule)
    state, metrics = rule.step(rule.init(model, key), jnp.ones((3, 24)))
    assert metrics["skipped"] == 0
    assert seen[0] == (jnp.float32, jnp.dtype(compute))
    np.testing.assert_array_equal(state.model.threshold, model.threshold)
    assert (np.asarray(state.model.gate.weight.w) != model.gate.weight.w).any()


def test_thresholds_of_inputs_are_not_rounded(key):
    model = {"w": SparseInput(WEIGHTS["Dense"](key), jnp.float32(0.1234567))}
    found = lambda model, _: (model["w"].threshold, {"w": model["w"].w.w})  # noqa: E731
    threshold, seen = computed_in("bfloat16", found)(model, None)
    assert threshold == jnp.float32(0.1234567) and seen["w"].dtype == jnp.bfloat16
