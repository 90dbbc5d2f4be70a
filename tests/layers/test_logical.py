"""Layouts: what is in use decides how activations are cut, also in what is traced already."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from ffnlab import compat
from ffnlab.errors import ConfigError
from ffnlab.layers.logical import LAYOUT, ambient, constrain, using

CUSTOM = {"batch": ("data",), "mlp": ("model",)}


@pytest.fixture
def mesh():
    return compat.make_mesh((2, 4), ("data", "model"))


def cut(run, mesh, x=None):
    """How a function leaves its argument on a mesh."""
    with jax.set_mesh(mesh):
        return run(jnp.ones((8, 8)) if x is None else x).sharding.spec


def test_a_layout_holds_within_its_context_alone():
    assert ambient() == LAYOUT
    with using(CUSTOM):
        assert ambient() == CUSTOM
        with using({}):
            assert ambient() == {}
        assert ambient() == CUSTOM
    assert ambient() == LAYOUT


def test_constrain_follows_the_layout_in_use(mesh):
    run = lambda: jax.jit(lambda x: constrain(x, ("batch", "mlp")))  # noqa: E731
    with using(CUSTOM):
        assert cut(run(), mesh) == PartitionSpec("data", "model")
    with using({"batch": ("model",)}):
        assert cut(run(), mesh)[0] == "model"
    assert "data" not in str(cut(run(), mesh)), "the default layout has no such axis"


def test_no_trace_of_another_layout_is_run(mesh):
    """One jitted function, called by itself and within another, under three layouts."""
    inner = jax.jit(lambda x: constrain(x, ("batch", "mlp")))
    for run in (inner, jax.jit(lambda x: inner(x)), lambda x: jax.jit(lambda y: inner(y))(x)):
        with using(CUSTOM):
            assert cut(run, mesh) == PartitionSpec("data", "model")
        with using({"batch": ("model",)}):
            assert cut(run, mesh)[0] == "model"
        with using(CUSTOM):
            assert cut(run, mesh) == PartitionSpec("data", "model")


def test_equal_layouts_share_a_trace(mesh):
    traced = []

    @jax.jit
    def run(x):
        traced.append(1)
        return constrain(x, ("batch", "mlp"))

    cut(run, mesh)
    with using(dict(reversed(LAYOUT.items()))):
        cut(run, mesh)
    assert len(traced) == 1


def test_what_has_a_path_must_divide(mesh):
    x, axes = jnp.ones((8, 6)), ("batch", "mlp")
    keep = jax.jit(lambda x: constrain(x, axes))
    name = jax.jit(lambda x: constrain(x, axes, path="batch[0]"))
    with using(CUSTOM):
        assert cut(keep, mesh, x)[0] == "data" and "model" not in str(cut(keep, mesh, x))
        with pytest.raises(ConfigError, match=r"batch\[0\]: axis 'mlp' of size 6 .* 4 \(model=4\)"):
            cut(name, mesh, x)
    assert name(x) is not None, "without a mesh nothing has to divide"
