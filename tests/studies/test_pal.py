"""PAL's study: its problems, how runs are compared, what its claims are decided by, its files."""

import dataclasses
import importlib
import json

import jax
import numpy as np
import pytest

from ffnlab.models import AudioInput
from ffnlab.routing import pal
from ffnlab.studies import load, pal_measure, pal_tasks

study = importlib.import_module("ffnlab.studies.pal")
MODEL = pal_tasks.facts_model(AudioInput((32,), ("attended",)), 0)


@pytest.mark.parametrize("count", [1, 2])
def test_an_answer_is_what_the_sound_says(count):
    """The token nearest to the asked key's codes carries the value of the nearest codes."""
    found = pal_tasks.problems(np.random.default_rng(3), 20, count)
    tokens, targets = found.asked
    codes = np.random.default_rng(7)
    encoders = [codes.normal(size=(16 + 8, width)) for width in pal_tasks.WIDTHS[:count]]
    heard = found.sounds.features
    assert [f.shape for f in heard] == (
        [(20, 16, 32)] if count == 1 else [(20, 8, 32), (20, 8, 24)]
    )
    for i, (asked, wanted) in enumerate(zip(tokens[:, 1], targets[:, 1], strict=True)):
        gaps = [
            (np.linalg.norm(f[i, j] - table[asked] - table[16 + v]), v)
            for f, table in zip(heard, encoders, strict=True)
            for j in range(f.shape[1])
            for v in range(8)
        ]
        assert 16 + min(gaps)[1] == wanted
    assert (tokens[:, 0] == 24).all() and (targets[:, 0] == -1).all()
    assert all(mask.all() for mask in found.sounds.valid)
    assert len({tuple(row) for row in tokens}) > 5


@pytest.mark.slow
def test_rates_are_chosen_by_the_first_seed_on_other_problems(monkeypatch):
    monkeypatch.setattr(pal_tasks, "SIZES", pal_tasks.SIZES | {"layers": 1, "width": 16})
    monkeypatch.setattr(pal_tasks, "VALIDATION", 32)
    monkeypatch.setattr(pal_tasks, "TEST", 32)
    task = pal_tasks.facts(20, batch=32, every=10)
    make = lambda seed: pal_tasks.facts_model(AudioInput((32,), ("attended",)), seed)  # noqa: E731
    found = pal_measure.learned(make, task, (0.0, 1e-2), (3, 4), trainable=pal.TRAINS)[""]
    assert set(found.curves) == {10, 20} and set(found.rates) == {0.0, 1e-2}
    assert found.rate == max(found.rates, key=found.rates.get)
    assert len(found.at(20)) == 2 and found.trained == 33 * 16 < found.parameters
    for rate, i in ((0.0, 0), (1e-2, 1)):  # alone, as in the company of other members
        alone = pal_measure.learned(make, task, (rate,), (3,), trainable=pal.TRAINS)[""]
        assert alone.rates[rate] == pytest.approx(found.rates[rate], abs=1.5 / 32), i
    both = pal_tasks.facts(20, batch=32, every=10, encoders=2)
    pair = AudioInput((32, 24), ("attended", "attended"))
    each = pal_measure.learned(
        lambda seed: pal_tasks.facts_model(pair, seed),
        both,
        (1e-2,),
        (3,),
        present={"deaf": (False, False), "all": (True, True)},
    )
    tokens, targets = both.test.asked
    for name, sees in (("deaf", False), ("all", True)):
        valid = tuple(mask & sees for mask in both.test.sounds.valid)
        sounds = both.test.sounds._replace(valid=valid)
        right = np.asarray(pal.answer(each[name].model, sounds, tokens)).argmax(-1)
        assert each[name].at(20)[0] == pytest.approx(np.mean(right == targets[:, -1])), name
    start = make(3)
    tokens, targets = task.validation.asked
    right = np.asarray(pal.answer(start, task.validation.sounds, tokens)).argmax(-1)
    assert found.rates[0.0] == pytest.approx(np.mean(right == targets[:, -1]))


def reached(*scores, step=study.STEPS, early=None, products=10):
    curves = {study.EARLY: list(early or scores), step: list(scores)}
    return pal_measure.Learned({1e-3: 0.5}, 1e-3, curves, products, 1, 2, MODEL)


def facts(**changes):
    found = {name: reached(0.995, 0.999) for name in study.DESIGNS}
    found[study.DEAF] = reached(0.12, 0.13)
    return [claim.holds for claim in study.fact_claims({**found, **changes}, study.STEPS)]


def test_claims_about_facts_are_decided_by_all_figures():
    assert facts() == [True] * 5
    assert facts(**{study.LATE: reached(0.999, 0.98)})[0] is False
    assert facts(**{study.DEAF: reached(0.12, 0.16)})[1] is False
    slow = reached(0.995, 0.999, early=(0.995, 0.9))
    assert facts(**{study.BOTH: slow}) == [True, True, False, True, True]
    assert facts(**{study.LATE: slow}) == [True, True, True, False, True]
    assert facts(**{study.PLAIN: slow}) == [True, True, True, True, False]
    halves = {study.TOGETHER: reached(0.99), study.FIRST: reached(0.55), study.SECOND: reached(0.5)}
    assert study.half_claims(halves, study.STEPS)[0].holds
    assert not study.half_claims({**halves, study.SECOND: reached(0.61)}, study.STEPS)[0].holds
    assert not study.half_claims({**halves, study.TOGETHER: reached(0.97)}, study.STEPS)[0].holds


def speech(*changes):
    return [claim.holds for claim in study.speech_claims(speakers(*changes))]


def speakers(*changes):
    scores = [[0.8, 0.82], [0.79, 0.81], [0.5, 0.6], [0.85, 0.9], [0.9, 0.95]]
    for i, values in changes:
        scores[i] = values
    products = (20, 10, 10, 11, 11)
    return {
        name: reached(*s, step=study.SPEECH_STEPS, early=s, products=p)
        for name, s, p in zip(study.SPEECH, scores, products, strict=True)
    }


def test_claims_about_speech_are_decided_by_all_figures():
    assert speech() == [True] * 3
    assert speech((1, [0.79, 0.79])) == [False, True, True]
    assert speech((3, [0.85, 0.8])) == [True, False, True]
    assert speech((4, [0.9, 0.89])) == [True, True, False]


def test_an_encoder_that_only_guesses_is_named():
    said = "only guesses"
    assert said in study.speech_claims(speakers((2, [0.1, 0.3])))[1].evidence
    assert said not in study.speech_claims(speakers((2, [0.1, 0.32])))[1].evidence


def test_what_holds_of_any_weights():
    ratios = {n: study.cost("attended", n) / study.cost("prepended", n) for n in study.LENGTHS}
    assert [claim.holds for claim in study.cost_claims(MODEL, ratios)] == [True] * 3
    assert not study.cost_claims(MODEL, ratios | {8: 0.36})[0].holds


@pytest.mark.slow
def test_the_study_writes_its_result_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "QUICK_STEPS", 200)
    monkeypatch.setattr(study, "BATCH", 8)
    found = load("pal").run(out=tmp_path, quick=True)
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["pictures"] == ["facts.png", "cost.png"]
    assert all((tmp_path / name).stat().st_size > 5000 for name in saved["pictures"])
    assert len(found.claims) == 8 and len(saved["table"]) == 7
    assert {claim.seeds for claim in found.claims} == {0, 1}


@pytest.mark.slow
def test_spoken_digits_of_an_unknown_speaker(data, tmp_path, monkeypatch):
    """Connectors of the embedded model alone, trained on other speakers, far above chance."""
    monkeypatch.setenv("FFNLAB_DATA", str(data))
    if not pal_tasks.has_speech():
        pytest.skip(f"no spoken digits or no Whisper encoder in {data}")
    task = pal_tasks.speech(("whisper",), 100, batch=32, every=100, cache=tmp_path)
    assert len(task.test.asked[0]) == 150 and len(task.validation.asked[0]) == 45
    audio = AudioInput((384,), ("attended",), hidden=64)
    make = lambda seed: pal_tasks.speech_model(audio, seed)  # noqa: E731
    found = pal_measure.learned(make, task, (1e-3,), (0,), trainable=pal.TRAINS)[""]
    assert found.at(100)[0] > 0.8
    before, after = make(0), found.model
    assert all(
        np.array_equal(a, b)
        for a, b in zip(*map(jax.tree.leaves, (before.layers, after.layers)), strict=True)
    )
    assert dataclasses.asdict(after.config) == dataclasses.asdict(before.config)
