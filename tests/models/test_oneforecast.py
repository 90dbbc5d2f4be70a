"""The forecast network: parity with the authors' classes, what its blocks are, what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ffnlab import models, transform
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.oneforecast import load_oneforecast
from ffnlab.graph import Graph
from ffnlab.graph.ends import collected
from ffnlab.graphs import globe_of, make_globe
from ffnlab.graphs.globe import grid_places, joined
from ffnlab.layers.mesh import EdgeMLP, MeshBlock, first_maps, small
from ffnlab.models import OneForecast, OneForecastConfig
from ffnlab.quantization import nearest
from ffnlab.weights import Int8
from tests.fixtures.oneforecast import record

BOXES = (0.0, 30.0, 105.0, 160.0, 10.0, 30.0, -95.0, -35.0)
TOLERANCE = 1e-4  # of the card, float32
run = jax.jit(lambda model, x, globe: model(x, globe))


def config_of(name, **more):
    """That of a recorded network."""
    width, blocks = record.SIZES[name]
    gated = name == "OneForecast"
    given = {"level": record.LEVEL, "refined": BOXES if gated else (), "gated": gated}
    fields = record.FIELDS
    return OneForecastConfig(
        record.GRID, fields, fields, width=width, blocks=blocks, **given, **more
    )


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "oneforecast" / "official.npz") as saved:
        return dict(saved)


def weights(official, name):
    """Numbers of the authors' network by their names."""
    shapes = json.loads(official["shapes"].tobytes())[name]
    return {key: record.drawn(key, tuple(shape)) for key, shape in shapes.items()}


def test_official_weights_forecast_the_same(official, tmp_path):
    name = "OneForecast"
    save_file(weights(official, name), tmp_path / "weights.safetensors")
    config = config_of(name)
    model = load_oneforecast(tmp_path / "weights.safetensors", config)
    assert type(model) is OneForecast
    x = jnp.asarray(record.drawn("x", (*record.GRID, record.FIELDS)))
    places = grid_places(record.GRID, config.latitudes, config.longitudes)
    ends = [official[f"{part}_ends"].astype(int) for part in ("up", "mesh", "down")]
    globe = joined(places, official["vertices"], *map(tuple, ends))
    found = run(model, x, globe)
    assert np.abs(official[name]).max() > 0.5
    np.testing.assert_allclose(found, official[name], atol=TOLERANCE)


def test_official_weights_of_graphcast_forecast_nearly_the_same(official, tmp_path):
    """Of its graph nothing is recorded, and rounding decides about twelve edges up to the mesh."""
    save_file(weights(official, "GraphCast"), tmp_path / "weights.safetensors")
    config = config_of("GraphCast")
    model = load_oneforecast(tmp_path / "weights.safetensors", config)
    x = jnp.asarray(record.drawn("x", (*record.GRID, record.FIELDS)))
    found = run(model, x, globe_of(config))
    np.testing.assert_allclose(found, official["GraphCast"], atol=0.03)


def test_official_weights_that_are_not_all_of_it_or_more(official, tmp_path):
    found, file = weights(official, "GraphCast"), tmp_path / "weights.safetensors"
    config = config_of("GraphCast")

    def refused(arrays, message):
        save_file(arrays, file)
        with pytest.raises(FormatError, match=message):
            load_oneforecast(file, config)

    one = "processor.processor_layers.0.edge_mlp.lin_src"
    refused({k: v for k, v in found.items() if k != one}, f"has no tensor '{one}'")
    refused(found | {"more": np.zeros(1, np.float32)}, "more is not part of the model")
    refused(found | {one: found[one][:1]}, r"float32\[1, 16\], the model has float32\[16, 16\]")
    refused(found | {one: found[one] * np.nan}, "NaN")
    file.write_bytes(b"nothing")
    with pytest.raises(FormatError, match="cannot be read"):
        load_oneforecast(file, config)


@pytest.fixture(scope="module")
def mesh():
    """A graph, edges, nodes; node 4 has no edge."""
    random = np.random.default_rng(0)
    graph = Graph.make([0, 1, 2, 3, 1, 0], [1, 0, 1, 1, 2, 3], nodes=5)
    return graph, *(jnp.asarray(random.standard_normal((n, 8)), jnp.float32) for n in (6, 5))


def test_an_edge_mlp_is_that_of_the_three_side_by_side(mesh, key):
    graph, e, x = mesh
    mlp = EdgeMLP(8, 5, 7, key=key)
    whole = jnp.concatenate([e, x[graph.senders], x[graph.receivers]], axis=1)
    parts = [getattr(mlp, f"of_{name}").weight.dense() for name in ("edge", "sender", "receiver")]
    h = whole @ jnp.concatenate(parts) + mlp.of_receiver.bias
    np.testing.assert_allclose(mlp(graph, e, x, x), mlp.finish(h), atol=1e-5)
    bounds = [np.abs(part).max() for part in parts]
    assert max(bounds) <= 24**-0.5 < 1.2 * max(bounds)  # drawn as one map of 24 inputs


def test_gates_lie_between_0_and_1_and_attention_adds_up_to_1(mesh, key):
    graph, e, x = mesh
    block = MeshBlock(8, key=key, heads=3)
    _, h = first_maps([block.edge, block.gate], graph, 5 * e, x, x)
    factor = block.factor(h)
    assert factor.shape == (6, 1) and 0 < factor.min() < factor.max() < 1
    p = block.attention(graph, e)
    assert p.shape == (6, 3) and p.min() > 0
    np.testing.assert_allclose(collected(graph, p), [[1] * 3] * 4 + [[0] * 3], atol=1e-6)
    wanted = np.stack([[np.asarray(p[:, j]) @ (np.asarray(e) * (graph.receivers == i)[:, None])
                        for j in range(3)] for i in range(5)])  # fmt: skip
    found = block.gathered(graph, e).reshape(5, 3, 8)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_with_its_gate_at_1_and_a_sum_it_is_graphcast(mesh, key):
    graph, e, x = mesh
    gated, plain = MeshBlock(8, key=key), MeshBlock(8, key=key, gated=False)
    plain.edge = gated.edge
    forced = jax.tree.map(lambda leaf: leaf, gated)
    last = forced.gate.last
    forced.gate.last = last.replace(jax.tree.map(jnp.zeros_like, last.weight), last.bias + 100.0)
    assert forced.factor(jnp.ones((6, small(8)))).tolist() == [[1.0]] * 6
    np.testing.assert_allclose(forced(graph, e, x)[0], plain(graph, e, x)[0], atol=1e-6)
    summed = collected(graph, plain(graph, e, x)[0])
    wanted = x + plain.node(jnp.concatenate([summed, x], axis=1))
    np.testing.assert_allclose(plain(graph, e, x)[1], wanted, atol=1e-6)


def test_relabelled_nodes_of_the_mesh_change_nothing(mesh, key):
    graph, e, x = mesh
    block, order = MeshBlock(8, key=key), np.array([3, 0, 4, 1, 2])  # new number of each node
    pairs = order[np.asarray(graph.senders)], order[np.asarray(graph.receivers)]
    other = Graph.make(*pairs, nodes=5)
    places = np.lexsort(pairs)
    found = block(other, e[places], x[np.argsort(order)])
    wanted = block(graph, e, x)
    np.testing.assert_allclose(found[0], wanted[0][places], atol=1e-5)
    np.testing.assert_allclose(found[1][order], wanted[1], atol=1e-5)


TINY = OneForecastConfig((3, 4), 2, 1, 0, width=8, blocks=3, heads=2)


@pytest.fixture(scope="module")
def tiny():
    return TINY.make(key=jax.random.key(0)), globe_of(TINY)


def test_several_moments_by_vmap_are_as_one_by_one(tiny, key):
    model, globe = tiny
    x = jax.random.normal(key, (2, 3, 4, 2))
    found = jax.jit(jax.vmap(lambda x, globe: model(x, globe), (0, None)))(x, globe)
    assert found.shape == (2, 3, 4, 1)
    np.testing.assert_allclose(found[1], run(model, x[1], globe), atol=1e-5)


def test_blocks_apart_are_the_same_network(tiny, key):
    model, globe = tiny
    x, apart = jax.random.normal(key, (3, 4, 2)), models.unstack(model)
    assert len(apart.layers) == 3
    np.testing.assert_allclose(run(apart, x, globe), run(model, x, globe), atol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (models.stack(apart), model)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_its_weights_are_rounded_as_any_others(tiny, key):
    model, globe = tiny
    x, (rounded, _) = (
        jax.random.normal(key, (3, 4, 2)),
        transform.apply(nearest(format="int8"), model),
    )
    assert isinstance(rounded.layers.period[0].edge.last.weight, Int8)
    np.testing.assert_allclose(run(rounded, x, globe), run(model, x, globe), atol=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["nothing", "products"])
def test_less_memory_is_the_same_gradient(tiny, key, remat):
    model, globe = tiny
    x, saving = jax.random.normal(key, (3, 4, 2)), models.remat(model, remat)
    gradient = jax.jit(jax.grad(lambda model: jnp.sum(model(x, globe) ** 2)))
    for a, b in zip(*map(jax.tree.leaves, (gradient(model), gradient(saving))), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_bfloat16_stays_bfloat16(tiny, key):
    model, globe = tiny
    narrow = TINY.make(key=jax.random.key(0), dtype=jnp.bfloat16)
    x = jax.random.normal(key, (3, 4, 2))
    found = run(narrow, x.astype(jnp.bfloat16), globe)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), run(model, x, globe), atol=0.1)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 4, 2), r"\[2, 3, 4, 2\]; the model takes \[3, 4, 2\].*jax.vmap"),
        ((4, 3, 2), r"x has shape \[4, 3, 2\]"),
        ((3, 4, 1), r"x has shape \[3, 4, 1\]"),
    ],
)
def test_fields_that_do_not_fit(tiny, shape, message):
    with pytest.raises(ConfigError, match=message):
        tiny[0](jnp.zeros(shape), tiny[1])


def test_the_globe_of_another_grid(tiny):
    with pytest.raises(ConfigError, match=r"globe has 8 places; the model's grid is \[3, 4\]"):
        tiny[0](jnp.zeros((3, 4, 2)), make_globe((2, 4), 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": 2}, "blocks=2 must be at least 3"),
        ({"width": 0}, "width=0"),
        ({"level": -1}, "level=-1"),
        ({"grid": (3,)}, r"grid=\[3\]"),
        ({"refined": (0.0, 1.0)}, "four numbers for each box"),
        ({"latitudes": (3.0, 1.0)}, "latitudes=.* ascending"),
    ],
)
def test_bad_configurations(options, message):
    with pytest.raises(ConfigError, match=message):
        OneForecastConfig(**({"grid": (3, 4), "inputs": 2, "outputs": 2} | options))
