"""Tests of the bench of precoders: that both sides are of the same work; none is timed."""

import numpy as np
import pytest

from ffnlab.bench import precoding
from ffnlab.bench.precoding import Settings, compare
from ffnlab.errors import ConfigError, FFNLabError

SMALL = Settings(channels=3, users=3, antennas=4, rounds=4, turns=2)


def test_both_sides_climb_to_the_same_rates(monkeypatch):
    found = compare(SMALL)
    task = found.tasks["precoders"]
    assert 0 <= task.difference < 1e-4 and task.ours > 0 and task.form == "WMMSE, 4 rounds"
    assert found.ratios()["precoders"] == task.ratio
    h = np.ones((1, 2, 3), np.complex64) + 1j * np.arange(6).reshape(1, 2, 3).astype(np.float32)
    v = precoding.numpy_wmmse(h, 2.5, 3)
    assert (np.abs(v) ** 2).sum() == pytest.approx(2.5, rel=1e-5)
    whole = precoding.numpy_wmmse
    monkeypatch.setattr(precoding, "numpy_wmmse", lambda h, power, rounds: whole(h, power, 0))
    with pytest.raises(FFNLabError, match="the two sides' WMMSE differ by"):
        compare(SMALL)


def test_what_is_refused():
    with pytest.raises(ConfigError, match="rounds=0 must be at least 1"):
        Settings(rounds=0)
