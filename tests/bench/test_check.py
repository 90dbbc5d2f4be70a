"""Tests of ffnlab.bench.check, with measures that take no time."""

import math

import pytest

from ffnlab.bench import check as bench
from ffnlab.bench import startup
from ffnlab.errors import ConfigError, MissingExtraError

runs: list[float] = []


def settling() -> dict[str, float]:
    """A measure that is slow the first time."""
    runs.append(1.0)
    return {"seconds": 3.0 / len(runs), "ratio": 1.0 * len(runs)}


def without_extra() -> float:
    """A measure whose package is missing."""
    raise MissingExtraError("peer is not installed: pip install 'ffnlab[peer]'")


def limits(tmp_path, text):
    path = tmp_path / "limits.toml"
    path.write_text(text.replace("HERE", __name__))
    return bench.read_limits(path)


def test_shipped_limits_name_existing_measures():
    shipped = bench.read_limits()
    assert {limit.name for limit in shipped} >= {"import_over_jax"}
    for limit in shipped:
        assert callable(bench.find(limit.measure))
        assert limit.why, f"{limit.name} does not say where its limit comes from"


def test_measured_again_until_every_figure_of_a_measure_is_in_its_limit(tmp_path):
    runs.clear()
    text = """
        [time]
        measure = "HERE:settling"
        key = "seconds"
        max = 1.5
        [ratio]
        measure = "HERE:settling"
        key = "ratio"
        min = 3
        tries = 2
    """
    outcomes = bench.check(limits(tmp_path, text))
    assert len(runs) == 3  # the larger of the two `tries`
    assert [(o.figure, o.status) for o in outcomes] == [(1.0, "ok"), (3.0, "ok")]


def test_a_figure_that_stays_out_is_reported(tmp_path):
    runs.clear()
    text = '[time]\nmeasure = "HERE:settling"\nkey = "seconds"\nmax = 0.1\ntries = 2'
    (outcome,) = bench.check(limits(tmp_path, text))
    assert (outcome.figure, outcome.status) == (1.5, "OUT OF LIMIT")


def test_a_missing_extra_is_not_a_failure(tmp_path):
    (outcome,) = bench.check(limits(tmp_path, '[x]\nmeasure = "HERE:without_extra"\nmax = 1'))
    assert outcome.status == "not measured" and "peer" in outcome.absent


def test_nan_is_never_within_a_limit():
    for at_most in (True, False):
        limit = bench.Limit("x", "a:b", bound=1.0, at_most=at_most)
        assert not limit.holds(math.nan)
        assert limit.better(math.nan, 2.0) == limit.better(2.0, math.nan) == 2.0


@pytest.mark.parametrize(
    "text",
    [
        "x = 3",
        '[x]\nmeasure = "a:b"',
        '[x]\nmeasure = "a:b"\nmin = 1\nmax = 2',
        '[x]\nmeasure = "a:b"\nmax = 1\nspeed = 2',
        '[x]\nmeasure = "nothing"\nmax = 1',
        '[x]\nmeasure = "a:b"\nmax = 1\ntries = "two"',
    ],
)
def test_bad_tables_are_named(tmp_path, text):
    with pytest.raises(ConfigError, match="x"):
        limits(tmp_path, text)


@pytest.mark.parametrize("measure", ["ffnlab.bench.nowhere:f", "ffnlab.bench.startup:nothing"])
def test_unknown_measure(measure):
    with pytest.raises(ConfigError, match="no measure"):
        bench.find(measure)


def test_unknown_key(tmp_path):
    text = '[x]\nmeasure = "HERE:settling"\nkey = "other"\nmax = 1'
    with pytest.raises(ConfigError, match=r"it has \['ratio', 'seconds'\]"):
        bench.check(limits(tmp_path, text))


def test_import_is_measured_in_seconds():
    assert 0 < startup.over_jax(runs=1) < 60


def test_command(capsys, monkeypatch):
    fine = bench.Limit("fine", f"{__name__}:settling", 1e9, at_most=True, key="seconds")
    late = bench.Limit("late", f"{__name__}:settling", -1.0, at_most=True, key="seconds")
    away = bench.Limit("away", f"{__name__}:without_extra", 1.0, at_most=True)
    monkeypatch.setattr(bench, "read_limits", lambda: [fine, late, away])
    assert bench.main(["fine"]) == 0
    assert bench.main(["fine", "away"]) == 0
    assert bench.main(["--all", "away"]) == 1
    assert bench.main([]) == 1
    said = capsys.readouterr().out
    assert "OUT OF LIMIT" in said and "ffnlab[peer]" in " ".join(said.replace("│", " ").split())
    with pytest.raises(SystemExit):
        bench.main(["nothing"])
