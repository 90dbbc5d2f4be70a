"""Tests of ffnlab.bench.routing on small layers; none is timed."""

import jax
import numpy as np
import pytest
import rich

from ffnlab.bench import routing
from ffnlab.errors import ConfigError
from ffnlab.models.cost import multiply_adds

SMALL = routing.Settings(tokens=12, width=8, hidden=6, experts=4, turns=2)


def test_all_sides_are_timed_and_told(capsys):
    found = routing.compare(SMALL)
    assert set(found.ratios) == set(found.seconds) == {"forward", "gradient"}
    assert all(t > 0 for work in found.seconds.values() for t in work.values())
    rich.print(found)
    said = capsys.readouterr().out
    assert "12 tokens x 8 x 6" in said and "gradient" in said and "products" in said


@pytest.mark.parametrize(("work", "times"), [("forward", 1), ("gradient", 3)])
def test_all_sides_have_equal_products_but_for_the_router(work, times):
    calls = routing.sides(SMALL, work)
    counted = {side: multiply_adds(call) for side, call in calls.items()}
    expected = times * 12 * 2 * 3 * 8 * 6
    assert counted["dense"] == counted["products"] == expected
    assert counted["routed"] == expected + times * 12 * 8 * 4
    y = jax.tree.leaves(calls["routed"]())
    assert all(np.isfinite(part).all() for part in y)


def test_bad_sizes():
    with pytest.raises(ConfigError, match="k=9 of experts=8"):
        routing.compare(routing.Settings(k=9))
    with pytest.raises(ValueError, match="tokens"):
        routing.Settings(tokens=0)
