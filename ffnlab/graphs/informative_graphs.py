"""Generated graphs whose edges hang on features, on structure, or on both (NetInfoF, ICLR 2024).

Nodes are of classes; edges join nodes of one class ("diag") or of two that go together
("offdiag"), as cliques of 4 to 8 nodes or as pairs of such sets, all of one joined to all of the
other, and a few join others. Features are coins that say nothing ("random"), a spectral embedding
of the graph itself ("global"), or that in columns of each class ("local").

What differs from the authors' code (data/synthetic.py): sizes are given, so that small graphs are
too; a feature matrix is no wider than the graph has nodes, less one.
"""

import numpy as np
from jaxtyping import Float, Int

from ffnlab.data import LabelledNodes
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graph import Graph, undirected
from ffnlab.graphs.netinfof_views import adjacency, spectral, walk_counts

__all__ = ["EDGES", "FEATURES", "informative_graph"]

FEATURES = ("random", "global", "local")
EDGES = ("diag", "offdiag")
NOISE = {"diag": 2e-4, "offdiag": 1e-4}  # chance of an edge of other classes
SIZES = (4, 9)  # nodes of a clique, the latter excluded
SEEN_BEFORE = 0.1  # weight of a node that is in a clique already
REPLACED = 0.002  # of features, by uniform noise
WALK = 3  # nodes


def informative_graph(
    features: str = "global",
    edges: str = "diag",
    seed: int = 0,
    *,
    nodes: int = 4000,
    width: int = 800,
    classes: int = 4,
    density: float = 0.01,
    walks: int = 1000,
) -> LabelledNodes:
    """A graph of one kind of each.

    Args:
      features: "random", "global" or "local".
      edges: "diag" or "offdiag".
      seed: of everything.
      nodes: how many; classes are equally large.
      width: of the features, at least one for each class and fewer than nodes.
      classes: how many; even for "offdiag".
      density: share of the pairs of a class, or of two that go together, that are joined, in (0,
        1); every node is in a clique, which may make it more.
      walks: from each node, of features that are an embedding.
    Returns:
      the graph, its classes and features; no node is in a part (`ffnlab.data.node_split`,
      `ffnlab.data.link_split`).
    Raises:
      ConfigError: another kind, or numbers out of range.
    """
    check_seed(seed)
    for name, given, accepted in (("features", features, FEATURES), ("edges", edges, EDGES)):
        if given not in accepted:
            raise ConfigError(f"{name}={given!r} is not one of {list(accepted)}")
    at_least(1, classes=classes, walks=walks)
    if classes % 2 and edges == "offdiag":
        raise ConfigError(f"classes={classes} must be even for edges='offdiag'")
    if nodes < SIZES[1] * classes or not classes <= width < nodes or not 0 < density < 1:
        raise ConfigError(
            f"nodes={nodes}, width={width}, density={density}: {SIZES[1] * classes} nodes or more, "
            f"a width of {classes} to one less than nodes, and a density in (0, 1) are accepted"
        )
    random = np.random.default_rng(seed)
    y = np.arange(nodes) * classes // nodes
    pairs = [(c, c) for c in range(classes)]
    if edges == "offdiag":
        pairs = [(c, c + 1) for c in range(0, classes, 2)]
    groups = [np.flatnonzero(y == c) for c in range(classes)]
    ends = [cliques(groups[a], groups[b], density, random) for a, b in pairs]
    ends.append(noise(y, pairs, NOISE[edges], random))
    graph = undirected(Graph.make(*np.concatenate(ends).T, nodes=nodes))
    none = np.zeros(nodes, bool)
    x = drawn_features(features, graph, y, width, walks, random)
    return LabelledNodes(graph, x.astype(np.float32), y.astype(np.int32), none, none, none)


def cliques(
    one: Int[np.ndarray, "a"],
    other: Int[np.ndarray, "b"],
    density: float,
    random: np.random.Generator,
) -> Int[np.ndarray, "e 2"]:
    """Edges among nodes of one group, or between two, until they are dense and all have some."""
    is_one = one is other
    most = len(one) * (len(one) - 1) / 2 if is_one else len(one) * len(other)
    found: set[tuple[int, int]] = set()
    weight = [np.ones(len(group)) for group in ((one,) if is_one else (one, other))]
    while len(found) <= density * most or any(np.any(w == 1) for w in weight):
        sides = []
        for group, w in zip((one, other), weight, strict=False):
            chosen = random.choice(
                len(group), random.integers(*SIZES), replace=False, p=w / w.sum()
            )
            w[chosen] = SEEN_BEFORE
            sides.append(group[chosen].tolist())
        if is_one:
            nodes = sorted(sides[0])
            found |= {(a, b) for i, a in enumerate(nodes) for b in nodes[i + 1 :]}
        else:
            found |= {(a, b) for a in sides[0] for b in sides[1]}
    return np.array(sorted(found))


def noise(
    y: Int[np.ndarray, "n"],
    pairs: list[tuple[int, int]],
    chance: float,
    random: np.random.Generator,
) -> Int[np.ndarray, "e 2"]:
    """Edges between nodes of classes that do not go together."""
    n = len(y)
    ends = np.sort(random.integers(n, size=(random.binomial(n * (n - 1) // 2, chance), 2)), axis=1)
    goes = np.zeros((y.max() + 1,) * 2, bool)
    for a, b in pairs:
        goes[a, b] = goes[b, a] = True
    return ends[(ends[:, 0] != ends[:, 1]) & ~goes[tuple(y[ends].T)]]


def drawn_features(
    kind: str,
    graph: Graph,
    y: Int[np.ndarray, "n"],
    width: int,
    walks: int,
    random: np.random.Generator,
) -> Float[np.ndarray, "n width"]:
    """Features of one kind."""
    if kind == "random":
        return random.integers(2, size=(len(y), width)).astype(float)
    classes = int(y.max()) + 1
    own = width if kind == "global" else width // classes
    z = spectral(walk_counts(adjacency(graph), walks, WALK, random), own, random)
    x = z = z - z.min()
    if kind == "local":
        x = np.zeros((len(y), width))
        for c in range(classes):
            x[y == c, c * own : (c + 1) * own] = z[y == c]
    is_noise = random.random(x.shape) < REPLACED
    return np.where(is_noise, random.random(x.shape), x)
