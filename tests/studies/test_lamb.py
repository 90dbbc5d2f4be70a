"""The LAMB study on little data: what it claims of a step, its table, its picture, its files."""

import importlib
import json

import numpy as np
import pytest

from ffnlab.data import gaussian_clusters
from ffnlab.studies import classify, load
from tuned import assert_tuned, cases, with_scores

study = importlib.import_module("ffnlab.studies.lamb")


def test_a_step_is_what_the_paper_says():
    for claim in study.step_claims(gaussian_clusters(1, train=64, test=8)[0], 1):
        assert claim.holds, claim


def best(name, rates, batch):
    """The largest test accuracy of an optimizer over its rates, after ten epochs."""
    data, found = gaussian_clusters(0), []
    steps = study.EPOCHS * len(data[0].x) // batch
    rule = study.rule_of(name, steps)
    for rate in rates:
        paced = classify.at_rate(rule, rate)
        state = classify.learned(paced, study.network(0), data[0], batch=batch, steps=steps)
        found.append(classify.accuracy(paced, state, data[1]))
    return max(found)


@pytest.mark.slow
def test_nineteen_large_steps_are_enough_for_lamb():
    """Card, point 2, with its grids of rates."""
    large = best("LAMB", (0.01, 0.03, 0.1), 4096)
    assert large >= 0.97
    assert large >= best("AdamW", (1e-3, 3e-3, 1e-2, 3e-2), 4096) + 0.02
    assert large >= best("LAMB", (0.01, 0.03, 0.1), 64) - 0.02


def test_layers_are_scaled():
    alike, scaled = study.network(0), study.network(0, study.SCALES)
    for a, b, scale in zip(study.maps(alike), study.maps(scaled), study.SCALES, strict=True):
        np.testing.assert_allclose(b, a * scale, rtol=1e-6)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("lamb")
    with pytest.MonkeyPatch.context() as patch:
        small = lambda seed: gaussian_clusters(seed, train=320, test=64)  # noqa: E731
        patch.setattr(study, "clusters", small)
        patch.setattr(study, "SIZES", (64, 8, 8, 8, 10))
        patch.setattr(study, "LARGE", 128)
        patch.setattr(study, "EPOCHS", 2)
        return load("lamb").run(out=out, quick=True), out


@pytest.mark.slow
def test_study_writes_its_result_and_picture(result):
    found, out = result
    saved = json.loads((out / "result.json").read_text())
    assert [row["side"] for row in saved["table"]] == ["LAMB", "AdamW"] * 4
    assert saved["pictures"] == ["accuracy.png"] and (out / "accuracy.png").stat().st_size > 5000
    assert len(found.claims) == 9 and found.settings["batches"] == [128, 64]
    for claim in found.claims[:7]:
        assert_tuned(claim, "LAMB")
    assert_tuned(found.claims[1], "LAMB", "AdamW")
    tried = saved["settings"]["validation"]
    assert {len(each) for sides in tried.values() for each in sides.values()} == {2}


def test_optimizers_try_as_many_rates():
    assert {len(optimizer.rates) for optimizer in study.OPTIMIZERS.values()} == {6}
    assert all(list(o.rates) == sorted(o.rates) for o in study.OPTIMIZERS.values())


LARGE, SMALL = ([study.case_of(name, batch) for name in study.LAYERS] for batch in (4096, 64))


def claimed(**changes):
    """Which claims hold; changes are test scores by "index of layers, batch, optimizer"."""
    large = {"LAMB": [0.98] * 2, "AdamW": [0.95] * 2, "Nesterov": [0.94] * 2, "LARS": [0.93] * 2}
    small = {"LAMB": [0.99] * 2, "AdamW": [0.985] * 2, "Nesterov": [0.98] * 2, "LARS": [0.98] * 2}
    found = cases(**dict.fromkeys(LARGE, large), **dict.fromkeys(SMALL, small))
    for place, scores in changes.items():
        layers, batch, name = place.split("_")
        found = with_scores(
            found, {"large": LARGE, "small": SMALL}[batch][int(layers[1])], name, scores
        )
    return [claim.holds for claim in study.batch_claims(found, 8000)]


def test_claims_are_decided_by_all_figures():
    # enough, above, costs .02, costs nothing, scale, match at 64, match at 4096
    assert claimed() == [True, True, True, False, True, True, False]
    for layers in ("l0", "l1"):
        found = claimed(**{f"{layers}_large_LAMB": [0.98, 0.965]})
        assert found[:4] == [False, False, False, False]
        assert claimed(**{f"{layers}_large_LARS": [0.93, 0.965]})[1] is False
        assert claimed(**{f"{layers}_small_Nesterov": [0.98, 0.975]})[5] is False
    even = {f"l{i}_large_{n}": [0.985] * 2 for i in (0, 1) for n in ("AdamW", "Nesterov")}
    assert claimed(**even)[6] is True
    nothing = {f"l{i}_large_LAMB": [0.989, 0.991] for i in (0, 1)}
    assert claimed(**nothing)[3] is True
    assert claimed(**nothing, l1_small_LAMB=[0.995, 0.999])[3] is False
    assert claimed(l1_small_LAMB=[0.99, 0.975])[4] is False, "the small batch counts as well"
    assert claimed(l1_large_LAMB=[0.965, 0.98])[4] is False
