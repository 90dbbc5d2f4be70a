"""Optimizers of narrow parameters: float32 moments, norms and masters, in every optimizer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.errors import FormatError
from ffnlab.layers import MLP
from ffnlab.learning import (
    MastersState,
    NoPropNet,
    OptimizerConfig,
    backprop,
    counter_current,
    digital_twin,
    in_float32,
    lamb,
    lars,
    make_optimizer,
    noprop,
    physical_ff,
)
from ffnlab.learning.optimizers.named import OPTIMIZERS
from ffnlab.models import PhysicalConfig
from ffnlab.storage import trees
from ffnlab.testing import batches, tiny

NARROW = [jnp.bfloat16, jnp.float16]


def floats(tree) -> set[str]:
    """Names of the floating dtypes in a tree."""
    return {x.dtype.name for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


@pytest.mark.parametrize("dtype", NARROW)
def test_a_second_moment_decays(dtype):
    optimizer = in_float32(optax.adamw(1e-3, b2=0.999))
    params = {"w": jnp.ones((), dtype)}
    state = optimizer.init(params)
    _, state = optimizer.update(params, state, params)

    def idle(state, _):
        return optimizer.update({"w": jnp.zeros((), dtype)}, state, params)[1], None

    first = state.inner[0].nu["w"]
    last = jax.lax.scan(idle, state, length=3000)[0].inner[0].nu["w"]
    assert float(last / first) == pytest.approx(0.999**3000, rel=1e-3)


@pytest.mark.parametrize("dtype", NARROW)
def test_steps_too_small_for_the_parameters_add_up(dtype):
    optimizer = in_float32(optax.sgd(1e-4))
    params = {"narrow": jnp.ones((), dtype), "wide": jnp.ones(())}
    state = optimizer.init(params)
    for _ in range(100):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert params["narrow"].dtype == dtype and params["wide"].dtype == jnp.float32
    assert state.masters["wide"] is None
    assert float(state.masters["narrow"]) == float(params["wide"])
    # A hundred float32 roundings.
    assert float(params["wide"]) == pytest.approx(0.99, abs=100 * 2**-24)
    assert params["narrow"] == jnp.asarray(0.99, dtype)


@given(st.integers(0, 2**31 - 1), st.sampled_from([1e-3, 0.1, 10.0]))
def test_parameters_are_the_rounded_masters(seed, rate):
    random = np.random.default_rng(seed)
    optimizer = in_float32(optax.sgd(rate))
    params = jnp.asarray(random.normal(size=64), jnp.bfloat16)
    state, exact = optimizer.init(params), np.asarray(params, np.float32)
    for _ in range(4):
        gradient = random.normal(size=64).astype(np.float32)
        updates, state = optimizer.update(jnp.asarray(gradient), state, params)
        params = optax.apply_updates(params, updates)
        exact = exact - np.float32(rate) * gradient
    np.testing.assert_allclose(state.masters, exact, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(params, state.masters.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", sorted(OPTIMIZERS.own))
def test_named_optimizers_step_narrow_parameters_as_wide_ones(key, name):
    """The same float32 steps from the same values; the narrow parameters are their roundings."""
    config = OptimizerConfig(name, rate=1e-2, warmup=0, noise=1e-4)
    optimizer = make_optimizer(config, 10, key=key)
    narrow = MLP((3, 8, 4), key=key, dtype=jnp.bfloat16)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), narrow)
    ours, theirs = optimizer.init(narrow), optimizer.init(wide)
    assert isinstance(ours, MastersState) and floats(ours) == {"float32"}
    assert jax.tree.structure(ours.inner) == jax.tree.structure(theirs)
    update = jax.jit(optimizer.update)
    for value in (0.5, 1.5):
        full = functools.partial(jnp.full_like, fill_value=value)
        gradient = jax.tree.map(full, narrow)
        updates, ours = update(gradient, ours, narrow)
        narrow = optax.apply_updates(narrow, updates)
        gradient = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient)
        updates, theirs = update(gradient, theirs, wide)
        wide = optax.apply_updates(wide, updates)
    for found, wanted in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert found.dtype == jnp.bfloat16
        # A float32 rounding apart, which may tip a bfloat16 one.
        np.testing.assert_allclose(np.asarray(found, np.float32), wanted, rtol=2**-7, atol=1e-6)
    for found, wanted in zip(jax.tree.leaves(ours.inner), jax.tree.leaves(theirs), strict=True):
        if jnp.issubdtype(found.dtype, jnp.floating):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", [lamb(1e-2), lars(1e-2), lamb(1e-2, mu_dtype=jnp.bfloat16)])
def test_lamb_and_lars_by_themselves(optimizer):
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    state = optimizer.init(params)
    assert isinstance(state, MastersState) and "float32" in floats(state)
    updates, state = optimizer.update(params, state, params)
    # A step as long as the rate times the weights: 1e-2 of 1 each, half the width of a rounding.
    np.testing.assert_allclose(state.masters["w"], 0.99, rtol=1e-5)
    with pytest.raises(ValueError, match="params=None"):
        optimizer.update(params, state)


def rules():
    x, y = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32), np.arange(6) % 4
    key = jax.random.key(0)
    around = PhysicalConfig(5, 4, (8, 6), slots=4, skip=True).make(key=key)
    return {
        "backprop": (backprop(), tiny(), batches()[0]),
        "counter-current": (counter_current(), MLP((5, 8, 7, 4), bias=False, key=key), (x, y)),
        "noprop": (noprop(), NoPropNet(5, 4, hidden=6, blocks=3, key=key), (x, y)),
        "physical_ff": (physical_ff(inner=2), around, (x, y)),
        "digital_twin": (digital_twin(hidden=(6,)), around, (x, y)),
    }


@pytest.mark.parametrize(
    "name", ["backprop", "counter-current", "noprop", "physical_ff", "digital_twin"]
)
def test_every_rule_keeps_float32_beside_bfloat16(name, key):
    rule, model, batch = rules()[name]
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    state = rule.init(narrow, key)
    memory = getattr(state, "optimizers", ()) or state.optimizer
    assert floats(memory) == {"float32"}
    form = lambda state: (  # noqa: E731
        jax.tree.structure(state),
        [(x.shape, x.dtype) for x in jax.tree.leaves(state)],
    )
    before = form(state)
    state, metrics = rule.step(state, batch)
    assert form(state) == before
    assert floats(state.model) == {"bfloat16"}
    assert all(np.isfinite(value) for value in metrics.values())
    assert "MastersState" not in repr(jax.tree.structure(rule.init(model, key))), "no copy needed"


def test_a_norm_of_narrow_gradients_is_float32(key):
    loss = lambda model, batch: (jnp.sum(model["w"] * batch), {})  # noqa: E731
    rule = backprop(loss, optax.sgd(0.0))
    w = jnp.zeros(4096, jnp.bfloat16)
    _, metrics = rule.step(rule.init({"w": w}, key), jnp.full(4096, 3, jnp.bfloat16))
    assert metrics["gradient_norm"].dtype == jnp.float32
    assert float(metrics["gradient_norm"]) == pytest.approx(192, rel=1e-6)


def test_a_checkpoint_of_narrow_moments_is_refused_by_their_dtype(key, tmp_path):
    model = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    loss = lambda model, batch: (jnp.sum(model["w"] * batch), {})  # noqa: E731
    state = backprop(loss).init(model, key)
    trees.save(tmp_path / "now", state)
    for found, wanted in zip(
        jax.tree.leaves(trees.restore(tmp_path / "now", state)), jax.tree.leaves(state), strict=True
    ):
        assert found.dtype == wanted.dtype
    trees.save(tmp_path / "before", state._replace(optimizer=optax.adamw(1e-3).init(model)))
    with pytest.raises(FormatError, match="optimizer"):
        trees.restore(tmp_path / "before", state)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", ["cocob", "dog", "prodigy", "mechanize", "momo"])
def test_optimizers_that_keep_the_first_parameters_or_ask_for_the_loss_step(name, dtype, key):
    """Their state begins with the parameters themselves, and the step donates both."""
    make = getattr(optax.contrib, name)
    args = {"dog": (1.0,), "momo": (0.1,), "mechanize": (optax.sgd(0.1),)}.get(name, ())
    loss = lambda model, x: (jnp.mean((model["w"] - x) ** 2), {})  # noqa: E731
    rule = backprop(loss, make(*args))
    state = rule.init({"w": jnp.zeros(4, dtype)}, key)
    for _ in range(2):
        state, metrics = rule.step(state, jnp.ones(4, dtype))
    assert np.isfinite(metrics["loss"]) and state.model["w"].dtype == dtype
