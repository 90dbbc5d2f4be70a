"""The graphs of a forecast: a grid of places, a multimesh, and the edges between the two.

    up    a place to its (at most) four nearest nodes that are within 0.6 of the longest edge of the
          finest level
    down  to a place from the three corners of the triangle, of any level, whose centroid is nearest

What is kept of the authors' code though it looks odd: the grid has neither its last parallel nor
its first meridian; nodes are told cos and sin of their degrees, as if those were radians; and
positions of the grid are rounded to float32 before a place is asked for its own latitude, so that
at a pole, where every meridian ends, frames are turned by half a circle. Where two choices are
equally good (a place at the very end of a node's reach, or in the middle between two triangles)
rounding decides, there as here, and not always alike.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from ffnlab.errors import ConfigError, at_least
from ffnlab.graph import Bipartite, Graph
from ffnlab.graph.edges import Edges
from ffnlab.graphs.icosphere import Box, Triangles, edges_of, multimesh
from ffnlab.models.globe import Globe
from ffnlab.models.oneforecast import OneForecastConfig

__all__ = ["boxes_of", "globe_of", "grid_axes", "joined", "grid_places", "make_globe"]

NEAREST, REACH = 4, 0.6
Ends = tuple[Int[np.ndarray, "e"], Int[np.ndarray, "e"]]


def globe_of(config: OneForecastConfig) -> Globe:
    """The globe that a model of this configuration runs on.

    Raises:
      ConfigError: as `make_globe`.
    """
    return make_globe(
        config.grid,
        config.level,
        refined=config.refined,
        latitudes=config.latitudes,
        longitudes=config.longitudes,
    )


def make_globe(
    grid: Sequence[int],
    level: int,
    *,
    refined: Sequence[float] = (),
    latitudes: Sequence[float] = (-90.0, 90.0),
    longitudes: Sequence[float] = (-180.0, 180.0),
) -> Globe:
    """Builds the graphs of a grid and a multimesh, on the host.

    Args:
      grid: parallels and meridians, (h, w).
      level: of the multimesh (`multimesh`).
      refined: south, north, west, east of each box in which the finest level is split once more,
        one box after the other; degrees.
      latitudes, longitudes: what the grid covers, see `grid_axes`.
    Returns:
      a globe of h * w places.
    Raises:
      ConfigError: sizes below 1, a level, box or bounds that there are not; or a place that is
        near no node, or no node near any place.

    >>> globe = make_globe((12, 24), 2)
    >>> globe.mesh.num_nodes, globe.mesh.num_edges, globe.down.num_edges
    (162, 1260, 864)
    """
    if len(grid) != 2:
        raise ConfigError(f"grid={list(grid)} must be a height and a width")
    mesh, longest = multimesh(level, boxes_of(refined))
    places = grid_places(grid, latitudes, longitudes)
    nodes = mesh.vertices.astype(np.float32)
    up = up_ends(places, nodes, float(np.float32(REACH) * np.float32(longest)))
    if not len(up[0]):
        raise ConfigError(f"grid={list(grid)}, level={level}: no place is near a node of the mesh")
    return joined(places, nodes, up, edges_of(mesh), down_ends(places, mesh))


def joined(
    places: Float[np.ndarray, "p 3"],
    nodes: Float[np.ndarray, "m 3"],
    up: tuple[Int[np.ndarray, "u"], Int[np.ndarray, "u"]],
    mesh: tuple[Int[np.ndarray, "e"], Int[np.ndarray, "e"]],
    down: tuple[Int[np.ndarray, "v"], Int[np.ndarray, "v"]],
) -> Globe:
    """The globe of places and nodes that are joined as given.

    Args:
      places, nodes: on the unit sphere.
      up, mesh, down: (senders, receivers) of the edges from places to nodes, among nodes, and from
        nodes to places.
    Raises:
      FFNLabError: an index out of range.
    """
    counts = len(places), len(nodes)
    graph = Graph.make(*mesh, nodes=counts[1])
    to_mesh = Bipartite.make(*up, num_senders=counts[0], num_receivers=counts[1])
    to_grid = Bipartite.make(*down, num_senders=counts[1], num_receivers=counts[0])
    globe = Globe(
        to_mesh,
        graph,
        to_grid,
        jnp.asarray(node_features(nodes)),
        jnp.asarray(edge_features(to_mesh, places, nodes)),
        jnp.asarray(edge_features(graph, nodes, nodes)),
        jnp.asarray(edge_features(to_grid, nodes, places)),
    )
    globe.check()
    return globe


def boxes_of(numbers: Sequence[float]) -> tuple[Box, ...]:
    """Boxes of a flat row of numbers, four for each.

    Raises:
      ConfigError: as `Box.of`.
    """
    return tuple(Box.of(numbers[i : i + 4]) for i in range(0, len(numbers), 4))


def grid_axes(
    grid: Sequence[int], latitudes: Sequence[float], longitudes: Sequence[float]
) -> tuple[Float[np.ndarray, "h"], Float[np.ndarray, "w"]]:
    """Parallels and meridians of a grid, degrees.

    Of the h + 1 parallels that divide `latitudes` evenly the last is left out, of the w + 1
    meridians of `longitudes` the first, which on a whole globe is also the last.

    Raises:
      ConfigError: sizes below 1, or bounds that are not ascending degrees on the sphere.

    >>> [axis.tolist() for axis in grid_axes((2, 2), (-90.0, 90.0), (-180.0, 180.0))]
    [[-90.0, 0.0], [0.0, 180.0]]
    """
    at_least(1, height=grid[0], width=grid[1])
    for name, bounds, most in (("latitudes", latitudes, 90), ("longitudes", longitudes, 180)):
        if len(bounds) != 2 or not -most <= bounds[0] < bounds[1] <= most:
            raise ConfigError(
                f"{name}={list(bounds)} must be two ascending numbers in -{most}..{most}"
            )
    (south, north), (west, east) = latitudes, longitudes
    return np.linspace(south, north, grid[0] + 1)[:-1], np.linspace(west, east, grid[1] + 1)[1:]


def grid_places(
    grid: Sequence[int], latitudes: Sequence[float], longitudes: Sequence[float]
) -> Float[np.ndarray, "p 3"]:
    """Places of a grid on the unit sphere, parallel by parallel, in float32; see `grid_axes`."""
    axes = grid_axes(grid, latitudes, longitudes)
    # Rounded as the authors' are: some places lie exactly at the end of a node's reach.
    radians = (axis.astype(np.float32) * np.float32(np.pi) / np.float32(180) for axis in axes)
    lat, lon = np.meshgrid(*radians, indexing="ij")
    flat = np.cos(lat)
    return np.stack([flat * np.cos(lon), flat * np.sin(lon), np.sin(lat)], -1).reshape(-1, 3)


def up_ends(
    places: Float[np.ndarray, "p 3"], nodes: Float[np.ndarray, "m 3"], reach: float
) -> Ends:
    """Edges from places to the nearest nodes within reach of them."""
    apart, near_nodes = nearest(nodes, places, NEAREST)
    place = np.repeat(np.arange(len(places)), NEAREST).reshape(near_nodes.shape)
    near = apart <= reach
    return place[near], near_nodes[near]


def nearest(
    points: Float[np.ndarray, "n 3"], places: Float[np.ndarray, "p 3"], count: int
) -> tuple[Float[np.ndarray, "p *k"], Int[np.ndarray, "p *k"]]:
    """(distances to the points nearest to each place, which those are)."""
    # SciPy takes a third of a second to import, which commands without a globe do not need.
    from scipy.spatial import KDTree

    return KDTree(points).query(places, k=count)


def down_ends(places: Float[np.ndarray, "p 3"], mesh: Triangles) -> Ends:
    """Edges to places from the corners of the triangle with the nearest centroid."""
    centroids = mesh.vertices[mesh.faces].mean(1)
    _, faces = nearest(centroids, places, 1)
    return mesh.faces[faces].reshape(-1), np.repeat(np.arange(len(places)), 3)


def node_features(nodes: Float[np.ndarray, "m 3"]) -> Float[np.ndarray, "m 3"]:
    """(cos of the latitude, sin and cos of the longitude), of degrees taken for radians."""
    lat, lon = np.degrees(angles(nodes))
    return np.stack([np.cos(lat), np.sin(lon), np.cos(lon)], 1).astype(np.float32)


def angles(positions: Float[np.ndarray, "p 3"]) -> Float[np.ndarray, "2 p"]:
    """Latitudes and longitudes of positions, radians, float64."""
    x, y, z = positions.astype(np.float64).T
    return np.stack([np.arcsin(np.clip(z, -1, 1)), np.arctan2(y, x)])


def edge_features(
    edges: Edges, senders: Float[np.ndarray, "m 3"], receivers: Float[np.ndarray, "n 3"]
) -> Float[np.ndarray, "e 4"]:
    """Where the sender of each edge is, seen from its receiver, over the longest edge.

    The frame: straight up at the receiver, east, and north; a node at a pole has the east of the
    meridian that its coordinates say.

    Args:
      edges: of the graph.
      senders, receivers: their positions on the unit sphere.
    Returns:
      (up, east, north, length) in the order of the edges, float32.
    """
    s = senders.astype(np.float64)[np.asarray(edges.senders)]
    r = receivers.astype(np.float64)[np.asarray(edges.receivers)]
    lat, lon = angles(r)
    none = np.zeros_like(lat)
    up = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], 1)
    east = np.stack([-np.sin(lon), np.cos(lon), none], 1)
    north = np.cross(up, east)
    seen = np.stack([np.sum(s * axis, 1) for axis in (up, east, north)], 1) - [1.0, 0.0, 0.0]
    length = np.linalg.norm(seen, axis=1, keepdims=True)
    return (np.concatenate([seen, length], 1) / max(length.max(), 1e-12)).astype(np.float32)
