"""The study of ScaleLong: how its claims are decided, and what it measures."""

import importlib

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

from ffnlab.structure.scalelong import Response
from ffnlab.studies import scalelong_measure as measure
from ffnlab.studies.scalelong_measure import FULL, QUICK, Run, Start
from ffnlab.studies.tuning import Splits
from tuned import assert_tuned, reached

study = importlib.import_module("ffnlab.studies.scalelong")
PLAIN, CONSTANT, LEARNED = study.PLAIN, study.CONSTANT, study.LEARNED
WAYS = (PLAIN, "root", CONSTANT, LEARNED, "apart")


def with_one(found, name, **options):
    return {**found, name: found[name]._replace(**options)}


# Linear networks.


def test_linear_networks_are_judged_at_every_depth():
    found = {n: measure.gains(n) for n in (4, 64)}
    assert found[64][PLAIN] == 65 and found[4]["root"] == pytest.approx(1 + 4 * 0.5**0.5)
    claim = study.linear_claim(found)
    assert claim.holds and "64 skips: 65 and 4.3333" in claim.ours
    for name, off in ((PLAIN, 64.0), (CONSTANT, 4.334)):
        assert not study.linear_claim({**found, 64: found[64] | {name: off}}).holds


# Networks as they are drawn.


def begun(**small):
    """Two depths of all ways, the scaled at 0.9 of the first; `small` says otherwise at 64."""
    sizes = dict.fromkeys(WAYS[1:], 0.9) | {PLAIN: 1.0}

    def one(size):
        rising = np.linspace(1, 10, 4)[None] ** np.array([[size], [size]])
        return Start(Response(np.array([size, size]), np.array([size, size])), rising)

    found = {depth: {way: one(sizes[way]) for way in WAYS} for depth in (12, 64)}
    for way, change in small.items():
        found[64][way] = found[64][way]._replace(**change)
    return found


def test_drawn_networks_are_judged_by_every_seed_depth_and_way():
    held = lambda **small: [c.holds for c in study.start_claims(begun(**small))]  # noqa: E731
    assert held() == [True, True, True]
    low, high = np.array([0.9, 0.9]), np.array([0.9, 1.1])
    assert held(root={"response": Response(high, low)}) == [False, True, True]
    assert held(apart={"response": Response(low, high)}) == [True, False, True]
    uneven = np.array([[1.0, 2, 3, 4], [1, 2, 3, 11]])
    assert held(learned={"gradients": uneven}) == [True, True, False]
    claim = study.start_claims(begun())[2]
    assert "64 blocks: original 10 (10 to 10), root 7.94 (7.94 to 7.94)" in claim.ours
    rows = study.start_rows(begun())
    assert len(rows) == 10 and rows[0]["gradients"] == 10 and rows[1]["stream"] == 0.9


# Trained networks.

FALLING = np.array([0.4, 0.3, 0.2, 0.1])
STEADY = np.array([1.0, 2.0, 2.2, 2.0])


def run_of(error=0.2, curve=FALLING, stream=STEADY, output=1.0):
    """What a way reached, alike with two seeds."""
    return Run(
        reached([error, error]),
        np.stack([curve] * 2),
        np.stack([stream] * 2),
        Response(np.ones(2), np.full(2, output)),
        np.zeros((2, 16, 8, 8, 1)),
    )


def found_with(**ways):
    good = {way: run_of(output=0.9, curve=FALLING[::-1], stream=0 * STEADY + 1) for way in WAYS}
    return good | {PLAIN: run_of()} | ways


def test_learning_is_judged_by_means_of_every_way():
    held = lambda **ways: [c.holds for c in study.learning_claims(found_with(**ways), 20)]  # noqa: E731
    assert held() == [True, True, True]
    assert_tuned(study.learning_claims(found_with(), 20)[0], *WAYS)
    same = found_with()["root"]
    assert held(apart=same._replace(tuned=reached([0.23, 0.21]))) == [False, True, True]
    assert held(apart=same._replace(tuned=reached([0.22, 0.20]))) == [True, True, True]
    slow = same._replace(curves=np.stack([FALLING] * 2))
    assert held(constant=slow) == [True, False, True]
    assert held(learned=slow) == [True, False, True]
    assert held(root=slow) == [True, True, True]
    assert held(root=same._replace(streams=np.stack([STEADY * 9, STEADY * 9]))) == [
        True,
        True,
        False,
    ]


def test_speed_is_that_of_the_least_error():
    curves = {
        PLAIN: [[0.4, 0.2, 0.3, 0.3]] * 3,
        "root": [[0.2, 1, 1, 1], [0.3, 0.25, 0.15, 0], [9] * 4],
    }
    found = {way: run_of()._replace(curves=np.array(curve, float)) for way, curve in curves.items()}
    assert study.speeds(found, PLAIN, 20) == [1, 1, 1]
    assert study.speeds(found, "root", 20) == [2, 0.8, 0]
    np.testing.assert_allclose(study.wobble(np.exp([[9.0, 0, 1, 0.5], [0, 0, 3, 3]])), [0.5, 0])


def far_with(**far):
    good = {way: [1.0, 1.0] for way in WAYS} | {PLAIN: [2.0, 2.0]}
    return good | {"pixels": [4.0], "digits": [0.3]} | far


def test_trained_networks_are_judged_by_noise_and_by_what_they_draw():
    found = found_with()
    held = lambda far, **ways: [c.holds for c in study.after_claims(found | ways, far)]  # noqa: E731
    assert held(far_with()) == [True, True, True]
    loud = run_of(output=1.0)
    assert held(far_with(), apart=loud) == [False, True, True]
    assert held(far_with(root=[4.1, 1.0])) == [True, False, False]
    assert held(far_with(original=[5.0, 1.0])) == [True, False, True]
    assert held(far_with(learned=[2.1, 2.1])) == [True, True, False]
    claim = study.after_claims(found, far_with())[1]
    assert "pixels 4, training digits 0.3" in claim.ours


def test_pictures_show_every_way():
    found, data = found_with(), Splits(None, None, np.ones((20, 8, 8, 1)))
    for draw, count in (
        (lambda figure: study.blocks(figure, begun()[64]), 1),
        (lambda figure: study.curves(figure, found, 20), 1),
        (lambda figure: study.samples(figure, found, data), 6),
    ):
        figure = Figure()
        draw(figure)
        assert len(figure.axes) == count
        if count == 1:
            assert len(figure.axes[0].lines) == 5
    shown = [axes.images[0].get_array() for axes in figure.axes]
    figure = Figure()
    study.grid(figure, np.arange(60.0)[:, None, None, None] * np.ones((1, 8, 8, 1)))
    tiles = figure.axes[0].images[0].get_array()
    assert tiles.shape == (40, 120)
    np.testing.assert_array_equal(tiles[5::10, 5::10], np.arange(48).reshape(4, 12))
    assert shown[0].shape == (8, 140) and shown[0].sum() == 14 * 64 and shown[1].sum() == 0


# What is measured.


def test_ways_of_a_seed_differ_in_scaling_alone():
    plain, other = (measure.network(way, 2, 1) for way in (PLAIN, "apart"))
    assert other.config.scaling == "apart" and len(other.scaling.gates) == 1
    leaves = lambda model: jax.tree.leaves((model.layers, model.fusions, model.head))  # noqa: E731
    for ours, theirs in zip(leaves(plain), leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert measure.network(CONSTANT, 2, 1).scaling.factors(2) == (0.7, 1.0)


def test_steps_to_a_level():
    curve = np.array([0.5, 0.4, 0.2, 0.3])
    assert measure.steps_to(curve, 10, 0.3) == pytest.approx(25)
    assert measure.steps_to(curve, 10, 0.5) == 10
    assert measure.steps_to(curve, 10, 0.1) == np.inf


def test_the_distance_of_images_is_that_of_their_moments():
    draw = np.random.default_rng(0)
    a = draw.normal(size=(40_000, 1, 2, 1))
    mixed = np.array([[2.0, 0.5], [0.0, 1.0]])
    b = (a.reshape(-1, 2) @ mixed + [1.0, -1.0]).reshape(a.shape)
    cov = mixed.T @ mixed  # of b, where a has the identity: sqrtm(cov) by its eigenvalues
    wanted = 2 + 2 + np.trace(cov) - 2 * np.sqrt(np.linalg.eigvalsh(cov)).sum()
    assert measure.frechet(a, b) == pytest.approx(wanted, rel=0.03)
    assert measure.frechet(b, a) == pytest.approx(measure.frechet(a, b), rel=1e-6)
    assert abs(measure.frechet(a, a)) < 1e-9


def test_forms_run_what_they_say():
    assert FULL.ways == WAYS and 64 in FULL.depths and 64 in QUICK.depths
    assert set(QUICK.ways) >= {PLAIN, CONSTANT} and QUICK.seeds == 1 and not QUICK.rates
    assert FULL.steps % FULL.every == 0 and FULL.steps // FULL.every >= 4
    assert min(FULL.samples, QUICK.samples) >= np.prod(study.GRID) >= study.SHOWN


@pytest.mark.slow
def test_a_small_run_has_every_claim(tmp_path, monkeypatch):
    ways = (PLAIN, CONSTANT)
    small = measure.Sizes(1, (4,), 2, ways, (1e-2, 3e-2), 20, 5, 48, 2, 20)
    monkeypatch.setattr(study, "FULL", small)
    monkeypatch.setattr(study, "QUICK", small._replace(rates=()))
    result = study.run(out=tmp_path)
    assert len(result.claims) == 10 and result.claims[0].holds
    for name in ("gradients", "training", "samples", "grid"):
        assert (tmp_path / f"{name}.png").stat().st_size > 3000
    trained = [row for row in result.table if row["case"] == "trained"]
    assert [row["way"] for row in trained] == list(ways) and trained[0]["speed"] == 1
    assert [c.claim for c in study.run(quick=True).claims] == [c.claim for c in result.claims[:4]]
