"""Stacks of any alike modules: bits, values, gradients, axes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, Linear, RMSNorm, Statistic
from ffnlab.layers.stacking import POLICIES, run_stack, stack_modules, unstack_modules


class Named(nnx.Variable):
    """A kind of variable that stacking was not written for."""


class Cell(nnx.Module):
    """A residual map with a norm, a statistic and another variable."""

    def __init__(self, key):
        self.norm = RMSNorm(4)
        self.map = Linear(4, 4, key=key, axes=("embed", "mlp"), bias=True)
        self.mean = Statistic(jax.random.normal(key, (4,)), axes=("embed",))
        self.other = Named(jnp.ones(4), axes=("embed",), kind="x")
        self.plain = Named(jnp.zeros(()))

    def __call__(self, h):
        return h + jnp.tanh(self.map(self.norm(h)) - self.mean[...])


@pytest.fixture(scope="module")
def cells():
    return [Cell(key) for key in jax.random.split(jax.random.key(0), 3)]


def test_apart_and_together_again_is_bit_for_bit(cells):
    stacked = stack_modules(cells)
    for before, after in zip(cells, unstack_modules(stacked, 3), strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(np.testing.assert_array_equal, before, after)
        assert after.other.kind == "x" and after.mean.axes == ("embed",)
    for variable in (stacked.map.w, stacked.map.b, stacked.mean, stacked.other):
        assert variable.axes[0] == "layers" and isinstance(variable, nnx.Variable)
    assert stacked.plain.get_metadata().get("axes") is None


@pytest.mark.parametrize("remat", [None, *POLICIES])
def test_a_stack_gives_values_and_gradients_of_the_list(cells, remat):
    x = jax.random.normal(jax.random.key(1), (2, 4))
    xs = jnp.array([1.0, -1.0, 2.0])

    def listed(cells):
        h, seen = x, []
        for cell, scale in zip(cells, xs, strict=True):
            h = cell(h * scale)
            seen.append(h.sum())
        return (h**2).sum(), (h, jnp.stack(seen))

    def scanned(stacked):
        def call(cell, h, scale):
            h = cell(h * scale)
            return h, h.sum()

        h, seen = run_stack(stacked, x, call, xs=xs, remat=remat)
        return (h**2).sum(), (h, seen)

    gradient = lambda f, m: jax.jit(jax.value_and_grad(f, has_aux=True))(m)  # noqa: E731
    (_, want), of_list = gradient(listed, cells)
    (_, got), of_stack = gradient(scanned, stack_modules(cells))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), want, got)
    for one, other in zip(of_list, unstack_modules(of_stack, 3), strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), one, other
        )


def test_any_alike_modules_and_what_they_say(key):
    mlps = [MLP((3, 5, 3), key=k) for k in jax.random.split(key, 2)]
    x = jnp.ones((4, 3))
    got, seen = run_stack(stack_modules(mlps), x, lambda mlp, h, _: (mlp(h), h))
    np.testing.assert_allclose(got, mlps[1](mlps[0](x)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen, jnp.stack([x, mlps[0](x)]), rtol=1e-5, atol=1e-6)


def test_an_unknown_policy_is_refused(cells):
    with pytest.raises(ConfigError, match="policy='all' is not one of"):
        run_stack(stack_modules(cells), 0.0, lambda m, h, _: (h, None), remat="all")
