"""The loop: any rule, the same bits after an interruption, what it writes, how it refuses."""

import json
import signal
import threading
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import io
from ffnlab.data import held_out_windows
from ffnlab.errors import ConfigError, FormatError, NumericalError
from ffnlab.learning import backprop
from ffnlab.parallel import LoopOptions, checkpoints, held_out_bits, train
from ffnlab.parallel.signals import stop_request
from ffnlab.rule import Rule


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
    leaves = [jax.random.key_data(x) if io.is_key(x) else x for x in jax.tree.leaves(tree)]
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
    assert [r["step"] for r in logged if "kinds" in r and "total" not in r][:1] == [2]
    assert [r["step"] for r in logged if set(r) == {"step", "seconds", "total"}] == [3, 6, 7]
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


def test_a_second_signal_acts_as_before():
    with stop_request() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop(1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


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
