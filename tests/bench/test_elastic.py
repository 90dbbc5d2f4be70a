"""Tests of ffnlab.bench.elastic on small models; none is timed."""

import numpy as np
import pytest
import rich

from ffnlab.bench import elastic
from ffnlab.clock import Times
from ffnlab.errors import ConfigError
from tests.often import often

SMALL = elastic.Settings(width=8, rows=4, drawn=1, turns=2)


@pytest.mark.parametrize("name", often(["MLP", "FFN blocks"], "MLP"))
def test_both_steps_are_timed_and_told_by_the_network(name, capsys, monkeypatch):
    told, every = [], elastic.models(SMALL)
    assert set(every) == {"MLP", "FFN blocks"}
    monkeypatch.setattr(elastic, "models", lambda settings: {name: every[name]})

    def in_turns(calls, turns, *, label):
        told.extend(set(call()) for call in calls.values())
        return Times({"plain": np.full(turns, 2.0), "elastic": np.full(turns, 9.0)})

    monkeypatch.setattr(elastic, "in_turns", in_turns)
    found = elastic.compare(SMALL)
    assert found.ratios == {name: 1.5}  # nine halves, three networks
    assert found.seconds[name] == {"plain": 2.0, "elastic": 9.0}
    assert ["smallest" in metrics for metrics in told] == [False, True]
    rich.print(found)
    assert "3 networks a step" in capsys.readouterr().out.replace("\n", " ")


def test_steps_go_on():
    model, depths = elastic.models(SMALL)["MLP"]
    call = elastic.steps(SMALL, model, depths)["elastic"]
    losses = [float(call()["loss"]) for _ in range(3)]
    assert losses[2] < losses[0]


def test_bad_sizes():
    for options, said in (({"turns": 0}, "turns=0"), ({"width": 3}, "width=3")):
        with pytest.raises(ConfigError, match=said):
            elastic.Settings(**options)
    with pytest.raises(ConfigError, match="drawn=8"):
        elastic.compare(elastic.Settings(width=8, rows=4, drawn=8, turns=1))
