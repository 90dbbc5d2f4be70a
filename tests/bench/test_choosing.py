"""Tests of ffnlab.bench.choosing on small models; none is timed."""

import jax.numpy as jnp
import pytest
import rich

from ffnlab.bench import choosing
from ffnlab.errors import ConfigError
from ffnlab.routing import BIG

SMALL = choosing.Settings(width=16, hidden=32, layers=2, tokens=2, turns=2, oracle_layers=2)


def test_both_sides_and_the_oracle_are_timed_and_told(capsys):
    found = choosing.compare(SMALL)
    assert all(t > 0 for t in found.seconds.values()) and found.ratio > 0
    rich.print(found)
    assert "small / big" in capsys.readouterr().out
    assert "FFNs of 32 and 2" in found.about and "4 patterns" in found.about


@pytest.mark.parametrize("choice", [BIG, BIG + 1])
def test_routers_choose_as_told(choice):
    model = choosing.decoder(SMALL, choice)
    _, outputs = model.run(jnp.array([[1, 2, 3]]))
    assert (outputs.reports["ffn"].chosen == choice).all()


def test_bad_sizes():
    with pytest.raises(ConfigError, match="turns=0"):
        choosing.Settings(turns=0)
