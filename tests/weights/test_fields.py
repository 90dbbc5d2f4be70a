"""Fields that do not fit each other are refused, those that just fit are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import weights
from ffnlab.weights import Dense, Float8, Int4, Int8, Masked

BYTES, FLOAT = jnp.zeros((4, 5), jnp.uint8), jnp.ones
INT8, E4M3 = jnp.zeros((8, 5), jnp.int8), jnp.zeros((8, 5), jnp.float8_e4m3fn)


def int4(codes=BYTES, scales=None, group=4, rows=8, act=None):
    """Eight rows, packed, in groups of four."""
    scales = FLOAT((2, 5)) if scales is None else scales
    return Int4(codes, scales, jnp.float32(1), group=group, rows=rows, act=act)


def test_the_largest_and_smallest_that_fit():
    for rows in (5, 6, 7, 8):
        assert int4(rows=rows).shape == (rows, 5)
    assert int4(group=2, scales=FLOAT((4, 5))).dense().shape == (8, 5)
    assert int4(jnp.zeros((3, 4, 5), jnp.uint8), FLOAT((3, 2, 5))).shape == (8, 5)
    for group, groups in ((1, 8), (3, 3), (8, 1), (9, 1)):
        assert Int8(INT8, FLOAT((groups, 5)), group=group).dense().shape == (8, 5)
    assert Float8(E4M3, FLOAT((1, 5))).shape == (8, 5)
    assert Masked(Dense(FLOAT((4, 5))), FLOAT((2, 4, 5)) > 0).shape == (4, 5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: int4(group=1, scales=FLOAT((8, 5))), "group=1 with 8 rows"),
        (lambda: int4(jnp.zeros((3, 5), jnp.uint8), group=3, rows=6), "group=3 with 2 rows"),
        (lambda: int4(group=2), "group=2 with 2 rows of scales does not cover the 8 rows"),
        (lambda: int4(rows=4), "rows=4 does not fit 8 packed rows of groups of 4"),
        (lambda: int4(rows=9), "rows=9 does not fit"),
        (lambda: int4(scales=FLOAT((2, 4))), "scales have 4 columns, codes 5"),
        (lambda: int4(act="e5m2"), "act='e5m2' is not one of None, 'e4m3'"),
        (lambda: int4(codes=BYTES[0]), r"codes must have shape \[in, out\]"),
        (lambda: int4(scales=FLOAT(5)), r"scales must have shape \[in, out\]"),
        (lambda: Int4.from_codes(INT8[:3], FLOAT((1, 5)), group=3), "even number of rows"),
        (lambda: Int8(INT8, FLOAT((8, 5)), group=0), "group=0; it takes a number of rows >= 1"),
        (lambda: Int8(INT8, FLOAT((2, 5)), group=3), r"scales must have shape \(3, 5\) for 8 rows"),
        (lambda: Int8(INT8, FLOAT((3, 4)), group=3), r"got \(3, 4\)"),
        (lambda: Int8(INT8, FLOAT((1, 5)), group=8, act="int8"), "act='int8'"),
        (lambda: Float8(E4M3, FLOAT((2, 5))), r"scales must have shape \(1, 5\), got \(2, 5\)"),
        (lambda: Float8(E4M3, FLOAT((1, 5)), act="int8"), "act='int8'"),
        (lambda: Float8(E4M3[0], FLOAT((1, 5))), r"codes must have shape \[in, out\]"),
        (lambda: Dense(FLOAT(5)), r"w must have shape \[in, out\], got \(5,\)"),
        (lambda: Dense(FLOAT((4, 5)), act="int8"), "act='int8'"),
        (lambda: Masked(Dense(FLOAT((4, 5))), FLOAT((5, 4)) > 0), r"keep_mask has shape \(5, 4\)"),
        (lambda: weights.prepare(Dense(FLOAT((4, 5))), "rocm"), "'cpu', 'cuda', 'tpu'"),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bytes_of_every_width():
    keys = jax.random.split(jax.random.key(0), 3)
    assert weights.nbytes(keys) == 24
    for dtype, size in (("int4", 3), ("uint4", 3), ("int8", 6), ("bfloat16", 12), ("float32", 24)):
        assert weights.nbytes(jax.ShapeDtypeStruct((2, 3), dtype)) == size


def test_a_gpu_is_prepared_for_as_cuda(key):
    codes = jax.random.randint(key, (128, 128), -7, 8, jnp.int8)
    w = Int4.from_codes(codes, FLOAT((1, 128)), group=128, act="e4m3")
    kinds = [type(weights.prepare(w, backend)).__name__ for backend in ("gpu", "cuda", "tpu")]
    assert kinds == ["PackedInt4", "PackedInt4", "Int4"]


def test_int8_rounds_half_to_even_and_keeps_zero_columns():
    w = np.float32([[127.0, 0.0, 254.0], [0.5, 0.0, 3.0], [-1.5, 0.0, -127.0]])
    packed = Int8.quantize(jnp.asarray(w))
    np.testing.assert_array_equal(packed.q(), [[127, 0, 127], [0, 0, 2], [-2, 0, -64]])
    np.testing.assert_array_equal(packed.scales, [[1, 1, 2]])
    assert packed.group == 3 and Int8.quantize(jnp.asarray(w), group=8).group == 3
