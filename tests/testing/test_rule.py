"""`check_rule` passes a plain rule, and fails one broken rule for each line of its contract."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.rule import Rule, held_model
from ffnlab.testing import check_rule

MODEL = {"w": jnp.ones((3, 2)), "steps": jnp.int32(0)}


def batches():
    return list(np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32))


def hebbian(state, batch):
    """Oja's rule for all outputs, without their order."""
    y = batch @ state["w"]
    w = state["w"] + 0.01 * (batch.T @ y - state["w"] * (y**2).sum(0))
    return state | {"w": w, "steps": state["steps"] + 1}, {"mean": y.mean()}


def plain(**changes):
    """A rule of one matrix; the broken ones differ in one thing."""
    parts = {
        "init": lambda model, key: jax.tree.map(jnp.copy, model),
        "step": jax.jit(hebbian),
        "predict": jax.jit(lambda state, inputs: inputs @ state["w"]),
        "model": lambda state: state,
    }
    return lambda: Rule("plain", **parts | changes)


def after(change):
    """A step with something done to state, metrics and batch after it."""

    def step(state, batch):
        state, metrics = jax.jit(hebbian)(state, batch)
        return change(state, metrics, batch)

    return step


def emptied(state, metrics, batch):
    batch[:] = 0
    return state, metrics


def refuse(message):
    raise ValueError(message)


def drawn(state, metrics, batch):
    return state | {"at": jnp.int32(next(count))}, metrics


count = itertools.count()
with_codes = functools.partial(jnp.zeros, 3, jnp.uint4)
BROKEN = {
    "it is a rule": lambda: None,
    "the model stays .*deleted": plain(
        init=lambda model, key: model, step=jax.jit(hebbian, donate_argnums=0)
    ),
    "the model stays .*model or a batch was changed": plain(step=after(emptied)),
    "the model stays .*the state is another": plain(step=after(drawn)),
    "the model stays .*the metrics are others": plain(
        step=after(lambda state, metrics, batch: (state, {"at": jnp.int32(next(count))}))
    ),
    "compiles nothing: 1 programs": plain(step=lambda s, b: jax.jit(lambda *a: hebbian(*a))(s, b)),
    "learns: predictions": plain(
        step=after(lambda state, metrics, batch: (state | {"w": MODEL["w"]}, metrics))
    ),
    "scalars: mean has shape .2,": plain(
        step=after(lambda state, metrics, batch: (state, {"mean": state["w"].mean(0)}))
    ),
    "scalars: mean is nan": plain(
        step=after(lambda state, metrics, batch: (state, {"mean": jnp.float32(jnp.nan)}))
    ),
    "from a checkpoint": plain(
        init=lambda model, key: jax.tree.map(jnp.copy, model) | {"codes": with_codes()}
    ),
    "predicts .*3 outputs of 4": plain(predict=lambda state, inputs: (inputs @ state["w"])[1:]),
    "accepts its batches: ValueError: no odd rows": plain(
        check=lambda state, batch: refuse("no odd rows")
    ),
    "accepts its batches: AttributeError": plain(
        check=lambda state, batch: float(state["w"].sum())
    ),
    "gives its model: .*no part `model`": plain(model=held_model),
    "gives its model: it is another tree": plain(model=lambda state: state["w"]),
    "gives its model: its arrays": plain(model=lambda state: state | {"w": state["w"].T}),
    "predicts .*not finite": plain(
        predict=lambda state, inputs: jnp.where(state["steps"] > 0, 1.0, jnp.inf) * inputs
    ),
}


def test_a_plain_rule_passes():
    check_rule(plain(), model=MODEL, batches=batches())


def test_outputs_are_those_that_the_rule_is_said_to_give():
    def summed(outputs, inputs):
        assert outputs.shape == (), f"shape {outputs.shape}"

    total = jax.jit(lambda state, inputs: (inputs @ state["w"]).sum())
    check_rule(plain(predict=total), model=MODEL, batches=batches(), check=summed)
    with pytest.raises(AssertionError, match=r"predicts.*shape \(4, 2\)"):
        check_rule(plain(), model=MODEL, batches=batches(), check=summed)


def test_one_batch_is_too_few():
    with pytest.raises(ValueError, match="batches has 1; two are needed"):
        check_rule(plain(), model=MODEL, batches=batches()[:1])


@pytest.mark.parametrize("said", BROKEN)
def test_each_line_of_the_contract_is_held(said):
    model = jax.tree.map(jnp.copy, MODEL)  # which some of them break
    with pytest.raises(AssertionError, match=f"the rule breaks its contract: .*{said}"):
        check_rule(BROKEN[said], model=model, batches=batches())
