"""Arrays as batches by position; the classification data of the studies."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data import ArrayBatches, digits, gaussian_clusters
from ffnlab.errors import FFNLabError


@given(
    rows=st.integers(1, 30),
    batch=st.integers(1, 30),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
def test_an_epoch_takes_each_row_at_most_once(rows, batch, seed, epoch):
    batch = min(batch, rows)
    batches = ArrayBatches({"x": np.arange(rows), "y": np.arange(rows) * 2}, batch, seed)
    first = epoch * batches.per_epoch
    taken = [batches(first + i) for i in range(batches.per_epoch)]
    xs = np.concatenate([t["x"] for t in taken])
    assert len(set(xs.tolist())) == len(xs) == rows // batch * batch
    np.testing.assert_array_equal(np.concatenate([t["y"] for t in taken]), 2 * xs)
    np.testing.assert_array_equal(batches(first)["x"], taken[0]["x"])


def test_epochs_and_seeds_differ():
    a, b = (ArrayBatches(np.arange(100), 100, seed) for seed in (0, 1))
    assert (a(0) != a(1)).any() and (a(0) != b(0)).any()


@pytest.mark.parametrize(
    ("arrays", "batch", "message"),
    [
        ((np.zeros(3), np.zeros(4)), 1, "equal size"),
        (np.float32(1), 1, "equal size"),
        ({}, 1, "equal size"),
        (np.zeros(3), 4, "batch=4 must lie in 1..3"),
        (np.zeros(3), 0, "batch=0"),
    ],
)
def test_refusals(arrays, batch, message):
    with pytest.raises(FFNLabError, match=message):
        ArrayBatches(arrays, batch)


def test_clusters_follow_their_seed():
    train, test = gaussian_clusters(3, train=50, test=20)
    again, _ = gaussian_clusters(3, train=50, test=20)
    assert train.x.shape == (50, 64) and test.y.shape == (20,)
    np.testing.assert_array_equal(train.x, again.x)
    assert set(train.y.tolist()) <= set(range(10))
    assert (gaussian_clusters(4, train=50, test=20)[0].x != train.x).any()


def test_digits_are_split():
    train, test = digits()
    assert train.x.shape == (1437, 64) and test.x.shape == (360, 64)
    assert train.x.min() == 0 and train.x.max() == 1 and set(train.y.tolist()) == set(range(10))
