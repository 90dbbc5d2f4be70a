"""Forward learning against whole runs of the authors' code, recorded: every way, every layer.

The recorded runs (`tests/fixtures/forward_gnn/record.py`) end each layer by early stopping and go
back to its best parameters, so that equal weights at the end are equal steps, equal validations,
equal ends of layers and equal inputs of the next. Both sides compute in float64.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import tree
from ffnlab.data import LabelledNodes
from ffnlab.graph import Graph, with_self_loops
from ffnlab.learning import (
    ForwardGNNOptions,
    GraphBatch,
    GraphInputs,
    forward_gnn,
    node_batch,
    node_question,
)
from ffnlab.learning.forward_gnn.batches import with_virtual_nodes
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from tests.fixtures.forward_gnn import record

TOLERANCE = {"GCN": 1e-9, "SAGE": 1e-9, "GAT": 1e-6}  # attention is float32 in any case
LAYERS = {"GCN": "gcn", "SAGE": "sage", "GAT": "gat"}
WAYS = {
    "sf": {},
    "la": {"objective": "label_appending"},
    "vn": {"objective": "virtual_nodes"},
    "top2input": {"top_down": "input"},
    "top2loss": {"top_down": "loss"},
    "links": {"objective": "links"},
    "links_top": {"objective": "links", "top_down": "input"},
}
PLACES = {
    "w": "linear.w.value.w",
    "near": "near.w.value.w",
    "own": "own.w.value.w",
    "sending": "sending.value",
    "receiving": "receiving.value",
}


def of_run(name):
    """(convolution, options, whether graphs have self loops)."""
    conv, is_both, is_alternating = record.RUNS[name]
    ends = {"every": record.EVERY, "patience": record.PATIENCE, "limit": record.EPOCHS}
    way = WAYS[name.rsplit("_", 1)[0]] | {"temperature": 0.7, "both_ways": is_both}
    options = ForwardGNNOptions(**way, **ends, alternating=is_alternating)
    return conv, options, conv != "SAGE"


def optimizer_of(options):
    """Theirs, at the recorded rate."""
    parts = [optax.clip_by_global_norm(1.0)] if options.top_down == "loss" else []
    if (options.objective, options.top_down) != ("links", "input"):
        parts.append(optax.add_decayed_weights(5e-4))
    return optax.chain(*parts, optax.adam(record.RATE))


def place(conv, name):
    """The path of a recorded parameter."""
    return ("own.b.value" if conv == "SAGE" else "b.value") if name == "b" else PLACES[name]


def network(name, conv, options):
    """The network with the recorded first weights."""
    sizes = [record.widths(name)[0][0], record.HIDDEN, record.HIDDEN]
    if options.form == "top_down":
        sizes = [record.WIDTH, *sizes[1:], 0 if options.objective == "links" else record.CLASSES]
    heads = 4 if conv == "GAT" else 1
    config = GraphNetworkConfig(tuple(sizes), LAYERS[conv], heads, form=options.form)
    model = GraphNetwork(config, key=jax.random.key(0))
    seed, new = 10 * list(record.RUNS).index(name), {}
    for i, pair in enumerate(record.widths(name)):
        for part, value in record.weights(conv, *pair, seed + i).items():
            new[f"layers[{i}].{place(conv, part)}"] = jnp.asarray(value)
    assert len(new) == len(jax.tree.leaves(model))
    return tree.replace(model, new)


def exact(leaf):
    """A third in float64 where it was one in float32."""
    return np.where(np.isin(leaf, (0, 1)), leaf, np.float64(1 / 3)) if is_thirds(leaf) else leaf


def is_thirds(leaf):
    """Whether an array is of labels."""
    return np.ndim(leaf) == 3 and np.shape(leaf)[-1] == record.CLASSES


def given(name, options, loops, saved):
    """(the batch, what is asked at the end), with what the authors' code drew."""
    drawn = record.graph()
    n, graph = record.NODES, Graph.make(*drawn["edges"].T, nodes=record.NODES)
    if options.objective == "links":
        looped = with_self_loops(graph) if loops else graph
        parts = ("pairs", "pairs_valid", "pairs_test")
        shown = [GraphInputs(drawn["x"], looped, None, drawn[part]) for part in parts]
        labels = [record.joined(drawn[part]).astype(np.int32) for part in parts]
        return GraphBatch(shown[0], labels[0], labels[1], shown[1]), shown[2]
    masks = (drawn[part] for part in ("train", "valid", "test"))
    nodes = LabelledNodes(graph, drawn["x"], drawn["y"].astype(np.int32), *masks)
    batch, asked = (
        jax.tree.map(exact, make(nodes, options, loops=loops))
        for make in (node_batch, node_question)
    )
    if options.objective == "label_appending":
        inputs = dataclasses.replace(batch.inputs, labels=saved[f"{name}.labels"])
        return dataclasses.replace(batch, inputs=inputs), asked

    def with_theirs(inputs):
        x = np.concatenate([drawn["x"], saved[f"{name}.virtual"]])
        return inputs and dataclasses.replace(inputs, x=x)

    batch = dataclasses.replace(
        batch, inputs=with_theirs(batch.inputs), asked=with_theirs(batch.asked)
    )
    if options.objective == "virtual_nodes":
        graphs = []
        for senders, receivers in saved[f"{name}.written"]:
            y = np.full(n, -1)
            y[senders] = receivers - n
            graphs.append(with_self_loops(with_virtual_nodes(graph, y, record.CLASSES)))
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *graphs)
        batch = dataclasses.replace(batch, inputs=dataclasses.replace(batch.inputs, graph=stacked))
    return batch, with_theirs(asked)


QUICK = ("sf_gcn", "vn_gcn", "top2input_gcn")  # of every flow one; the others take as long
CASES = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in record.RUNS
]


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_authors(name, fixtures):
    with np.load(fixtures / "forward_gnn" / "official.npz", allow_pickle=False) as file:
        saved = {key: file[key] for key in file.files if key.startswith(f"{name}.")}
    conv, options, loops = of_run(name)
    close = {"rtol": TOLERANCE[conv], "atol": TOLERANCE[conv]}
    with jax.enable_x64(True):
        model = network(name, conv, options)
        batch, asked = given(name, options, loops, saved)
        rule = forward_gnn(batch, options, optimizer_of(options))
        state = rule.init(model, jax.random.key(0))
        rule.check(state, batch)
        steps = int(sum(saved[f"{name}.epochs"] + 1))
        for _ in range(steps):
            before = int(state.layer)
            state, _ = rule.step(state, batch)
        assert (before, int(state.layer)) == (before, 2) and before < 2, "it ends with that step"
        learned = rule.model(state)
        for i in range(2):
            for part in record.weights(conv, 1, 4, 0):
                found = tree.select(learned, tree.at(f"layers[{i}].{place(conv, part)}"))
                want = saved[f"{name}.{i}.{part}"]
                np.testing.assert_allclose(next(iter(found.values())), want, **close)
        said = np.asarray(rule.predict(state, asked))
        rows = said if options.objective == "links" else said[record.graph()["test"]]
        if (options.objective, options.top_down) == ("links", "none"):
            rows = rows / 2  # their mean counts the norms before layers, which say 0
        np.testing.assert_allclose(rows, saved[f"{name}.said"], **close)
