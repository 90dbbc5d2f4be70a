"""Loading takes the memory of the model and little more: peak of a fresh process, at 1 GB."""

import os

import pytest

from ffnlab.bench import loading
from ffnlab.bench.check import read_limits


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc (Linux)")
def test_peaks_of_loading_a_gigabyte_are_within_their_limits(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")  # one device, as a user has
    limits = {limit.name: limit for limit in read_limits()}
    for dtype, ratio in loading.peaks().items():
        assert limits[f"load_peak_{dtype}"].holds(ratio), (dtype, ratio)
        assert ratio > 0.95  # less would mean that the values were never there
