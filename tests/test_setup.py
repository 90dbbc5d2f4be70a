"""Tests of the test set-up itself: what every other test relies on."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array, Float, TypeCheckError

from ffnlab import errors
from tests.shape_checks import checked


def test_eight_cpu_devices():
    assert jax.default_backend() == "cpu"
    assert len(jax.devices()) == 8


def test_warnings_are_errors():
    with pytest.raises(UserWarning):
        warnings.warn("a warning", stacklevel=1)


def test_annotations_are_checked_at_the_call():
    with pytest.raises(TypeCheckError):
        errors.require(3, extra="run")


def test_axes_of_one_name_have_one_size():
    @checked
    def product(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
        return a @ b if len(b) < 4 else b

    inner = jnp.ones((2, 3)), jnp.ones((3, 2))
    assert product(*inner).shape == (2, 2) and product(*inner[::-1]).shape == (3, 3)
    with pytest.raises(TypeCheckError, match=r"parameter 'b'(.|\n)*k.*3"):
        product(inner[0], jnp.ones((4, 2)))
    with pytest.raises(TypeCheckError, match="return"):
        product(jnp.ones((2, 4)), jnp.ones((4, 3)))


def test_what_is_decorated_keeps_what_it_is():
    @checked
    @dataclasses.dataclass
    class Pair:
        left: Float[Array, "n"]
        right: Float[Array, "n"]

        @property
        @checked
        def size(self) -> int:
            return len(self.left)

    assert Pair(jnp.ones(2), right=jnp.ones(2)).size == 2
    with pytest.raises(TypeCheckError, match="right"):
        Pair(jnp.ones(2), jnp.ones(3))
    fields = checked(staticmethod(lambda n: n)), checked(classmethod(lambda cls, n: n))
    assert [type(field) for field in fields] == [staticmethod, classmethod]


def test_an_error_inside_is_raised_as_it_is():
    calls = []

    @checked
    def fails(a: Float[Array, "n"]) -> Float[Array, "n"]:
        calls.append(1)
        errors.require(3, extra="run")
        return a

    with pytest.raises(TypeCheckError, match="require"):
        fails(jnp.ones(2))
    assert len(calls) == 1, "the body does not run again"


def test_standard_promotion_outside_the_strict_folders():
    assert (jnp.ones(2, jnp.bfloat16) + jnp.ones(2)).dtype == jnp.float32


def test_the_key_is_typed(key):
    assert jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def test_fixtures_folder(fixtures):
    assert fixtures.name == "fixtures" and fixtures.is_dir()
