"""Pairs of known information: moments, invertibility and brute force of the pictures."""

import math

import numpy as np
import pytest

from ffnlab.data import as_uniform, blob_images, box_images, gaussian_pairs
from ffnlab.errors import ConfigError


@pytest.mark.parametrize(("width", "other"), [(1, 1), (2, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize("information", [0.0, 1.5, 6.0])
def test_pairs_share_what_they_are_to(width, other, information):
    x, y = gaussian_pairs(60_000, information, width=width, other=other, seed=3)
    both = np.cov(np.concatenate([x, y], 1).T)
    assert both[:width, :width] == pytest.approx(np.eye(width), abs=0.03)
    assert both[width:, width:] == pytest.approx(np.eye(other), abs=0.03)
    # Of Gaussians, from the covariance alone.
    assert -0.5 * math.log(np.linalg.det(both)) == pytest.approx(information, abs=0.03)
    # Canonical correlations: the same of all shared components.
    a, b = (
        np.linalg.inv(np.linalg.cholesky(part))
        for part in (both[:width, :width], both[width:, width:])
    )
    each = np.linalg.svd(a @ both[:width, width:] @ b.T, compute_uv=False)
    nats = -0.5 * np.log1p(-(each**2))
    assert nats == pytest.approx(np.full(len(nats), information / len(nats)), abs=0.03)


def test_draws_repeat_and_are_rotated():
    pairs = [gaussian_pairs(50, 1.0, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(pairs[0][0], pairs[1][0])
    assert not np.array_equal(pairs[0][0], pairs[2][0])
    x, y = gaussian_pairs(4000, 3.0, seed=1)
    assert np.abs(np.corrcoef(x.T, y.T)[:2, 2:] - np.eye(2) * 0.97).max() > 0.2


def test_uniform_numbers():
    rows = np.array([[0.0, -1.96], [1.0, 40.0]])
    assert as_uniform(rows) == pytest.approx(np.array([[0.5, 0.025], [0.8413, 1.0]]), abs=1e-4)


def test_a_blob_is_where_it_is_put():
    places = np.random.default_rng(0).random((40, 2))
    images = blob_images(places, 12)
    grid = np.linspace(0, 1, 12)
    for (a, b), image in zip(places[:5], images[:5], strict=True):
        for row in (0, 4, 11):
            for column in (0, 7, 11):
                far = (grid[column] - a) ** 2 + (grid[row] - b) ** 2
                assert image[row, column] == pytest.approx(math.exp(-10 * far), rel=1e-5)
    # A linear map of the log gives the parameters back.
    logs = np.log(images.astype(np.float64)).reshape(40, -1)
    inputs = np.concatenate([logs, np.ones((40, 1))], 1)
    fit = np.linalg.lstsq(inputs, places, rcond=1e-9)[0]
    assert inputs @ fit == pytest.approx(places, abs=1e-5)


def test_a_box_covers_its_pixels():
    shapes = np.random.default_rng(1).random((6, 4))
    images = box_images(shapes, 8)
    fine = (np.arange(8 * 500) + 0.5) / (8 * 500)
    for (a, b, c, d), image in zip(shapes, images, strict=True):
        across = ((fine >= a) & (fine <= a + b * (1 - a))).reshape(8, 500).mean(1)
        down = ((fine >= c) & (fine <= c + d * (1 - c))).reshape(8, 500).mean(1)
        assert image == pytest.approx(np.outer(down, across), abs=5e-3)
        area = b * (1 - a) * d * (1 - c)
        assert image.sum() / 64 == pytest.approx(area, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: gaussian_pairs(0, 1.0), "count=0"),
        (lambda: gaussian_pairs(5, -1.0), "information=-1.0 must be finite and >= 0"),
        (lambda: gaussian_pairs(5, math.inf), "information=inf"),
        (lambda: gaussian_pairs(5, 1.0, width=0), "width=0"),
        (lambda: blob_images(np.full((3, 2), 1.5)), r"parameters [3, 2] must be [n, 2] in 0..1"),
        (lambda: blob_images(np.full((3, 2), np.nan)), "in 0..1"),
        (lambda: blob_images(np.zeros((3, 2)), 1), "size=1"),
        (lambda: box_images(np.full((3, 4), -0.1)), "must be [n, 4] in 0..1"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(ConfigError) as caught:
        call()
    assert said in str(caught.value)
