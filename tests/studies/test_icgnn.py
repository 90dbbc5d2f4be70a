"""The study of homogeneous networks: how its claims are decided, by figures made by hand."""

import importlib

import jax
import pytest
from matplotlib.figure import Figure

from ffnlab.graphs import POWER, PRECODING
from ffnlab.studies import icgnn_measure as measure
from ffnlab.studies.icgnn_measure import Cell, Free, Settings, Solved, Symmetry

study = importlib.import_module("ffnlab.studies.icgnn")
TINY = Settings((0,), (2, 2), 3, 2, 2)


def cells(**over):
    """Every size with RZF at 10 and the network at 10.3, WMMSE at 10.4, or as given by size."""
    base = {"MRT": [5.0], "ZF": [9.0], "RZF": [10.0], "WMMSE": [10.2]}
    named = {f"{k}x{n}": (k, n) for k, n in measure.CELLS}
    rates = {name: base | {"ICGNN": over.get(name, [10.3, 10.25])} for name in named}
    return [Cell(*size, 10.0, rates[name]) for name, size in named.items()]


def test_precoding_is_judged_at_every_size_by_every_seed():
    held = lambda **over: [c.holds for c in study.rate_claims(cells(**over))]  # noqa: E731
    assert held() == [True, True, True]
    assert held(**{"12x16": [10.3, 9.89]}) == [False, True, False]
    assert held(**{"4x8": [9.91, 10.3]}) == [True, True, False]
    assert held(**{"8x8": [10.3, 10.19]}) == [True, False, False]
    assert held(**{"8x16": [10.19, 10.3]}) == [True, True, False]  # K 8, but N 16


def test_the_loudest_power_is_judged():
    at = lambda db, rate: Cell(8, 8, db, {"RZF": [10.0], "ICGNN": [rate]})  # noqa: E731
    levels = [at(5.0, 8.0), at(20.0, 9.1)]
    assert study.loud_claim([*cells(), *levels]).holds
    assert "20 dB" in study.loud_claim([*cells(), *levels]).ours
    assert not study.loud_claim([*levels, at(25.0, 8.9)]).holds


def free(worst=10.31, oracle=11.4):
    base = {"equal": [9.0], "gain^0.5": [10.0], "gain^1": [8.0], "oracle": [oracle]}
    return [Free(size, base | {"ICGNN": [10.4, worst]}) for size in measure.FREE]


def test_powers_are_judged_by_the_best_split_and_the_oracle():
    held = lambda *given: [c.holds for c in study.power_claims(free(*given))]  # noqa: E731
    assert held() == [True, True]
    assert held(10.29) == [False, True]
    assert held(10.31, 11.6) == [True, False]
    one = [*free()[:-1], Free((2, 2, 2, 2), free()[0].rates | {"gain^1": [10.2]})]
    assert not study.power_claims(one)[0].holds


def test_the_solver_is_judged_by_all_it_is_good_for():
    good = Solved(1e-9, [1.0, 0.1], True, [1.0, 2.0, 3.0, 4.0])
    assert study.solved_claim(good).holds
    for bad in ({"error": 2e-8}, {"falls": False}, {"rates": [1.0, 3.0, 2.0, 4.0]}):
        assert not study.solved_claim(good._replace(**bad)).holds


def test_symmetries_limits_and_cost():
    assert study.symmetry_claim(Symmetry([1e-6, 2e-6], [1e-6, 9e-6])).holds
    assert not study.symmetry_claim(Symmetry([1e-6, 2e-5], [1e-6, 1e-6])).holds
    assert not study.symmetry_claim(Symmetry([1e-6, 1e-6], [1e-6, 2e-5])).holds
    assert study.limit_claim([-1e-7, 9e-7]).holds
    assert not study.limit_claim([0.0, 2e-6]).holds and not study.limit_claim([0.0, 1.0]).holds
    times = {"ICGNN": 1.0, "WMMSE, 50 rounds": 2.0, "over": 0.5}
    assert study.cost_claim(times).holds and not study.cost_claim(times | {"over": 1.1}).holds


@pytest.fixture(scope="module")
def nets():
    """A network of each use, as drawn."""
    return [config.make(key=jax.random.key(0)) for config in (PRECODING, POWER)]


def test_methods_are_measured_on_one_size_of_array(nets):
    found = measure.cell(nets[:1], 4, 8, 10.0, TINY)
    assert found.rates.keys() == {"MRT", "ZF", "RZF", "WMMSE", "ICGNN"}
    assert found.rates["MRT"] < found.rates["RZF"] <= found.rates["WMMSE"]
    h, valid = measure.drawn_cell(4, 8, 3)
    assert h.shape == (3, *measure.WIDE) and valid.sum(1).tolist() == [4, 4, 4]
    assert measure.symmetry(nets[:1], 2).renumbered[0] < study.SYMMETRIC
    assert max(measure.limits(nets[:1], nets[1:], TINY)) < study.WITHIN


def test_pictures_are_drawn(nets):
    for draw, given in (
        (study.rates_drawn, (cells(),)),
        (study.sizes_drawn, (free(),)),
        (study.links_drawn, (nets[1], TINY)),
    ):
        figure = Figure()
        draw(figure, *given)
        assert figure.axes


@pytest.mark.slow
def test_the_study_runs(monkeypatch):
    monkeypatch.setattr(study, "TURNS", 2)
    monkeypatch.setattr(study, "Settings", lambda *_: Settings((0, 1), (20, 20), 10, 5, 20))
    found = study.run(seed=3)
    assert len(found.claims) == 10 and found.settings["seeds"] == [0, 1]
    assert {claim.holds for claim in found.claims[:2]} == {True}
