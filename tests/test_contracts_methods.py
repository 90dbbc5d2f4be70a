"""The contracts of transforms and rules, run over all of them (see `contracts_methods.py`)."""

import importlib
import inspect
import json
import pkgutil
import subprocess
import sys
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ffnlab
from ffnlab import io, models, transform
from ffnlab.rule import Rule
from ffnlab.transform import Transform
from tests import calibrating
from tests.compiles import counted
from tests.conftest import ROOT
from tests.contracts import batches, tiny
from tests.contracts_methods import RULES, TRANSFORMS
from tests.test_contracts import equal

transform_cases = pytest.mark.parametrize("name", TRANSFORMS)
rule_cases = pytest.mark.parametrize("name", RULES)
METHODS = ("learning", "pruning", "quantization", "sparsity")


def factories(kind: type) -> set[str]:
    """Public functions of the method packages that are annotated to return a `kind`."""
    found = set()
    for package in METHODS:
        home = importlib.import_module(f"ffnlab.{package}")
        for module in pkgutil.iter_modules(home.__path__, f"ffnlab.{package}."):
            for name, member in vars(importlib.import_module(module.name)).items():
                if inspect.isfunction(member) and member.__module__ == module.name:
                    returned = inspect.signature(member).return_annotation
                    if kind in (returned, typing.get_origin(returned)) and name[0] != "_":
                        found.add(name)
    return found


def test_every_method_is_under_contract():
    for kind, table in ((Transform, TRANSFORMS), (Rule, RULES)):
        assert factories(kind) == {name.split("-")[0] for name in table}
    assert set(METHODS) <= set(ffnlab.__all__)


@transform_cases
def test_arguments_stay_and_the_result_repeats_bit_for_bit(name):
    model, calibration = tiny(), batches()
    before, texts = jax.tree.map(np.array, model), jax.tree.map(np.array, calibration)
    new, stats = transform.apply(TRANSFORMS[name](), model, calibration)
    again, stats_again = transform.apply(TRANSFORMS[name](), model, calibration)
    assert equal(before, model) and equal(texts, calibration)
    assert type(new) is type(model) and new.config == model.config
    assert equal(new, again) and equal(stats, stats_again)
    logits = jax.jit(lambda m, t: m(t))(new, calibration[0])
    assert logits.shape == (2, 12, 64) and np.all(np.isfinite(logits))


@transform_cases
def test_second_pass_over_the_data_compiles_nothing(name):
    t, model, calibration = TRANSFORMS[name](), tiny(), batches()
    if t.observe is None:
        assert t.advance(model, t.init(model))[1]
        return
    transform.calibrate(t, model, calibration)
    other = tiny(jax.random.key(1))
    with counted() as count:
        t.observe(t.init(model), other, calibration[1])
    assert count.programs == 0


@transform_cases
def test_calibration_holds_no_more_of_four_times_the_tokens(name):
    """Live arrays and stats at a batch; `tests/calibrating.py` sees the rest of the memory."""
    t, model, calibration = TRANSFORMS[name](), tiny(), batches()

    def held(times: int) -> tuple[int, int]:
        live, stats = [], t.init(model)
        for _ in range(times if t.observe is not None else 0):
            for batch in calibration:
                stats = jax.block_until_ready(t.observe(stats, model, batch))
                live.append(sum(array.nbytes for array in jax.live_arrays()))
        return max(live, default=0), sum(np.asarray(x).nbytes for x in jax.tree.leaves(stats))

    once = held(1)
    assert held(4) == once


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_calibration_takes_no_more_memory_for_four_times_the_tokens():
    command = [sys.executable, "-m", "tests.calibrating"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    grown = {name: four - one for name, (one, four) in json.loads(done.stdout).items()}
    # Half of what keeping one activation of each further batch would take.
    bound = 3 * calibrating.BATCHES * calibrating.ACTIVATION / 2
    assert grown.pop("holding") > bound, "the measure sees what is held"
    assert max(grown.values()) < bound, grown


@transform_cases
def test_stats_are_saved_and_applied_elsewhere(name, tmp_path):
    t, model = TRANSFORMS[name](), tiny()
    stats = transform.calibrate(t, model, batches())
    if jax.tree.leaves(stats):
        io.save_stats(tmp_path / "stats.npz", stats)
        stats = io.load_stats(tmp_path / "stats.npz", stats)
    assert equal(t.rewrite(tiny(), stats), transform.apply(t, model, batches())[0])


@transform_cases
def test_stacked_models_are_taken(name):
    t = TRANSFORMS[name]()
    flat, _ = transform.apply(t, tiny(), batches())
    stacked, _ = transform.apply(t, models.stack(tiny()), batches())
    back = models.unstack(stacked)
    tokens = batches()[0]
    assert jax.tree.structure(back) == jax.tree.structure(flat)
    run = jax.jit(lambda m, t: m(t))
    # Scanned blocks round in another order, which moves no decision and no code of this model.
    error = jnp.linalg.norm(run(back, tokens) - run(flat, tokens))
    assert error < 1e-5 * jnp.linalg.norm(run(flat, tokens))


@pytest.mark.parametrize(
    "order", ["finercut chess fireq", "fireq finercut chess", "chess fireq cats"]
)
def test_any_order_composes(order):
    steps = [TRANSFORMS[name]() for name in order.split()]
    by_hand = tiny()
    for step in steps:
        by_hand, _ = transform.apply(step, by_hand, batches())
    chained, _ = transform.apply(transform.chain(*steps), tiny(), batches())
    assert equal(chained, by_hand)
    assert np.all(np.isfinite(jax.jit(lambda m, t: m(t))(chained, batches()[0])))


@rule_cases
def test_rule_steps_once_compiled_and_repeats(name):
    case = RULES[name]
    rule, data, model = case.make(), case.batches(), case.model()
    before = jax.tree.map(np.array, model)
    state, metrics = rule.step(rule.init(model, jax.random.key(0)), data[0])
    with counted() as count:
        state, metrics = rule.step(state, data[1])
    assert count.programs == 0
    other, _ = rule.step(rule.init(model, jax.random.key(0)), data[0])
    other, same = rule.step(other, data[1])
    assert equal(state, other) and equal(metrics, same)
    assert equal(before, model)
    assert all(np.ndim(value) == 0 for value in metrics.values())


@rule_cases
def test_rule_state_survives_a_checkpoint(name, tmp_path):
    case = RULES[name]
    rule, data = case.make(), case.batches()
    state, _ = rule.step(rule.init(case.model(), jax.random.key(0)), data[0])
    io.save(tmp_path / "state", state)
    back = io.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    assert equal(rule.step(back, data[1])[0], rule.step(state, data[1])[0])


@rule_cases
def test_rule_predicts_from_its_state(name):
    case = RULES[name]
    rule, model, batch = case.make(), case.model(), case.batches()[0]
    inputs = case.inputs(batch)
    out = rule.predict(rule.init(model, jax.random.key(0)), inputs)
    assert len(out) == len(inputs) and np.all(np.isfinite(out))
