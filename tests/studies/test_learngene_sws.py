"""The Learngene study: claims by all depths and seeds, and what its sides begin with."""

import importlib

import jax
import numpy as np
import pytest

from ffnlab.models import Shared
from ffnlab.studies.digit_images import digit_images
from tuned import assert_tuned, cases, reached, with_scores

study = importlib.import_module("ffnlab.studies.learngene_sws")
SIZES = study.Sizes((3, 6), (1e-3, 1e-2), 4, 4, 2, 3, (0,))


def forms(tuned, scratch, few, turned):
    names = (study.TUNED, study.SCRATCH, study.EQUAL, study.REVERSED)
    return {name: [s, s] for name, s in zip(names, (tuned, scratch, few, turned), strict=True)}


def test_claims_are_decided_by_every_depth_and_seed():
    found = cases(three=forms(0.95, 0.7, 0.3, 0.3), six=forms(0.93, 0.75, 0.2, 0.4))
    few = lambda found: study.ahead_claim(found, study.EQUAL, "as many steps")  # noqa: E731
    many = lambda found: study.ahead_claim(found, study.SCRATCH, "a tenth")  # noqa: E731
    order = study.order_claim
    for claim, name in ((few, study.EQUAL), (many, study.SCRATCH), (order, study.REVERSED)):
        assert claim(found).holds
        assert_tuned(claim(found), study.TUNED, name)
    for case, name, scores, claim in (
        ("six", study.SCRATCH, [0.7, 0.79], many),
        ("three", study.EQUAL, [0.3, 0.81], few),
        ("six", study.REVERSED, [0.2, 0.64], order),
        ("three", study.TUNED, [0.95, 0.4], few),
    ):
        assert not claim(with_scores(found, case, name, scores)).holds
    first = {study.TEACHER: reached([0.95, 0.97]), study.AUXILIARY: reached([0.93, 0.94])}
    assert study.close_claim(first).holds
    assert not study.close_claim({**first, study.AUXILIARY: reached([0.93, 0.92])}).holds
    assert not study.cost_claim(SIZES).holds
    cheap = study.Sizes((3, 6, 9), (1e-3,), 10, 10, 1, 200, (0,))
    assert study.cost_claim(cheap).holds


def test_sides_begin_where_they_say():
    auxiliary = {3: study.shared(3)}
    assert isinstance(auxiliary[3].layers, Shared)
    scratch, few, tuned, turned = study.sides(6, auxiliary, SIZES)
    assert [s.steps for s in (scratch, few, tuned, turned)] == [3, 2, 2, 2]
    stages = auxiliary[3].layers.stages
    weight = lambda block: np.asarray(block.ffn.up.weight.dense())  # noqa: E731
    for side, order in ((tuned, (0, 0, 1, 1, 2, 2)), (turned, (2, 2, 1, 1, 0, 0))):
        for block, stage in zip(side.model(3).layers, order, strict=True):
            np.testing.assert_array_equal(weight(block), weight(stages[stage]))
    first, second = (weight(side.model(3).layers[0]) for side in (scratch, few))
    np.testing.assert_array_equal(first, second)


@pytest.mark.slow
def test_the_auxiliary_network_learns_the_teachers_scores(monkeypatch):
    seen = []

    def spy(sides, data, seeds, **options):
        seen.append((sides[0], data))
        model = sides[0].model(0)
        rule = sides[0].rule(sides[0].grid[0])
        state = rule.init(model, jax.random.key(0))
        return {sides[0].name: reached([0.9], states=(state,), rule=rule)}

    monkeypatch.setattr(study.tuning, "compare", spy)
    data = digit_images(0)
    found = study.teaching(data, SIZES)
    assert list(found) == [study.TEACHER, study.AUXILIARY]
    (_, plain), (side, taught) = seen
    teacher = study.learned(found, study.TEACHER, 0)
    want = study.forward(teacher, taught.train.inputs[:3])
    np.testing.assert_allclose(taught.train.logits[:3], want, atol=1e-5)
    assert len(teacher.layers) == study.TEACHER_LAYERS and plain.train is data.train
    assert taught.validation is data.validation and isinstance(side.model(0).layers, Shared)


def test_a_run_that_diverged_is_said():
    with pytest.raises(RuntimeError, match="auxiliary diverged with seed 0"):
        study.learned({study.AUXILIARY: reached([0.1], states=(None,))}, study.AUXILIARY, 0)
