"""Steps in groups: the same as single ones, whatever falls between groups, resumed, on meshes."""

import functools
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.data import ArrayBatches
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, backprop, counter_current, labelled, noprop, physical_ff
from ffnlab.models import PhysicalConfig
from ffnlab.parallel import LoopOptions, checkpoints, parse_mesh, train
from ffnlab.parallel.feed import Feed
from ffnlab.parallel.options import check_positions
from ffnlab.rule import Rule
from ffnlab.testing import counted
from tests.parallel.test_loop import MODEL, bits, counting, exploding, numbers, rows

# A step rounds its float32 sums; groups may sum in another order, by 1e-6 a step.
A_STEP = 1e-6


def classes():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(40, 5)), random.integers(0, 4, 40)
    return ArrayBatches((x.astype(np.float32), y.astype(np.int32)), 8)


def mlp(key):
    return MLP((5, 8, 4), key=key, bias=False)


RULES = {
    "backprop": (lambda: backprop(labelled, optax.adam(1e-2)), mlp),
    "counter_current": (counter_current, mlp),
    "noprop": (noprop, lambda key: NoPropNet(5, 4, hidden=6, blocks=2, key=key)),
    "physical_ff": (
        lambda: physical_ff(optax.sgd(0.1), inner=2),
        lambda key: PhysicalConfig(5, 4, (8, 6), slots=4, skip=True).make(key=key),
    ),
}


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("backprop", ""),
        ("backprop", "dp=2"),
        ("counter_current", "dp=2"),
        ("noprop", ""),
        ("physical_ff", "dp=2"),
    ],
)
def test_groups_are_single_steps(key, tmp_path, name, mesh):
    make, network = RULES[name]
    options = LoopOptions(log_every=4, evaluate_every=5, checkpoint_every=6)
    run = functools.partial(
        train,
        make(),
        network(key),
        classes(),
        11,
        key=key,
        evaluate=lambda state: {"size": sum(np.abs(x).sum() for x in arrays(state.model))},
        options=options,
        mesh=parse_mesh(mesh) if mesh else None,
    )
    single = run(folder=tmp_path / "single")
    group = run(folder=tmp_path / "group", together=3)
    bound = {"rtol": 11 * A_STEP, "atol": 11 * A_STEP}
    for a, b in zip(arrays(single.state), arrays(group.state), strict=True):
        np.testing.assert_allclose(a, b, **bound)
    one, other = rows(tmp_path / "single"), rows(tmp_path / "group")
    assert [row["step"] for row in one] == [row["step"] for row in other] == [4, 5, 8, 10, 11]
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for figure in a.keys() - {"seconds"}:
            np.testing.assert_allclose(a[figure], b[figure], **bound)
    assert list(single.evaluations) == list(group.evaluations) == [5, 10, 11]
    kept = [checkpoints.steps(tmp_path / run / "checkpoint") for run in ("single", "group")]
    assert kept == [[11, 6], [11, 6]]


def arrays(state):
    """The arrays of a state on the host, without its keys."""
    leaves = jax.tree.leaves(state)
    return [np.asarray(x) for x in leaves if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]


@pytest.mark.parametrize("mesh", ["", "dp=2"])
def test_groups_of_any_size_and_runs_cut_anywhere_have_the_same_bits(key, tmp_path, mesh):
    def go(steps, folder, together, resume=False):
        return train(
            backprop(labelled, optax.adam(1e-2)),
            mlp(key),
            classes(),
            steps,
            key=key,
            folder=tmp_path / folder,
            resume=resume,
            mesh=parse_mesh(mesh) if mesh else None,
            options=LoopOptions(log_every=0),
            together=together,
        )

    whole = go(10, "whole", 4)
    go(7, "cut", 4)
    assert bits(go(10, "cut", 4, resume=True).state) == bits(whole.state)
    assert bits(go(10, "other", 3).state) == bits(whole.state)


def test_one_program_serves_all_groups(key):
    rule, batches = backprop(labelled, optax.adam(1e-2)), classes()
    common = {"key": key, "options": LoopOptions(log_every=0, evaluate_at=(1, 3)), "together": 5}
    seen = []
    evaluate = lambda state: seen.append(counting_programs.programs) or {}  # noqa: E731
    with counted() as counting_programs:
        train(rule, mlp(key), batches, 13, evaluate=evaluate, **common)
    assert len(seen) == 3 and seen[0] == seen[-1], "groups of 1, 2, 5, 5 steps"


def test_integer_states_and_keys_have_the_bits_of_single_steps(key):
    single = train(counting(), MODEL, numbers, 9, key=key)
    group = train(counting(), MODEL, numbers, 9, key=key, together=4)
    assert bits(group.state) == bits(single.state)
    assert group.metrics == single.metrics


def test_a_signal_ends_the_run_after_its_group(key, tmp_path):
    def interrupting(position):
        if position == 5:
            signal.raise_signal(signal.SIGTERM)
        return numbers(position)

    common = {"key": key, "folder": tmp_path, "together": 4}
    stopped = train(counting(), MODEL, interrupting, 12, **common)
    assert not stopped.finished and stopped.position == 8
    resumed = train(counting(), MODEL, numbers, 12, resume=True, **common)
    assert bits(resumed.state) == bits(train(counting(), MODEL, numbers, 12, key=key).state)


def test_the_step_that_is_not_finite_is_named(key, tmp_path):
    options = LoopOptions(log_every=0)
    where = r"step 6: \{'size': inf\}; after step 8, where its group ends, the first bad part is"
    with pytest.raises(NumericalError, match=where):
        train(
            exploding(5), 0.0, np.asarray, 9, key=key, folder=tmp_path, options=options, together=4
        )
    assert (tmp_path / "failed").exists()


def test_bad_steps_of_a_group_are_left_out_and_each_is_counted(key, tmp_path):
    def run(together):
        options = LoopOptions(log_every=3, on_bad="skip")
        batches = lambda position: np.full(2, position if position % 5 < 2 else 0)  # noqa: E731
        return train(exploding(12), 0.0, batches, 9, key=key, options=options, together=together)

    assert run(1).metrics == run(4).metrics == {"size": 8.0, "skipped": 1.0}


def test_batches_of_another_shape_begin_another_group(key):
    read = []

    def lengthening(position):
        read.append(position)
        return np.zeros(2 if position < 3 else 4, int)

    def step(state, batch):
        return state.at[batch.shape[0]].add(1), {"rows": jnp.float32(batch.shape[0])}

    rule = Rule("rows", lambda model, key: model, jax.jit(step), lambda state, inputs: state)
    outcome = train(rule, jnp.zeros(5, int), lengthening, 8, key=key, together=5)
    np.testing.assert_array_equal(outcome.state, [0, 0, 3, 0, 5])
    assert read == list(range(8)), "each is read once"
    feed = Feed(lengthening, rule, None, 5)
    assert [feed(None, 0, 8)[1], feed(None, 3, 8)[1]] == [3, 5]


def test_arrays_that_cannot_change_are_checked_once(key):
    """A whole graph is the same batch every time; arrays of NumPy may have been written to."""
    one, other, host = jnp.zeros(2), jnp.ones(2), np.zeros(2)

    def checks(batch_at):
        seen = []
        step = jax.jit(lambda state, batch: (state + batch.sum(), {"sum": batch.sum()}))
        rule = Rule(
            "counting",
            lambda model, key: model,
            step,
            lambda state, inputs: state,
            check=lambda state, batch: seen.append(batch),
        )
        for together in (1, 3):
            train(rule, jnp.float32(0), batch_at, 6, key=key, together=together)
        return len(seen)

    assert checks(lambda position: one) == 2, "once a run"
    assert checks(lambda position: (one, other)[position // 3]) == 4, "and another one anew"
    assert checks(lambda position: host) == 12
    assert checks(lambda position: jnp.zeros(2)) == 12


def test_positions_to_evaluate_at(key, tmp_path):
    def go(steps, **more):
        return train(
            counting(),
            MODEL,
            numbers,
            steps,
            key=key,
            folder=tmp_path,
            resume=True,
            evaluate=lambda state: {"total": state.seen.sum()},
            options=LoopOptions(log_every=0, evaluate_every=4, evaluate_at=(0, 1, 2, 7, 50)),
            **more,
        )

    first = go(6)
    assert list(first.evaluations) == [0, 1, 2, 4, 6] and first.evaluations[0] == {"total": 0.0}
    second = go(9, together=3)
    assert list(second.evaluations) == [0, 1, 2, 4, 6, 7, 8, 9]
    assert second.evaluations[4] == first.evaluations[4], "and those of the first part"
    logged = {row["step"]: row["total"] for row in rows(tmp_path)}
    assert logged == {at: figures["total"] for at, figures in second.evaluations.items()}


def test_a_position_before_the_first_step_is_logged_once(key, tmp_path):
    options = LoopOptions(log_every=0, evaluate_at=(0,))
    common = {"key": key, "folder": tmp_path, "options": options, "resume": True}

    def fails(position):
        raise OSError("no disk")

    for batches in (fails, numbers):
        try:
            outcome = train(
                counting(), MODEL, batches, 2, evaluate=lambda state: {"one": 1.0}, **common
            )
        except OSError:
            continue
    assert [row["step"] for row in rows(tmp_path)] == [0, 2] and outcome.finished


def test_refusals(key):
    with pytest.raises(ConfigError, match="together=0 must be at least 1"):
        train(counting(), MODEL, numbers, 2, key=key, together=0)
    with pytest.raises(ConfigError, match=r"evaluate_at=\(3, -1\) must hold positions"):
        LoopOptions(evaluate_at=(3, -1))
    check_positions((np.int64(3), 0))
    for wrong in ((1.5,), ("3",), 3, [1, -1]):
        with pytest.raises(ConfigError, match=f"evaluate_at={re.escape(repr(wrong))} must hold po"):
            check_positions(wrong)
