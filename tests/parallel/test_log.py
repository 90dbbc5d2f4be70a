"""Rows hold what was measured at their step, one row a step, interrupted or not."""

import io
import json
import os
import re
import signal
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError, FormatError
from ffnlab.parallel import LoopOptions, Work, checkpoints, train
from ffnlab.parallel.log import Display
from ffnlab.rule import Rule

STEPS = 11
OPTIONS = LoopOptions(log_every=2, evaluate_every=3, checkpoint_every=4)
WORK = Work(lambda position: 8)
RATES = ("tokens_per_second", "mfu")


def counter() -> Rule:
    """Its state after step n is n, and so is the metric "size"."""
    step = jax.jit(lambda state, batch: (state + 1, {"size": state + 1.0}))
    return Rule("counter", lambda model, key: jnp.int32(0), step, lambda state, inputs: state)


def run(folder, key, batches=np.asarray, steps=STEPS, options=OPTIONS, **more):
    def evaluate(state):
        return {"total": 10 * int(state)}

    more = {"resume": True, "evaluate": evaluate, "work": WORK} | more
    return train(counter(), None, batches, steps, key=key, folder=folder, options=options, **more)


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def measured(folder) -> list[dict]:
    timed = ("seconds", *RATES)
    return [{name: row[name] for name in row if name not in timed} for row in rows(folder)]


def expected(steps=STEPS, log=2, evaluate=3) -> list[dict]:
    """In closed form: metrics where a row is due, figures where an evaluation is."""
    found = []
    for step in range(1, steps + 1):
        evaluated = step % evaluate == 0 or step == steps
        if evaluated or step % log == 0:
            row = {"step": step, "size": float(step)}
            found.append(row | ({"total": 10.0 * step} if evaluated else {}))
    return found


def test_a_row_holds_what_was_measured_at_its_step(tmp_path, key):
    outcome = run(tmp_path, key)
    assert measured(tmp_path) == expected()
    assert outcome.metrics == {"size": STEPS, "total": 10 * STEPS}
    assert all("tokens_per_second" in row for row in rows(tmp_path))
    again = run(tmp_path, key)
    assert again.metrics == outcome.metrics, "nothing was left to do, and all is remembered"
    assert measured(tmp_path) == expected()


@pytest.mark.parametrize("at", range(1, STEPS))
def test_rows_of_an_interrupted_run_are_those_of_one_that_was_not(tmp_path, key, at):
    """By a signal, which saves, and by an error, after what was logged beyond the checkpoint."""

    def interrupting(position):
        if position == at:
            signal.raise_signal(signal.SIGTERM)
        return np.asarray(position)

    def failing(position):
        if position == at:
            raise OSError("the disk went away")
        return np.asarray(position)

    stopped = run(tmp_path / "stopped", key, interrupting)
    assert stopped.position == at + 1
    with pytest.raises(OSError, match="went away"):
        run(tmp_path / "failed", key, failing)
    assert measured(tmp_path / "failed") == [row for row in expected() if row["step"] <= at]
    for name in ("stopped", "failed"):
        assert run(tmp_path / name, key).metrics == {"size": STEPS, "total": 10 * STEPS}
        assert measured(tmp_path / name) == expected()


def test_rows_after_a_damaged_checkpoint_was_passed_over(tmp_path, key):
    def failing(position):
        if position == 10:
            raise OSError("the disk went away")
        return np.asarray(position)

    with pytest.raises(OSError, match="went away"):
        run(tmp_path, key, failing)
    (tmp_path / "checkpoint" / "step-000000008" / "tree.json").write_text("{}")
    with pytest.warns(UserWarning, match="step-000000008"):
        run(tmp_path, key)
    assert measured(tmp_path) == expected()
    assert checkpoints.steps(tmp_path / "checkpoint") == [STEPS, 8]


def test_rows_are_written_where_only_evaluations_are_due(tmp_path, key):
    run(tmp_path, key, options=LoopOptions(log_every=0, evaluate_every=3))
    assert measured(tmp_path) == expected(log=STEPS)


def test_rates_stand_where_they_were_measured(tmp_path, key):
    run(tmp_path, key, steps=3, options=LoopOptions(log_every=1))
    run(tmp_path, key, steps=6, options=LoopOptions(log_every=1))
    counted = [row["step"] for row in rows(tmp_path) if "tokens_per_second" in row]
    assert counted == [2, 3, 5, 6], "steps 1 and 4 were compiled"


def test_events_are_those_of_the_rows(tmp_path, key):
    run(tmp_path, key, options=LoopOptions(2, 3, 4, tensorboard=True))
    (file,) = (tmp_path / "events").iterdir()
    found = [(e.step, v.tag, v.simple_value) for e in events(file) for v in e.summary.value]
    wanted = [
        (row["step"], name, row[name]) for row in expected() for name in row if name != "step"
    ]
    assert sorted(pair for pair in found if pair[1] not in RATES) == sorted(wanted)
    timed = [(row["step"], name) for row in rows(tmp_path) for name in RATES if name in row]
    assert sorted(pair[:2] for pair in found if pair[1] in RATES) == sorted(timed)


def test_events_hide_what_came_after_the_checkpoint(tmp_path, key):
    """A viewer drops, of the files before it, steps from that of a session's start on."""
    options = LoopOptions(2, 3, 4, tensorboard=True)
    for steps in (4, 7):
        run(tmp_path, key, steps=steps, options=options)
    files = sorted((tmp_path / "events").iterdir())  # one, if both began in the same second
    found = [event for file in files for event in events(file)]
    versions = [event.file_version for event in found if event.file_version]
    assert versions == ["brain.Event:2"] * 2
    starts = [event.step for event in found if event.session_log.status == 1]
    assert starts == [1, 5], "the first steps after the checkpoints"


def events(file):
    """The events in a file of TFRecords: a length, its sum, the event, its sum."""
    from tensorboardX.proto.event_pb2 import Event

    content = file.read_bytes()
    while content:
        (size,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + size])
        content = content[16 + size :]


def test_the_bar_shows_the_last_known(tmp_path, key, monkeypatch):
    shown = {}

    def show(self, position, figures=None):
        if figures:
            shown[position] = {name: figures[name] for name in figures if name not in RATES}

    monkeypatch.setattr(Display, "show", show)
    run(tmp_path, key, steps=5)
    known = {"size": 4.0, "total": 30.0}
    assert shown == {
        2: {"size": 2.0},
        3: {"size": 3.0, "total": 30.0},
        4: known,
        5: {"size": 5.0, "total": 50.0},
    }


@pytest.mark.parametrize(
    "content",
    [b'{"step": 2, "siz', b"\xff\xfe\n[]\n3\n{}\nnull\n", b'{"step": "2"}\n{"step": 99}\n', b""],
)
def test_rows_that_are_damaged_are_dropped(tmp_path, key, content):
    run(tmp_path, key, steps=4)
    before = measured(tmp_path)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(content)
    run(tmp_path, key, steps=4)
    assert measured(tmp_path) == before


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_log_that_is_no_file_is_refused_before_anything(tmp_path, key, make):
    run(tmp_path, key, steps=4)
    (tmp_path / "metrics.jsonl").unlink()
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(FormatError, match=r"metrics\.jsonl is not a regular file"):
        run(tmp_path, key)


def test_a_change_of_the_working_directory_moves_no_run(tmp_path, key, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def evaluate(state):
        os.chdir(tmp_path / "other")
        return {"total": 10 * int(state)}

    run("run", key, steps=4, evaluate=evaluate)
    assert measured(tmp_path / "run") == expected(4)
    assert checkpoints.exists(tmp_path / "run" / "checkpoint")
    assert not (tmp_path / "run" / "run.lock").exists()
    assert not list((tmp_path / "other").iterdir())


def test_the_log_decides_nothing(tmp_path, key):
    """Early stopping and the count of skipped steps go on from the checkpoint."""
    costs = {2: 3.0, 4: 1.0, 6: 2.0, 8: 1.5}
    options = LoopOptions(1, 2, 2, on_bad="skip", watch="cost", patience=2)

    def step(state, batch):
        return state + 1, {"size": jnp.where(state == 2, jnp.nan, state + 0.0)}

    rule = Rule("bad at 2", lambda model, key: jnp.int32(model), jax.jit(step), lambda s, i: s)
    position = []

    def batches(at):
        position.append(at + 1)
        return np.asarray(at)

    def go(steps, options=options):
        def evaluate(state):
            return {"cost": costs[position[-1]]}

        more = {"key": key, "folder": tmp_path, "resume": True, "evaluate": evaluate}
        return train(rule, 0, batches, steps, options=options, **more)

    assert go(4).metrics["skipped"] == 2.0, "its state stays at 2"
    (tmp_path / "metrics.jsonl").unlink()
    assert go(6).metrics["skipped"] == 4.0
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "cost": 0.0, "skipped": 70.0}\n')
    stopped = go(12)
    assert stopped.finished and stopped.position == 8 and stopped.metrics["skipped"] == 6.0


def snapshot(folder) -> dict:
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in folder.rglob("*")
    }


def test_fewer_steps_than_were_taken_are_refused_and_nothing_is_written(tmp_path, key):
    run(tmp_path, key, steps=6)
    before = snapshot(tmp_path)
    with pytest.raises(ConfigError, match=r"steps=5, but .* has taken 6 already; ask for as many"):
        run(tmp_path, key, steps=5)
    assert snapshot(tmp_path) == before
    assert run(tmp_path, key, steps=6).position == 6


def test_a_run_without_a_finished_checkpoint_begins_anew_and_says_so(tmp_path, key):
    (tmp_path / "checkpoint" / "step-000000004").mkdir(parents=True)
    with pytest.warns(UserWarning, match="holds no finished checkpoint: the run begins at step 0"):
        run(tmp_path, key)
    assert measured(tmp_path) == expected()


def test_a_file_in_place_of_the_checkpoints_is_refused(tmp_path, key):
    (tmp_path / "checkpoint").write_text("")
    with pytest.raises(ConfigError, match="checkpoint is not a folder"):
        run(tmp_path, key)


class Terminal(io.StringIO):
    """A terminal as far as anyone can tell."""

    def isatty(self) -> bool:
        return True


def test_bar_and_time_left_have_room_in_80_columns(monkeypatch):
    for name, value in {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Terminal())
    figures = {f"figure_number_{i}": 1.5 + i for i in range(7)}
    with Display(10_000, 0, enabled=True) as display:
        display.show(2_500, figures)
    frame = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sys.stderr.getvalue()).split("\r")[-1].split("\n")
    bar = next(line for line in frame if "2500/10000" in line)
    assert bar.count("━") + bar.count("╸") + bar.count("╺") == 40
    assert len(re.findall(r"\d?-?:\d\d:\d\d|-:--:--", bar)) == 2, "time spent and time left"
    below = [line for line in frame if "figure_number" in line]
    assert sorted(" ".join(below).split()) == [f"{n}={v:.4g}" for n, v in figures.items()]
    assert all(len(line.rstrip()) <= 80 for line in frame)
