"""Graphs of several kinds of nodes, one of which has classes: a generated one, and Cora's words."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Int32

from ffnlab.data.graphs import cora
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graph import Hetero

__all__ = ["HeteroNodes", "academic", "cora_words"]


class HeteroNodes(NamedTuple):
    """Nodes of several kinds, of one of which classes are learned.

    Attributes:
      graph: the nodes and their relations.
      x: features by kind, [n, d] float32; kinds may have none.
      target: the kind that has classes.
      y: classes of its nodes, [n] int32.
      train, valid, test: which of them they are, [n] bool; none is in two of them.
    """

    graph: Hetero
    x: Mapping[str, Float32[np.ndarray, "_ _"]]
    target: str
    y: Int32[np.ndarray, "n"]
    train: Bool[np.ndarray, "n"]
    valid: Bool[np.ndarray, "n"]
    test: Bool[np.ndarray, "n"]


def academic(
    seed: int = 0,
    *,
    papers: int = 600,
    authors: int = 400,
    venues: int = 20,
    terms: int = 150,
    classes: int = 3,
    width: int = 32,
    signal: float = 0.3,
    inside: float = 4.0,
    train: float = 0.6,
    valid: float = 0.2,
) -> HeteroNodes:
    """Papers with authors, venues and terms that prefer those of their own class.

        P(joined) = (.004, .02, .02 by kind) * (inside in a class, else 1);
        x_paper = signal * centre[y] + N(0, I)

    Classes of all nodes are drawn evenly; those of papers are learned. Other kinds have no
    features.

    Args:
      seed: of everything.
      papers, authors, venues, terms: nodes of each kind.
      classes: how many.
      width: of the papers' features (d); centres are drawn from N(0, I).
      signal: of centres in features.
      inside: how much likelier nodes of one class are joined, 0 to 50.
      train, valid: shares of the papers; the others are for testing.
    Returns:
      relations (author, writes, paper), (paper, at, venue) and (paper, has, term).
    Raises:
      ConfigError: a number out of its range, or so few nodes that a relation has no edges.
    """
    check_seed(seed)
    counts = {"paper": papers, "author": authors, "venue": venues, "term": terms}
    at_least(1, **{f"{kind}s": n for kind, n in counts.items()}, classes=classes, width=width)
    if not (min(train, valid) > 0 and train + valid < 1 and 0 <= inside <= 50):
        raise ConfigError(
            f"train={train}, valid={valid}, inside={inside}: two shares above 0 whose sum is below "
            "1, and 0 to 50 are accepted"
        )
    random = np.random.default_rng(seed)
    labels = {kind: random.integers(classes, size=n) for kind, n in counts.items()}

    def joined(first: str, last: str, p: float) -> tuple[np.ndarray, ...]:
        same = labels[first][:, None] == labels[last]
        return np.nonzero(random.random(same.shape) < np.where(same, inside * p, p))

    graph = Hetero.make(
        counts,
        {
            ("author", "writes", "paper"): joined("author", "paper", 0.004),
            ("paper", "at", "venue"): joined("paper", "venue", 0.02),
            ("paper", "has", "term"): joined("paper", "term", 0.02),
        },
    )
    y = labels["paper"]
    x = signal * random.normal(size=(classes, width))[y] + random.normal(size=(papers, width))
    cuts = np.cumsum([round(train * papers), round(valid * papers)])
    parts = np.split(random.permutation(papers), cuts)
    masks = (np.isin(np.arange(papers), part) for part in parts)
    return HeteroNodes(graph, {"paper": x.astype(np.float32)}, "paper", y.astype(np.int32), *masks)


def cora_words(path: str | Path | None = None) -> HeteroNodes:
    """Cora as papers and words: (paper, cites, paper), both ways, and (paper, has, word).

    The words of a paper are its neighbours, and no features: neither kind has any.

    Args:
      path: as `cora`.
    Returns:
      2,708 papers, 1,433 words, 10,556 citations and 49,216 words in papers; classes and parts as
      `cora` has them.
    Raises:
      FFNLabError, FormatError: as `cora`.
    """
    nodes = cora(path)
    counts = {"paper": nodes.x.shape[0], "word": nodes.x.shape[1]}
    cites = np.asarray(nodes.graph.senders), np.asarray(nodes.graph.receivers)
    relations = {("paper", "cites", "paper"): cites, ("paper", "has", "word"): np.nonzero(nodes.x)}
    return HeteroNodes(Hetero.make(counts, relations), {}, "paper", nodes.y, *nodes[3:])
