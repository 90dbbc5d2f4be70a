"""Sources side by side, of unequal rows, and a graph among them that is never cut where it has no
rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from ffnlab.data import ArrayBatches, PackedBatches, Parted, TextBatches, Zipped
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.layers.logical import batch_axes
from ffnlab.learning import backprop
from ffnlab.learning.accumulate import cut_rows
from ffnlab.parallel import LoopOptions, batch_shardings, parse_mesh, place_batch, train
from ffnlab.parallel.sharding import place_part
from ffnlab.weights import AxisNames, register


@register
@dataclasses.dataclass(frozen=True)
class Graphs:
    """Graphs of the same three edges: features of each graph by column, [nodes, b]."""

    edges: np.ndarray
    features: np.ndarray

    def leaf_axes(self):
        return Graphs(AxisNames((None,)), AxisNames((None, "batch")))


def graphs(position, rows=4):
    features = np.random.default_rng(position).normal(size=(3, rows)).astype(np.float32)
    return Graphs(np.array([2, 0, 1]), features)


def vectors():
    return ArrayBatches(np.random.default_rng(1).normal(size=(24, 3)).astype(np.float32), 8)


def loss(model, batch):
    x, graph = batch
    moved = graph.features[graph.edges]
    mean = jnp.mean((x @ model["w"]) ** 2) + jnp.mean((model["w"] @ moved - 1) ** 2)
    return mean, {"edges": jnp.float32(graph.edges.shape[0])}


def test_a_batch_of_each_source():
    text = TextBatches(bytes(range(100)), 2, 5)
    both = Zipped(text, vectors(), graphs)
    assert isinstance(both, Parted)
    for position in (0, 7):
        found = both(position)
        wanted = text(position), vectors()(position), graphs(position)
        jax.tree.map(np.testing.assert_array_equal, found, wanted)
    with pytest.raises(FFNLabError, match="at least one source"):
        Zipped()
    with pytest.raises(FFNLabError, match="source 1 of Zipped is a ndarray, no function of a"):
        Zipped(text, np.zeros(3))


def test_parts_have_the_rows_of_each_source():
    packed = PackedBatches([np.arange(9), np.arange(7), np.arange(11)], 2, 5)
    both = Zipped(packed, vectors(), graphs)
    whole, parts = both(3), [both.part(i, 2)(3) for i in range(2)]
    assert [part[0].tokens.shape for part in parts] == [(1, 6)] * 2, "read as rows alone"
    joined = jax.tree.map(
        lambda names, *leaves: (
            np.concatenate(leaves, names.index("batch")) if "batch" in names else leaves[0]
        ),
        batch_axes(whole),
        *parts,
    )
    jax.tree.map(np.testing.assert_array_equal, joined, whole)
    np.testing.assert_array_equal(parts[1][2].edges, whole[2].edges)
    with pytest.raises(FFNLabError, match="batch=4 does not divide into 3"):
        Zipped(graphs).part(0, 3)(0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("place", [place_batch, place_part])
def test_edges_are_whole_on_every_device(place, stacked):
    mesh, batch = parse_mesh("dp=2"), Zipped(vectors(), graphs)(0)
    before = (None,) if stacked else ()
    if stacked:
        batch = jax.tree.map(lambda leaf: np.stack([leaf] * 3), batch)
    vector, graph = batch_shardings(batch, mesh, stacked=stacked)
    assert vector.spec == PartitionSpec(*before, "dp", None)
    assert graph.edges.spec == PartitionSpec(*before, None)
    assert graph.features.spec == PartitionSpec(*before, None, "dp")
    placed = place(batch, mesh, stacked=stacked)
    jax.tree.map(np.testing.assert_array_equal, placed, batch)
    assert placed[1].edges.sharding == graph.edges
    shapes = {shard.data.shape for shard in placed[1].features.addressable_shards}
    assert shapes == {(3,) * stacked + (3, 2)}


def test_names_that_do_not_fit_an_array_are_refused():
    batch = Graphs(np.zeros((3, 2)), np.zeros((3, 4)))
    with pytest.raises(ConfigError, match=r"batch\[0\]: leaf_axes\(\) of Graphs names \(None,\)"):
        batch_axes((batch,))
    with pytest.raises(ConfigError, match=r"batch\[1\].features: axis 'batch' of size 3"):
        batch_shardings((np.zeros(4), graphs(0, 3)), parse_mesh("dp=2"))


def test_rows_are_cut_along_their_own_axis():
    batch = Zipped(vectors(), graphs)(0)
    (x, graph), whole = cut_rows(batch, 2)
    assert graph.edges is None and whole[1].features is None and whole[0] is None
    np.testing.assert_array_equal(whole[1].edges, batch[1].edges)
    for part in range(2):
        np.testing.assert_array_equal(x[part], batch[0][part::2])
        np.testing.assert_array_equal(graph.features[part], batch[1].features[:, part::2])
    with pytest.raises(ConfigError, match=r"batch\[1\].features: microbatches=3 do not divide 4"):
        cut_rows((np.zeros(3), graphs(0)), 3)


@pytest.mark.parametrize(
    ("mesh", "together", "parts"), [("dp=2", 1, 1), ("dp=2", 2, 2), ("", 2, 1), ("", 1, 4)]
)
def test_zipped_batches_train_anywhere(key, mesh, together, parts):
    def run(parts=1, **more):
        rule = backprop(loss, optax.sgd(0.1), microbatches=parts)
        model, batches = {"w": jnp.ones(3)}, Zipped(vectors(), graphs)
        options = LoopOptions(log_every=0)
        return train(rule, model, batches, 4, key=key, options=options, **more)

    wanted, metrics = run().state.model["w"], run().metrics
    found = run(parts, mesh=parse_mesh(mesh) if mesh else None, together=together)
    # Means of a few float32 terms in another order, four steps.
    np.testing.assert_allclose(found.state.model["w"], wanted, rtol=1e-5)
    assert found.metrics["edges"] == metrics["edges"] == 3
