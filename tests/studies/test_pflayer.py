"""The study of parameter-free layers: how its claims are decided, and its quick form."""

import dataclasses

import jax
import numpy as np
import pytest

from ffnlab.bench import bottleneck
from ffnlab.data import Labelled
from ffnlab.layers import Attention, EffLayer
from ffnlab.models import ResNet
from ffnlab.studies import pflayer, tuning
from ffnlab.studies.pflayer import ATTENTION, MIXED, NETWORK, OPS, Reached, Sizes


def side(*scores):
    return Reached(100, 1000, 3e-3, {3e-3: 0.9}, scores)


GOOD = {
    "conv": side(0.95, 0.94),
    "depthwise": side(0.90, 0.91),
    "max": side(0.90, 0.93),
    "average": side(0.9, 0.9),
    "identity": side(0.70, 0.70),
    ATTENTION: side(0.90, 0.92),
    MIXED: side(0.89, 0.93),
}
SIZES = Sizes([0, 1], (3e-3,))


def held(**changes):
    found = GOOD | {name.replace("_", " "): side(*scores) for name, scores in changes.items()}
    return [claim.holds for claim in pflayer.learned_claims(found, SIZES)]


def test_each_claim_is_decided_by_its_own_sides():
    assert held() == [True] * 4
    assert held(max=(0.95, 0.87)) == [False, True, True, True], "one seed more than .06 below"
    assert held(identity=(0.7, 0.79)) == [True, False, True, True], "one seed within .15"
    assert held(depthwise=(0.90, 0.94)) == [True, True, False, True], "of means"
    assert held(attention_and_max=(0.87, 0.93)) == [True, True, True, False]


def test_counts_are_those_of_the_paper():
    parameters, products = pflayer.counted_claims()
    assert parameters.holds and "14,232,232" in parameters.ours and "23,819,368" in parameters.ours
    assert products.holds and products.ours.endswith("0.55, 0.63")


def test_time_is_of_the_bench(monkeypatch):
    ratios = {"forward": 1.1, "gradient": 0.9}
    found = bottleneck.Comparison({}, ratios, {}, "here")
    monkeypatch.setattr(bottleneck, "compare", lambda settings: found)
    claim = pflayer.time_claim(3)
    assert claim.timed and not claim.holds and "1.10 of its time" in claim.ours


def test_networks_differ_in_what_mixes_alone():
    made = {name: make(key=jax.random.key(0)) for name, make in pflayer.transformers().items()}
    assert [type(block.attn) for block in made[ATTENTION].layers] == [Attention] * 4
    assert [type(block.attn) for block in made[MIXED].layers] == [Attention, EffLayer] * 2
    for op in OPS:
        block = jax.eval_shape(
            lambda key, op=op: ResNet(dataclasses.replace(NETWORK, op=op), key=key),
            jax.random.key(0),
        ).residuals[0]
        assert block.shortcut is None and block.spatial.op == op


def test_the_best_rate_is_chosen_on_validation_rows_and_tested(monkeypatch):
    """Accuracies of two seeds at three rates, in the order in which members stand."""
    validation = np.array([0.5, 0.6, 0.9, 0.7, 0.1, 0.9])
    test = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr(pflayer, "learned", lambda *a, **k: None)
    monkeypatch.setattr(
        pflayer, "accuracies", lambda rule, state, rows: validation if len(rows.y) == 3 else test
    )
    x = lambda n: Labelled(np.zeros((n, 8, 8, 1), np.float32), np.zeros(n, np.int32))  # noqa: E731
    data = tuning.Splits(x(4), x(3), x(2))
    make = lambda *, key: ResNet(dataclasses.replace(NETWORK, blocks=(1,)), key=key)  # noqa: E731
    found = pflayer.reached(make, data, Sizes([0, 1], (1e-3, 3e-3, 1e-2)))
    assert found.rate == 3e-3 and found.scores == [0.3, 0.4]
    assert found.validation == pytest.approx({1e-3: 0.55, 3e-3: 0.8, 1e-2: 0.5})


@pytest.mark.slow
def test_the_quick_form(tmp_path):
    result = pflayer.run(out=tmp_path, quick=True)
    assert len(result.claims) == 7 and (tmp_path / "accuracy.png").is_file()
