"""The gradient-noise study: escape from zero on little data, its claims, picture and files."""

import importlib
import json

import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.studies import load

study = importlib.import_module("ffnlab.studies.gradient_noise")
Setting = study.Setting


def test_the_variance_is_the_formula_s():
    claim = study.statistics_claim(1)
    assert claim.holds, claim


def test_claims_are_decided_by_the_figures():
    found = {
        Setting(5, 0.0, 0.0): [0.1, 0.12],
        Setting(5, 0.0, study.ETA): [0.95, 0.93],
        Setting(3, 0.1, 0.0): [0.98, 0.99],
        Setting(3, 0.1, study.ETA): [0.96, 0.95],
    }
    assert [c.holds for c in study.training_claims(found)] == [True, True]
    found[Setting(5, 0.0, 0.0)][0] = 0.3
    found[Setting(3, 0.1, study.ETA)] = [0.93, 0.93]
    found[Setting(20, 0.0, 0.01, 20)] = [0.1]
    assert [c.holds for c in study.training_claims(found)] == [False, False, False]


def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    clusters = lambda seed: gaussian_clusters(seed, train=200, test=50)  # noqa: E731
    monkeypatch.setattr(study, "gaussian_clusters", clusters)
    monkeypatch.setattr(study, "WIDTH", 8)
    found = load("gradient-noise").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["hidden layers"] for row in saved["table"]] == [5, 5, 3, 3]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    stuck = found.table[0]
    assert stuck["eta"] == 0 and stuck["accuracy"] <= 0.35, "a constant guess"


@pytest.mark.slow
def test_zero_networks_escape_with_three_of_three_seeds():
    """The card's third and fourth points."""
    for seed in range(3):
        stuck, freed = (study.trained(Setting(5, 0.0, eta), seed) for eta in (0.0, study.ETA))
        assert stuck <= 0.15 and freed >= 0.9, seed
    plain, noisy = (study.trained(Setting(3, 0.1, eta), 0) for eta in (0.0, study.ETA))
    assert plain - noisy <= 0.04
