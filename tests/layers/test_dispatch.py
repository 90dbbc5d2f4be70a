"""Experts over a mesh against experts on one device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.layers import MoE, MoESpec, routers
from ffnlab.layers.feed_forward.dispatch import mixed
from ffnlab.parallel import on, parse_mesh, shard
from ffnlab.parallel.sharding import place_batch
from tests.contracts import input_of

ATOL = 1e-5  # float32 sums in another order
D, E = 16, 8


@functools.cache
def moe():
    return MoE(D, MoESpec(E, 2, 24), key=jax.random.key(0), bias=True)


def routing_of(kind, x):
    """Spread evenly, all at one expert, or with padding and a token that was dropped."""
    if kind == "one expert":
        return routers.fixed(jnp.full(x.shape[:2], 5), E)
    valid = jnp.arange(x.shape[1]) < jnp.arange(2, 2 + len(x))[:, None]
    found = routers.softmax_top_k(moe().router(x), 2, valid=valid if kind == "padded" else None)
    return routers.limited(found, 2) if kind == "padded" else found


def value_and_gradient(experts, x, routing):
    def loss(experts, x, weight):
        y = mixed(experts, x, routing._replace(weight=weight))
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(experts, x, routing.weight)
    return found[0][1], found[1]


@pytest.mark.parametrize(
    ("mesh", "kind"),
    [
        ("ep=8", "even"),
        ("ep=8", "one expert"),
        ("dp=2,ep=4", "one expert"),
        ("dp=2,ep=4", "padded"),
    ],
)
def test_a_mesh_equals_one_device(mesh, kind):
    x = input_of((8, 3, D))
    routing = routing_of(kind, x)
    expected = jax.jit(value_and_gradient)(moe().experts, x, routing)
    mesh = parse_mesh(mesh)
    experts = shard(moe().experts, mesh)
    assert not experts.up.weight.dense().sharding.is_fully_replicated
    with on(mesh):
        found = jax.jit(value_and_gradient)(experts, *place_batch((x, routing), mesh))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_rows_are_exchanged_and_no_expert_is_gathered():
    mesh = parse_mesh("ep=8")
    with on(mesh):
        x = place_batch(np.asarray(input_of((8, 3, D))), mesh)
        layer = shard(moe(), mesh)
        compiled = jax.jit(lambda m, x: m(x)[0]).lower(layer, x).compile()
    text = compiled.as_text()
    assert text.count("all-to-all(") >= 3
    for shape in re.findall(r"\[([0-9,]+)\][^=\n]* all-gather\(", text):
        assert np.prod([int(n) for n in shape.split(",")]) < E * D * 24, shape
    np.testing.assert_allclose(compiled(layer, x), moe()(input_of((8, 3, D)))[0], atol=ATOL)


@pytest.mark.parametrize("mesh", ["dp=2,tp=2", "ep=3"])
def test_meshes_that_do_not_cut_experts_sort_rows_where_they_are(mesh):
    x = input_of((4, 3, D))
    mesh = parse_mesh(mesh)
    layer = moe() if "ep" in mesh.shape else shard(moe(), mesh)
    with on(mesh):
        compiled = jax.jit(lambda m, x: m(x)[0]).lower(layer, x).compile()
    assert "all-to-all(" not in compiled.as_text()
    np.testing.assert_allclose(compiled(layer, x), moe()(x)[0], atol=ATOL)
