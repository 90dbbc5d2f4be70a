"""Tests of ffnlab.compat."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ffnlab import compat


def test_mesh_axes_are_automatic():
    mesh = compat.make_mesh((2, 4), ("data", "model"))
    assert mesh.shape == {"data": 2, "model": 4}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_contraction_over_a_sharded_axis_needs_no_annotation():
    mesh = compat.make_mesh((8,), ("model",))
    x = jax.device_put(jnp.ones((3, 8)), NamedSharding(mesh, PartitionSpec(None, "model")))
    w = jax.device_put(jnp.ones((8, 2)), NamedSharding(mesh, PartitionSpec("model", None)))
    assert (jax.jit(jnp.matmul)(x, w) == 8).all()


def test_mesh_on_chosen_devices():
    chosen = jax.devices()[2:4]
    assert list(compat.make_mesh((2,), ("data",), devices=chosen).devices) == chosen


def test_mesh_rejects_unequal_lengths():
    with pytest.raises(ValueError, match="equal lengths"):
        compat.make_mesh((1, 1), ("data",))


def test_a_bare_module_is_the_one_that_its_class_makes():
    made = nnx.List([nnx.Param(jnp.ones(2)), nnx.Param(jnp.zeros(3))])
    parts = {str(i): part for i, part in enumerate(made)}
    bare = compat.bare_module(nnx.List, parts, {"_length": 2})
    assert jax.tree.structure(bare) == jax.tree.structure(made)
    assert hash(jax.tree.structure(bare)) == hash(jax.tree.structure(made))
    bare.append(nnx.Param(jnp.ones(1)))
    made.append(nnx.Param(jnp.ones(1)))
    assert jax.tree.structure(bare) == jax.tree.structure(made)
    assert len(nnx.state(bare)) == 3
