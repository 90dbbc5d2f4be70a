"""The counter-current study on little data: its claims, its table, its picture."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.studies import load

autoencoder = importlib.import_module("ffnlab.studies.counter_current_autoencoder")
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
    short = [dataclasses.replace(case, steps=2) for case in autoencoder.CASES[:1]]
    monkeypatch.setattr(autoencoder, "CASES", short)
    result = load("counter-current").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["rule"] for row in saved["table"]] == [*study.ORDER * 2, *autoencoder.WAYS]
    for name in ("accuracy", "autoencoders"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert all(0 <= row["accuracy"] <= 1 for row in result.table[:8]) and len(result.claims) == 5
    assert all(row["error"] > 0 for row in result.table[8:])


def test_an_autoencoder_must_beat_random_hidden_layers():
    errors = dict(zip(autoencoder.WAYS, (0.3, 0.47, 0.5, 0.5), strict=True))
    found = {("rows", way): [value] for way, value in errors.items()}
    assert autoencoder.claim(found).holds
    found["rows", "counter-current"] = [0.48]
    assert not autoencoder.claim(found).holds


@pytest.mark.parametrize("case", autoencoder.CASES, ids=lambda case: case.name)
def test_frozen_networks_of_the_autoencoders_stay_frozen(case):
    model = case.make(jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (4, *case.shape))
    moved = {}
    for way, rule in autoencoder.rules(case).items():
        state = rule.init(model, jax.random.key(2))
        before = jax.tree.map(np.asarray, (state.model, getattr(state, "mirror", None)))
        state, _ = rule.step(state, x)
        after = (state.model, getattr(state, "mirror", None))
        moved[way] = [
            {
                jax.tree_util.keystr(path)
                for (path, old), new in zip(
                    jax.tree_util.tree_leaves_with_path(was), jax.tree.leaves(now), strict=True
                )
                if np.any(old != new)
            }
            for was, now in zip(before, after, strict=True)
        ]
    every = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(model)}
    assert moved["backprop"] == [every, set()]
    assert moved["counter-current"][0] == moved["feedback frozen"][0] == every
    assert moved["counter-current"][1] and not moved["feedback frozen"][1]
    assert moved["hidden frozen"] == [{p for p in every if case.last in p}, set()]


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
