"""Narrow models in float64: what float32 leaves open is rounding, and no channel that is small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.models import masked, narrow
from tests.models.test_narrow import CASES, as_off, of_groups
from tests.often import often

TOLERANCE = 1e-13  # of the length of the output: the same sums in another order, float64


def double(leaf):
    """A floating array in float64."""
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


@pytest.mark.standard_promotion  # tables of rotations are float32, made by NumPy
@pytest.mark.parametrize("name", often(CASES, "decoder", "flattened pixels"))
def test_it_is_the_masked_model_to_the_last_bits(name, monkeypatch):
    make, x, keep = CASES[name]
    with jax.enable_x64(True):
        # Norms, softmax and scores are computed in float32 whatever comes: here in float64.
        monkeypatch.setattr(jnp, "float32", jnp.float64)
        model, x = (jax.tree.map(double, tree) for tree in (make(), x))
        forms = (
            model,
            as_off(model, keep),
            narrow(model, keep),
            masked(model, of_groups(model, keep)),
        )
        run = jax.jit(lambda forms: [form(x) for form in forms])
        whole, want, small, multiplied = map(np.asarray, run(forms))
    assert want.dtype == np.float64
    size = np.linalg.norm(want)
    assert np.linalg.norm(whole - want) > 0.05 * size
    for found in (small, multiplied):
        assert np.linalg.norm(found - want) <= TOLERANCE * size
