"""Triangles on a sphere: counts, closed surfaces, refined boxes, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from ffnlab.errors import ConfigError
from ffnlab.graphs import Box, icosahedron, multimesh
from ffnlab.graphs.icosphere import edges_of, split

BOXES = (Box(0, 30, 105, 160), Box(10, 30, -95, -35))  # the authors'


def check_whole(mesh):
    """No edge twice, each both ways, everything in one piece, no two vertices in one place."""
    n, (senders, receivers) = len(mesh.vertices), edges_of(mesh)
    pairs = set(zip(senders.tolist(), receivers.tolist(), strict=True))
    assert len(pairs) == len(senders) and all(a != b and (b, a) in pairs for a, b in pairs)
    joined = coo_array((np.ones(len(senders)), (senders, receivers)), shape=(n, n))
    assert connected_components(joined)[0] == 1
    assert len(np.unique(np.round(mesh.vertices, 6), axis=0)) == n
    np.testing.assert_allclose(np.linalg.norm(mesh.vertices, axis=1), 1, atol=1e-12)


def area(mesh):
    """Of flat triangles, outward ones counted positive."""
    a, b, c = np.moveaxis(mesh.vertices[mesh.faces], 1, 0)
    normal = np.cross(b - a, c - a)
    return 0.5 * np.linalg.norm(normal, axis=1) * np.sign(np.sum(normal * (a + b + c), axis=1))


@pytest.mark.parametrize("level", range(4))
def test_levels_have_the_counts_of_the_formula(level):
    mesh = icosahedron()
    for _ in range(level):
        mesh = split(mesh)
    n, f = 10 * 4**level + 2, 20 * 4**level
    assert mesh.vertices.shape == (n, 3) and mesh.faces.shape == (f, 3)
    assert n - len(edges_of(mesh)[0]) // 2 + f == 2  # Euler: it is closed
    assert area(mesh).min() > 0 and 9 < area(mesh).sum() < 4 * np.pi
    check_whole(mesh)


def test_a_multimesh_has_the_edges_of_all_levels():
    mesh, longest = multimesh(2)
    assert len(edges_of(mesh)[0]) == 60 * (1 + 4 + 16) and 0.28 < longest < 0.34
    check_whole(mesh)
    smaller = set(zip(*map(np.ndarray.tolist, edges_of(icosahedron())), strict=True))
    assert smaller <= set(zip(*map(np.ndarray.tolist, edges_of(mesh)), strict=True))
    with pytest.raises(ValueError, match="read-only"):
        mesh.vertices[0] = 0


def test_two_boxes_add_the_vertices_and_edges_of_the_card():
    mesh, _ = multimesh(2, BOXES)
    assert (len(mesh.vertices), len(edges_of(mesh)[0])) == (206, 1568)
    check_whole(mesh)
    np.testing.assert_array_equal(mesh.vertices[:162], multimesh(2)[0].vertices)


@pytest.mark.parametrize(("boxes", "counts"), [((), (10_242, 81_900)), (BOXES, (12_337, 98_296))])
def test_the_authors_mesh(boxes, counts):
    mesh, _ = multimesh(5, boxes)
    assert (len(mesh.vertices), len(edges_of(mesh)[0])) == counts


@settings(max_examples=15)
@given(
    st.integers(0, 2),
    st.lists(st.tuples(*[st.floats(-1, 1)] * 2, *[st.floats(0.4, 1)] * 2), max_size=3),
)
def test_boxes_anywhere_leave_a_mesh_whole(level, drawn):
    def around(centre, half, most):
        return max(-most, centre - half), min(most, centre + half)

    boxes = tuple(
        Box.of((*around(60 * a, 60 * h, 90.0), *around(90 * b, 90 * w, 180.0)))
        for a, b, h, w in drawn
    )
    try:
        mesh, _ = multimesh(level, boxes)
    except ConfigError as error:
        assert "has no triangle" in str(error)
        return
    check_whole(mesh)
    assert area(mesh).min() > 0


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0.0, 30.0, 10.0), "must be four"),
        ((30.0, 0.0, 10.0, 20.0), "south < north"),
        ((0.0, 30.0, 170.0, 190.0), "west < east in -180..180"),
        ((0.0, float("nan"), 10.0, 20.0), "south < north"),
    ],
)
def test_bad_boxes(numbers, message):
    with pytest.raises(ConfigError, match=message):
        Box.of(numbers)


def test_bad_levels_and_empty_boxes():
    with pytest.raises(ConfigError, match="level=-1"):
        multimesh(-1)
    with pytest.raises(ConfigError, match="level=10 must be at most 9"):
        multimesh(10)
    with pytest.raises(ConfigError, match="has no triangle of the mesh inside"):
        multimesh(1, (Box(0, 0.1, 0, 0.1),))
