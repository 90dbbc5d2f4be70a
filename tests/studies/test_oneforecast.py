"""The study of forecasts: what decides its claims, and its tasks at tiny sizes."""

import importlib
import json

import jax
import numpy as np
import pytest

from ffnlab.data import AirTemperature
from ffnlab.models import OneForecastConfig
from ffnlab.studies import oneforecast_measure as measure
from ffnlab.studies.oneforecast_measure import Measured, rms

study = importlib.import_module("ffnlab.studies.oneforecast")
TINY = OneForecastConfig((12, 24), 3, 3, 0, width=4, blocks=3, heads=2)


def errors(*by_seed, still=(0.6, 0.8, 0.9, 1.0)):
    """Errors of the first and of the fourth day, by seed."""
    each = np.array([[first, 0.3, 0.3, last] for first, last in by_seed])
    return Measured(each, np.array(still), np.zeros((1, 4, 2, 2, 3)))


def test_global_claims_are_decided_by_every_seed():
    good = {
        study.GATED: errors((0.2, 0.5), (0.2, 0.5)),
        study.PLAIN: errors((0.3, 0.7), (0.3, 0.7)),
    }

    def held(**change):
        return [claim.holds for claim in study.global_claims(good | change)]

    assert held() == [True] * 3
    assert held(gated=errors((0.2, 0.5), (0.211, 0.5))) == [False, True, True]
    assert held(gated=errors((0.2, 0.5), (0.2, 0.61))) == [True, True, False]
    assert held(**{study.PLAIN: errors((0.1, 0.5), (0.29, 0.5))}) == [True, False, True]
    tuned = {study.TUNED: errors((0.2, 0.49), (0.2, 0.49))}
    assert held(**tuned) == [True] * 4
    assert held(**{study.TUNED: errors((0.2, 0.4), (0.2, 0.5))}) == [True, True, True, False]


def test_region_claims_are_decided_by_means():
    def held(nested, alone=0.3, bare=0.35):
        found = {study.NESTED: nested, study.ALONE: (alone, 0.5), study.NO_MARGIN: (0.2, bare)}
        regions = {k: study.Region(*(np.array([x, x]) for x in v)) for k, v in found.items()}
        return [claim.holds for claim in study.region_claims(regions)]

    assert held((0.25, 0.3)) == [True, True]
    assert held((0.31, 0.3)) == [False, True]
    assert held((0.25, 0.36)) == [True, False]


def test_temperature_is_judged_against_both():
    def held(*network):
        found = {"network": np.array(network), "persistence": np.array([2.0])}
        found["climatology"] = np.array([1.5])
        return [claim.holds for claim in study.temperature_claims(found)]

    assert held(1.0, 1.4) == [True, True]
    assert held(1.0, 1.6) == [True, False]
    assert held(1.0, 2.1) == [False, False]
    assert study.temperature_claims({}) == []


def test_blocks_and_balance_hold():
    assert study.block_claim(3).holds and study.balance_claim(3).holds


@pytest.mark.slow
def test_the_counts_of_the_card():
    assert study.counts_claim().holds


def test_roots_of_mean_squares_over_some_places():
    apart = np.zeros((2, 5, 3, 4, 4, 1))
    apart[:, :, 1, 0, 0] = 4
    np.testing.assert_allclose(rms(apart)[0], [0, 1, 0])
    np.testing.assert_allclose(rms(apart, measure.border((4, 4), 1))[1], [0, (16 / 12) ** 0.5, 0])
    inside = 1 - measure.border((4, 4), 1)
    assert inside.sum() == 4 and rms(apart, inside).max() == 0


def test_a_region_lies_where_its_cells_of_the_world_are(monkeypatch):
    """What the region is told of an exact forecast is nearly its own next state."""
    world = measure.wave_task(TINY, 0, counts=(3, 1, 2), steps=1)
    exact = {len(rows.x): rows.y[None] for rows in (world.train, world.valid, world.test)}
    monkeypatch.setattr(measure, "answers", lambda models, task, rows: exact[len(rows.x)])
    tasks = measure.nested_tasks(world, TINY.make(key=jax.random.key(0)), 0)
    assert [task.train.x.shape[-1] for task in tasks.values()] == [3, 9, 9]
    bare = tasks["no margin"].train
    np.testing.assert_array_equal(bare.x[..., 3:6], bare.x[..., 6:])
    truth, told = bare.y[:, 0], bare.x[..., 3:6]
    assert np.corrcoef(truth.ravel(), told.ravel())[0, 1] > 0.75
    shifted = np.roll(told, 4, axis=2)
    assert np.abs(truth - told).mean() < 0.7 * np.abs(truth - shifted).mean()


def test_temperature_is_split_and_scored_by_the_hour():
    hours = np.arange(400)
    day = 3 * np.sin(2 * np.pi * hours / 24)
    kelvin = (280 + day[:, None, None] + np.zeros((1, 2, 3))).astype(np.float32)
    found = AirTemperature(kelvin, hours, np.array([50.0, 51.0]), np.array([0.0, 1.0, 2.0]))
    config = OneForecastConfig((2, 3), 3, 1, 0, width=4, blocks=3, heads=2)
    given = measure.temperature(config, found)
    assert given.climatology[0] < 1e-3 < measure.still(given.task.test)[0]
    counts = [len(rows.x) for rows in (given.task.train, given.task.valid, given.task.test)]
    assert counts == [211 - 6, 71 - 6, 70 - 6]


@pytest.mark.slow
def test_the_whole_study_at_tiny_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(study, "WORLD", TINY)
    region = OneForecastConfig((16, 16), 3, 3, 0, width=4, blocks=3)
    for module in (study, measure):
        monkeypatch.setattr(module, "REGION", region)
    monkeypatch.setattr(study, "find_folder", lambda name: None)
    sizes = study.Sizes([0, 1], (4, 4, 4, 2), (1e-3, 3e-3))
    monkeypatch.setattr(study, "sizes_of", lambda seed, quick: sizes)
    result = study.run(out=tmp_path, quick=True)
    assert len(result.claims) == 3 + 4 + 2 and study.TUNED in {
        row["forecast"].removeprefix("waves, ") for row in result.table
    }
    rates = result.settings["rates"]
    assert set(rates) == {study.GATED, study.PLAIN, "alone", "nested", "no margin"}
    assert all(set(each) == {"0.001", "0.003"} for each in rates.values())
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["slug"] == "oneforecast"
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "forecast.png",
        "errors_by_day.png",
        "region.png",
    }


@pytest.mark.slow
def test_the_best_of_several_looks_is_kept():
    config = OneForecastConfig((2, 3), 3, 1, 0, width=4, blocks=3, heads=2)
    random = np.random.default_rng(0)
    kelvin = (280 + random.standard_normal((300, 2, 3))).astype(np.float32)
    found = AirTemperature(kelvin, np.arange(300), np.array([50.0, 51.0]), np.array([0.0, 1, 2]))
    given = measure.temperature(config, found)
    models = measure.best_by(given.task, 40, [0, 1], looks=4)
    best = rms(measure.answers(models, given.task, given.task.valid) - given.task.valid.y).mean()
    last = measure.learned(given.task, 40, [0, 1])
    assert (
        best
        <= rms(measure.answers(last, given.task, given.task.valid) - given.task.valid.y).mean()
        + 1e-6
    )


def test_the_rate_is_chosen_by_the_first_seed_on_validation_rows(monkeypatch):
    """Rates of members stand in for their weights; 0.3 is best, and best on no other rows."""
    zeros = np.zeros((1, 1, 1, 1), np.float32)
    given = dict.fromkeys(measure.Task._fields)
    task = measure.Task(**given | {"valid": measure.Rows(zeros, zeros[None])})
    asked = []

    def learned(task, steps, seeds, rates):
        asked.append((steps, list(seeds), list(rates)))
        return np.array(rates)

    def answers(models, task, rows):
        assert rows is task.valid
        return np.abs(np.asarray(models) - 0.3).reshape(-1, 1, 1, 1, 1, 1)

    monkeypatch.setattr(measure, "learned", learned)
    monkeypatch.setattr(measure, "answers", answers)
    found = measure.tuned(task, 7, [5, 6, 8], (0.1, 0.3, 1.0))
    assert found.rate == 0.3 and found.models.tolist() == pytest.approx([0.3] * 3)
    assert found.tried == pytest.approx({0.1: 0.2, 0.3: 0.0, 1.0: 0.7})
    assert asked == [(7, [5] * 3, [0.1, 0.3, 1.0]), (7, [6, 8], [0.3] * 2)]
    said = study.rates_of({"gated": found})
    assert "gated 0.3; 0 of 1 chosen at an end" in said
    assert "not tuned" in study.rates_of({"gated": found._replace(tried={0.3: 0.0})})
