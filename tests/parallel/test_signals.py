"""Signals: the first one asks the run to stop, and none of them loses what was learned."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.parallel import LoopOptions, signals, train
from ffnlab.parallel.signals import SIGNALS, stop_request
from ffnlab.rule import Rule


@contextmanager
def set_to(number: int, handler: object) -> Iterator[None]:
    """A signal's handler within a block."""
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def heard(number: int) -> list[int]:
    """Registers a handler of the caller's own; the signals that reached it."""
    found = []
    signal.signal(number, lambda n, frame: found.append(n))
    return found


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_asks_and_more_change_nothing(number):
    with set_to(number, signal.SIG_DFL):
        found = heard(number)
        with stop_request() as stop:
            assert not stop(1)
            for _ in range(3):  # `timeout` sends two
                signal.raise_signal(number)
                assert stop(2)
        assert not found
        signal.raise_signal(number)
        assert found == [number], "the handler of before is back"


def test_ctrl_c_a_second_later_acts_as_before(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with set_to(signal.SIGINT, signal.default_int_handler), stop_request() as stop:
        signal.raise_signal(signal.SIGINT)
        now[0] += 0.9
        signal.raise_signal(signal.SIGINT)
        assert stop(1)
        now[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_sigterm_again_never_ends_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with stop_request() as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)  # acting as before would end this process
            now[0] += 100
        assert stop(1)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_is_ignored_stays_so(number):
    with set_to(number, signal.SIG_IGN):
        with stop_request() as stop:
            signal.raise_signal(number)
            assert not stop(1)
        assert signal.getsignal(number) == signal.SIG_IGN


def test_outside_the_main_thread_nothing_is_asked():
    answers = []

    def ask() -> None:
        with stop_request() as stop:
            answers.append(stop(1))

    handlers = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert answers == [False]
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def adding(*, at: str = "", number: int = signal.SIGINT) -> Rule:
    """Adds batches up; a signal comes while `at` ("init" or "step") is traced to be compiled."""

    def step(state, batch):
        if at == "step":
            signal.raise_signal(number)
        return state + batch.sum(), {"sum": state}

    def init(model, key):
        if at == "init":
            signal.raise_signal(number)
        return jnp.asarray(model)

    return Rule("adding", init, jax.jit(step), lambda state, inputs: state)


def go(folder, rule: Rule, **more):
    options = LoopOptions(log_every=1, evaluate_every=3, checkpoint_every=2)
    return train(
        rule,
        jnp.float32(0),
        lambda position: np.full(4, position, np.float32),
        8,
        key=jax.random.key(0),
        folder=folder,
        resume=True,
        options=options,
        **more,
    )


def finishes(folder) -> None:
    """The run goes on to its end, as if nothing had been."""
    again = go(folder, adding())
    assert again.finished and float(again.state) == 4 * sum(range(8))


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_while_the_first_step_compiles_stops_after_it(tmp_path, number):
    outcome = go(tmp_path, adding(at="step", number=number))
    assert (outcome.finished, outcome.position) == (False, 1)
    finishes(tmp_path)


def test_ctrl_c_while_the_state_is_made_interrupts(tmp_path):
    with set_to(signal.SIGINT, signal.default_int_handler):
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path, adding(at="init"))
    assert not (tmp_path / "checkpoint").exists()
    finishes(tmp_path)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_an_evaluation_leaves_its_figures_whole(tmp_path, number):
    def evaluate(state):
        if state == 4 * (0 + 1 + 2):
            signal.raise_signal(number)
        return {"state": float(state)}

    outcome = go(tmp_path, adding(), evaluate=evaluate)
    assert (outcome.finished, outcome.position) == (False, 4)
    assert outcome.metrics["state"] == 12.0
    finishes(tmp_path)
