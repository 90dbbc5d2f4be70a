"""The NoProp study on little data: its claims, its table, its picture."""

import importlib
import json

from ffnlab.data import gaussian_clusters
from ffnlab.studies import load

study = importlib.import_module("ffnlab.studies.noprop")


def test_exact_claims_hold():
    for claim in (study.algebra_claim(), study.ode_claim(study.ode_errors())):
        assert claim.holds, claim
    claim = study.locality_claim(0)
    assert claim.holds and claim.ours.startswith("0 of 90 "), claim


def test_claims_are_decided_by_the_figures():
    found = {"backprop": 0.99, "discrete": 0.98, "discrete, noisy": 0.97}
    assert [c.holds for c in study.accuracy_claims(found)] == [True, True]
    found |= {"discrete": 0.96, "continuous": 0.95, "flow": 0.8}
    found |= {"continuous, learned noise": 0.95}
    assert [c.holds for c in study.accuracy_claims(found)] == [False, False, False]


def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    small = lambda seed: gaussian_clusters(seed, train=60, test=20)  # noqa: E731
    monkeypatch.setattr(study, "gaussian_clusters", small)
    for name, value in {"HIDDEN": 6, "BATCH": 30, "EPOCHS": 1}.items():
        monkeypatch.setattr(study, name, value)
    monkeypatch.setattr(study, "locality_claim", lambda seed: study.Claim("a", "b", "c", True, "d"))
    result = load("noprop").run(out=tmp_path)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row.get("rule") for row in saved["table"]][:6] == ["backprop", *study.KINDS]
    assert (tmp_path / "accuracy.png").stat().st_size > 5000 and len(result.claims) == 6
