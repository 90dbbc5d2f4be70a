"""The loop: any rule, the same bits after an interruption, what it writes, how it refuses."""

import json
import signal
import sys
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.data import held_out_windows
from ffnlab.errors import ConfigError, FormatError, MissingExtraError, NumericalError
from ffnlab.learning import backprop
from ffnlab.parallel import LoopOptions, checkpoints, held_out_bits, parse_mesh, rates, train
from ffnlab.rule import Rule
from ffnlab.storage import trees


class Counts(NamedTuple):
    seen: jax.Array
    key: jax.Array


def counting() -> Rule:
    """Learns how often each number came: integer state, a random key, no loss and no gradient."""

    def step(state, batch):
        key, draw = jax.random.split(state.key)
        seen = state.seen.at[batch].add(1) + jax.random.bernoulli(draw, 0.5, state.seen.shape)
        return Counts(seen, key), {"kinds": jnp.sum(seen > 0)}

    return Rule(
        "counting",
        lambda model, key: Counts(jnp.zeros_like(model), key),
        jax.jit(step),
        lambda state, inputs: state.seen[inputs],
    )


MODEL = np.zeros(10, np.int32)


def numbers(position: int) -> np.ndarray:
    return np.random.default_rng(position).integers(0, 10, 4)


def bits(tree) -> list[bytes]:
    leaves = [jax.random.key_data(x) if trees.is_key(x) else x for x in jax.tree.leaves(tree)]
    return [np.asarray(leaf).tobytes() for leaf in leaves]


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_any_rule_runs_and_is_logged(key, tmp_path):
    options = LoopOptions(log_every=2, evaluate_every=3, checkpoint_every=4)
    outcome = train(
        counting(),
        MODEL,
        numbers,
        7,
        key=key,
        folder=tmp_path,
        evaluate=lambda state: {"total": state.seen.sum()},
        options=options,
    )
    assert outcome.finished and outcome.position == 7 and outcome.seconds > 0
    assert outcome.metrics == {"kinds": 10.0, "total": float(outcome.state.seen.sum())}
    logged = rows(tmp_path)
    common = {"step", "seconds", "kinds"}
    assert [(r["step"], set(r) - common) for r in logged] == [
        (2, set()),
        (3, {"total"}),
        (4, set()),
        (6, {"total"}),
        (7, {"total"}),
    ]
    assert all(common <= set(r) for r in logged)
    assert not MODEL.any()


@pytest.mark.parametrize("cut", [1, 4, 5])
def test_resumed_runs_end_in_the_same_bits(key, tmp_path, cut):
    whole = train(counting(), MODEL, numbers, 9, key=key, folder=tmp_path / "whole")
    first = train(counting(), MODEL, numbers, cut, key=key, folder=tmp_path / "cut")
    assert first.position == cut
    second = train(counting(), MODEL, numbers, 9, key=key, folder=tmp_path / "cut", resume=True)
    assert bits(second.state) == bits(whole.state)
    before = rows(tmp_path / "cut")[0]  # saving the checkpoint comes after it, and is not counted
    assert before["step"] == cut and second.seconds > before["seconds"] - 1e-3
    again = train(counting(), MODEL, numbers, 9, key=key, folder=tmp_path / "cut", resume=True)
    assert bits(again.state) == bits(whole.state) and again.finished


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_rest_is_the_same(key, tmp_path, number):
    def interrupting(position):
        if position == 3:
            signal.raise_signal(number)  # to this thread: os.kill may reach another one, later
        return numbers(position)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    options = LoopOptions(log_every=1)
    stopped = train(counting(), MODEL, interrupting, 8, key=key, folder=tmp_path, options=options)
    assert not stopped.finished and stopped.position == 4
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = train(
        counting(), MODEL, numbers, 8, key=key, folder=tmp_path, resume=True, options=options
    )
    assert resumed.finished
    assert bits(resumed.state) == bits(train(counting(), MODEL, numbers, 8, key=key).state)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_crash_falls_back_to_the_checkpoint(key, tmp_path):
    def failing(position):
        if position == 5:
            raise OSError("the disk went away")
        return numbers(position)

    options = LoopOptions(log_every=1, checkpoint_every=2)
    with pytest.raises(OSError, match="went away"):
        train(counting(), MODEL, failing, 8, key=key, folder=tmp_path, options=options)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "kin')  # as a kill leaves it
    resumed = train(
        counting(), MODEL, numbers, 8, key=key, folder=tmp_path, resume=True, options=options
    )
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert resumed.finished
    assert bits(resumed.state) == bits(train(counting(), MODEL, numbers, 8, key=key).state)


def test_a_rule_without_gradients_goes_on_on_another_mesh(key, tmp_path):
    whole = train(counting(), MODEL, numbers, 6, key=key, folder=tmp_path / "alone")
    for steps, mesh in ((2, "dp=4"), (4, "dp=2,fsdp=2"), (6, "fsdp=2")):
        found = train(
            counting(),
            MODEL,
            numbers,
            steps,
            key=key,
            folder=tmp_path / "meshes",
            resume=True,
            mesh=parse_mesh(mesh),
        )
    assert bits(found.state) == bits(whole.state)


def test_a_run_is_not_overwritten(key, tmp_path):
    train(counting(), MODEL, numbers, 2, key=key, folder=tmp_path)
    with pytest.raises(ConfigError, match="holds a run"):
        train(counting(), MODEL, numbers, 2, key=key, folder=tmp_path)
    with pytest.raises(FormatError):
        train(
            backprop(optimizer=optax.sgd(1.0)),
            {"w": jnp.ones(3)},
            numbers,
            2,
            key=key,
            folder=tmp_path,
            resume=True,
        )


def test_not_a_number_stops_the_run(key, tmp_path):
    rule = Rule(
        "growing",
        lambda model, key: model,
        lambda state, batch: (state * 1e30, {"size": state * 1e30}),
        lambda state, inputs: state,
    )
    options = LoopOptions(log_every=1, checkpoint_every=1)
    with pytest.raises(NumericalError, match=r"step 2: \{'size': inf\}"):
        train(rule, jnp.float32(1), numbers, 5, key=key, folder=tmp_path, options=options)
    like = {"position": 0, "seconds": 0.0, "state": jnp.float32(0)}
    saved = checkpoints.restore(tmp_path / "checkpoint", like)
    assert saved["position"] == 1


def test_nothing_is_written_without_a_folder(key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(counting(), MODEL, numbers, 3, key=key).finished
    assert not list(tmp_path.iterdir())


def test_outside_the_main_thread_signals_are_left_alone(key):
    found = []

    def run():
        found.append(train(counting(), MODEL, numbers, 3, key=key).finished)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True]


def test_negative_intervals_are_refused():
    with pytest.raises(ConfigError, match="log_every=-1"):
        LoopOptions(log_every=-1)


def test_held_out_bits_of_a_known_model():
    text = bytes([0, 1, 0, 1, 1, 0, 1, 0, 0, 1, 1])
    table = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
    windows = held_out_windows(text, length=4, stride=2)
    found = held_out_bits(lambda tokens: table[tokens], windows, rows=2)
    probabilities = [[0.25, 0.75], [0.5, 0.5]]
    expected = -np.mean(
        [np.log2(probabilities[a][b]) for a, b in zip(text[:-1], text[1:], strict=True)]
    )
    assert found == pytest.approx(expected, rel=1e-6)


def exploding(at: int) -> Rule:
    """Counts, until the batch of one step makes a part of its state infinite."""

    def step(state, batch):
        grown = jnp.where(batch.sum() == at, jnp.inf, state["b"][0] + 1.0)
        return {"a": state["a"] + 1, "b": [grown]}, {"size": grown}

    return Rule(
        "exploding",
        lambda model, key: {"a": jnp.int32(0), "b": [jnp.float32(model)]},
        jax.jit(step),
        lambda state, inputs: state["b"][0],
    )


def test_a_step_that_is_not_finite_is_named_and_its_state_kept(key, tmp_path):
    options = LoopOptions(log_every=0, checkpoint_every=2)
    where = r"step 6: \{'size': inf\}; the first bad part is \['b'\]\[0\] \(saved in .*failed\)"
    with pytest.raises(NumericalError, match=where):
        train(exploding(5), 0.0, np.asarray, 9, key=key, folder=tmp_path, options=options)
    like = {"position": 0, "seconds": 0.0, "state": {"a": jnp.int32(0), "b": [jnp.float32(0)]}}
    failed = trees.restore(tmp_path / "failed", like)
    assert failed["position"] == 6 and failed["state"]["a"] == 6
    assert checkpoints.restore(tmp_path / "checkpoint", like)["position"] == 4


@pytest.mark.parametrize("mesh", [None, "dp=2"])
def test_bad_steps_are_left_out_and_counted_also_after_an_interruption(key, tmp_path, mesh):
    def run(steps, on_bad="skip"):
        return train(
            exploding(10),
            0.0,
            lambda position: np.full(2, position),
            steps,
            key=key,
            folder=tmp_path,
            resume=True,
            options=LoopOptions(log_every=1, on_bad=on_bad),
            mesh=parse_mesh(mesh) if mesh else None,
        )

    assert run(7).metrics == {"size": 6.0, "skipped": 1.0}
    assert [row.get("size") for row in rows(tmp_path)] == [1, 2, 3, 4, 5, None, 6]
    assert run(8, "stop").metrics == {"size": 7.0}
    last = run(9)
    assert last.metrics == {"size": 8.0, "skipped": 1.0}, "also after steps that were not counted"
    assert last.state["a"] == 8, "no part of a bad step is kept"
    with pytest.raises(ConfigError, match="on_bad='ignore'"):
        LoopOptions(on_bad="ignore")


def test_a_run_that_no_longer_improves_stops_and_stays_stopped(key, tmp_path):
    figures = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0, 10: 0.5}
    options = LoopOptions(log_every=0, evaluate_every=2, watch="cost", patience=2)

    position = []

    def counted(step):
        position.append(step + 1)
        return numbers(step)

    def go(steps, watched="cost"):
        return train(
            counting(),
            MODEL,
            counted,
            steps,
            key=key,
            folder=tmp_path / watched,
            resume=True,
            evaluate=lambda state: {watched: figures[position[-1]]},
            options=options,
        )

    assert go(6).position == 6
    stopped = go(12)  # it remembers what was evaluated before
    assert stopped.finished and stopped.position == 8
    assert checkpoints.steps(tmp_path / "cost" / "checkpoint") == [8, 6]
    again = go(12)
    assert again.finished and again.position == 8
    with pytest.raises(ConfigError, match=r"watch='cost' is not one of \['price'\]"):
        go(12, "price")
    with pytest.raises(ConfigError, match="patience=1 needs a figure to watch"):
        LoopOptions(patience=1)


def test_rates_are_logged_where_the_work_is_known(key, tmp_path, monkeypatch):
    monkeypatch.setitem(rates.PEAKS, "cpu", 1e9)
    work = rates.Work(lambda position: 8, flops=1e3)
    options = LoopOptions(log_every=2)
    train(counting(), MODEL, numbers, 6, key=key, folder=tmp_path, options=options, work=work)
    for row in rows(tmp_path):
        assert row["tokens_per_second"] > 0
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * 1e3 / 1e9)
    assert rates.peak("NVIDIA H100 PCIe") < rates.peak("NVIDIA H100 80GB HBM3")
    assert rates.peak("an abacus") is None


def test_event_files_and_a_trace(key, tmp_path):
    options = LoopOptions(log_every=2, tensorboard=True, profile=2)
    train(counting(), MODEL, numbers, 6, key=key, folder=tmp_path, options=options)
    (events,) = (tmp_path / "events").iterdir()
    assert events.name.startswith("events.out.tfevents") and b"kinds" in events.read_bytes()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_a_missing_writer_of_events_is_named(key, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    options = LoopOptions(tensorboard=True)
    with pytest.raises(MissingExtraError, match=r"ffnlab\[log\]"):
        train(counting(), MODEL, numbers, 2, key=key, folder=tmp_path, options=options)
