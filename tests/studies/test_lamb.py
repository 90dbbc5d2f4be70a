"""The LAMB study on little data: what it claims of a step, its table, its picture, its files."""

import importlib
import json

import jax
import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.studies import classify, load

study = importlib.import_module("ffnlab.studies.lamb")


def test_a_step_is_what_the_paper_says():
    for claim in study.step_claims(gaussian_clusters(1, train=64, test=8), 1):
        assert claim.holds, claim


def test_layers_are_scaled():
    alike, scaled = study.network(0), study.network(0, study.SCALES)
    for a, b, scale in zip(study.maps(alike), study.maps(scaled), study.SCALES, strict=True):
        np.testing.assert_allclose(b, a * scale, rtol=1e-6)


def test_a_rule_is_fitted_and_scored(key):
    data = gaussian_clusters(0, train=400, test=200, classes=2, per_class=1, noise=0.5)
    model = MLP([64, 16, 2], key=key)
    rule = backprop(labelled)
    before = classify.accuracy(rule, rule.init(model, jax.random.key(0)), data[1])
    found = classify.fit(rule, model, data, batch=40, steps=60)
    assert before < 0.95 <= found


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("lamb")
    with pytest.MonkeyPatch.context() as patch:
        clusters = lambda seed: gaussian_clusters(seed, train=256, test=64)  # noqa: E731
        patch.setattr(study, "gaussian_clusters", clusters)
        patch.setattr(study, "SIZES", (64, 8, 8, 8, 10))
        patch.setattr(study, "LARGE", 128)
        patch.setattr(study, "EPOCHS", 2)
        return load("lamb").run(out=out, quick=True), out


def test_study_writes_its_result_and_picture(result):
    found, out = result
    saved = json.loads((out / "result.json").read_text())
    assert [row["optimizer"] for row in saved["table"]] == ["LAMB", "AdamW"] * 2
    assert saved["pictures"] == ["accuracy.png"] and (out / "accuracy.png").stat().st_size > 5000
    assert len(found.claims) == 6 and found.settings["batches"] == [128, 64]


def test_claims_are_decided_by_the_figures(result):
    table = [dict(row) for row in result[0].table]
    figures = iter([(0.98, 0.99), (0.9, 0.985), (0.98, 0), (0.9, 0)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LARGE", 128)
        for row, (large, small) in zip(table, figures, strict=True):
            row |= {"accuracy, batch 128": large, "accuracy, batch 64": small}
        assert all(claim.holds for claim in study.batch_claims(table))
        table[0]["accuracy, batch 128"] = 0.91
        assert [c.holds for c in study.batch_claims(table)] == [False, False, True, True]
