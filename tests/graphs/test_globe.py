"""Graphs of a grid and a mesh: the authors' own edges and features, frames, and what is refused."""

import jax
import numpy as np
import pytest
from scipy.spatial import cKDTree

from ffnlab.errors import ConfigError
from ffnlab.graph import Graph
from ffnlab.graphs import globe_of, make_globe, multimesh
from ffnlab.graphs.globe import edge_features, grid_places
from ffnlab.models import OneForecastConfig
from tests.fixtures.oneforecast import record

BOXES = (0.0, 30.0, 105.0, 160.0, 10.0, 30.0, -95.0, -35.0)
TOLERANCE = 1e-5  # of features: theirs are made in float32, of positions rounded in another order


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "oneforecast" / "official.npz") as saved:
        return dict(saved)


@pytest.fixture(scope="module")
def ours():
    return make_globe(record.GRID, record.LEVEL, refined=BOXES)


@pytest.fixture(scope="module")
def numbers(official):
    """Our number of each of the authors' nodes."""
    vertices = multimesh(record.LEVEL, boxes())[0].vertices
    apart, found = cKDTree(vertices).query(official["vertices"])
    assert apart.max() < 1e-6 and len(set(found)) == len(vertices)
    return found


def boxes():
    """The authors' two."""
    from ffnlab.graphs.globe import boxes_of

    return boxes_of(BOXES)


def as_set(ends, features):
    """Features by edge."""
    return {tuple(pair): row for pair, row in zip(ends.T.tolist(), features, strict=True)}


@pytest.mark.parametrize("name", ["up", "mesh", "down"])
def test_edges_and_their_features_are_the_authors(ours, official, numbers, name):
    """All but a few of which rounding decides, see the next tests."""
    senders, receivers = official[f"{name}_ends"].astype(int)
    senders = senders if name == "up" else numbers[senders]
    receivers = receivers if name == "down" else numbers[receivers]
    wanted = as_set(np.stack([senders, receivers]), official[f"{name}_edges"])
    graph = getattr(ours, name)
    found = as_set(np.stack([graph.senders, graph.receivers]), getattr(ours, f"{name}_edges"))
    assert len(found) == graph.num_edges == len(wanted)
    assert len(found.keys() - wanted.keys()) <= {"up": 2, "mesh": 0, "down": 18}[name]
    for edge in found.keys() & wanted.keys():
        np.testing.assert_allclose(found[edge], wanted[edge], atol=TOLERANCE)


def test_edges_up_that_differ_are_at_the_very_end_of_reach(ours, official, numbers):
    vertices, longest = multimesh(record.LEVEL, boxes())
    places = grid_places(record.GRID, (-90.0, 90.0), (-180.0, 180.0))
    senders, receivers = official["up_ends"].astype(int)
    theirs = set(zip(senders.tolist(), numbers[receivers].tolist(), strict=True))
    mine = set(zip(ours.up.senders.tolist(), ours.up.receivers.tolist(), strict=True))
    for place, node in mine ^ theirs:
        apart = np.linalg.norm(places[place] - vertices.vertices[node])
        assert apart == pytest.approx(0.6 * longest, abs=1e-6)


def test_triangles_that_differ_are_as_near(ours, official, numbers):
    vertices = multimesh(record.LEVEL, boxes())[0].vertices
    places = grid_places(record.GRID, (-90.0, 90.0), (-180.0, 180.0))
    senders, receivers = official["down_ends"].astype(int)
    theirs = vertices[numbers[senders[np.argsort(receivers, kind="stable")]]].reshape(-1, 3, 3)
    mine = vertices[np.asarray(ours.down.senders)].reshape(-1, 3, 3)
    near = [np.linalg.norm(corners.mean(1) - places, axis=1) for corners in (mine, theirs)]
    np.testing.assert_allclose(*near, atol=1e-6)


def test_nodes_are_told_degrees_as_radians(ours, official, numbers):
    np.testing.assert_allclose(np.asarray(ours.nodes)[numbers], official["nodes"], atol=3e-5)


def test_counts_are_those_of_the_card(ours):
    counts = [graph.num_edges for graph in (ours.up, ours.mesh, ours.down)]
    assert (ours.mesh.num_nodes, ours.places, counts) == (206, 288, [556, 1568, 864])


def test_the_authors_size():
    for boxes, counts in (((), (45_864, 86_400)), (BOXES, (49_233, 86_400))):
        globe = make_globe((120, 240), 5, refined=boxes)
        assert (globe.up.num_edges, globe.down.num_edges) == counts


def test_a_frame_is_that_of_its_receiver():
    """A sender a little to the east, north, or above of a receiver anywhere."""
    random = np.random.default_rng(0)
    up = random.standard_normal((20, 3))
    up /= np.linalg.norm(up, axis=1, keepdims=True)
    east = np.cross([0, 0, 1], up)
    east /= np.linalg.norm(east, axis=1, keepdims=True)
    near = np.concatenate([up + 0.1 * axis for axis in (up, east, np.cross(up, east))])
    edges = Graph.make(np.arange(60), np.arange(60), nodes=60)
    found = edge_features(edges, near, np.tile(up, (3, 1)))
    wanted = np.concatenate([np.repeat(np.eye(3), 20, axis=0), np.ones((60, 1))], axis=1)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_grid_leaves_out_its_last_parallel_and_its_first_meridian():
    places = grid_places((2, 4), (-90.0, 90.0), (-180.0, 180.0)).reshape(2, 4, 3)
    np.testing.assert_allclose(places[0], [[0, 0, -1]] * 4, atol=1e-6)
    wanted = [[0, -1, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0]]
    np.testing.assert_allclose(places[1], wanted, atol=1e-6)
    region = grid_places((2, 2), (0.0, 60.0), (0.0, 90.0)).reshape(2, 2, 3)
    np.testing.assert_allclose(region[0, 1], [0, 1, 0], atol=1e-6)


def test_a_globe_is_an_argument_that_no_mesh_of_devices_cuts(ours):
    leaves, structure = jax.tree.flatten(ours)
    assert all(isinstance(leaf, jax.Array) for leaf in leaves)
    names = jax.tree.leaves(ours.leaf_axes(), is_leaf=lambda x: isinstance(x, tuple))
    assert all(set(axes) == {None} and len(axes) == leaf.ndim
               for axes, leaf in zip(names, leaves, strict=True))  # fmt: skip
    config = OneForecastConfig(record.GRID, 3, 3, record.LEVEL, BOXES, 8, 3)
    assert jax.tree.structure(globe_of(config)) == structure


@pytest.mark.parametrize(
    ("grid", "level", "more", "message"),
    [
        ((12,), 1, {}, r"grid=\[12\] must be a height and a width"),
        ((0, 24), 1, {}, "height=0"),
        ((2, 4), 10, {}, "level=10"),
        ((2, 4), 1, {"refined": (0.0, 30.0, 10.0)}, "must be four"),
        ((2, 4), 1, {"latitudes": (10.0, -10.0)}, "latitudes=.* ascending"),
        ((2, 4), 1, {"longitudes": (0.0, 200.0)}, "longitudes=.* in -180..180"),
    ],
)
def test_bad_input(grid, level, more, message):
    with pytest.raises(ConfigError, match=message):
        make_globe(grid, level, **more)
