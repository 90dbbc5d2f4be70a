"""The construction: what it gathers in closed form, its fit by least squares, and its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.analysis import construct, corners_and_grid, errors_of
from ffnlab.analysis.universal import features, ridge
from ffnlab.data.sequence_maps import SEQUENCE_MAPS
from ffnlab.errors import ConfigError

WAVES, FIRST = SEQUENCE_MAPS["waves"], SEQUENCE_MAPS["first"]
ROUNDING = 1e-6  # of attention, whose weights are float32
POINTS = corners_and_grid(2, steps=2)
SMALL = {"width": 12, "samples": 40}


def mixed(model, x):
    """What the feed-forward network is given, in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), model)
        return np.asarray(wide.mixed(jnp.asarray(x, jnp.float64)))


@pytest.mark.parametrize(("length", "inputs"), [(2, 1), (3, 2), (1, 3)])
@pytest.mark.parametrize("beta", [0.0, 1.5, 6.0, 40.0, 500.0])
def test_what_is_gathered_is_within_its_bound(length, inputs, beta):
    target = lambda x: x[..., :1]  # noqa: E731
    made = construct(target, length, inputs, beta=beta, low=-2.0, **SMALL)
    x = np.random.default_rng(0).uniform(-2, 1, (30, length, inputs))
    u = mixed(made.model, x)
    assert np.array_equal(u[..., :inputs], x)
    assert np.array_equal(u[..., inputs : inputs + length], np.tile(np.eye(length), (30, 1, 1)))
    whole = np.tile(x.reshape(30, 1, -1), (1, length, 1))
    gap = np.abs(u[..., inputs + length :] - whole).max()
    assert made.gather == 2 * (length - 1) * math.exp(-beta) * 2
    assert gap <= made.gather + (1e-12 if beta >= 40 else ROUNDING)
    # Exactly: weights are e^beta of place h and 1 of the others.
    weight = 1 / (1 + (length - 1) * math.exp(-beta))
    rest = (1 - weight) / max(length - 1, 1)
    for head in range(length):
        others = x.sum(1) - x[:, head]
        expected = weight * x[:, head] + rest * others
        block = u[..., inputs + length + head * inputs :][..., :inputs]
        assert np.abs(block - expected[:, None]).max() < ROUNDING


def test_the_fit_is_a_ridge_regression_on_its_features():
    made = construct(WAVES, 2, width=30, samples=200, seed=3)
    x = np.random.default_rng(3).uniform(-1, 1, (200, 2, 1))
    u = np.concatenate([x, features(x, True, True)], -1).reshape(400, 5)
    first, second = made.model.mlp.maps
    w1, b1 = np.asarray(first.weight.dense(), np.float64), np.asarray(first.bias, np.float64)
    assert np.array_equal(w1[0], np.zeros(30))  # its own is gathered too
    assert np.linalg.norm(w1, axis=0) == pytest.approx(np.ones(30), abs=1e-6)
    assert 1.2 < np.abs(b1).max() <= 1.5
    hidden = np.concatenate([np.maximum(u @ w1 + b1, 0), np.ones((400, 1))], 1)
    wanted = WAVES(x).reshape(400, 1)
    best = np.linalg.lstsq(hidden, wanted, rcond=None)[0]
    floor = np.sqrt(np.mean((hidden @ best - wanted) ** 2))
    assert made.fitted.rms == pytest.approx(floor, rel=0.02)
    told = errors_of(made.model, WAVES, x)
    assert told.rms == pytest.approx(made.fitted.rms, rel=0.02)
    w, b = ridge(hidden[:, :-1], wanted)
    gradient = hidden[:, :-1].T @ (hidden[:, :-1] @ w + b - wanted) + 1e-8 * 400 * w
    assert np.abs(gradient).max() < 1e-6 and abs((hidden[:, :-1] @ w + b - wanted).sum()) < 1e-6


def test_errors_are_the_largest_and_the_root_mean_square():
    points = corners_and_grid(2, steps=3)
    found = errors_of(lambda x: x * 0.5, lambda x: x, points)
    assert found.largest == 0.5 and found.rms == pytest.approx(math.sqrt(np.mean(points**2)) / 2)


def test_wider_is_closer_and_needs_its_parts():
    points = corners_and_grid(2, steps=7)
    sizes = [
        errors_of(construct(WAVES, 2, width=w, samples=1500), WAVES, points).largest
        for w in (16, 256)
    ]
    assert sizes[1] < 0.5 * sizes[0]
    apart = construct(WAVES, 2, width=256, samples=1500, gathers=False)
    assert apart.model.attn is None and apart.gather == 0
    assert (
        errors_of(apart, WAVES, points).rms
        > 3 * errors_of(construct(WAVES, 2, width=256, samples=1500), WAVES, points).rms
    )
    # Of any equivariant network both outputs are the same where both inputs are.
    alike = construct(FIRST, 2, width=64, samples=500, positions=False)
    assert alike.model.positions is None
    assert errors_of(alike, FIRST, points).largest >= 0.5
    assert errors_of(construct(FIRST, 2, width=64, samples=500), FIRST, points).largest < 0.05


@pytest.mark.parametrize(("low", "high"), [(0.0, 10.0), (-1e3, 1e3), (5.0, 5.1)])
def test_any_box_is_approximated_as_well(low, high):
    """The features see numbers scaled to -1..1, whatever the box is."""

    def scaled(x):
        return WAVES(2 * (x - low) / (high - low) - 1)

    options = {"width": 64, "samples": 500}
    here = construct(WAVES, 2, **options)
    there = construct(scaled, 2, low=low, high=high, **options)
    assert there.fitted.rms == pytest.approx(here.fitted.rms, rel=1e-3)
    points = corners_and_grid(2, steps=5, low=low, high=high)
    found = errors_of(there.model, scaled, points)
    base = errors_of(here.model, WAVES, corners_and_grid(2, steps=5))
    assert found.largest == pytest.approx(base.largest, rel=0.05)


@pytest.mark.parametrize(("positions", "gathers"), [(True, False), (False, True), (False, False)])
def test_what_is_left_out_is_left_out_of_the_fit_too(positions, gathers):
    made = construct(WAVES, 3, positions=positions, gathers=gathers, **SMALL)
    x = np.random.default_rng(1).uniform(-1, 1, (20, 3, 1))
    expected = np.concatenate([x, features(x, positions, gathers)], -1)
    assert np.abs(mixed(made.model, x) - expected).max() < ROUNDING
    fitted = np.random.default_rng(0).uniform(-1, 1, (40, 3, 1))
    assert errors_of(made.model, WAVES, fitted).rms == pytest.approx(made.fitted.rms, rel=1e-2)


def test_a_construction_is_a_model_like_any_other(tmp_path):
    made = construct(WAVES, 2, **SMALL)
    x = jnp.asarray(corners_and_grid(2, steps=3), jnp.float32)
    models.save(made.model, tmp_path / "m", format="ffnlab")
    assert np.array_equal(models.load(tmp_path / "m")(x), made.model(x))
    jitted = jax.jit(lambda model, x: model(x))(made.model, x)
    assert np.asarray(jitted) == pytest.approx(np.asarray(made.model(x)), abs=1e-5)
    again = construct(WAVES, 2, **SMALL)
    assert np.array_equal(again.model(x), made.model(x))
    assert not np.array_equal(construct(WAVES, 2, **SMALL, seed=1).model(x), made.model(x))
    huge = construct(WAVES, 2, **SMALL, beta=1e6)
    assert np.isfinite(huge.model(x)).all()
    assert np.array_equal(construct(WAVES, 2, **SMALL, beta=1e300).model(x), huge.model(x))


def test_outside_of_the_box_it_warns():
    made = construct(WAVES, 2, **SMALL)
    x = np.full((1, 2, 1), 1.0)
    assert np.array_equal(made(x), made.model(jnp.asarray(x, jnp.float32)))
    with pytest.warns(UserWarning, match="x lies in 1.5 to 1.5; the model was made for -1 to 1"):
        made(x + 0.5)
    with pytest.warns(UserWarning, match="nan"):
        made(x * np.nan)


def test_a_grid_has_its_corners():
    points = corners_and_grid(2, 2, steps=2, low=0.0, high=3.0)
    assert sorted(map(tuple, points.reshape(-1, 4))) == sorted(
        tuple(3.0 * (i >> k & 1) for k in range(4)) for i in range(16)
    )


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: construct(WAVES, 0), "length=0"),
        (lambda: construct(WAVES, 2, width=0), "width=0"),
        (lambda: construct(WAVES, 2, beta=-1.0), "beta=-1.0 must be finite"),
        (lambda: construct(WAVES, 2, beta=math.inf), "beta=inf"),
        (lambda: construct(WAVES, 2, low=1.0), "low=1.0 must lie below high=1.0"),
        (lambda: construct(WAVES, 2, low=-math.inf), "low=-inf must lie below high=1.0, and both"),
        (lambda: construct(WAVES, 2, seed=-1), "seed=-1"),
        (lambda: construct(lambda x: x[:, :1], 2, **SMALL), r"target gives \[40, 1, 1\] for"),
        (lambda: construct(lambda x: x * np.nan, 2, **SMALL), "target gives NaN"),
        (lambda: corners_and_grid(2, steps=1), "steps=1"),
        (lambda: corners_and_grid(2, low=1.0, high=0.0), "low=1.0 must lie below high=0.0"),
        (
            lambda: errors_of(lambda x: x[:1], lambda x: x, POINTS),
            r"model gives \[1, 2, 1\], target",
        ),
        (lambda: corners_and_grid(9), "steps=15 of 9 numbers"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(ConfigError, match=said):
        call()
