"""The study of S-Mamba: claims by all seeds, windows without the future, baselines that learn."""

import importlib

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree
from ffnlab.layers import Mamba
from ffnlab.studies import s_mamba_measure as measure
from ffnlab.studies.s_mamba_measure import MAMBA, NO_MAMBA, Early, Plain
from ffnlab.studies.tuning import Splits
from tuned import assert_tuned, cases

study = importlib.import_module("ffnlab.studies.s_mamba")
PLAIN = Plain(last=1.0, own=0.5, joint=0.3)


def held(ours, other=(0.5, 0.5), plain=PLAIN):
    found = cases(lagged={MAMBA: list(ours), NO_MAMBA: list(other)})["lagged"]
    claims = study.lagged_claims(found, plain)
    assert_tuned(claims[0], MAMBA, NO_MAMBA)
    return [claim.holds for claim in claims]


def test_lagged_series_are_judged_by_every_seed():
    assert held((0.2, 0.25)) == [True, True, True]
    assert held((0.2, 0.26)) == [True, False, True]
    assert held((0.2, 0.2), other=(0.5, 0.33)) == [False, True, True]
    assert held((0.2, 0.2), plain=PLAIN._replace(joint=0.2)) == [True, True, False]
    assert held((0.2, 0.2), plain=PLAIN._replace(own=0.19)) == [True, True, False]


def test_etth1_is_judged_by_every_seed():
    real = lambda *errors: [(Early(e, [1.0], 3), PLAIN) for e in errors]  # noqa: E731
    holds = lambda *errors: [c.holds for c in study.etth1_claims(real(*errors))]  # noqa: E731
    assert holds(0.386, 0.395) == [True, False]
    assert holds(0.386, 0.397) == [False, False]
    assert holds(0.29, 0.29) == [False, True]
    assert study.etth1_claims([]) == []


def test_scaling_and_cost_have_limits():
    assert study.scaling_claim(1e-4).holds and not study.scaling_claim(1.1e-4).holds
    assert study.cost_claim({MAMBA: 2.3, "attention": 3.0}).holds
    assert not study.cost_claim({MAMBA: 2.4, "attention": 3.0}).holds
    assert not study.cost_claim({MAMBA: 2.3, "attention": 2.2}).holds
    growth = measure.cost_growth()
    assert growth[MAMBA] == pytest.approx(2, rel=0.01) and 2.5 < growth["attention"] < 4


def some(seed, count, joined):
    """Windows of two series; what follows the first one is what the second one was."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 6, 2)).astype(np.float32)
    y = np.stack([x[:, 3:, 1] if joined else 2 * x[:, :3, 0], 2 * x[:, :3, 1]], -1)
    return {"x": x}, y


def test_linear_maps_find_what_is_linear():
    of = lambda joined: measure.plain(Splits(*(some(s, 60, joined) for s in range(3))))  # noqa: E731
    alone, both = of(False), of(True)
    assert alone.own < 1e-4 and alone.joint < 1e-2
    assert both.joint < 1e-2 < 0.4 < both.own
    inputs, y = some(2, 60, False)
    assert alone.last == pytest.approx(float(np.mean((inputs["x"][:, -1:] - y) ** 2)), rel=1e-5)


def test_nothing_of_mamba_is_left_or_learned():
    model = measure.without(3)
    for _, node in tree.walk(model):
        if isinstance(node, Mamba):
            assert not np.asarray(node.output.weight.dense()).any()
    kept = tree.trained(model, tree.where(measure.no_mamba))[0]
    paths = [path for path, leaf in tree.walk(kept) if hasattr(leaf, "shape")]
    assert paths and not any("forward" in path or "reverse" in path for path in paths)
    np.testing.assert_array_equal(model.embed.weight.dense(), measure.drawn(3).embed.weight.dense())


def test_errors_are_of_all_windows(monkeypatch):
    model = measure.drawn(0)
    random = np.random.default_rng(0)
    x, y = (random.normal(size=(7, n, 3)).astype(np.float32) for n in (48, 12))
    wanted = float(np.mean((np.asarray(model(jnp.asarray(x))) - y) ** 2))
    for size in (3, 7, 512):
        monkeypatch.setattr(measure, "AT_ONCE", size)
        assert measure.error(model, ({"x": x}, y)) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.slow
def test_sides_learn_at_their_rates():
    data = measure.lagged(0)
    few = Splits(*(({"x": part[0]["x"][:64]}, part[1][:64]) for part in data))
    found = measure.on_lagged(few, [0, 1], steps=20, rates=(1e-3, 3e-3))
    for side in found.values():
        assert len(side.scores) == 2 and [s["rate"] for s, _ in side.tried] == [1e-3, 3e-3]
        assert side.setting["rate"] == min(side.tried, key=lambda pair: pair[1])[0]["rate"]
    assert found[NO_MAMBA].parameters < found[MAMBA].parameters
    for net in found[NO_MAMBA].states:
        assert not np.asarray(net.layers[0].forward.output.weight.dense()).any()
