"""Tests of the test set-up itself: what every other test relies on."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from ffnlab import errors


def test_eight_cpu_devices():
    assert jax.default_backend() == "cpu"
    assert len(jax.devices()) == 8


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("a warning", stacklevel=1)


def test_annotations_are_checked_at_the_call():
    with pytest.raises(TypeCheckError):
        errors.require(3, extra="run")


def test_standard_promotion_outside_the_strict_folders():
    assert (jnp.ones(2, jnp.bfloat16) + jnp.ones(2)).dtype == jnp.float32


def test_the_key_is_typed(key):
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_fixtures_folder(fixtures):
    assert fixtures.name == "fixtures" and fixtures.is_dir()
