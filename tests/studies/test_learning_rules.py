"""Rules side by side: what is measured of a step, and the study as a whole."""

import dataclasses
import importlib
import json
import math

import jax
import optax
import pytest

from ffnlab.data import ArrayBatches, digits
from ffnlab.layers import MLP
from ffnlab.learning import NoPropNet, backprop, labelled, noprop, physical_ff
from ffnlab.models import HypernetConfig, HypernetSpec, MLPConfig
from ffnlab.studies import learning_rules_measure as measures
from ffnlab.studies import load, tuning
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.learning_rules")


def test_backpropagation_follows_the_gradient(key):
    rule = backprop(labelled, optax.sgd(0.1))
    batch = ArrayBatches(digits()[0], 32)(0)
    state = rule.init(MLP((64, 8, 10), key=key), key)
    assert measures.direction(rule, state, batch) == pytest.approx(1, abs=1e-5)
    for other, net in (
        (noprop(), NoPropNet(64, 10, key=key, hidden=4, blocks=2)),
        (physical_ff(), MLP((64, 8, 10), key=key)),
    ):
        assert math.isnan(measures.direction(other, other.init(net, key), batch))


def test_what_is_generated_moves_across_the_gradient(key):
    """dTheta = -rate J J^T dL/dTheta: downhill, and not along it where chunks share a map."""
    rule = backprop(labelled, optax.sgd(1e-3))
    spec = HypernetSpec(outputs="chunk_wise", chunk=64)
    net = HypernetConfig(MLPConfig((64, 8, 10)), spec).make(key=key)
    found = measures.direction(rule, rule.init(net, key), ArrayBatches(digits()[0], 32)(0))
    assert 0.01 < found < 0.99


def test_losses_reach_the_layers_that_are_theirs(key):
    net, stack = MLP((64, 9, 8, 10), key=key), NoPropNet(64, 10, key=key, hidden=4, blocks=3)
    found = measures.reach(net, stack, ArrayBatches(digits()[0], 32)(0), 0)
    assert {name: each.text for name, each in found.items()} == {
        "backprop": "3 of 3",
        "counter-current": "6 of 24",
        "noprop": "4 of 16",
        "physical-ff": "3 of 9",
    }
    assert all(each.is_local for each in found.values())
    assert found["counter-current"].found.reached == [
        *(("B2",), ("F0", "B1"), ("F1", "B0"), ("F2",))
    ]
    report, own = found["physical-ff"]
    for slopes in (report.slopes + 1e-9, report.slopes * 0):  # across layers; of no layer
        changed = dataclasses.replace(report, slopes=slopes)
        assert not measures.Reach(changed, own).is_local
        reached = {"digits": found | {"physical-ff": measures.Reach(changed, own)}}
        assert not study.reach_claim(reached, 0).holds
    claim = study.reach_claim({"digits": found}, 0)
    assert claim.holds and "counter-current 6 of 24" in claim.ours


def test_work_is_counted(key):
    rule = backprop(labelled, optax.sgd(0.1))
    found = measures.measure(rule, MLP((64, 32, 10), key=key, bias=False), digits(), 128, 3, 0)
    # Forward, and backward by the weights and by the hidden activations: 2 (2 ab + 2 bc + bc).
    least = 2 * 128 * (2 * 64 * 32 + 3 * 32 * 10)
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
    """NoProp's and the hypernetwork are the nearest to the MLP's, for the inputs of both sets."""
    for width in (64, 784):
        sizes = {s.name: tuning.numbers(s.model(0)) for s in study.sides(width, 1, quick=False)}
        assert sizes[study.LOCAL] == width * 128 + 4 * 128**2 + 1280
        assert sizes[study.LOCAL] == sizes[study.SGD] == sizes[study.ADAMW]
        assert sizes[study.LOCAL] == sizes[study.PHYSICAL] == sizes[study.NO_TARGET]
        models = {s.name: s.model(0) for s in study.sides(width, 1, quick=False)}
        made = models[study.GENERATED].make(0)
        assert made.sizes == models[study.SGD].sizes and tuning.numbers(made) == sizes[study.SGD]
        chunk = models[study.GENERATED].spec.chunk
        assert study.hypernet_numbers(sizes[study.SGD], chunk) == sizes[study.GENERATED]
        assert sizes[study.GENERATED] == pytest.approx(sizes[study.SGD], rel=0.01)
        hidden = models[study.APART].blocks.head.weight.shape[-2]
        near = {h: abs(study.noprop_numbers(width, h) - sizes[study.SGD]) for h in range(2, 200)}
        assert near[hidden] == min(near.values())
        assert study.noprop_numbers(width, hidden) == sizes[study.APART]


def test_rules_try_as_many_rates():
    for quick, count in ((False, 6), (True, 2)):
        assert {len(side.grid) for side in study.sides(64, 1, quick)} == {count}


def test_accuracy_is_decided_by_all_figures():
    rivals = (*study.ALONE, study.GENERATED)
    sides = {study.SGD: [0.97] * 2, study.ADAMW: [0.965] * 2}
    sides |= {name: [0.955 - 0.001 * i] * 2 for i, name in enumerate(rivals)}
    found = cases(digits=sides, mnist=sides)
    claims = study.accuracy_claims(found)
    assert [claim.holds for claim in claims] == [True] * 4
    for i, name in enumerate(rivals):
        assert_tuned(claims[i], name, *study.THROUGH)
        for case in found:
            for through in study.THROUGH:
                better = study.accuracy_claims(with_scores(found, case, through, [0.97, 0.985]))
                assert [c.holds for c in better] == [False] * 4, "as good as either optimizer"
            worse = study.accuracy_claims(with_scores(found, case, name, [0.97, 0.94]))
            assert [c.holds for c in worse] == [i != j for j in range(4)]


def test_without_a_target_all_networks_are_to_be_the_same(key):
    rule = backprop(labelled, optax.sgd(0.1))
    states = [rule.init(MLP((3, 2), key=k), k) for k in jax.random.split(key)]
    tuned = cases(digits={study.NO_TARGET: [0.9] * 2, study.ADAMW: [0.9] * 2})
    tuned = {
        case: {name: dataclasses.replace(t, rule=rule, states=states) for name, t in sides.items()}
        for case, sides in tuned.items()
    }
    assert study.no_target_claim(tuned).holds
    mine = tuned["digits"][study.NO_TARGET]
    near = jax.tree.map(lambda leaf: leaf * (1 + 2**-23), states[1].model)
    moved = [states[0], states[1]._replace(model=near)]
    tuned["digits"][study.NO_TARGET] = dataclasses.replace(mine, states=moved)
    assert not study.no_target_claim(tuned).holds, "by one unit in the last place, of one seed"
    tuned["digits"][study.NO_TARGET] = dataclasses.replace(mine, states=[states[0], None])
    assert not study.no_target_claim(tuned).holds, "where it alone diverged"


def test_steps_are_decided_by_all_figures():
    """Direction before and after training, memory, state and work: on every data set."""
    found = cases(**dict.fromkeys(("digits", "mnist"), dict.fromkeys(study.RULES, [0.9])))
    base = measures.Measured({0: 0.1}, 100, 50, 1e6, (0.5, 0.3))
    steps = {data: dict.fromkeys(study.RULES, base) for data in found}

    def held(data, name, **change):
        """(direction, no storage of each rule alone, no dearer)."""
        changed = {**steps[data], name: base._replace(**change)}
        first, *memory, last = [c.holds for c in study.step_claims(found, {**steps, data: changed})]
        return first, memory, last

    assert [c.holds for c in study.step_claims(found, steps)] == [True] * 5
    for data in found:
        for cosines in ((0.5, 0.995), (0.5, -0.1), (-0.1, 0.5), (0.995, 0.5)):
            assert held(data, study.LOCAL, cosines=cosines) == (False, [True] * 3, True)
        for through in study.THROUGH:
            assert held(data, through, temporary=99) == (True, [False] * 3, False)
            assert held(data, through, flops=9e5) == (True, [True] * 3, False)
        for i, name in enumerate(study.ALONE):
            less = [i != j for j in range(3)]
            assert held(data, name, temporary=101) == (True, less, False)
            assert held(data, name, state=51) == held(data, name, flops=2e6)
            assert held(data, name, state=51) == (True, [True] * 3, False)
    for claim in study.step_claims(found, steps):
        assert "1,234 parameters" in claim.evidence and "seed 0" in claim.evidence


@pytest.mark.slow
def test_study_writes_its_result_and_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "HIDDEN", (8, 8))
    monkeypatch.setattr(study, "BATCH", 575)
    result = load("learning-rules").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert [row["side"] for row in saved["table"]] == list(study.RULES)
    for row in saved["table"]:
        assert ("cosine, first" in row) == (row["side"] not in (study.APART, study.PHYSICAL))
    for name in ("learning_curves", "reach"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    assert len(result.claims) == 11 and jax.tree.leaves(result.table)
    assert_tuned(result.claims[0], study.LOCAL, *study.THROUGH)
    assert_tuned(result.claims[1], study.APART, *study.THROUGH)
    assert result.claims[4].holds, "no target, and the bits of backpropagation"
    assert result.claims[-1].holds
