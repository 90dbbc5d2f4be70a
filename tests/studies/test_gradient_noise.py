"""The gradient-noise study: escape from zero on little data, its claims, picture and files."""

import dataclasses
import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.layers import MLP
from ffnlab.studies import load, tuning
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.gradient_noise")
Network = study.Network


def test_the_variance_is_the_formula_s():
    claim = study.statistics_claim(1)
    assert claim.holds, claim


PLAIN, NOISY, STRONG = study.PLAIN, study.NOISY, study.STRONG


def sides(plain, noisy, strong):
    return {PLAIN: plain, NOISY: noisy, STRONG: strong}


def held(zero, good, deep):
    return [claim.holds for claim in study.training_claims(zero, good, deep)]


def test_claims_are_decided_by_all_figures():
    """Every depth and every seed counts, and so does the noise that is not tuned away."""
    zero = cases(a=sides([0.1, 0.12], [0.95, 0.93], [0.95, 0.93]))
    zero |= cases(b=sides([0.1, 0.12], [0.91, 0.92], [0.9, 0.9]))
    good = cases(c=sides([0.98] * 2, [0.97, 0.96], [0.95, 0.96]))
    good |= cases(d=sides([0.97] * 2, [0.97, 0.95], [0.94, 0.94]))
    deep = cases(e=sides([0.1] * 2, [0.6, 0.5], [0.1, 0.1]))
    assert held(zero, good, deep) == [True] * 4
    claims = study.training_claims(zero, good, deep)
    for claim, name in zip(claims, (NOISY, NOISY, STRONG, NOISY), strict=True):
        assert_tuned(claim, PLAIN, name)
    for case in zero:
        assert held(with_scores(zero, case, PLAIN, [0.1, 0.3]), good, deep)[0] is False
        assert held(with_scores(zero, case, NOISY, [0.95, 0.89]), good, deep)[0] is False
    for case in good:
        worse = with_scores(good, case, NOISY, [0.97, 0.92])
        assert held(zero, worse, deep) == [True, False, True, True]
        worse = with_scores(good, case, STRONG, [0.62, 0.97])
        assert held(zero, worse, deep) == [True, True, False, True]
    assert held(zero, good, with_scores(deep, "e", NOISY, [0.6, 0.1]))[3] is False
    assert len(held(zero, good, {})) == 3


def test_sides_try_as_many_settings():
    """SGD with and without noise; the rates without are those of the strong noise."""
    assert {len(tried) for tried in study.GRIDS.values()} == {4}
    assert {s["eta"] for s in study.GRIDS[PLAIN]} == {0}
    assert [s["rate"] for s in study.GRIDS[PLAIN]] == [s["rate"] for s in study.GRIDS[STRONG]]
    data = tuning.splits(gaussian_clusters(0, train=200, test=10))
    made = study.sides(Network(3, 0.1), study.rule_of, data, quick=True)
    assert [side.grid for side in made] == [tried[1:3] for tried in study.GRIDS.values()]


def test_seeds_draw_noise_of_their_own():
    """From zero, with one order of rows, two seeds differ by their noise, and one repeats."""
    rule, model = study.rule_of(0.3), MLP((4, 3, 2), key=jax.random.key(0), std=0.0)
    batch = (jnp.ones((5, 4)), jnp.zeros(5, jnp.int32))
    ends = []
    for seed in (0, 0, 1):
        state, _ = rule.step(rule.init(model, jax.random.key(seed)), batch)
        ends.append(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(state.model)]))
    np.testing.assert_array_equal(ends[0], ends[1])
    assert np.all(ends[0] != ends[2]), "every entry, biases too"


@pytest.mark.slow
def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    small = lambda seed: gaussian_clusters(seed, train=250, test=50)  # noqa: E731
    monkeypatch.setattr(study, "clusters", small)
    monkeypatch.setattr(study, "WIDTH", 8)
    found = load("gradient-noise").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["case"] for row in saved["table"]] == ["5 layers, all zero"] * 3 + [
        "3 layers, std 0.1"
    ] * 3
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    stuck = found.table[0]
    assert stuck["side"] == PLAIN and stuck["accuracy"] <= 0.35, "a constant guess"
    for claim in found.claims[:3]:
        assert_tuned(claim, PLAIN)


@pytest.mark.slow
def test_zero_networks_escape_with_three_of_three_seeds():
    """The card's third and fourth points, at its rate."""
    data = tuning.splits(study.clusters(0))
    tried = {PLAIN: (0.0, 0.1), STRONG: (0.3, 0.1)}
    found = {}
    for net, seeds in ((Network(5, 0.0), [0, 1, 2]), (Network(3, 0.1), [0])):
        made = [
            dataclasses.replace(
                side, grid=[dict(zip(("eta", "rate"), tried[side.name], strict=True))]
            )
            for side in study.sides(net, study.rule_of, data, quick=False)
            if side.name in tried
        ]
        found[net.depth] = tuning.compare(made, data, seeds)
    assert max(found[5][PLAIN].scores) <= 0.15 and min(found[5][STRONG].scores) >= 0.9
    assert found[3][PLAIN].mean - found[3][STRONG].mean <= 0.04
