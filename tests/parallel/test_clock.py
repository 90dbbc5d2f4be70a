"""The clock of a run: every moment lies in one phase, whatever overlaps."""

import json
import time

import jax
import jax.numpy as jnp
import pytest

from ffnlab.parallel import LoopOptions, clock, train
from ffnlab.parallel.clock import PHASES, TIMES, Clock, process_began
from tests.parallel.test_loop import MODEL, counting, numbers


class Hands:
    """A clock that is moved by hand, and a device that is busy as long as it is told."""

    def __init__(self, monkeypatch):
        self.now, self.busy_until = 100.0, 0.0
        monkeypatch.setattr(clock.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(clock.time, "time", lambda: self.now + 1000)
        monkeypatch.setattr(clock, "is_busy", lambda _: self.now < self.busy_until)

    def step(self, timer: Clock, seconds: float) -> None:
        """Hands a step over, which takes no time; it ends after some."""
        with timer.dispatching():
            self.busy_until = self.now + seconds

    def wait(self, timer: Clock) -> None:
        with timer.waiting(None):
            self.now = max(self.now, self.busy_until)


@pytest.fixture
def hands(monkeypatch):
    return Hands(monkeypatch)


def spent(timer: Clock) -> dict[str, float]:
    timer.to(timer.phase)
    return {name: seconds for name, seconds in timer.seconds.items() if seconds}


def test_phases_are_nested_and_sum_to_the_time_since_the_process_began(hands):
    timer = Clock(None, began=1095.0, fresh=True)  # five seconds ago
    hands.now += 2
    timer.to("steps")
    hands.now += 1
    with timer.during("saving"):
        hands.now += 4
        with timer.during("evaluating"):
            hands.now += 8
        hands.now += 16
    hands.now += 32
    assert spent(timer) == {"starting": 7, "steps": 33, "saving": 20, "evaluating": 8}
    with pytest.raises(KeyError), timer.during("logging"):
        hands.now += 1
        raise KeyError
    assert spent(timer)["logging"] == 1 and timer.phase == "steps"


@pytest.mark.parametrize(
    ("reading", "lost"),
    [(3, 0), (5, 0), (9, 4), (20, 15)],  # a step of 5 seconds, of which the last one told
)
def test_input_counts_only_while_the_device_waits(hands, reading, lost):
    timer = Clock(None, fresh=True)
    timer.to("steps")
    hands.step(timer, 5)
    hands.wait(timer)  # learns that a step takes 5
    hands.step(timer, 5)
    with timer.reading(None):
        hands.now += reading
    hands.wait(timer)
    assert spent(timer).get("input", 0) == lost
    assert sum(spent(timer).values()) == hands.now - 100


def test_input_counts_whole_where_nothing_was_under_way_or_nothing_is_known(hands):
    timer = Clock(None, fresh=True)
    timer.to("steps")
    with timer.reading(None):
        hands.now += 3
    assert spent(timer) == {"input": 3}
    hands.step(timer, 5)  # nobody has waited for a step yet
    with timer.reading(None):
        hands.now += 7
    assert spent(timer) == {"input": 10}


def test_a_step_that_compiles_is_compiling_and_tells_nothing_of_how_long_steps_take():
    step, x = jax.jit(lambda x: jnp.sin(x) @ x), jnp.ones((8, 8))
    timer = Clock(None, fresh=True)
    timer.to("steps")
    with timer.dispatching():
        y = step(x)
    compiling = timer.seconds["compiling"]
    assert compiling > 0 and timer.seconds["steps"] < compiling
    with timer.waiting(y):
        y.block_until_ready()
    assert timer._whole < compiling
    with timer.dispatching():
        step(x)
    assert timer.seconds["compiling"] == compiling


def test_a_run_tiles_its_wall_clock(key, tmp_path):
    moments = []

    def slow(position):
        moments.append(time.time())
        time.sleep(0.01)
        return numbers(position)

    def evaluate(state):
        time.sleep(0.05)
        moments.append(time.time())
        return {"total": state.seen.sum()}

    options = LoopOptions(log_every=4, evaluate_every=6, checkpoint_every=5)
    begin = time.time()
    train(counting(), MODEL, slow, 12, key=key, folder=tmp_path, evaluate=evaluate, options=options)
    end = time.time()
    rows = [json.loads(line) for line in (tmp_path / TIMES).read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 4, 6, 8, 12, 12]
    assert [row.get("ended", False) for row in rows] == [False] * 5 + [True]
    last = rows[-1]["seconds"]
    assert set(last) == set(PHASES) and all(value >= 0 for value in last.values())
    assert sum(last.values()) == pytest.approx(rows[-1]["time"] - rows[-1]["began"], rel=1e-3)
    # No bound on what lies outside, which a busy machine stretches: the part holds all of the work.
    assert begin <= rows[0]["began"] <= moments[0] and moments[-1] <= rows[-1]["time"] <= end
    assert last["evaluating"] >= 0.1 and last["input"] >= 0.12 * 0.8
    assert last["compiling"] > 0 and last["saving"] > 0 and last["starting"] > 0
    for earlier, later in zip(rows, rows[1:], strict=False):
        assert all(earlier["seconds"][name] <= later["seconds"][name] for name in PHASES)


def test_a_resumed_run_adds_a_part_and_a_new_one_begins_its_file_anew(key, tmp_path):
    begun = lambda: {json.loads(line)["began"] for line in file.read_text().split("\n") if line}  # noqa: E731
    file = tmp_path / TIMES
    train(counting(), MODEL, numbers, 2, key=key, folder=tmp_path)
    first = begun()
    with file.open("a") as cut:
        cut.write('{"began": 1')  # it died while it wrote
    train(counting(), MODEL, numbers, 4, key=key, folder=tmp_path, resume=True)
    text = file.read_text()
    assert text.count('"ended"') == 2 and '{"began": 1\n' in text
    file.write_text(text.replace('{"began": 1\n', ""))
    assert len(begun()) == 2 and first < begun()
    other = tmp_path / "other"
    other.mkdir()
    (other / TIMES).write_text(text)
    train(counting(), MODEL, numbers, 2, key=key, folder=other)
    assert (other / TIMES).read_text().count('"ended"') == 1


def test_the_beginning_of_this_process():
    began = process_began()
    assert began is None or 0 < time.time() - began < 24 * 3600
