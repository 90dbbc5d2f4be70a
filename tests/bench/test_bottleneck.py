"""Tests of ffnlab.bench.bottleneck on a small block; none is timed."""

import jax
import numpy as np
import pytest
import rich

from ffnlab.bench import bottleneck
from ffnlab.errors import ConfigError
from ffnlab.models.cost import multiply_adds

SMALL = bottleneck.Settings(images=2, side=5, width=3, turns=2)


def test_all_ops_are_timed_and_told(capsys):
    found = bottleneck.compare(SMALL)
    assert set(found.ratios) == set(found.seconds) == {"forward", "gradient"}
    assert all(t > 0 for work in found.seconds.values() for t in work.values())
    rich.print(found)
    said = capsys.readouterr().out
    assert "2 x 5 x 5, 12 -> 3 channels" in said and "max / conv" in said


def test_the_ops_cost_what_they_are():
    calls = bottleneck.sides(SMALL, "forward")
    counted = {op: multiply_adds(call) for op, call in calls.items()}
    places, outside = 2 * 5 * 5, 2 * 12 * 3
    assert counted["max"] == places * outside
    assert counted["depthwise"] == places * (outside + 9 * 3)
    assert counted["conv"] == places * (outside + 9 * 9)
    leaves = jax.tree.leaves(bottleneck.sides(SMALL, "gradient")["max"]())
    assert all(np.isfinite(leaf).all() for leaf in leaves)


def test_bad_sizes():
    with pytest.raises(ConfigError, match="turns=0"):
        bottleneck.Settings(turns=0)
