"""Networks on graphs on eight devices: weights cut by their names, graphs whole or one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab.graph import Graph, disjoint, pad, with_self_loops
from ffnlab.learning import backprop
from ffnlab.losses import masked
from ffnlab.models import GraphNetworkConfig
from ffnlab.parallel import create, make_step, parse_mesh, place_batch, shard

NODES, LABELLED, EDGES = 12, 5, 40


def network(layer="gcn"):
    config = GraphNetworkConfig((8, 16, 16, 8), layer, heads=4 if layer == "gat" else 1)
    return config.make(key=jax.random.key(0))


def example(seed):
    """A graph with features and the classes of some nodes; alike in size for all seeds."""
    random = np.random.default_rng(seed)
    edges = random.integers(NODES - 1, size=(2, 12 + seed))
    graph = pad(with_self_loops(Graph.make(*edges, nodes=NODES - 1)), NODES, EDGES)
    x = random.normal(size=(NODES, 8)).astype(np.float32)
    y = np.where(np.arange(NODES) < LABELLED, random.integers(8, size=NODES), -1).astype(np.int32)
    return {"x": x, "graph": graph}, y


def loss(model, batch):
    """Mean cross-entropy of the nodes with a class."""
    return masked(lambda inputs: model(**inputs), batch)


def check_near(found, want):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        if jnp.issubdtype(b.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


SLOW = [pytest.param(layer, marks=pytest.mark.slow) for layer in ("sage", "gat")]


@pytest.mark.parametrize("layer", ["gcn", *SLOW])
def test_weights_are_cut_by_their_names_and_the_graph_is_whole(layer):
    mesh, key = parse_mesh("fsdp=2,tp=4"), jax.random.key(0)
    rule, batch = backprop(loss, optax.sgd(0.1)), example(0)
    want, told = rule.step(rule.init(network(layer), key), batch)
    state = create(lambda model: rule.init(model, key), (shard(network(layer), mesh),), mesh)
    placed = place_batch(batch, mesh)
    assert all(leaf.is_fully_replicated for leaf in jax.tree.leaves(placed[0]["graph"]))
    found, metrics = make_step(rule, mesh)(state, placed)
    for part in found.model.layers:
        maps = [getattr(part, name) for name in ("linear", "own", "near") if hasattr(part, name)]
        specs = [m.weight.w.sharding.spec for m in maps]
        assert specs and set(specs) == {PartitionSpec("fsdp", "tp")}
    check_near(found.model, want.model)
    np.testing.assert_allclose(metrics["loss"], told["loss"], rtol=1e-5)


def test_graphs_of_a_batch_lie_each_on_its_own_device():
    """Two of sixteen on each; gradients are those of all of them side by side."""
    examples, mesh, model = [example(seed) for seed in range(16)], parse_mesh("dp=8"), network()
    graph = disjoint([inputs["graph"] for inputs, _ in examples])
    x, y = (
        np.concatenate(part)
        for part in zip(*((inputs["x"], y) for inputs, y in examples), strict=True)
    )
    valued = jax.value_and_grad(lambda model, batch: loss(model, batch)[0])
    want = jax.jit(valued)(model, ({"x": x, "graph": graph}, y))
    batch = jax.tree.map(lambda *leaves: np.stack(leaves), *examples)
    placed = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("dp")))
    senders = placed[0]["graph"].senders
    assert senders.sharding.shard_shape(senders.shape) == (2, EDGES)

    def part(model, batch):
        each = jax.vmap(valued, (None, 0))(model, batch)
        return jax.lax.pmean(jax.tree.map(lambda leaf: leaf.mean(0), each), "dp")

    specs = (PartitionSpec(), PartitionSpec("dp"))
    run = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False)
    check_near(jax.jit(run)(model, placed), want)
