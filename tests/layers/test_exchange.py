"""Experts over a mesh against experts on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import MoE, MoESpec, routers
from ffnlab.layers.exchange import loads, mixed
from ffnlab.parallel import on, parse_mesh, shard
from ffnlab.parallel.sharding import place_batch
from tests.contracts import input_of

ATOL = 1e-5  # float32 sums in another order
D, E = 16, 8


@functools.cache
def moe():
    return MoE(D, MoESpec(E, 2, 24), key=jax.random.key(0), bias=True)


def routing_of(kind, x):
    """Where tokens go.

    "even": as many to each expert. "one expert": all to one. "few": three experts are asked for,
    and most devices have no row. "one token": the others are padding. "padded": with padding, and
    choices that were dropped.
    """
    tokens = jnp.arange(x.shape[0] * x.shape[1]).reshape(x.shape[:2])
    fixed = {"one expert": tokens * 0 + 5, "few": tokens % 3 * 2}
    if kind != "padded":
        valid = tokens == 4 if kind == "one token" else tokens >= 0
        return routers.fixed(fixed.get(kind, tokens % E), E, valid=valid)
    valid = jnp.arange(x.shape[1]) < jnp.arange(2, 2 + len(x))[:, None]
    return routers.limited(routers.softmax_top_k(moe().router(x), 2, valid=valid), 2)


def value_and_gradient(experts, x, routing, form):
    def loss(experts, x, weight):
        y = mixed(experts, x, routing._replace(weight=weight), form=form)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    found = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(experts, x, routing.weight)
    return found[0][1], found[1]


def sending(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `ragged_all_to_all` is documented to do, from everything that all devices have."""
    me = jax.lax.axis_index(axis_name)
    everywhere = lambda x: jax.lax.all_gather(x, axis_name)  # noqa: E731
    rows, first, sizes, places = map(
        everywhere, (operand, input_offsets, send_sizes, output_offsets)
    )
    for source in range(len(rows)):
        at = jnp.arange(len(output)) - places[source, me]
        mine = (at >= 0) & (at < sizes[source, me])
        new = rows[source][jnp.clip(first[source, me] + at, 0, len(operand) - 1)]
        output = jnp.where(mine[:, None], new, output)
    return jnp.where((recv_sizes == sizes[:, me]).all(), output, jnp.nan)


@functools.cache
def expected(kind, rows):
    x = input_of((rows, 3, D))
    one = jax.jit(functools.partial(value_and_gradient, form=None))
    return one(moe().experts, x, routing_of(kind, x))


KINDS = ("even", "one expert", "one token", "few")


@pytest.mark.parametrize(
    ("mesh", "kinds", "rows", "form"),
    [
        ("ep=8", KINDS, 8, "padded"),
        ("dp=2,ep=4", KINDS, 8, "ragged"),
        pytest.param("ep=8", ("padded",), 8, "ragged", marks=pytest.mark.slow),
        pytest.param("dp=2,ep=4", ("padded", "one expert"), 8, "padded", marks=pytest.mark.slow),
        # Their only row lies on both.
        pytest.param("ep=2,sp=3", ("padded",), 1, "padded", marks=pytest.mark.slow),
        pytest.param("ep=2,sp=3", ("padded",), 1, "ragged", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_equals_one_device(monkeypatch, mesh, kinds, rows, form):
    """No row is dropped, and gradients are those of one device too, of experts, rows and weights.

    XLA has no ragged exchange on a CPU: what it sends is sent by what all devices have.
    """
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", sending)
    x, mesh = input_of((rows, 3, D)), parse_mesh(mesh)
    experts = shard(moe().experts, mesh)
    assert not experts.up.weight.dense().sharding.is_fully_replicated
    step = jax.jit(functools.partial(value_and_gradient, form=form))
    for kind in kinds:
        with on(mesh):
            found = step(experts, x, routing_of(kind, x))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected(kind, rows)), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, atol=ATOL, err_msg=kind)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_ragged_form_is_lowered_where_there_is_one(platform):
    """With its gradient, which sends what came back again."""
    x = input_of((8, 3, D))
    step = jax.jit(functools.partial(value_and_gradient, form="ragged"))
    mesh = parse_mesh("dp=2,ep=4")
    with on(mesh):
        given = jax.eval_shape(lambda: (moe().experts, x, routing_of("padded", x)))
        text = step.trace(*given).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("ragged_all_to_all") >= 4, "there and back, and their gradients"
    with on(mesh), pytest.raises(ConfigError, match=r"form='dense' is not one of \['padded', 'r"):
        mixed(moe().experts, x, routing_of("even", x), form="dense")


def test_rows_are_exchanged_and_nothing_is_gathered():
    mesh = parse_mesh("ep=8")
    layer = shard(moe(), mesh)
    with on(mesh):
        x = place_batch(np.asarray(input_of((8, 3, D))), mesh)
        compiled = jax.jit(lambda m, x: m(x)[0]).lower(layer, x).compile()
    text = compiled.as_text()
    assert text.count("all-to-all(") >= 3
    assert "all-gather(" not in text, "neither an expert nor the scores of the router"
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


def test_loads_are_shares_of_experts_and_of_devices():
    """Of all layers, and of kept choices alone; devices where the mesh cuts the experts."""
    x = input_of((8, 3, D))
    one, few = routing_of("one expert", x), routing_of("few", x)
    dropped = few._replace(kept=few.kept.at[:, 0].set(False))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), one, dropped)
    alone = loads([stacked, few])
    wanted = np.zeros(E)
    wanted[5] = 24
    for token in range(24):
        wanted[token % 3 * 2] += 1 + (token % 3 > 0)
    experts = [float(alone[f"load.expert_{i}"]) for i in range(E)]
    np.testing.assert_allclose(experts, wanted / wanted.sum(), rtol=1e-6)
    assert len(alone) == E
    with on(parse_mesh("dp=2,ep=4")):
        found = loads([stacked, few])
    devices = [float(found[f"load.device_{i}"]) for i in range(4)]
    np.testing.assert_allclose(devices, wanted.reshape(4, 2).sum(1) / wanted.sum(), rtol=1e-6)
    nothing = loads([few._replace(kept=jnp.zeros_like(few.kept))])
    assert not any(nothing.values())
    assert loads([]) == {}
