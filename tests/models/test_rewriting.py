"""Tests of ffnlab.models.rewriting: keys of places."""

import jax
import pytest

from ffnlab.errors import ConfigError
from ffnlab.models.rewriting import key_of


def test_a_key_is_of_its_seed_and_its_place():
    found = {
        tuple(jax.random.key_data(key_of(seed, path)).tolist())
        for seed in (0, 1, 2**32 - 1)
        for path in ("layers[0].ffn", "layers[1].ffn")
    }
    assert len(found) == 6


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_draws_as_another_is_refused(seed):
    """jax takes both, and makes the keys of 2^32 - 1 and of 0 of them."""
    with pytest.raises(ConfigError, match=f"seed={seed} must lie in"):
        key_of(seed, "head")
