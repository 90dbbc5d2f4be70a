"""Tests of ffnlab.bench.editing on small models; none is timed."""

import pytest
import rich

from ffnlab.bench import editing
from ffnlab.errors import ConfigError

SMALL = editing.Settings(width=16, layers=2, facts=3, steps=2, turns=2)


def test_both_numbers_are_timed_and_told(capsys):
    found = editing.compare(SMALL)
    assert set(found.seconds) == {1, 3} and min(found.seconds.values()) > 0 < found.ratio
    rich.print(found)
    assert "ms a fact" in capsys.readouterr().out and "2 evaluations" in found.about


def test_both_do_as_many_steps():
    for count in (1, 3):
        assert editing.call_of(SMALL, count)().tolist() == [1] * count


def test_bad_sizes():
    for options, said in (
        ({"turns": 0}, "turns=0"),
        ({"steps": 1}, "steps=1"),
        ({"width": 8}, "8"),
    ):
        with pytest.raises(ConfigError, match=said):
            editing.Settings(**options)
