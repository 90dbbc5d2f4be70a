"""Clusters and digits, and seeds and sizes of data that is drawn: what is out of range is named."""

import math

import numpy as np
import pytest

from ffnlab.data import digits, gaussian_clusters
from ffnlab.data.graphs import block_model
from ffnlab.data.known_information import gaussian_pairs
from ffnlab.data.ring import ring
from ffnlab.data.sequence_maps import drawn_pairs
from ffnlab.errors import ConfigError


def test_points_lie_around_centres_of_their_class():
    train, test = gaussian_clusters(1, train=40, test=9, classes=3, per_class=2, width=5, noise=0.0)
    assert train.x.shape == (40, 5) and test.x.shape == (9, 5)
    centres = np.unique(np.concatenate([train.x, test.x]), axis=0)
    assert len(centres) == 6
    for row, label in zip(test.x, test.y, strict=True):
        alike = (train.x == row).all(1)
        assert alike.any() and (train.y[alike] == label).all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gaussian_clusters(-1), "seed=-1"),
        (lambda: gaussian_clusters(train=-1), "train=-1"),
        (lambda: gaussian_clusters(classes=0), "classes=0"),
        (lambda: gaussian_clusters(noise=math.nan), "noise=nan"),
        (lambda: digits(test=-5), "test=-5"),
        (lambda: digits(test=1797), "test=1797 leaves none of 1797 digits"),
        (lambda: block_model(-1), "seed=-1"),
        (lambda: gaussian_pairs(3, 1.0, seed=-1), "seed=-1"),
        (lambda: drawn_pairs("waves", 3, 2, seed=-1), "seed=-1"),
        (lambda: drawn_pairs("waves", 3, 2, high=math.inf), "high=inf, and both be finite"),
        (lambda: ring(math.inf), "gain=inf"),
    ],
)
def test_what_is_out_of_range_is_named(call, says):
    with pytest.raises(ConfigError, match=says):
        call()
