"""Packed documents: every token once, borders known, rows by position."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data import PackedBatches
from ffnlab.errors import FFNLabError


def documents(sizes):
    """Documents whose tokens are all different: the hundreds name the document."""
    return [100 * i + np.arange(size) for i, size in enumerate(sizes, start=1)]


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=8),
    batch=st.integers(1, 3),
    length=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_rows_hold_each_token_once_and_know_its_document(sizes, batch, length, seed):
    if (sum(sizes) - 1) // length // batch < 1:
        with pytest.raises(FFNLabError, match="need at least"):
            PackedBatches(documents(sizes), batch, length, seed)
        return
    batches = PackedBatches(documents(sizes), batch, length, seed)
    for epoch in range(2):
        start = epoch * batches.per_epoch
        rows = [batches(start + i) for i in range(batches.per_epoch)]
        tokens = np.concatenate([row.tokens for row in rows])
        segments = np.concatenate([row.segments for row in rows])
        positions = np.concatenate([row.positions for row in rows])
        assert tokens.shape == segments.shape == positions.shape == (len(tokens), length + 1)
        np.testing.assert_array_equal(tokens[1:, 0], tokens[:-1, -1])  # neighbours share one
        seen = tokens[:, :-1].ravel()
        assert len(set(seen.tolist())) == len(seen) > sum(sizes) - (batch * length + 1)
        for row, segment, position in zip(tokens, segments, positions, strict=True):
            same = row[:, None] // 100 == row // 100
            np.testing.assert_array_equal(segment[:, None] == segment, same)
            first = np.r_[True, segment[1:] != segment[:-1]]
            np.testing.assert_array_equal(position[first], 0)
            np.testing.assert_array_equal(np.diff(position)[~first[1:]], 1)
            np.testing.assert_array_equal(np.diff(row)[~first[1:]], 1)
            assert segment[0] == 1 and set(np.diff(segment)) <= {0, 1}


def test_orders_differ_between_epochs_and_positions_do_not_lie():
    docs = documents([7] * 12)
    batches, again = (PackedBatches(docs, 2, 6, seed=1) for _ in range(2))
    assert batches.per_epoch == 6
    for position in (11, 0, 3, 11):
        for one, two in zip(batches(position), again(position), strict=True):
            np.testing.assert_array_equal(one, two)
    assert not np.array_equal(batches(0).tokens, batches(6).tokens)
    assert not np.array_equal(batches(0).tokens, PackedBatches(docs, 2, 6, seed=2)(0).tokens)


def test_parts_are_the_rows_of_the_whole():
    batches = PackedBatches(documents([5, 9, 30, 4, 20]), 4, 3)
    for position in range(8):
        parts = [batches.part(index, 2)(position) for index in range(2)]
        for whole, *pieces in zip(batches(position), *parts, strict=True):
            np.testing.assert_array_equal(whole, np.concatenate(pieces))
    with pytest.raises(FFNLabError, match="batch=4 does not divide into 3"):
        batches.part(0, 3)


def test_bad_documents_are_refused():
    with pytest.raises(FFNLabError, match="the essays: document 1 has no tokens"):
        PackedBatches([np.arange(9), np.arange(0)], 1, 2, source="the essays")
    with pytest.raises(FFNLabError, match="length=0 must be at least 1"):
        PackedBatches([np.arange(9)], 1, 0)
    with pytest.raises(FFNLabError, match="have 0 tokens"):
        PackedBatches([], 1, 2)
