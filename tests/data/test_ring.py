"""The finite world: what its label is, and what leaves it as it is."""

import numpy as np
import pytest

from ffnlab.data import ring
from ffnlab.errors import ConfigError


def test_every_input_is_there_once():
    world = ring()
    assert world.x.shape == (4096, 12) and world.x.dtype == np.float32
    numbers = world.x @ 2 ** np.arange(11, -1, -1)
    np.testing.assert_array_equal(numbers, np.arange(4096))
    assert world.y.mean() == pytest.approx(0.494, abs=1e-3)
    np.testing.assert_array_equal(world.p, world.y)


def test_turning_the_ring_leaves_the_label():
    world = ring()
    for turn in (1, 5):
        numbers = (np.roll(world.x, turn, axis=1) @ 2 ** np.arange(11, -1, -1)).astype(int)
        np.testing.assert_array_equal(world.y[numbers], world.y)


def test_soft_labels_follow_the_same_score():
    hard, soft = ring(), ring(3.0)
    np.testing.assert_array_equal(soft.p > 0.5, hard.y.astype(bool))
    steep = ring(300.0)
    assert np.abs(steep.p - hard.p).mean() < np.abs(soft.p - hard.p).mean()
    with pytest.raises(ConfigError, match="gain=0"):
        ring(0.0)
