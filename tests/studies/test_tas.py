"""The study of transformable architecture search on little data: claims, table, pictures."""

import importlib
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.data import Labelled
from ffnlab.layers import MLP
from ffnlab.learning import backprop
from ffnlab.losses import labelled
from ffnlab.studies import load
from ffnlab.studies import tas_decoder as decoder
from ffnlab.studies import tas_measure as measured
from ffnlab.studies.tuning import Splits
from ffnlab.testing import tiny

study = importlib.import_module("ffnlab.studies.tas")


def rows(count, seed):
    random = np.random.default_rng(seed)
    y = np.arange(count, dtype=np.int32) % 10
    x = np.eye(10, 64, dtype=np.float32)[y] + 0.3 * random.normal(size=(count, 64))
    return Labelled(x.astype(np.float32), y)


# Searches of a few steps need not meet their budget.
pytestmark = pytest.mark.filterwarnings("ignore:no step of the search met")
DATA = Splits(rows(60, 0), rows(20, 1), rows(20, 2))
TEXT = np.random.default_rng(0).integers(0, 64, 400).astype(np.int32)
TEXTS = decoder.Texts(TEXT, TEXT[:120], TEXT[::-1].copy())
PACE = decoder.Pace(3, 2, 2, 8, (1e-3, 1e-2), 4)
SETTINGS = study.Settings((0, 1), (3, 2), (0.03, 0.1), (20,), None)


def drawn(sizes, seed=0):
    return MLP(sizes, key=jax.random.key(seed))


@pytest.fixture(scope="module")
def made():
    """What might have been measured, without measuring."""
    cases = [(target, seed) for target in study.TARGETS for seed in SETTINGS.seeds]
    hidden = [(38, 38), (38, 38), (19, 25), (19, 25)]
    nets = [drawn((64, *w, 10)) for w in hidden]
    ratio = np.array([[measured.share(net.sizes) for net in nets]] * 3)
    widths = np.array([hidden] * 3)
    search = measured.Search(cases, ratio, ratio, widths, nets, 1e-6)

    def trained(networks):
        return measured.Trained(SETTINGS.rates, (0.8, 0.7), (0.9, 0.9), networks)

    names = itertools.product(study.TARGETS, (study.SEARCHED, study.RANDOM), (0.0, study.TEACHER))
    groups = {key: trained(nets[2:] if key[0] < 0.5 else nets[:2]) for key in names}
    whole = trained([drawn(study.WHOLE)] * 2)
    return study.Measured(search, groups, whole, {20: 40.81}, 0.0, {})


def test_smaller_networks_learn_as_members_of_the_whole_one_do():
    """Channels that are zero stay zero, and the others learn as if they were alone."""
    shape = (64, 5, 7, 10)
    rule = backprop(labelled, optax.sgd(0.1, momentum=0.9))
    alone = rule.init(MLP(shape, key=jax.random.key(4)), jax.random.key(0))
    wide = measured.networks_of([shape], [4])
    inside = rule.init(measured.member(wide, 0), jax.random.key(0))
    for _ in range(3):
        alone, inside = (rule.step(state, DATA.train)[0] for state in (alone, inside))
    again = measured.cut(inside.model, shape)
    assert again.sizes == list(shape)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone.model), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not np.any(inside.model.maps[0].weight.w[:, 5:])


def test_shapes_drawn_cost_as_much():
    shapes = [(64, 38, 38, 10), (64, 19, 25, 10)]
    for drawn, given in zip(measured.random_shapes(shapes, 3), shapes, strict=True):
        assert drawn != given
        assert measured.share(drawn) == pytest.approx(measured.share(given), rel=0.011)


@pytest.mark.slow
def test_what_is_measured():
    found = study.measure(DATA, TEXTS, SETTINGS)
    search = found.search
    assert search.cases == [(0.5, 0), (0.5, 1), (0.25, 0), (0.25, 1)]
    assert search.ratio.shape == search.expected.shape == (3, 4)
    for i, widths in enumerate(search.widths[-1]):
        assert search.ratio[-1, i] == pytest.approx(measured.share((64, *widths.tolist(), 10)))
    assert search.apart < 1e-5 and found.kept == 0
    assert found.counted[20] == pytest.approx(40.813184)
    assert set(found.groups) == {
        (t, s, w) for t in (0.5, 0.25) for s in ("searched", "random") for w in (0.0, 0.9)
    }
    for (target, shape, _), trained in found.groups.items():
        nets = trained.networks
        assert len(nets) == len(trained.test) == 2 and trained.rate in SETTINGS.rates
        if shape == "searched":
            assert [tuple(net.sizes) for net in nets] == search.shapes(target)
        x, y = jnp.asarray(DATA.test.x), DATA.test.y
        right = [float((np.asarray(net(x)).argmax(-1) == y).mean()) for net in nets]
        np.testing.assert_allclose(right, trained.test, atol=1e-6)


@pytest.mark.slow
def test_the_language_model_at_half_its_ffns():
    halves = decoder.at_half(tiny(), TEXTS, PACE, seed=0)
    assert list(halves) == ["whole", "searched", "FinerCut", "random"]
    assert halves["whole"].share == pytest.approx(1.0)
    assert decoder.hidden_of(halves["FinerCut"].model).count(0) == 1
    channels = [sum(decoder.hidden_of(halves[way].model)) for way in ("searched", "random")]
    assert abs(channels[0] - channels[1]) <= 0.01 * channels[0] + 1
    for way in ("searched", "FinerCut", "random"):
        half = halves[way]
        assert half.share == pytest.approx(sum(decoder.hidden_of(half.model)) / 96)
        assert half.rate in PACE.rates and len(half.tried) == 2
    claim = study.half_claim(halves, PACE)
    assert f"FinerCut {halves['FinerCut'].rate:g}" in claim.evidence
    assert "3 of 3 chosen at an end of those tried" in claim.evidence
    others = [halves[way].bits for way in ("FinerCut", "random")]
    assert claim.holds == (halves["searched"].bits <= min(others))


def test_claims_are_decided_by_what_was_measured(made):
    claims = study.claims_of(made, SETTINGS)
    assert len(claims) == 5 and all(claim.holds for claim in claims)
    assert "4 of 4 chosen at an end of those tried" in claims[2].evidence
    assert not study.count_claim({20: 41.0}).holds
    assert not study.own_claim(made._replace(kept=1e-3), 2).holds
    ours, theirs = (study.SEARCHED, study.TEACHER), [(study.RANDOM, 0.0), (study.RANDOM, 0.9)]

    def holds(side, *test):
        key = 0.25, *side
        groups = {**made.groups, key: made.groups[key]._replace(test=test)}
        given = made._replace(groups=groups), SETTINGS
        return study.side_claim("a", "b", ours, theirs, *given).holds

    assert holds(ours, 0.9, 0.9) and holds(ours, 0.89, 0.901) and not holds(ours, 0.89, 0.899)
    for side in theirs:
        assert not holds(side, 0.9, 0.92)
    nets = [*made.search.networks[:-1], drawn(study.WHOLE)]
    assert not study.budget_claim(made.search._replace(networks=nets), (0, 1)).holds
    nets[-1] = drawn((64, 4, 4, 10))  # well below its budget
    assert not study.budget_claim(made.search._replace(networks=nets), (0, 1)).holds


def test_the_study_writes_its_result_and_pictures(made, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "measure", lambda *_: made)
        patch.setattr(study.Settings, "of", lambda quick, seed: SETTINGS)
        result = load("tas").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["pictures"] == ["search.png", "accuracy.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in saved["pictures"])
    names = [row["network"] for row in saved["table"]]
    assert names[:2] == ["ResNet-20", "whole"] and "0.25 searched + teacher" in names
    assert {"MACs", "bytes", "latency ms", "accuracy", "shape"} <= saved["table"][-1].keys()
    assert len(result.claims) == 5


def test_both_forms_have_the_seeds_of_the_card():
    quick, full = (study.Settings.of(form, 0) for form in (True, False))
    assert len(quick.seeds) == 3 and len(full.seeds) == 5
    assert quick.pace is None and full.pace is not None and full.depths == (20, 32, 56, 110, 164)
