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
from ffnlab.studies import load, tuning
from tuned import assert_tuned, cases, with_scores

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
    # Parameters, the number of the step and the key of the run.
    assert found.state == 4 * (64 * 32 + 320) + 4 + 8 and found.temporary > 0
    assert set(found.curve) == {0, 1, 2, 3}


def test_mnist_where_it_is_present(tmp_path, monkeypatch):
    monkeypatch.delenv("FFNLAB_DATA", raising=False)
    assert set(study.sets(0, quick=False)) == {"digits"}
    (tmp_path / "mnist").mkdir()
    monkeypatch.setenv("FFNLAB_DATA", str(tmp_path))
    monkeypatch.setattr(study, "mnist", lambda: digits())
    assert set(study.sets(0, quick=False)) == {"digits", "mnist"}
    assert set(study.sets(0, quick=True)) == {"digits"}


def test_networks_are_of_equal_size():
    """NoProp's is the nearest to the MLP's that there is, for the inputs of both data sets."""
    for width in (64, 784):
        sizes = {s.name: tuning.numbers(s.model(0)) for s in study.sides(width, 1, quick=False)}
        assert sizes[study.LOCAL] == width * 128 + 4 * 128**2 + 1280
        assert sizes[study.LOCAL] == sizes[study.SGD] == sizes[study.ADAMW]
        hidden = study.sides(width, 1, quick=False)[3].model(0).blocks.head.weight.shape[-2]
        near = {h: abs(study.noprop_numbers(width, h) - sizes[study.SGD]) for h in range(2, 200)}
        assert near[hidden] == min(near.values())
        assert study.noprop_numbers(width, hidden) == sizes[study.APART]


def test_rules_try_as_many_rates():
    for quick, count in ((False, 6), (True, 2)):
        assert {len(side.grid) for side in study.sides(64, 1, quick)} == {count}


def test_accuracy_is_decided_by_all_figures():
    sides = {study.SGD: [0.97] * 2, study.ADAMW: [0.965] * 2}
    sides |= {study.LOCAL: [0.96] * 2, study.APART: [0.955] * 2}
    found = cases(digits=sides, mnist=sides)
    claims = study.accuracy_claims(found)
    assert [claim.holds for claim in claims] == [True, True]
    for i, name in enumerate((study.LOCAL, study.APART)):
        assert_tuned(claims[i], name, *study.THROUGH)
        for case in found:
            for through in study.THROUGH:
                better = study.accuracy_claims(with_scores(found, case, through, [0.97, 0.985]))
                assert [c.holds for c in better] == [False, False], "as good as either optimizer"
            worse = study.accuracy_claims(with_scores(found, case, name, [0.97, 0.94]))
            assert [c.holds for c in worse] == [i == 1, i == 0]


def test_steps_are_decided_by_all_figures():
    """Direction before and after training, memory, state and work: on every data set."""
    found = cases(**dict.fromkeys(("digits", "mnist"), dict.fromkeys(study.RULES, [0.9])))
    base = study.Measured({0: 0.1}, 100, 50, 1e6, (0.5, 0.3))
    steps = {data: dict.fromkeys(study.RULES, base) for data in found}

    def held(data, name, **change):
        changed = {**steps[data], name: base._replace(**change)}
        return [c.holds for c in study.step_claims(found, {**steps, data: changed})]

    assert [c.holds for c in study.step_claims(found, steps)] == [True] * 4
    for data in found:
        for cosines in ((0.5, 0.995), (0.5, -0.1), (-0.1, 0.5), (0.995, 0.5)):
            assert held(data, study.LOCAL, cosines=cosines) == [False, True, True, True]
        assert held(data, study.LOCAL, temporary=101) == [True, False, True, False]
        for through in study.THROUGH:
            assert held(data, through, temporary=99) == [True, False, False, False]
            assert held(data, through, flops=9e5) == [True, True, True, False]
        assert held(data, study.APART, temporary=101) == [True, True, False, False]
        for name in (study.LOCAL, study.APART):
            assert held(data, name, state=51) == held(data, name, flops=2e6)
            assert held(data, name, state=51) == [True, True, True, False]
    for claim in study.step_claims(found, steps):
        assert "1,234 parameters" in claim.evidence and "seed 0" in claim.evidence


def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HIDDEN", (8, 8))
    monkeypatch.setattr(study, "BATCH", 575)
    result = load("learning-rules").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["side"] for row in saved["table"]] == list(study.RULES)
    assert "cosine, first" not in saved["table"][3]
    assert (tmp_path / "learning_curves.png").stat().st_size > 5000
    assert len(result.claims) == 6 and jax.tree.leaves(result.table)
    assert_tuned(result.claims[0], study.LOCAL, *study.THROUGH)
    assert_tuned(result.claims[1], study.APART, *study.THROUGH)
