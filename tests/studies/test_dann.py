"""The study of domain-adversarial training: claims by all figures, choices of settings, probes."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import Labelled, moons
from ffnlab.layers import MLP
from ffnlab.learning import features_of
from ffnlab.rule import Rule
from ffnlab.studies import dann_measure as measure
from ffnlab.studies import dann_moons
from ffnlab.studies.dann_measure import Apart
from ffnlab.studies.dann_moons import ALONE, BOTH, Carried
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.dann")


def carried(target, source=(1.0, 1.0), told=(0.5, 0.5), linear=(0.55, 0.55), fresh=(0.7, 0.7)):
    return Carried(*map(np.array, (source, target, source, told, linear, fresh)), models=None)


def on_moons(both, **alone):
    plain = {"told": (0.5, 0.5), "linear": (0.65, 0.65), "fresh": (0.85, 0.85)} | alone
    forms = (study.SHALLOW, study.EVERYTHING)
    return {form: {ALONE: carried((0.83, 0.82), **plain), BOTH: both} for form in forms}


def held(claims):
    return [claim.holds for claim in claims]


def test_moons_are_decided_by_every_seed():
    good = {"target": (0.95, 0.91)}
    assert held(study.moons_claims(on_moons(carried(**good)))) == [True] * 5
    for change, wrong in (
        ({"target": (0.95, 0.89)}, [0, 1]),
        ({"source": (0.97, 1.0)}, [0, 1]),
        ({"told": (0.63, 0.5)}, [2]),
        ({"linear": (0.66, 0.5)}, [3]),
        ({"fresh": (0.7, 0.85)}, [4]),
    ):
        found = held(study.moons_claims(on_moons(carried(**good | change))))
        assert found == [i not in wrong for i in range(5)], change
    close = on_moons(carried((0.95, 0.91)), linear=(0.65, 0.65))
    close[study.SHALLOW][ALONE] = carried((0.91, 0.82), linear=(0.65,) * 2, fresh=(0.85,) * 2)
    assert held(study.moons_claims(close))[:2] == [False, True]


def test_deep_moons_are_tuned_alike():
    for quick, count in ((True, 1), (False, 8)):
        found = dann_moons.grids(quick)
        assert {len(grid) for grid in found.values()} == {count}
        assert {s["strength"] for s in found[ALONE]} == {0.0}
        assert all(s["strength"] > 0 for s in found[BOTH])
        for side, strength in ((ALONE, 0.0), (BOTH, 6.0)):
            assert dann_moons.published(strength) in found[side], "both forms know the authors'"
    assert {s["hidden"] for s in found[BOTH]} == {0, 100}, "of both kinds of the authors"


def test_settings_of_moons_are_chosen_without_a_class_of_the_target(monkeypatch):
    """The least of error on unseen rows of the source + half the A-distance, of the first seed."""

    def ran(seeds, form, settings, steps):
        found = {}
        for s in settings:
            hidden, strength = s["hidden"], s["strength"]
            unseen = 0.5 if hidden == 0 else 0.9 if strength == 3 else 1.0
            near = 0.5 if hidden == 0 else 0.52 if strength == 3 else 0.6 + strength / 100
            each = {"linear": (near, 0.5), "target": (near, 1.0)}
            found[f"{hidden:g} {strength:g}"] = carried(**each)._replace(
                unseen=np.array([unseen, 1.0])
            )
        return found

    monkeypatch.setattr(dann_moons, "ran", ran)
    tried = dann_moons.deep([0, 1], study.FEATURES, BOTH, steps=1, quick=False)
    found = dann_moons.least_bound(tried)
    assert found.setting == "100 3" and len(found.tried) == 8
    bounds = {f"0 {strength}": 0.5 for strength in (0.3, 1, 3, 6)}
    bounds |= {"100 0.3": 0.206, "100 1": 0.22, "100 3": 0.14, "100 6": 0.32}
    assert found.tried == pytest.approx(bounds)
    both = study.chosen_text(found._replace(setting="alone", tried={"this": 1.0}), found)
    assert "best of 8 settings" in both and "chosen alone, and 100 3" in both


def test_published_settings_are_judged_in_both_forms(monkeypatch):
    """The quick form judges nothing that the full one does not."""
    names = {}
    for quick in (True, False):
        tried = {
            side: {
                " ".join(f"{k} {v:g}" for k, v in s.items()): carried((0.9, 0.9))
                for s in dann_moons.grids(quick)[side]
            }
            for side in (ALONE, BOTH)
        }
        monkeypatch.setattr(study, "deep", lambda seeds, form, side, tried=tried, **_: tried[side])
        monkeypatch.setattr(study, "shallow", lambda seeds, passes: tried_one())
        forms = [study.FEATURES] if quick else [study.FEATURES, study.EVERYTHING]
        on = study.on_moons([0, 1], forms, steps=1, quick=quick)
        names[quick] = [claim.claim for claim in study.moons_claims(on)]
        assert on[study.FEATURES][BOTH].setting == "hidden 100 strength 6 rate 0.2"
        assert on[study.FEATURES][ALONE].setting == "hidden 100 strength 0 rate 0.2"
    assert set(names[True]) < set(names[False]) and len(names[False]) == 8


def tried_one():
    return {ALONE: carried((0.8, 0.8)), BOTH: carried((0.9, 0.9))}


def test_members_of_moons_are_scored_each_on_its_own(monkeypatch):
    """Against one network at a time."""
    monkeypatch.setattr(dann_moons, "told_apart", lambda *features, seed: np.zeros(2))
    keys = jax.random.split(jax.random.key(3))
    models = dann_moons.stacked([dann_moons.network(key) for key in keys])
    domain = dann_moons.stacked([MLP((15, 1), key=key) for key in keys])
    predict = lambda models, x: jax.vmap(lambda m, x: m(x))(models, x)  # noqa: E731
    rule = Rule("a rule", predict, predict, predict, model=lambda models: models)
    for is_high in (True, False):
        found = dann_moons.carried(rule, models, domain, [0, 4], source_is_high=is_high)
        for i, seed in enumerate((0, 4)):
            net, tells = jax.tree.map(lambda leaf, i=i: leaf[i], (models, domain))
            here, there = moons(seed)
            unseen = moons(dann_moons.OTHERS + seed)[0]
            for name, part in (("source", here), ("target", there), ("unseen", unseen)):
                right = (np.asarray(net(jnp.asarray(part.x))).argmax(-1) == part.y).mean()
                assert getattr(found, name)[i] == pytest.approx(right)
            logits = [np.asarray(tells(features_of(net, jnp.asarray(p.x)))) for p in (here, there)]
            high = [(z > 0).mean() for z in logits]
            told = (high[0] + 1 - high[1]) / 2 if is_high else (1 - high[0] + high[1]) / 2
            assert found.told[i] == pytest.approx(told, abs=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("side", [ALONE, BOTH])
def test_moons_of_two_seeds_are_run(side):
    tried = dann_moons.deep([0, 1], study.FEATURES, side, steps=500, quick=True)
    found = dann_moons.least_bound(tried)
    assert list(tried) == [found.setting] and found.target.shape == (2,)
    np.testing.assert_allclose(found.bound[0], found.tried[found.setting])
    assert dann_moons.as_published(tried, side).tried == {}
    assert jax.tree.leaves(found.models)[0].shape[0] == 2


def test_members_share_the_batches_of_their_seed():
    batches = dann_moons.AtOnce([lambda p: (np.full(2, p),), lambda p: (np.full(2, -p),)], 3)
    np.testing.assert_array_equal(batches(5)[0][:, 0], [5, -5] * 3)


def test_normals_are_shifted_where_the_class_is_not():
    source, target = measure.normals(0, n=4000)
    np.testing.assert_allclose(target.x.mean(0) - source.x.mean(0), [0, 2, -1, 0], atol=0.1)
    for part in (source, target):
        np.testing.assert_array_equal(part.y, part.x[:, 0] > 0)


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
        rates = (1e-3, 3e-3) if quick else (3e-5, 1e-4, 3e-4)
        alone, both = measure.sides(lambda seed: None, rates, **options)
        assert {s["rate"] for s in both.grid} == set(rates) <= {s["rate"] for s in alone.grid}
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
    found = dann_moons.told_apart(source, target, seed=0)
    assert 0.3 < found[0] < 0.7 and found[1] > 0.98


def test_photographs_have_digits_of_their_own():
    pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    (source, test), (target, other) = measure.photographs(0)
    assert source.x.shape[1:] == target.x.shape[1:] == (8, 8, 3)
    assert len(source.x) + len(target.x) == 1437 and len(test.x) + len(other.x) == 360
