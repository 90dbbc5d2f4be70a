"""Rematerialization: the same losses and gradients with less kept for the backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.testing import batches, tiny


def slope(model):
    """The jitted gradient of a loss, and the temporary bytes of its program."""
    tokens = jnp.tile(batches()[0], (8, 8))
    grad = jax.jit(jax.grad(lambda m: m(tokens).var())).lower(model).compile()
    return grad(model), grad.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_stay_and_memory_falls(stacked):
    model = models.stack(tiny()) if stacked else tiny()
    expected, whole = slope(model)
    for policy in ("nothing", "products"):
        found, less = slope(models.remat(model, policy))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)
        if stacked:  # without a scan the compiler may undo it
            assert less < whole


def test_a_model_with_a_cache_decodes_as_before():
    model, tokens = tiny(), batches()[0]
    run = jax.jit(lambda m: m.extend(tokens, m.init_cache(2, 12))[0])
    np.testing.assert_array_equal(run(models.remat(model, "nothing")), run(model))


def test_other_policies_are_refused():
    with pytest.raises(ConfigError, match="policy='all' is not one of"):
        models.remat(tiny(), "all")
    assert models.remat(models.remat(tiny(), "nothing"), None).remat is None
