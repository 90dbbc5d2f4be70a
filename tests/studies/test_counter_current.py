"""The counter-current study on little data: its claims, its table, its picture."""

import importlib
import json

import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.studies import load

study = importlib.import_module("ffnlab.studies.counter_current")


def test_no_error_crosses_a_layer():
    claim = study.locality_claim(0)
    assert claim.holds and claim.ours.startswith("0 of 40 "), claim


def test_claims_are_decided_by_the_figures():
    rules = dict(zip(study.ORDER, ([0.99], [0.98], [0.985], [0.9]), strict=True))
    found = {(name, rule): v for name in ("clusters", "digits") for rule, v in rules.items()}
    assert [c.holds for c in study.accuracy_claims(found)] == [True, True, True]
    found["clusters", "counter-current"] = [0.94]
    assert [c.holds for c in study.accuracy_claims(found)] == [False, False, False]


def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    small = lambda seed: gaussian_clusters(seed, train=60, test=20, width=6)  # noqa: E731
    monkeypatch.setattr(study, "gaussian_clusters", small)
    monkeypatch.setattr(study, "digits", small)
    monkeypatch.setattr(study, "HIDDEN", (5, 5, 5))
    monkeypatch.setattr(study, "BATCH", 30)
    monkeypatch.setattr(study, "locality_claim", lambda seed: study.Claim("a", "b", "c", True, "d"))
    result = load("counter-current").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["rule"] for row in saved["table"]] == list(study.ORDER) * 2
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
    assert all(0 <= row["accuracy"] <= 1 for row in result.table) and len(result.claims) == 4


@pytest.mark.slow
def test_the_card_s_accuracies():
    values = {
        rule: study.accuracy(make(), gaussian_clusters, 15, 0)
        for rule, make in study.rules().items()
    }
    assert values["counter-current"] >= 0.97
    assert values["counter-current"] >= values["feedback zero"] + 0.05
    assert values["counter-current"] >= values["backprop"] - 0.02
    assert np.isfinite(list(values.values())).all()
