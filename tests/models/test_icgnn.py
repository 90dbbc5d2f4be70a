"""The homogeneous network: loops over nodes and pairs, renumbering, padding, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers.stacking import unstack_modules
from ffnlab.models import ICGNN, ICGNNConfig

USERS = ICGNNConfig(2, 3, edges=2, layers=2, width=4)
LINKS = ICGNNConfig(3, 1, axes=2, layers=2, width=4)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
run = jax.jit(lambda net, **given: net(**given))


def drawn(config, *grid, seed=0):
    """(network with biases that are not 0, its inputs, the last node of each axis absent)."""
    net = config.make(key=jax.random.key(1))
    random = np.random.default_rng(seed)
    net = jax.tree.map(
        lambda leaf: leaf + 0.1 * random.standard_normal(leaf.shape).astype("f4"), net
    )
    valid = np.ones((2, *grid), bool)
    valid[1, -1:] = False
    valid[1, ..., -1:] = False
    given = {"nodes": random.standard_normal((2, *grid, config.nodes)).astype("f4"), "valid": valid}
    if config.edges:
        shape = (2, *grid, *grid, config.edges)
        given["edges"] = random.standard_normal(shape).astype("f4")
    return net, {name: jnp.asarray(value) for name, value in given.items()}


def affine(linear, x):
    y = x @ np.asarray(linear.weight.dense())
    return y if linear.bias is None else y + np.asarray(linear.bias)


def both(mlp, x):
    return affine(mlp.maps[1], np.maximum(affine(mlp.maps[0], x), 0))


def looped(net, nodes, valid, edges=None):
    """What the network is said to compute, of one grid, message by message."""
    nodes, valid = np.asarray(nodes), np.asarray(valid)
    places = [p for p in np.ndindex(valid.shape) if valid[p]]
    x = {p: both(net.embed, nodes[p]) for p in places}
    for one in unstack_modules(net.rounds, net.config.layers):
        new = {}
        for p in places:
            carried = []
            for axis in range(valid.ndim):
                near = [o for o in places if o != p and shares(o, p, axis)]
                sent = [message(one, x, p, o, axis, edges, net.config) for o in near]
                carried.append(np.mean(sent, 0) if sent else np.zeros(net.config.width))
            m = affine(one.message, np.concatenate(carried))
            new[p] = x[p] + both(one.update, np.concatenate([x[p], m]))
        x = new
    return {p: both(net.out, x[p]) for p in places}


def shares(a, b, axis):
    """Whether two places differ on one axis alone."""
    return all(i == j for k, (i, j) in enumerate(zip(a, b, strict=True)) if k != axis)


def message(one, x, p, other, axis, edges, config):
    near = affine(one.near, x[other])[axis * config.width : (axis + 1) * config.width]
    if config.edges:
        near = near + affine(one.own, x[p]) + affine(one.edge, np.asarray(edges)[*p, *other])
    return np.maximum(near, 0)


@pytest.mark.parametrize(("config", "grid"), [(USERS, (4,)), (LINKS, (3, 4))])
def test_the_network_is_its_messages_and_its_nodes_have_no_numbers(config, grid):
    net, given = drawn(config, *grid)
    found = np.asarray(run(net, **given))
    for i in range(2):
        for place, out in looped(net, *(given[name][i] for name in given)).items():
            np.testing.assert_allclose(found[i][place], out, **CLOSE)
    # Renumbered along every axis: outputs are renumbered alike.
    random = np.random.default_rng(3)
    orders = [random.permutation(size) for size in grid]
    turned = dict(given)
    for axis, order in enumerate(orders, start=1):
        turned = {name: jnp.take(value, order, axis) for name, value in turned.items()}
        if config.edges:
            turned["edges"] = jnp.take(turned["edges"], order, axis + 1)
    wanted = found[:, *np.ix_(*orders)]
    np.testing.assert_allclose(run(net, **turned), wanted, **CLOSE)


@pytest.mark.parametrize(("config", "grid"), [(USERS, (4,)), (LINKS, (3, 4))])
def test_absent_nodes_are_read_by_none(config, grid):
    net, given = drawn(config, *grid)
    valid = given["valid"]
    strange = given | {"nodes": jnp.where(valid[..., None], given["nodes"], 1e3)}
    if config.edges:
        there = (valid[:, :, None] & valid[:, None])[..., None]
        strange["edges"] = jnp.where(there, given["edges"], -1e3)
    np.testing.assert_allclose(
        np.asarray(run(net, **strange))[valid], np.asarray(run(net, **given))[valid], **CLOSE
    )


def test_a_single_node_and_none_have_finite_outputs_and_slopes():
    net, given = drawn(USERS, 2)
    for valid in (jnp.array([[True, False]] * 2), jnp.zeros((2, 2), bool)):
        slopes = jax.grad(lambda net, v=valid: jnp.sum(run(net, **given | {"valid": v}) ** 2))(net)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slopes))


def test_first_maps_are_drawn_as_the_one_map_they_are():
    wide = ICGNNConfig(2, 2, edges=2, layers=1, width=256).make(key=jax.random.key(0)).rounds
    for linear in (wide.near, wide.own, wide.edge):
        assert float(linear.weight.dense().std()) == pytest.approx((2 / 514) ** 0.5, rel=0.1)
    alone = ICGNNConfig(2, 2, axes=2, layers=1, width=256).make(key=jax.random.key(0)).rounds
    assert alone.own is None and alone.edge is None
    assert float(alone.near.weight.dense().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.1)


def test_half_precision_is_near(key):
    config = ICGNNConfig(2, 2, edges=2, width=8)
    nodes = jax.random.normal(key, (2, 3, 2))
    edges = jax.random.normal(key, (2, 3, 3, 2))
    net = config.make(key=key)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (net, nodes, edges))
    found = half[0](half[1], edges=half[2])
    assert found.dtype == jnp.bfloat16
    exact = net(nodes, edges=edges)
    off = jnp.abs(found.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
    assert 0 < off < 5 * 2**-8  # five roundings to bfloat16, whose unit is 2**-8


def test_what_is_refused():
    net, given = drawn(USERS, 2)
    links = ICGNN(LINKS, key=jax.random.key(0))
    x, edges = given["nodes"], given["edges"]
    for call, said in (
        (lambda: net(x[..., :1], edges=edges), r"nodes \[2, 2, 1\]: .* 1 axes, 2 numbers each"),
        (lambda: net(x), r"edges None: this network takes \[2, 2, 2, 2\] here"),
        (lambda: net(x, edges=edges[:, :1, :1]), r"edges \[2, 1, 1, 2\]"),
        (lambda: links(jnp.ones((2, 2, 3))), r"nodes \[2, 2, 3\]: .* 2 axes"),
        (lambda: links(jnp.ones((2, 2, 2, 3)), edges=edges), "takes None here"),
        (lambda: ICGNNConfig(2, 2, axes=3), "axes=3"),
        (lambda: ICGNNConfig(2, 2, edges=1, axes=2), "axes=2, edges=1"),
        (lambda: ICGNNConfig(2, 2, edges=-1), "edges=-1"),
        (lambda: ICGNNConfig(2, 2, layers=0), "layers=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            call()
