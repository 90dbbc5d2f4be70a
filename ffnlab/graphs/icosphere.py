"""Triangles on a sphere: an icosahedron split again and again, and finer in some boxes.

A multimesh has the vertices of its finest level and the edges of all levels, so that a few steps
along edges go around the globe. Level l has 10 * 4^l + 2 vertices. Refined boxes are split once
more than the rest: their new vertices come after the others, and at the border some lie in the
middle of an edge of a triangle that was not split.

All of this runs once, on the host, in float64.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.errors import ConfigError, at_least

__all__ = ["Box", "Triangles", "edges_of", "icosahedron", "multimesh", "refined", "split"]

GOLDEN = (1 + math.sqrt(5)) / 2
DIGITS = 6  # of a coordinate; vertices that agree in them are one
MOST = 9  # levels, 2.6 million vertices


class Triangles(NamedTuple):
    """A surface of triangles.

    Attributes:
      vertices: on the unit sphere, [n, 3] float64.
      faces: vertices of each, counterclockwise from outside, [f, 3] int64.
    """

    vertices: Float[np.ndarray, "n 3"]
    faces: Int[np.ndarray, "f 3"]


class Box(NamedTuple):
    """Part of a sphere between two parallels and two meridians, degrees, borders included."""

    south: float
    north: float
    west: float
    east: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> "Box":
        """The box of four numbers.

        Raises:
          ConfigError: there are not four, or a box of them would be empty or off the sphere.
        """
        if len(numbers) != 4:
            raise ConfigError(f"box={list(numbers)} must be four: south, north, west, east")
        box = cls(*numbers)
        if not (-90 <= box.south < box.north <= 90 and -180 <= box.west < box.east <= 180):
            raise ConfigError(
                f"box={list(numbers)} must be south < north in -90..90 and west < east in -180..180"
            )
        return box


def icosahedron() -> Triangles:
    """20 triangles between 12 vertices, turned so that one faces up and one down.

    >>> icosahedron().faces.shape, icosahedron().vertices.shape
    ((20, 3), (12, 3))
    """
    signs = itertools.product((1.0, -1.0), (GOLDEN, -GOLDEN))
    corners = np.array([v for a, b in signs for v in ((a, b, 0), (0, a, b), (b, 0, a))])
    turn = math.pi / 2 - math.asin(GOLDEN / math.sqrt(3))  # half the angle between two faces, less
    c, s = math.cos(turn), math.sin(turn)
    vertices = corners @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])
    apart = np.linalg.norm(vertices[:, None] - vertices, axis=-1)
    near = np.isclose(apart, 2.0)  # the length of an edge before it is scaled
    faces = [
        t
        for t in itertools.combinations(range(12), 3)
        if near[t[0], t[1]] and near[t[1], t[2]] and near[t[0], t[2]]
    ]
    outward = [t if np.linalg.det(vertices[list(t)]) > 0 else t[::-1] for t in faces]
    unit = vertices / np.linalg.norm(vertices, axis=1, keepdims=True)
    return Triangles(unit, np.array(outward))


def split(mesh: Triangles, chosen: Bool[np.ndarray, "f"] | None = None) -> Triangles:
    """Every chosen triangle as four, by the middles of its edges pushed out to the sphere.

    Args:
      mesh: what is split.
      chosen: which faces; all when None. The faces of the result are those of these alone.
    Returns:
      the old vertices, then the new ones.
    """
    faces = mesh.faces if chosen is None else mesh.faces[chosen]
    a, b, c = faces.T
    low, high = np.sort(np.stack([a, b, b, c, c, a], 1).reshape(-1, 2), axis=1).T
    n = len(mesh.vertices)
    edges, place = np.unique(low * n + high, return_inverse=True)
    middles = mesh.vertices[np.stack(np.divmod(edges, n), 1)].sum(1)
    middles /= np.linalg.norm(middles, axis=1, keepdims=True)
    ab, bc, ca = (place.reshape(-1, 3) + n).T
    parts = [(a, ab, ca), (ab, b, bc), (ca, bc, c), (ab, bc, ca)]
    smaller = np.concatenate([np.stack(part, 1) for part in parts])
    return Triangles(np.concatenate([mesh.vertices, middles]), smaller)


def refined(mesh: Triangles, box: Box) -> Triangles:
    """The mesh with the triangles whose centroids lie in a box split once more.

    The latitude of a centroid is asin of its height, though it lies below the sphere, as the
    authors have it.
    """
    centroids = mesh.vertices[mesh.faces].mean(1)
    lat = np.degrees(np.arcsin(centroids[:, 2]))
    lon = np.degrees(np.arctan2(centroids[:, 1], centroids[:, 0]))
    inside = (box.south <= lat) & (lat <= box.north) & (box.west <= lon) & (lon <= box.east)
    if not inside.any():
        raise ConfigError(f"box={list(box)} has no triangle of the mesh inside; use a larger one")
    local = split(mesh, inside)
    faces = np.concatenate([local.faces, mesh.faces[~inside]])
    return without_twins(Triangles(local.vertices, faces))


def without_twins(mesh: Triangles) -> Triangles:
    """The mesh with vertices of one place as the first of them: boxes that touch share some."""
    rounded = np.round(mesh.vertices, DIGITS) + 0.0  # no negative zeros
    _, first, place = np.unique(rounded, axis=0, return_index=True, return_inverse=True)
    kept = np.sort(first)
    number = np.searchsorted(kept, first)[place.reshape(-1)]
    return Triangles(mesh.vertices[kept], number[mesh.faces])


@functools.lru_cache(maxsize=4)
def multimesh(level: int, boxes: tuple[Box, ...] = ()) -> tuple[Triangles, float]:
    """All levels of an icosphere as one, refined in boxes.

    Args:
      level: splits of the icosahedron, 0..9.
      boxes: refined one after the other.
    Returns:
      the vertices of the finest level, then those of boxes, with the faces of every level; and the
      longest edge of the finest level before it was refined.
    Raises:
      ConfigError: another level, or a box without a triangle.

    >>> mesh, longest = multimesh(1)
    >>> len(mesh.vertices), len(mesh.faces), len(edges_of(mesh)[0])
    (42, 100, 300)
    """
    at_least(0, level=level)
    if level > MOST:
        raise ConfigError(f"level={level} must be at most {MOST}")
    meshes = [icosahedron()]
    for _ in range(level):
        meshes.append(split(meshes[-1]))
    finest = meshes[-1]
    ends = finest.vertices[np.stack(edges_of(finest))]
    longest = float(np.linalg.norm(ends[0] - ends[1], axis=1).max())
    last = finest
    for box in boxes:
        last = refined(last, box)
    faces = [mesh.faces for mesh in meshes] + ([last.faces] if boxes else [])
    whole = Triangles(last.vertices, np.concatenate(faces))
    for array in whole:
        array.flags.writeable = False  # it is shared by all who ask for it
    return whole, longest


def edges_of(mesh: Triangles) -> tuple[Int[np.ndarray, "e"], Int[np.ndarray, "e"]]:
    """(senders, receivers) of the edges of all faces, in both directions, each once."""
    a, b, c = mesh.faces.T
    n, forth = len(mesh.vertices), (np.concatenate([a, b, c]), np.concatenate([b, c, a]))
    keys = np.concatenate([forth[0] * n + forth[1], forth[1] * n + forth[0]])
    senders, receivers = np.divmod(np.unique(keys), n)
    return senders, receivers
