"""Weights of blocks: the official products, the card's formulas, the nearest ones, bad factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.weights import BlockDense, BlockDiagonal, BlockShuffle, Dense, LowRank, Merged, cost
from tests import hashed
from tests.fixtures.structured_ffn import record


def of_official(form, one, two):
    """The weight of factors as the official code stores them, [out, in]."""
    turn = lambda array: jnp.asarray(np.swapaxes(array, -1, -2))  # noqa: E731
    return {"low_rank": LowRank, "block_dense": BlockDense, "block_shuffle": BlockShuffle}[form](
        turn(one), turn(two)
    )


@pytest.mark.parametrize("case", record.CASES)
def test_products_are_those_of_the_official_code(fixtures, case):
    n, m, _, _ = case
    x = jnp.asarray(record.x_of(n), jnp.float32)
    with np.load(fixtures / "structured_ffn" / "expected.npz") as file:
        for form, shapes in record.shapes(case).items():
            drawn = [hashed.parameter(f"{form}{i}", shape) for i, shape in enumerate(shapes)]
            w, want = of_official(form, *drawn), file[f"{form} {case}"]
            assert w.shape == (n, m)
            np.testing.assert_allclose(w.matmul(x), want, atol=2e-6, err_msg=form)
            np.testing.assert_allclose(x @ w.dense(), want, atol=2e-6, err_msg=form)


def by_hand(w):
    """The matrix of a BlockShuffle by its definition, entry by entry."""
    first, second = np.float64(w.first), np.float64(w.second)
    (k, p, q), (j, _, s) = first.shape, second.shape
    found = np.zeros((k * p, j * s))
    for n, i, out in np.ndindex(k * p, k * q, s):
        if n // p == i // q:
            entry = first[n // p, n % p, i % q] * second[i % j, i // j]
            found[n, np.arange(s)[out] * j + i % j] += entry[out]
    return found


@pytest.mark.parametrize(("n", "m", "blocks"), [(6, 8, 2), (8, 4, 2), (9, 6, 3), (6, 18, 2)])
def test_shuffled_outputs_are_strided(n, m, blocks, key):
    w = BlockShuffle.project(jax.random.normal(key, (n, m)), blocks)
    np.testing.assert_allclose(w.dense(), by_hand(w), atol=1e-5)
    np.testing.assert_allclose(w.transpose().dense(), by_hand(w).T, atol=1e-5)


def test_diagonals_are_blocks_and_nothing_else(key):
    w = jax.random.normal(key, (6, 9))
    found = np.zeros((6, 9))
    for i in range(3):
        at = slice(2 * i, 2 * i + 2), slice(3 * i, 3 * i + 3)
        found[at] = w[at]
    np.testing.assert_array_equal(BlockDiagonal.project(w, 3).dense(), found)


def least(parts, rank):
    """How far matrices are from their best approximations of a rank, all together."""
    values = np.linalg.svd(np.float64(parts), compute_uv=False)
    return np.sqrt((values[..., rank:] ** 2).sum())


def test_projections_are_the_nearest_ones(key):
    """By the truncated SVD of each part that has factors of its own."""
    w = jax.random.normal(key, (12, 8))
    far = lambda found: float(jnp.linalg.norm(found.dense() - w))  # noqa: E731
    assert far(BlockDense.project(w, 6, 2)) == pytest.approx(least(w.reshape(2, 6, 8), 3), rel=1e-5)
    parts = np.asarray(w).reshape(2, 6, 4, 2).transpose(0, 3, 1, 2)
    assert far(BlockShuffle.project(w, 2)) == pytest.approx(least(parts, 2), rel=1e-5)
    assert far(BlockShuffle.project(w, 1)) < 1e-4 and far(BlockDense.project(w, 8, 1)) < 1e-4


@settings(max_examples=4, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_what_has_the_form_already_is_its_own_projection(blocks, p, q, seed):
    n, m, rank = blocks * p, blocks * q, blocks
    one, two = jax.random.split(jax.random.key(seed))
    inner = min(p, q)
    shuffle = BlockShuffle(
        jax.random.normal(one, (blocks, p, inner)), jax.random.normal(two, (blocks, inner, q))
    )
    again = BlockShuffle.project(shuffle.dense(), blocks)
    np.testing.assert_allclose(again.dense(), shuffle.dense(), atol=1e-4)
    assert shuffle.numbers == again.numbers == min(n, m) * (n + m) // blocks
    thin = BlockDense(jax.random.normal(one, (blocks, p, 1)), jax.random.normal(two, (rank, m)))
    again = BlockDense.project(thin.dense(), rank, blocks)
    np.testing.assert_allclose(again.dense(), thin.dense(), atol=1e-4)
    assert thin.numbers == rank * (n // blocks + m)


def test_numbers_and_operations_are_those_of_the_factors(key):
    w = jax.random.normal(key, (24, 16))
    for made, numbers in (
        (BlockDiagonal.project(w, 4), 24 * 16 // 4),
        (BlockDense.project(w, 6, 3), 6 * (8 + 16)),
        (BlockShuffle.project(w, 4), 16 * 40 // 4),
    ):
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), made)
        for each in (made, made.transpose(), Merged.of(made, 4)):
            assert (cost.parameters(each), cost.flops(each)) == (numbers, 2 * numbers)
        assert (cost.parameters(stacked), cost.flops(stacked)) == (3 * numbers, 2 * numbers)


def test_few_rows_are_multiplied_by_the_product_and_many_by_the_factors(key):
    factors = LowRank.truncate(jax.random.normal(key, (8, 6)), 2)
    both = Merged(factors, Dense(jnp.zeros((8, 6))), rows=4)  # which of the two is seen at once
    for shape, is_product in (((8,), True), ((3, 8), True), ((4, 8), False), ((2, 2, 8), False)):
        y = jax.jit(lambda w, x: w.matmul(x))(both, jnp.ones(shape))
        assert (float(jnp.abs(y).max()) == 0) == is_product, shape
    assert float(jnp.abs(Merged(factors, both.product, rows=0).matmul(jnp.ones(8))).max()) > 0


BLOCKS, ONES = jnp.ones((2, 4, 3)), jnp.ones((6, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockDiagonal(ONES), r"blocks must have shape \[blocks, in, out\], got \(6, 5\)"),
        (lambda: BlockDiagonal.project(ONES, 4), r"blocks=4 does not divide rows=6; one of \[1, 2"),
        (lambda: BlockDiagonal.project(ONES, 2), "blocks=2 does not divide columns=5"),
        (lambda: BlockDense(BLOCKS, ONES[:5]), "blocks have rank 6, b has 5"),
        (lambda: BlockDense.project(ONES, 3, 2), "blocks=2 does not divide rank=3"),
        (lambda: BlockDense.project(ONES, 4, 4), "blocks=4 does not divide rows=6"),
        (lambda: BlockDense.project(ONES, 6, 2), r"rank=6 is outside 1\.\.5"),
        (lambda: BlockShuffle(BLOCKS, BLOCKS), r"first \(2, 4, 3\) gives 6 channels"),
        (lambda: BlockShuffle.project(ONES, 3), r"blocks=3 does not divide columns=5"),
        (lambda: BlockShuffle.project(ONES, 0), "blocks=0 must be at least 1"),
        (lambda: Merged(Dense(ONES), Dense(ONES.T), 1), r"factors are \(6, 5\), their product"),
        (lambda: Merged.of(Dense(ONES), -1), "rows=-1 must be at least 0"),
    ],
)
def test_bad_factors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
