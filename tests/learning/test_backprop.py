"""Backpropagation as a rule: closed-form steps, frozen parts, purity, a task that is learned."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import tree
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.learning import backprop, computed_in
from ffnlab.losses import Moment
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.testing import counted

CONFIG = DecoderConfig(vocab=16, width=16, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8)


def squared(model, batch):
    x, y = batch
    error = x @ model["w"] + model["b"] - y
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


def regression(key):
    keys = jax.random.split(key, 4)
    model = {"w": jax.random.normal(keys[0], (3,)), "b": jnp.float32(0.5), "codes": jnp.arange(4)}
    return model, (jax.random.normal(keys[1], (7, 3)), jax.random.normal(keys[2], (7,)))


def test_one_step_is_the_closed_form(key):
    model, (x, y) = regression(key)
    rule = backprop(squared, optax.sgd(0.1))
    state, metrics = rule.step(rule.init(model, key), (x, y))
    error = np.asarray(x @ model["w"] + 0.5 - y)
    d_w, d_b = 2 * np.asarray(x).T @ error / 7, 2 * error.mean()
    # One product of seven float32 terms in another order.
    np.testing.assert_allclose(state.model["w"], model["w"] - 0.1 * d_w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state.model["b"], 0.5 - 0.1 * d_b, rtol=1e-5)
    np.testing.assert_array_equal(state.model["codes"], model["codes"])
    np.testing.assert_allclose(metrics["loss"], (error**2).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["worst"], np.abs(error).max(), rtol=1e-5)
    norm = np.sqrt((d_w**2).sum() + d_b**2)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    assert int(state.step) == 1


def test_the_callers_model_survives_donation(key):
    model, batch = regression(key)
    before = jax.tree.map(np.array, model)
    rule = backprop(squared, optax.adam(0.1))
    state = rule.init(model, key)
    for _ in range(3):
        state, _ = rule.step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, model))


def test_only_what_is_selected_learns(key):
    model = Decoder(CONFIG, key=key)
    rule = backprop(optimizer=optax.adam(1e-2), trainable=tree.at("layers[1].ffn.*"))
    state = rule.init(model, key)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state.optimizer))
    assert sizes == 2 * 3 * 16 * 16 + 1, "moments of the three matrices, and the count"
    state, _ = rule.step(state, jnp.ones((2, 6), jnp.int32))
    for path, node in tree.select(model, tree.floating).items():
        after = tree.select(state.model, tree.at(path))[path]
        assert (np.asarray(after) != np.asarray(node)).any() == path.startswith("layers[1].ffn.")


def test_nothing_selected_is_an_error(key):
    with pytest.raises(SelectionError, match="matches nothing"):
        backprop(trainable=tree.at("layers[9]")).init(Decoder(CONFIG, key=key), key)
    with pytest.raises(SelectionError, match="trainable=None.* none can be trained"):
        backprop(squared).init({"codes": jnp.arange(3)}, key)


def test_a_cycle_is_learned_with_one_compilation(key):
    model = Decoder(CONFIG, key=key)
    rule = backprop(optimizer=optax.adam(1e-2))
    state = rule.init(model, key)
    starts = np.random.default_rng(0).integers(0, 16, (60, 4, 1))
    batches = ((starts + 3 * np.arange(9)) % 16).astype(np.int32)
    state, first = rule.step(state, batches[0])
    with counted() as compiled:
        for batch in batches[1:]:
            state, last = rule.step(state, batch)
    assert compiled.programs == 0
    # Uniform guessing costs log2(16) = 4 bits; the cycle is deterministic.
    assert float(first["bits"]) > 3 and float(last["bits"]) < 0.3
    logits = rule.predict(state, batches[0][:, :-1])
    assert (np.argmax(logits, -1) == batches[0][:, 1:]).mean() > 0.95


def test_same_key_same_bits(key):
    def run():
        rule = backprop(optimizer=optax.adamw(1e-2))
        state = rule.init(Decoder(CONFIG, key=key), key)
        for i in range(3):
            state, _ = rule.step(state, jnp.full((2, 5), i, jnp.int32))
        return jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))

    for a, b in zip(run(), run(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_mixed_precision_rounds_the_step_and_keeps_the_masters(key):
    model = {"w": jnp.full((4, 4), 1 + 2**-12), "codes": jnp.arange(3)}

    def loss(model, batch):
        assert model["w"].dtype == jnp.bfloat16 and model["codes"].dtype == jnp.int32
        return jnp.sum(model["w"].astype(jnp.float32) * batch), {}

    rule = backprop(computed_in("bfloat16", loss), optax.sgd(2.0**-14))
    state, metrics = rule.step(rule.init(model, key), jnp.ones((4, 4)))
    assert metrics["loss"] == 16, "the rounded parameters are 1"
    np.testing.assert_array_equal(state.model["w"], np.full((4, 4), 1 + 2**-12 - 2**-14))
    assert state.model["w"].dtype == jnp.float32


def drawing(model, batch, moment):
    """A loss that says when it was asked, and what its key draws."""
    seen = {"step": moment.step, "draw": jax.random.uniform(moment.key)}
    return jnp.mean(model["w"] * batch) * (moment.step + 1), seen


def test_an_informed_loss_knows_the_step_and_draws_by_it(key):
    rule = backprop(drawing, optax.sgd(1.0), informed=True)
    model = {"w": jnp.float32(0)}
    state, other = rule.init(model, key), rule.init(model, jax.random.key(7))
    for step in range(3):
        state, metrics = rule.step(state, jnp.ones(4))
        other, metrics_other = rule.step(other, jnp.ones(4))
        wanted = jax.random.uniform(jax.random.fold_in(key, step))
        assert (metrics["step"], metrics["draw"]) == (step, wanted)
        assert metrics_other["draw"] != wanted
    assert state.model["w"] == -(1 + 2 + 3)
    assert state.key == key, "and the caller's is still there"


def test_parts_of_a_batch_draw_by_themselves(key):
    rule = backprop(drawing, optax.sgd(1.0), informed=True, microbatches=2)
    _, metrics = rule.step(rule.init({"w": jnp.float32(0)}, key), jnp.ones(4))
    keys = [jax.random.fold_in(jax.random.fold_in(key, 0), part) for part in range(2)]
    wanted = np.mean([jax.random.uniform(k) for k in keys])
    np.testing.assert_allclose(metrics["draw"], wanted, rtol=1e-6)


def test_mixed_precision_passes_the_moment_on(key):
    def loss(model, batch, moment: Moment):
        assert model["w"].dtype == jnp.bfloat16
        return drawing(model, batch, moment)

    rule = backprop(computed_in("bfloat16", loss), optax.sgd(1.0), informed=True)
    _, metrics = rule.step(rule.init({"w": jnp.float32(0)}, key), jnp.ones(4))
    assert metrics["draw"] == jax.random.uniform(jax.random.fold_in(key, 0))


def test_a_loss_that_cannot_be_called_so_is_refused():
    for loss, informed in ((squared, True), (drawing, False)):
        for given in (loss, computed_in("bfloat16", loss)):
            with pytest.raises(ConfigError, match=f"informed={informed}: the loss is called with"):
                backprop(given, informed=informed)
    backprop(lambda model, batch, moment=None: (0.0, {}), informed=True)
