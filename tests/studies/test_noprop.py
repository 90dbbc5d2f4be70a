"""The NoProp study on little data: its claims, its table, its picture."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.learning import NoPropNet, NoPropOptions, NoPropState, noprop
from ffnlab.studies import load, tuning
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.noprop")


def test_exact_claims_hold():
    for claim in (study.algebra_claim(), study.ode_claim(study.ode_errors())):
        assert claim.holds, claim
    claim = study.locality_claim(0)
    assert claim.holds and claim.ours.startswith("0 of 90 "), claim


def test_claims_are_decided_by_all_figures():
    sides = dict.fromkeys(study.THROUGH, [0.99] * 2)
    sides |= {study.OURS: [0.98] * 2, study.NOISY: [0.975] * 2}
    found = cases(clusters=sides)
    claims = study.accuracy_claims(found)
    assert [claim.holds for claim in claims] == [True, True]
    assert_tuned(claims[0], study.OURS, study.NOISY, *study.THROUGH)
    for name in study.THROUGH:
        better = with_scores(found, "clusters", name, [0.99, 0.999])
        assert study.accuracy_claims(better)[0].holds is False, "as good as each of them"
    for name in (study.OURS, study.NOISY):
        worse = with_scores(found, "clusters", name, [0.98, 0.96])
        assert [c.holds for c in study.accuracy_claims(worse)] == [False, False]
    found["clusters"] |= cases(a=dict.fromkeys(study.OTHERS, [0.95] * 2))["a"]
    assert [c.holds for c in study.accuracy_claims(found)] == [True, True, True]
    assert_tuned(study.accuracy_claims(found)[2], *study.OTHERS)
    worse = with_scores(found, "clusters", "flow", [0.95, 0.89])
    assert study.accuracy_claims(worse)[2].holds is False


def test_rivals_have_as_many_parameters():
    """The same blocks have the very same; the plain network differs by less than .5 %."""
    data = tuning.splits(gaussian_clusters(0, train=50, test=10))
    sides = {side.name: side for side in study.sides(data, 1, quick=False)}
    sizes = {name: tuning.numbers(side.model(0)) for name, side in sides.items()}
    assert sizes[study.OURS] == sizes[study.THROUGH[0]] == 439_350
    assert abs(sizes[study.THROUGH[1]] / 439_350 - 1) < 0.005
    assert sizes[study.THROUGH[2]] == 26_122 and study.mlp_numbers(64, 128, 128, 10) == 26_122
    assert {len(side.grid) for side in sides.values()} == {5}


def test_the_chain_trained_through_is_the_one_that_noprop_runs(key):
    """From the same first latent, it gives NoProp's scores; and its blocks all get a gradient."""
    model = NoPropNet(5, 3, key=key, hidden=6, blocks=study.BLOCKS)
    x = jax.random.normal(jax.random.key(1), (7, 5))
    model.out.w = model.out.replace(jax.tree.map(jnp.ones_like, model.out.weight)).w
    state = NoPropState(model, (), jax.random.key(2), jnp.int32(0))
    scores = noprop(NoPropOptions()).predict(state, x)
    start = jax.random.normal(jax.random.split(jax.random.key(2))[0], (7, 3))
    np.testing.assert_allclose(study.chained(model, x, start), scores, rtol=1e-5)
    slope = jax.grad(lambda m: study.chained(m, x)[:, 0].sum() ** 2)(model)
    assert all(np.any(slope.blocks.head.weight.dense()[t] != 0) for t in range(study.BLOCKS))


@pytest.mark.slow
def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    small = lambda seed: gaussian_clusters(seed, train=75, test=20)  # noqa: E731
    monkeypatch.setattr(study, "clusters", small)
    for name, value in {"HIDDEN": 6, "BATCH": 30, "EPOCHS": 1}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "RATES", (1e-3,))
    exact = study.Claim("a", "b", "c", True, "d", seeds=1)
    monkeypatch.setattr(study, "locality_claim", lambda seed: exact)
    result = load("noprop").run(out=tmp_path)
    saved = json.loads((tmp_path / "result.json").read_text())
    sides = [*study.THROUGH, study.OURS, *study.OTHERS, study.NOISY]
    assert [row.get("side") for row in saved["table"]][: len(sides)] == sides
    assert (tmp_path / "accuracy.png").stat().st_size > 5000 and len(result.claims) == 6
    assert_tuned(result.claims[0], study.OURS, study.NOISY, *study.THROUGH)
    assert_tuned(result.claims[2], *study.OTHERS)
