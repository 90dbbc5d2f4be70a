"""Networks on graphs: what a stack computes, its scanned form, and that it learns from edges."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ffnlab.data import block_model
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, row_norm, symmetric_norm, with_self_loops
from ffnlab.layers import GAT, GCN, MLP, GraphSAGE
from ffnlab.learning import backprop
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from ffnlab.models.cost import multiply_adds
from ffnlab.models.graph_network import Repeated
from ffnlab.testing import counted, equal
from tests.graph_cases import drawn

GRAPH = with_self_loops(Graph.make(*drawn(0, 20, 9, 9), nodes=9))
KINDS = {"gcn": GCN, "sage": GraphSAGE, "gat": GAT}
DEEP = (3, 8, 8, 8, 4, 4, 4, 4, 2)
TOLERANCE = 1e-6  # the same sums in a loop


def network(layer, sizes=DEEP, **options):
    return GraphNetwork(GraphNetworkConfig(sizes, layer, **options), key=jax.random.key(0))


def inputs(width=3):
    return jax.random.normal(jax.random.key(1), (9, width))


@pytest.mark.parametrize("layer", KINDS)
def test_a_network_is_its_layers_with_a_nonlinearity_between(layer):
    options = {"heads": 2} if layer == "gat" else {}
    model = network(layer, (3, 8, 6, 4), activation="tanh", **options)
    assert [type(part) for part in model.layers] == [KINDS[layer]] * 3
    first, second, third = model.layers
    h = jnp.tanh(second(jnp.tanh(first(inputs(), GRAPH)), GRAPH))
    expected = third(h, GRAPH)
    assert expected.shape == (9, 4)
    np.testing.assert_allclose(model(inputs(), GRAPH), expected, rtol=TOLERANCE, atol=TOLERANCE)
    if layer == "gat":
        assert first.is_joined and second.is_joined and not third.is_joined
        assert third.linear.weight.shape == (6, 8)


@pytest.mark.parametrize(("layer", "norm"), [("gcn", symmetric_norm), ("sage", row_norm)])
def test_weights_of_edges_reach_every_layer(layer, norm):
    model = network(layer, (3, 4, 4, 2))
    x = inputs()
    np.testing.assert_array_equal(model(x, GRAPH), model(x, GRAPH, norm(GRAPH)))
    weights = jax.random.uniform(jax.random.key(2), (GRAPH.num_edges,))
    first, second, third = model.layers
    h = jax.nn.relu(second(jax.nn.relu(first(x, GRAPH, weights)), GRAPH, weights))
    np.testing.assert_allclose(
        model(x, GRAPH, weights), third(h, GRAPH, weights), rtol=TOLERANCE, atol=TOLERANCE
    )


@pytest.mark.parametrize("layer", KINDS)
def test_alike_layers_are_scanned(layer):
    model = network(layer)
    whole = model.stacked()
    assert [p.count for p in whole.layers if isinstance(p, Repeated)] == [2, 3]
    assert len(whole.layers) == 5  # 3-8, twice 8-8, 8-4, thrice 4-4, 4-2
    assert equal(whole.unstacked(), model) and equal(whole.stacked(), whole)
    run = jax.jit(lambda model, x, graph: model(x, graph))
    np.testing.assert_allclose(
        run(whole, inputs(), GRAPH), run(model, inputs(), GRAPH), rtol=TOLERANCE, atol=TOLERANCE
    )
    count = lambda m: str(jax.make_jaxpr(lambda x: m(x, GRAPH))(inputs())).count("weighted")  # noqa: E731
    assert count(whole) < count(model)
    for path, variable in nnx.to_flat_state(nnx.state(whole)):
        value = variable.get_value()
        shape = jax.tree.leaves(value)[0].shape
        assert len(variable.axes) == len(shape)
        assert (variable.axes[0] == "layers") == (path[1] in (1, 3))


def test_what_has_no_alike_layers_stays_as_it_is():
    model = network("gcn", (3, 4, 4))  # the last layer has no nonlinearity
    assert equal(model.stacked(), model)


def test_a_second_graph_of_the_same_sizes_compiles_nothing():
    model, other = network("gcn", (3, 4, 2)), Graph.make(*drawn(3, 25, 9, 9), nodes=9)
    run = jax.jit(lambda model, x, graph: model(x, graph))
    graph = Graph.make(*drawn(4, 25, 9, 9), nodes=9)
    run(model, inputs(), graph)
    with counted() as count:
        run(model, inputs(), other)
    assert count.programs == 0


def unit(x):
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


@pytest.mark.parametrize("layer", KINDS)
def test_layers_of_hidden_rows_pass_on_directions(layer):
    options = {"heads": 2} if layer == "gat" else {}
    model = network(layer, (3, 8, 6), form="layerwise", **options)
    first, second = model.layers
    h = jax.nn.relu(first(unit(inputs()), GRAPH))
    expected = jax.nn.relu(second(unit(h), GRAPH))
    np.testing.assert_allclose(model(inputs(), GRAPH), expected, rtol=1e-5, atol=TOLERANCE)
    assert layer != "gat" or second.is_joined, "as all hidden layers"
    long = network(layer, (3, 8, 8, 8), form="layerwise", **options)
    np.testing.assert_allclose(
        long.stacked()(inputs(), GRAPH), long(inputs(), GRAPH), rtol=1e-5, atol=TOLERANCE
    )


@pytest.mark.parametrize("above", [0, 2])
def test_layers_that_are_told_from_above_read_zeros_on_the_way_up(above):
    model = network("gcn", (3, 4, 5, above), form="top_down")
    assert model.config.pairs == [(3 + 5, 4), (4 + above, 5)]
    first, second = model.layers
    padded = lambda x, width: jnp.concatenate([unit(x), jnp.zeros((9, width))], 1)  # noqa: E731
    h = jax.nn.relu(first(padded(inputs(), 5), GRAPH))
    expected = jax.nn.relu(second(padded(h, above), GRAPH))
    np.testing.assert_allclose(model(inputs(), GRAPH), expected, rtol=1e-5, atol=TOLERANCE)
    told = model.read(first, inputs(), inputs(5))
    np.testing.assert_allclose(told, jnp.concatenate([unit(inputs()), unit(inputs(5))], 1), 1e-6)


def test_rows_of_zeros_have_a_gradient():
    """Which ReLU makes of rows: a norm's own gradient is none there."""
    model = network("gcn", (3, 4, 2), form="layerwise")
    gradient = jax.grad(lambda m: m(jnp.zeros((9, 3)), GRAPH).sum())(model)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": (3, 4, 2), "form": "deep"}, "form='deep' is not one of"),
        ({"sizes": (3, 4), "form": "top_down"}, "three or more widths"),
        ({"sizes": (3, 0, 2), "form": "top_down"}, "all but the last positive"),
        ({"sizes": (3, 4, -1), "form": "top_down"}, "all but the last positive"),
        ({"sizes": (3, 4, 6), "layer": "gat", "heads": 4, "form": "layerwise"}, "heads=4 must div"),
        ({"sizes": (3,)}, "sizes="),
        ({"sizes": (3, 0)}, "sizes="),
        ({"sizes": (3, 4, 2), "layer": "gin"}, "layer='gin' is not one of"),
        ({"sizes": (3, 4, 2), "activation": "cube"}, "activation='cube' is not one of"),
        ({"sizes": (3, 4, 2), "heads": 2}, "heads=2 must be 1 but for"),
        ({"sizes": (3, 4, 2), "layer": "gat", "heads": 0}, "heads=0"),
        ({"sizes": (3, 4, 6, 2), "layer": "gat", "heads": 4}, "heads=4 must divide hidden"),
    ],
)
def test_configurations_that_mean_nothing_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        GraphNetworkConfig(**options)


def test_attention_takes_no_weights():
    with pytest.raises(ConfigError, match="find their own"):
        network("gat", (3, 2))(inputs(), GRAPH, jnp.ones(GRAPH.num_edges))


def test_products_with_a_graph_count_as_they_cost():
    model, (e, n) = network("gcn", (3, 8, 2)), (GRAPH.num_edges, GRAPH.num_nodes)
    found = multiply_adds(model, inputs(), GRAPH)
    assert found == n * (3 * 8 + 8 * 2) + e * (3 + 2)  # on the narrower sides: 3 of 3-8, 2 of 8-2


def loss(model, batch):
    """Mean cross-entropy of the nodes of a mask; a model of features alone gets no graph."""
    (x, *graph), y, mask = batch
    nats = optax.softmax_cross_entropy_with_integer_labels(model(x, *graph), y)
    return jnp.sum(nats * mask) / mask.sum(), {}


def learned(model, given, found):
    """Accuracy on the nodes for testing after a hundred steps on those for training."""
    rule = backprop(loss, optax.adam(1e-2))
    state = rule.init(model, jax.random.key(0))
    batch = (given, jnp.asarray(found.y), jnp.asarray(found.train))
    for _ in range(100):
        state, metrics = rule.step(state, batch)
    assert np.isfinite(metrics["loss"])
    guess = jax.jit(lambda model, given: model(*given).argmax(-1))(state.model, given)
    return float(np.mean(np.asarray(guess)[found.test] == found.y[found.test]))


@pytest.mark.slow
def test_edges_say_what_features_alone_do_not(key):
    found = block_model(0)
    x, graph = jnp.asarray(found.x), with_self_loops(found.graph)
    alone = learned(MLP((16, 16, 4), key=key), (x,), found)
    assert 0.3 < alone < 0.8  # features say something, and not all
    for layer in KINDS:
        better = learned(network(layer, (16, 16, 4)), (x, graph), found)
        # 400 nodes: a difference of 0.1 is three standard errors or more.
        assert better > alone + 0.1, layer
