"""Goodput: hand-made runs of which the division is known, and hostile files."""

import json

import pytest

from ffnlab.errors import FormatError
from ffnlab.parallel.clock import PHASES, TIMES
from ffnlab.parallel.goodput import Goodput


def row(began: float, at: float, step: int, ended: bool = False, **seconds: float) -> dict:
    spent = dict.fromkeys(PHASES, 0.0) | seconds
    return {"began": began, "time": at, "step": step, "seconds": spent} | (
        {"ended": True} if ended else {}
    )


def written(folder, *rows: dict) -> Goodput:
    (folder / TIMES).write_text("".join(json.dumps(each) + "\n" for each in rows))
    return Goodput.read(folder)


ALONE = (
    row(0, 10, 0, starting=10),
    row(0, 30, 10, starting=10, compiling=5, steps=15),
    row(0, 40, 20, True, starting=10, compiling=5, steps=20, saving=5),
)


def test_a_run_that_nothing_disturbed(tmp_path):
    found = written(tmp_path, *ALONE)
    assert found.wall == 40 and found.figures()["goodput"] == 0.5
    assert {name: s for name, s in found.seconds.items() if s} == {
        "productive": 20, "starting": 10, "compiling": 5, "saving": 5
    }  # fmt: skip
    assert found.figures() == {"goodput": 0.5, "wall clock, s": 40, "parts": 1, "step": 20}


def test_what_a_death_costs_steps_beyond_the_checkpoint_and_the_time_until_the_next_part(tmp_path):
    died = (
        row(0, 10, 0, starting=10),
        row(0, 20, 10, starting=10, steps=10),
        row(0, 40, 20, starting=10, steps=30),  # the second ten steps were slower
    )
    again = (
        row(47, 50, 15, starting=3),
        row(47, 60, 25, True, starting=3, steps=10),
    )
    found = written(tmp_path, *died, *again)
    assert found.wall == 60
    # Half of the slower ten steps was for nothing.
    assert found.seconds["repeated"] == 10 and found.seconds["restarts"] == 7
    assert found.seconds["productive"] == 30 and found.seconds["starting"] == 13
    assert sum(found.seconds.values()) == found.wall


def test_steps_of_all_parts_beyond_a_checkpoint_far_behind_are_repeated(tmp_path):
    first = row(0, 0, 0), row(0, 10, 10, steps=10)
    second = row(20, 20, 10), row(20, 25, 15, steps=5)
    third = row(30, 30, 4), row(30, 50, 24, True, steps=20)
    found = written(tmp_path, *first, *second, *third)
    assert found.seconds["repeated"] == 6 + 5 and found.seconds["restarts"] == 15
    assert found.seconds["productive"] == 4 + 20
    assert sum(found.seconds.values()) == found.wall == 50


def test_a_pause_after_a_stop_in_order_is_no_part_of_the_clock(tmp_path):
    stopped = row(0, 0, 0), row(0, 10, 10, True, steps=10)
    next_day = row(90000, 90000, 10), row(90000, 90010, 20, True, steps=10)
    found = written(tmp_path, *next_day, *stopped)  # in whatever order they stand
    assert found.wall == 20 and found.figures()["goodput"] == 1
    assert found.seconds["restarts"] == found.seconds["repeated"] == 0


def test_damaged_lines_are_left_out_and_a_file_without_any_row_is_refused(tmp_path):
    lacking = dict(ALONE[1], seconds={"steps": 3.0})
    text = dict(ALONE[1], began="yesterday")
    endless = dict(ALONE[1], time=float("inf"))
    found = written(tmp_path, ALONE[0], lacking, text, endless, *ALONE[1:])
    assert found.seconds == written(tmp_path, *ALONE).seconds
    with pytest.raises(FormatError, match=r"times\.jsonl has no row of a run's times"):
        written(tmp_path, lacking, text)
    with pytest.raises(FileNotFoundError):
        Goodput.read(tmp_path / "nowhere")


def test_it_draws_and_writes_itself(tmp_path):
    died = row(0, 10, 0), row(0, 30, 10, steps=20), row(40, 45, 5), row(40, 60, 20, steps=15)
    (tmp_path / "run").mkdir()
    found = written(tmp_path / "run", *died)
    found.write(tmp_path / "out")
    assert (tmp_path / "out" / "report.png").stat().st_size > 5000
    assert "restarts" in str(found) and "repeated" in str(found) and "saving" not in str(found)
