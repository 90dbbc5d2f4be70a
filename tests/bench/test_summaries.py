"""Tests of summaries beside SciPy on a small graph; nothing is timed to be judged."""

import numpy as np
import pytest
import rich

from ffnlab.bench import summaries
from ffnlab.bench.summaries import Settings, compare, memory_of
from ffnlab.bench.turns import Comparison, Task
from ffnlab.errors import ConfigError, FFNLabError

SMALL = Settings(papers=200, width=3, rounds=2, turns=1)


def test_both_sides_find_the_same(monkeypatch, capsys):
    monkeypatch.setattr(
        summaries, "in_process", lambda side, settings: {"ours": 1.0}.get(side, 2.0)
    )
    found = compare(SMALL)
    task = found.tasks["summaries"]
    assert task.ours > 0 and task.theirs > 0 and 0 <= task.difference <= summaries.TOLERANCE
    assert found.peaks == (1.0, 2.0)
    rich.print(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "SciPy CSR" in said and "2,800 edges" in said


def test_figures_of_other_work_are_refused(monkeypatch):
    case = summaries.drawn(SMALL)
    wrong = lambda case: lambda: 1.1 * summaries.theirs(case)()  # noqa: E731
    monkeypatch.setitem(summaries.SIDES, "theirs", wrong)
    with pytest.raises(FFNLabError, match=r"the two sides differ by (1.0e-01|9.\de-02)"):
        compare(SMALL)
    assert np.isfinite(summaries.theirs(case)()).all()


def test_memory_is_at_least_what_is_stored():
    found = memory_of("theirs", SMALL)
    assert found >= 200 * 6 * 2 * 3 * 2


def test_a_process_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(summaries, "PROGRAM", "raise SystemExit('no room')")
    with pytest.raises(FFNLabError, match="memory of ours: no room"):
        summaries.in_process("ours", SMALL)
    monkeypatch.setattr(summaries, "PROGRAM", "print('said', 12.5)")
    assert summaries.in_process("ours", SMALL) == 12.5


def test_ratios(monkeypatch):
    task = Task.of([(1.0, 2.0)], 0.0, "")
    made = Comparison("", {"summaries": task}, "", (3.0, 4.0))
    monkeypatch.setattr(summaries, "compare", lambda: made)
    assert summaries.ratios() == {"time": 2.0, "memory": 0.75}


def test_bad_sizes():
    with pytest.raises(ConfigError, match="papers=100"):
        Settings(papers=100)
