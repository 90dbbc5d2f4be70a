"""One row times a large dense matrix: another form of the same product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import Embedding
from ffnlab.weights import Dense, Transposed
from ffnlab.weights.dense import LARGE, is_memory_bound

D_IN, D_OUT = 1030, 1024  # just over the limit, and not a multiple of the partial sums


def forms(w):
    """The same matrix stored both ways, and as the table of a tied head."""
    table = Embedding(D_OUT, D_IN, key=jax.random.key(0))
    table.w.set_value(Dense(w.T))
    return {
        "dense": Dense(w).matmul,
        "transposed": Transposed(Dense(w.T)).matmul,
        "tied head": table.logits,
    }


@pytest.mark.parametrize("lead", [(), (1,), (1, 1)])
@pytest.mark.parametrize("form", ["dense", "transposed", "tied head"])
def test_one_row_equals_the_same_row_among_others(form, lead, key):
    w = jax.random.normal(key, (D_IN, D_OUT))
    rows = jax.random.normal(key, (3, D_IN))
    x = rows[1].reshape(*lead, D_IN)
    assert w.nbytes >= LARGE and is_memory_bound(x, w) and not is_memory_bound(rows, w)
    matmul = forms(w)[form]
    expected = np.asarray(rows, np.float64) @ np.asarray(w, np.float64)
    # Float32 sums of 1,030 products, relative to the largest output.
    bound = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(matmul(rows), expected, atol=bound)
    np.testing.assert_allclose(matmul(x), expected[1].reshape(*lead, D_OUT), atol=bound)


@pytest.mark.parametrize("form", ["dense", "transposed", "tied head"])
def test_gradients_of_one_row(form, key):
    w, x = jax.random.normal(key, (D_IN, D_OUT)), jax.random.normal(key, (1, D_IN))
    dx, dw = jax.grad(lambda x, w: forms(w)[form](x).sum(), argnums=(0, 1))(x, w)
    np.testing.assert_allclose(dx, w.sum(axis=1)[None], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dw, jnp.broadcast_to(x.T, w.shape), rtol=1e-6)
