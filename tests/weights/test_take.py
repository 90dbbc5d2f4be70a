"""Rows and columns of a weight: every format gives those of its matrix, or says why not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.weights import Int4, Int8
from ffnlab.weights.quantized import whole_groups
from tests.contracts import GROUP, IN, OUT, WEIGHTS

ROWS = np.r_[0:GROUP, 2 * GROUP : IN]  # whole groups
COLUMNS = np.array([0, 3, 4, 15])
APART = ("BlockD", "BlockS", "Joined", "Merged-blocks", "PackedInt4")


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_of_every_format(name):
    w = WEIGHTS[name](jax.random.key(1))
    assert w.shape == (IN, OUT)
    if name.startswith(APART):
        with pytest.raises(ValueError, match="has no rows and columns to take; use weights.Dense"):
            w.take(COLUMNS, None)
        return
    rows = ROWS if name != "Int8-e4m3" else np.r_[16:IN]  # its groups are of 16, the last is short
    dense = np.asarray(w.dense())
    for r, c in ((rows, None), (None, COLUMNS), (rows, COLUMNS)):
        small = w.take(r, c)
        want = dense[rows if r is not None else slice(None)]
        want = want[:, COLUMNS] if c is not None else want
        assert type(small) is type(w) and small.shape == want.shape
        if name.startswith(("Lo", "Merged")):  # sums of products, made anew
            np.testing.assert_allclose(small.dense(), want, atol=1e-6)
        else:
            np.testing.assert_array_equal(np.asarray(small.dense()), want)
    assert getattr(small, "act", None) == getattr(w, "act", None)
    there = np.isin(np.arange(IN), rows).astype(np.float32)
    x = jax.random.normal(jax.random.key(2), (2, IN)) * there
    whole = np.asarray(w.matmul(x))[
        :, COLUMNS
    ]  # rounding and thresholds see zeros for what is gone
    np.testing.assert_allclose(small.matmul(x[:, rows]), whole, atol=2e-5)
    assert small.nbytes < w.nbytes


def codes(rows, columns=3):
    return jax.random.randint(jax.random.key(rows), (rows, columns), -8, 8, jnp.int8)


def test_packed_rows_go_by_bytes_where_a_column_has_one_scale():
    w = Int4.from_codes(codes(7), jnp.ones((1, 3)), group=8, divisor=2.0)
    small = w.take(np.array([2, 3, 6]), None)
    assert (small.group, small.rows, small.codes.shape) == (4, 3, (2, 3))
    np.testing.assert_array_equal(small.dense(), w.dense()[np.array([2, 3, 6])])
    with pytest.raises(ValueError, match="Int4: a byte of 2 rows goes as a whole, and of group 1"):
        w.take(np.array([0, 1, 3]), None)
    one = Int8(codes(7), jnp.ones((1, 3)), group=128)
    assert one.take(np.array([0, 3]), None).group == 2


def test_groups_of_scales_go_as_a_whole():
    w = Int4.from_codes(codes(10), jnp.arange(1.0, 10).reshape(3, 3), group=4)
    small = w.take(np.array([4, 5, 6, 7, 8, 9]), None)
    assert (small.group, small.rows, small.codes.shape) == (4, 6, (4, 3))
    np.testing.assert_array_equal(small.dense(), w.dense()[4:])
    for kind, rows in ((w, [4, 5]), (Int8(codes(10), jnp.ones((3, 3)), group=4), [0, 1, 2, 8, 9])):
        with pytest.raises(ValueError, match="a group of 4 rows goes as a whole, and of group"):
            kind.take(np.array(rows), None)


@settings(max_examples=40)
@given(st.integers(1, 5), st.integers(1, 17), st.data())
def test_whole_groups_are_found_and_parts_refused(size, count, data):
    groups = data.draw(st.sets(st.integers(0, (count - 1) // size), min_size=1))
    rows = np.array([r for r in range(count) if r // size in groups])
    assert whole_groups(rows, size, count, "a").tolist() == sorted(groups)
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, count - 1), min_size=1))))
    parts = {r // size for r in kept.tolist()}
    if len(kept) == sum(r // size in parts for r in range(count)):
        assert whole_groups(kept, size, count, "a").tolist() == sorted(parts)
    else:
        with pytest.raises(ValueError, match="only a part is there"):
            whole_groups(kept, size, count, "a")
