"""Rules side by side: what is measured of a step, and the study as a whole."""

import importlib
import json
import math

import jax
import optax
import pytest

from ffnlab.data import ArrayBatches, digits
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, backprop, labelled, noprop
from ffnlab.studies import load

study = importlib.import_module("ffnlab.studies.learning_rules")


def test_backpropagation_follows_the_gradient(key):
    rule = backprop(labelled, optax.sgd(0.1))
    batch = ArrayBatches(digits()[0], 32)(0)
    state = rule.init(MLP((64, 8, 10), key=key), key)
    assert study.direction(rule, state, batch) == pytest.approx(1, abs=1e-5)
    other = noprop()
    state = other.init(NoPropNet(64, 10, key=key, hidden=4, blocks=2), key)
    assert math.isnan(study.direction(other, state, batch))


def test_work_is_counted(key):
    rule = backprop(labelled, optax.sgd(0.1))
    found = study.measure(rule, MLP((64, 32, 10), key=key, bias=False), digits(), 3, 0)
    # Forward, and backward by the weights and by the hidden activations: 2 (2 ab + 2 bc + bc).
    least = 2 * study.BATCH * (2 * 64 * 32 + 3 * 32 * 10)
    assert least <= found.flops < 1.5 * least
    assert found.parameters == 64 * 32 + 320 and found.temporary > 0
    assert set(found.curve) == {0, 1, 2, 3} and found.accuracy == found.curve[3]


def test_mnist_where_it_is_present(tmp_path, monkeypatch):
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    assert set(study.sets(0, quick=False)) == {"digits"}
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("FFNLAB_DATA", str(tmp_path))
    monkeypatch.setattr(study, "mnist", lambda: digits())
    assert set(study.sets(0, quick=False)) == {"digits", "mnist"}
    assert set(study.sets(0, quick=True)) == {"digits"}


def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HIDDEN", (8, 8))
    monkeypatch.setattr(study, "BATCH", 718)
    result = load("learning-rules").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["rule"] for row in saved["table"]] == ["backprop", "counter-current", "noprop"]
    assert "cosine, first" not in saved["table"][2]
    assert (tmp_path / "learning_curves.png").stat().st_size > 5000
    assert len(result.claims) == 3 and jax.tree.leaves(result.table)
