"""The study of domain-adversarial training: claims by all figures, choices of settings, probes."""

import importlib

import numpy as np
import pytest

from ffnlab.data import Labelled
from ffnlab.rule import Rule
from ffnlab.studies import dann_measure as measure
from ffnlab.studies.dann_measure import ALONE, BOTH, Apart, Carried
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.dann")


def carried(target, source=(1.0, 1.0), told=(0.5, 0.5), linear=(0.55, 0.55), fresh=(0.7, 0.7)):
    return Carried(*map(np.array, (source, target, told, linear, fresh)), models=None)


def moons(both, **alone):
    plain = {"told": (0.5, 0.5), "linear": (0.65, 0.65), "fresh": (0.85, 0.85)} | alone
    forms = (study.SHALLOW, study.EVERYTHING)
    return {form: {ALONE: carried((0.83, 0.82), **plain), BOTH: both} for form in forms}


def held(claims):
    return [claim.holds for claim in claims]


def test_moons_are_decided_by_every_seed():
    good = {"target": (0.95, 0.91)}
    assert held(study.moons_claims(moons(carried(**good)))) == [True] * 5
    for change, wrong in (
        ({"target": (0.95, 0.89)}, [0, 1]),
        ({"source": (0.97, 1.0)}, [0, 1]),
        ({"told": (0.63, 0.5)}, [2]),
        ({"linear": (0.66, 0.5)}, [3]),
        ({"fresh": (0.7, 0.85)}, [4]),
    ):
        found = held(study.moons_claims(moons(carried(**good | change))))
        assert found == [i not in wrong for i in range(5)], change
    close = moons(carried((0.95, 0.91)), linear=(0.65, 0.65))
    close[study.SHALLOW][ALONE] = carried((0.91, 0.82), linear=(0.65,) * 2, fresh=(0.85,) * 2)
    assert held(study.moons_claims(close))[:2] == [False, True]


def test_normals_are_decided_by_every_seed():
    far = lambda both: Apart(  # noqa: E731
        np.array([1.5, 1.6]), np.array([1.7, 1.6]), np.array(both), (np.ones(2), np.ones(2))
    )
    assert study.normals_claim(far([1.0, 1.3])).holds
    assert not study.normals_claim(far([1.0, 1.31])).holds


def test_pairs_are_decided_by_every_pair_and_seed():
    scores = {ALONE: [0.7, 0.72], BOTH: [0.75, 0.76]}
    found = cases(**{study.PHOTOGRAPHS: scores, "books to dvd": scores, "dvd to books": scores})
    far = {name: {ALONE: [1.5, 1.6], BOTH: [1.2, 1.3]} for name in found}
    claims = study.tuned_claims(found, far)
    assert held(claims) == [True] * 4
    for claim in (claims[0], claims[2]):
        assert_tuned(claim, ALONE, BOTH)
    worse = with_scores(found, "dvd to books", BOTH, [0.75, 0.72])  # no more than alone
    assert held(study.tuned_claims(worse, far)) == [True, True, False, True]
    nearer = far | {study.PHOTOGRAPHS: {ALONE: [1.5, 1.6], BOTH: [1.2, 1.6]}}
    assert held(study.tuned_claims(found, nearer)) == [True, False, True, True]


def test_sides_try_as_many_settings():
    for quick in (True, False):
        options = {"batch": 4, "steps": 1, "hidden": 0, "quick": quick}
        alone, both = measure.sides(lambda seed: None, **options)
        assert len(alone.grid) == len(both.grid)
        assert {s["strength"] for s in alone.grid} == {0.0}
        assert all(s["strength"] > 0 for s in both.grid)


def test_settings_are_chosen_on_the_way_back(monkeypatch):
    """The classes of the target are those that the state gives; its own are never seen."""
    seen = {}

    def learned(rule, model, rows, **options):
        seen["rows"] = rows
        return "back"

    monkeypatch.setattr(measure, "learned", learned)
    predict = lambda state, x: np.eye(2)[(np.asarray(x)[:, 0] > (state == "back")).astype(int)]  # noqa: E731
    rule = Rule("a rule", predict, predict, predict)
    side = measure.Side("a side", [{}], lambda setting: rule, lambda seed: None, 2, 1)
    source, target = np.zeros((2, 1), np.float32), np.float32([[-1], [1], [2]])
    held_out = Labelled(np.float32([[0.5], [2]]), np.array([0, 0], np.int32))
    back = measure.Back(source, target, held_out, side, 0)
    assert measure.score(rule, "there", back) == 0.5
    (x, y), other = seen["rows"]
    np.testing.assert_array_equal(x, target)
    np.testing.assert_array_equal(y, [0, 1, 1])
    np.testing.assert_array_equal(other, source)
    assert measure.score(rule, "there", held_out) == 0.0


def test_what_is_held_out_is_not_learned_from(monkeypatch):
    caught = {}
    keep = lambda sides, data, seeds, score: caught.update(data=data) or {}  # noqa: E731
    monkeypatch.setattr(measure.tuning, "compare", keep)
    x = np.arange(20, dtype=np.float32)[:, None]
    test = Labelled(np.ones((1, 1), np.float32), np.zeros(1, int))
    source, target = ((Labelled(x + s, np.zeros(20, int)), test) for s in (0, 100))
    side = measure.Side("a side", [{}], lambda setting: None, lambda seed: None, 2, 1)
    measure.pairs(source, target, [side], [3])
    data = caught["data"]
    (kept, unknown), back = data.train, data.validation
    assert data.test is test and isinstance(unknown, np.ndarray)
    assert len(kept.x) == len(unknown) == 16 and (unknown >= 100).all()
    assert sorted([*kept.x[:, 0], *back.held_out.x[:, 0]]) == list(range(20))
    assert not np.array_equal(unknown[:, 0] - 100, kept.x[:, 0])  # pairs of rows mean nothing


@pytest.mark.slow
def test_fresh_perceptrons_find_what_is_there():
    """Of domains alike a half, apart all; two members of one call."""
    random = np.random.default_rng(0)
    source = random.normal(size=(2, 120, 3)).astype(np.float32)
    target = source[:, ::-1] + np.float32([[[0]], [[6]]])
    found = measure.told_apart(source, target, seed=0)
    assert 0.3 < found[0] < 0.7 and found[1] > 0.98


def test_photographs_have_digits_of_their_own():
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (source, test), (target, other) = measure.photographs(0)
    assert source.x.shape[1:] == target.x.shape[1:] == (8, 8, 3)
    assert len(source.x) + len(target.x) == 1437 and len(test.x) + len(other.x) == 360
