"""Tests of ffnlab.bench.metanetwork on small nets; none is timed."""

import jax
import jax.numpy as jnp
import pytest
import rich

from ffnlab.bench import metanetwork
from ffnlab.errors import ConfigError
from ffnlab.pruning.meta import layout_of, lesson
from ffnlab.testing import equal

SMALL = metanetwork.Settings(
    rows=4, images=2, layers=1, width=2, sizes=(4, 3, 2), blocks=1, turns=1
)


class Fake:
    """A step that does nothing."""

    def __init__(self, net):
        self.batch = lesson(net, (jnp.ones((2, 4)), jnp.zeros(2, int)))

    def __call__(self):
        return jnp.ones(())


def test_both_steps_of_a_net_are_timed_and_told(capsys, monkeypatch):
    case = metanetwork.cases(SMALL)["mlp"]
    monkeypatch.setattr(metanetwork, "cases", lambda settings: {"mlp": case})
    monkeypatch.setattr(metanetwork, "steps", lambda settings, net, *rest: [Fake(net)] * 2)
    found = metanetwork.compare(SMALL)
    assert set(found.seconds) == set(found.ratios) == {"mlp"}
    assert all(t > 0 for times in found.seconds.values() for t in times)
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
