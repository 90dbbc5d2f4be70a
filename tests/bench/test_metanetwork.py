"""Tests of ffnlab.bench.metanetwork on small nets; none is timed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich

from ffnlab.bench import metanetwork
from ffnlab.clock import Times
from ffnlab.errors import ConfigError
from ffnlab.pruning.meta import layout_of, lesson
from ffnlab.testing import equal

SMALL = metanetwork.Settings(
    rows=4, images=2, layers=1, width=2, sizes=(4, 3, 2), blocks=1, turns=1
)


class Fake:
    """A step that notes that it was taken."""

    def __init__(self, net, name, taken):
        self.batch = lesson(net, (jnp.ones((2, 4)), jnp.zeros(2, int)))
        self.name, self.taken = name, taken

    def __call__(self):
        self.taken.append(self.name)
        return jnp.ones(())


def test_both_steps_of_a_net_are_timed_in_turns_and_told(capsys, monkeypatch):
    """Turns begin with either step, and a ratio is of one turn."""
    case, taken = metanetwork.cases(SMALL)["mlp"], []
    monkeypatch.setattr(metanetwork, "cases", lambda settings: {"mlp": case})
    monkeypatch.setattr(
        metanetwork, "steps", lambda settings, net, *rest: [Fake(net, n, taken) for n in "mo"]
    )
    clock = metanetwork.in_turns

    def in_turns(calls, turns, *, label):
        clock(calls, turns, label=label)
        return Times({"meta": np.array([8.0, 3.0, 4.0]), "own": np.array([1.0, 1.0, 2.0])})

    monkeypatch.setattr(metanetwork, "in_turns", in_turns)
    found = metanetwork.compare(dataclasses.replace(SMALL, turns=2))
    assert "".join(taken) == "mo" + "mo" + "om"
    assert found.seconds == {"mlp": (4.0, 1.0)} and found.ratios == {"mlp": 3.0}
    assert found.edges == {"mlp": 4 * 3 + 3 * 2}
    rich.print(found)
    assert "meta step ms" in capsys.readouterr().out and "4 rows" in found.about


def test_what_runs_is_a_step_on_each_s_own_network():
    net, x, numbers = metanetwork.cases(SMALL)["mlp"]
    ours, plain = metanetwork.steps(SMALL, net, x, numbers)
    for running, metric in ((ours, "penalty"), (plain, "accuracy")):
        before = jax.tree.map(lambda leaf: leaf.copy(), running.state.model)
        metrics, state = running()
        assert metric in metrics and int(state.step) == 1
        assert not equal(before, state.model)
    assert equal(ours.batch.model, net)
    resnet, images, numbers = metanetwork.cases(SMALL)["resnet"]
    assert images.shape == (2, 32, 32, 3) and numbers == (8, layout_of(resnet).edge_numbers)


def test_bad_sizes():
    with pytest.raises(ConfigError, match="turns=0"):
        metanetwork.Settings(turns=0)
