"""LowRank and LoRA against NumPy: the best approximation, the update and its scale, bad factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.weights import Dense, LoRA, LowRank


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_truncation_leaves_out_the_smallest_singular_values(rank, key):
    w = jax.random.normal(key, (9, 6))
    thin = LowRank.truncate(w, rank)
    values = np.linalg.svd(np.float64(w), compute_uv=False)
    assert thin.a.shape == (9, rank) and thin.b.shape == (rank, 6)
    np.testing.assert_allclose(
        np.linalg.norm(thin.dense() - w), np.sqrt(np.sum(values[rank:] ** 2)), atol=1e-5
    )
    for factor in (thin.a.T @ thin.a, thin.b @ thin.b.T):  # each takes the root of a value
        np.testing.assert_allclose(factor, np.diag(values[:rank]), atol=1e-5)


def trained(key, **options):
    """A LoRA whose b is not zero any more, and its arrays in float64."""
    base, b = jax.random.normal(key, (2, 8, 6))[0], jax.random.normal(key, (3, 6))
    start = LoRA.init(Dense(base), 3, key, **options)
    return LoRA(start.base, start.a, b, start.alpha), *map(np.float64, (base, start.a, b))


def test_a_lora_adds_its_scaled_product(key):
    x = jax.random.normal(key, (4, 8))
    for options, alpha in (({}, 16), ({"alpha": 6.0}, 6)):
        lora, base, a, b = trained(key, **options)
        wanted = base + alpha / 3 * a @ b
        np.testing.assert_allclose(lora.dense(), wanted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(lora.matmul(x), x @ wanted, rtol=1e-4, atol=1e-4)
    assert LoRA(lora.base, lora.a, lora.b).alpha == 16


def test_a_lora_begins_as_its_base_and_with_inputs_of_length_one(key):
    wide = LoRA.init(Dense(jnp.ones((400, 50))), 50, key)
    np.testing.assert_array_equal(wide.dense(), wide.base.dense())
    assert float(jnp.std(wide.a)) == pytest.approx(400**-0.5, rel=0.02)  # 20,000 draws: 0.5 %


def test_no_gradient_reaches_the_base(key):
    lora, *_ = trained(key)
    for product in (lambda w: w.dense(), lambda w: w.matmul(jnp.ones((2, 8)))):
        found = jax.grad(lambda w, product=product: (product(w) ** 2).sum())(lora)
        assert not np.any(found.base.w) and np.all(found.a != 0) and np.all(found.b != 0)


ONES = jnp.ones((4, 3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(ONES, ONES), "a has rank 3, b has rank 4"),
        (lambda: LowRank(ONES, jnp.ones(3)), r"b must have shape \[in, out\]"),
        (lambda: LowRank.truncate(ONES, 0), r"rank=0 is outside 1\.\.3"),
        (lambda: LowRank.truncate(ONES, 4), r"rank=4 is outside 1\.\.3"),
        (lambda: LoRA(Dense(ONES), ONES, ONES), "a has rank 3, b has rank 4"),
        (lambda: LoRA(Dense(ONES), ONES, jnp.ones((3, 4))), r"a @ b has shape \(4, 4\)"),
        (lambda: LoRA(Dense(ONES), jnp.ones((5, 3)), jnp.ones((3, 3))), r"has shape \(5, 3\)"),
        (lambda: LoRA.init(Dense(ONES), 0, jax.random.key(0)), r"rank=0 is outside 1\.\.3"),
        (lambda: LoRA.init(Dense(ONES), 4, jax.random.key(0)), r"rank=4 is outside 1\.\.3"),
    ],
)
def test_bad_factors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
