"""`check_layer` passes a plain layer, and fails one broken layer for each line of its contract."""

import itertools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ffnlab.testing import check_layer

X = jax.random.normal(jax.random.key(1), (2, 4))


class Scale(nnx.Module):
    """The least that a layer is; the broken ones differ from it in one thing."""

    def __init__(self, key, axes=("embed",)):
        self.scale = nnx.Param(jax.random.normal(key, (4,)), axes=axes)

    def __call__(self, x):
        return x * self.scale[...].astype(x.dtype)


class Shared(Scale):
    """One parameter at two places."""

    def __init__(self, key):
        super().__init__(key)
        self.again = self.scale


class Nameless(Scale):
    """A parameter that says no axes."""

    def __init__(self, key):
        super().__init__(key)
        self.shift = nnx.Param(jnp.zeros(4))


class Bare(Scale):
    """An array outside of a Variable."""

    def __init__(self, key):
        super().__init__(key)
        self.shift = nnx.data(jax.random.normal(key, (4,)))


class Counting(Scale):
    """Counts its calls."""

    def __init__(self, key):
        super().__init__(key)
        self.calls = nnx.Variable(jnp.zeros(()), axes=())

    def __call__(self, x):
        self.calls[...] += 1
        return super().__call__(x)


class Drawing(Scale):
    """Draws numbers that no key was given for."""

    def __call__(self, x):
        return super().__call__(x) + next(count)


class Growing(Scale):
    """Has a parameter whose shape depends on the key."""

    def __init__(self, key):
        super().__init__(key)
        size = 1 + int(jax.random.key_data(key)[-1])
        self.more = nnx.Param(jnp.ones(size), axes=(None,))


class Detached(Scale):
    """Stops the gradient of its parameters."""

    def __call__(self, x):
        return x * jax.lax.stop_gradient(self.scale[...]).astype(x.dtype)


class Infinite(Scale):
    """Has a gradient that is not finite."""

    def __call__(self, x):
        return super().__call__(x) + 0 * jnp.sqrt(0 * x)


class Cut(Scale):
    """Stops the gradient of its input."""

    def __call__(self, x):
        return super().__call__(jax.lax.stop_gradient(x))


class Wide(Scale):
    """Computes in float32 whatever it is given."""

    def __call__(self, x):
        return x * self.scale[...]


class Unsaved(Scale):
    """Has an array of a dtype that checkpoints do not take."""

    def __init__(self, key):
        super().__init__(key)
        self.codes = nnx.Variable(jnp.zeros(4, jnp.uint4), axes=(None,))


count = itertools.count()
BROKEN = {
    "it is a module": lambda key: {"scale": jnp.ones(4)},
    "the same key gives another": lambda key: Scale(jax.random.key(next(count))),
    "its axes: axes=None": Nameless,
    "its axes: axes=.'a', 'b'": lambda key: Scale(key, axes=("a", "b")),
    "without graph updates: ValueError: Duplicate": Shared,
    "lies outside of a Variable": Bare,
    "changes nothing: a call changes": Counting,
    "changes nothing: the same call has other bits": Drawing,
    "compiles nothing: 1 programs": Growing,
    "gradients flow: those of its parameters are all zero": Detached,
    "gradients flow: those of its input are all zero": Cut,
    "gradients flow: those of its input are not finite": Infinite,
    "dtype of the input: of bfloat16 it is float32": Wide,
    "saved and restored": Unsaved,
}


def test_a_plain_layer_passes():
    check_layer(Scale, X)


def test_ids_are_an_input_and_calls_are_free():
    check_layer(Scale, jnp.arange(4), call=lambda layer, ids: layer(layer.scale[...][ids]))


@pytest.mark.parametrize("said", BROKEN)
def test_each_line_of_the_contract_is_held(said):
    with pytest.raises(AssertionError, match=f"the layer breaks its contract: .*{said}"):
        check_layer(BROKEN[said], X)
