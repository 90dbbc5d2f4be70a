"""The study of lossy compression: how its claims are decided, and what is measured on the way."""

import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.data import Labelled
from ffnlab.layers import MLP
from ffnlab.studies import lossy_measure as measures
from ffnlab.studies.lossy_measure import Course, Curve, phases

study = importlib.import_module("ffnlab.studies.ib_lossy_compression")

KNOWN = np.array([0.0, 1, 5, 10])


def curve(learned=0.0, linear=1.0, parameters=0.0):
    """Estimates so far below what is known."""
    return Curve(KNOWN, KNOWN - learned, KNOWN - linear, KNOWN - parameters)


def test_the_estimator_is_judged_at_its_worst():
    assert study.gaussian_claim({1: [0.1, -0.12], 2: [0.0]}).holds
    for worst in (0.13, -0.13):
        assert not study.gaussian_claim({1: [0.0, 0.0], 2: [0.0, worst]}).holds


def test_images_are_judged_at_every_known_information():
    held = lambda **curves: [c.holds for c in study.image_claims(curves)]  # noqa: E731
    assert held(blobs=curve(), boxes=curve(0.4)) == [True, True, True]
    assert held(blobs=curve(), boxes=curve(0.6)) == [False, False, True]
    assert held(blobs=curve(np.array([0, 0, 0, 0.6]))) == [False, False, True]
    assert held(blobs=curve(np.array([0, 0, -0.6, 0]))) == [False, False, True]
    assert held(blobs=curve(0.4, parameters=-0.2)) == [True, False, True]
    assert held(blobs=curve(), boxes=curve(0.4, linear=0.3)) == [True, True, False]
    flat = curve(np.array([-0.3, 0.4, 0, 0]))
    assert held(blobs=flat._replace(learned=np.array([0.45, 0.4, 5, 10])))[0] is False


def told(x, y=None, error=0.5):
    """A course of one layer and an output, of two seeds alike."""
    x = np.array(x, float)
    grid = lambda values: np.tile(np.asarray(values, float)[:, None, None], (1, 2, 2))  # noqa: E731
    y = np.linspace(0.5, 2, len(x)) if y is None else y
    return Course(
        np.arange(len(x)), grid(x), grid(y), grid(x * 0 + error), grid(y)[..., 0], ("a", "b")
    )


def test_the_answer_is_judged_by_every_seed():
    held = lambda found: [c.holds for c in study.answer_claims({"net": found}, 2)]  # noqa: E731
    good = told([1, 2, 3])
    assert held(good) == [True, True]
    y = good.y.copy()
    y[1, 1, 1] = math.log(10) + 0.31
    assert held(good._replace(y=y)) == [False, True]
    y = good.y.copy()
    y[-1, 1, 0] = 0.5
    assert held(good._replace(y=y)) == [True, False]
    y[-1, 1, 0], y[-1, 1, 1] = 2.0, 0.1  # the output is no hidden layer
    assert held(good._replace(y=y)) == [True, True]


def test_phases_are_counted_by_seed_of_convolutional_networks():
    twice = told([1, 3, 1, 3])
    assert study.phase_claim({study.CONV: twice}, 2).holds
    assert study.phase_claim({study.CONV: told([1, 3, 1])}, 2).holds is False
    assert study.phase_claim({study.CONV: told([1, 3, 1, 3], error=2.5)}, 2).holds is False
    x = twice.x.copy()
    x[:, 1] = 1.0
    assert study.phase_claim({study.CONV: twice._replace(x=x)}, 2).holds is False
    only = {study.DENSE: twice, study.CONV: told([1, 3, 3])}
    assert not study.phase_claim(only, 2).holds


@pytest.mark.parametrize(
    ("values", "signs"),
    [
        ([0, 0, 0], []),
        ([0, 0.9, 0.1, 0.9], []),
        ([0, 0.5, 1.1, 1.6], [1]),
        ([0, 2, 1.8, 0.5, 0.6, 3], [1, -1, 1]),
        ([3, 2, 1, 0, 1, 2], [-1, 1]),
        ([0, 1, 1.9, 0.95], [1]),  # below the last maximum by less than a step
        ([0, 1, 1.9, 0.85], [1, -1]),
    ],
)
def test_phases_are_changes_of_a_step(values, signs):
    assert phases(np.array(values, float), 1.0).tolist() == signs


def test_a_compressor_is_chosen_by_rows_held_out():
    line = np.random.default_rng(0).random((600, 1))
    x = np.concatenate([line, line**2, 1 - line], 1)
    found = measures.autoencoder(x, 1, 0, hidden=8, passes=20, rates=(1e-6, 1e-2))
    assert found.tried[1e-2] < found.tried[1e-6]
    assert found.share < 0.3
    codes = found.encode(jnp.asarray(x, jnp.float32))
    assert codes.shape == (600, 1)
    order = np.argsort(line[:, 0])
    steps = np.diff(np.asarray(codes)[order, 0])
    assert max((steps > 0).mean(), (steps < 0).mean()) > 0.95  # a code of one number is in order


def test_an_encoder_is_the_first_maps_without_a_nonlinearity():
    net = MLP((4, 5, 2, 5, 4), activation="tanh", key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (3, 4))
    by_hand = net.maps[1](jnp.tanh(net.maps[0](x)))
    assert np.array_equal(measures.encoder_of(net)(x), by_hand)
    assert len(net.maps) == 4


def test_members_are_measured_along_training():
    random = np.random.default_rng(0)
    x = random.standard_normal((96, 3)).astype(np.float32)
    rows = Labelled(x, (x[:, 0] > 0).astype(np.int32))
    case = measures.Case(
        lambda key: MLP((3, 4, 2), activation="tanh", key=key), "maps[*]", 0.1, 32, 4, 1e-2
    )
    found = measures.course(case, rows, rows, lambda x: x[:, :2], (0, 1), points=3)
    assert found.epochs.tolist() == [0, 1, 2, 4] and found.layers == ("maps[0]", "maps[1]")
    assert found.x.shape == found.y.shape == found.error.shape == (4, 2, 2)
    assert np.isfinite(found.x).all() and (found.error > 0).all()
    assert not np.array_equal(found.x[:, 0], found.x[:, 1])  # networks of two seeds
    assert found.accuracy.shape == (4, 2) and found.accuracy[-1].mean() > 0.6
