"""NetInfoF: Measuring and Exploiting Network Usable Information (ICLR 2024, openreview KY8ZNcljVU).

What of a graph says which nodes are joined is told before anything is trained: a score for each of
five embeddings (`netinfof_views`), from how well its similarities, in bins, tell the answer
(`netinfof_core`). It is a probe; what it looks at is a tree of embeddings.

    views = {name: view_of(z, pairs) for name, z in embeddings(x, split.graph).items()}
    print(netinfof()(views, [scored_pairs(split)]))

The same of classes of nodes is `netinfof_nodes`. Embeddings are made useful by the linear model of
`ffnlab.graphs.sparse_group` on products of their coordinates (`pair_rows`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from ffnlab.analysis.parts import bars
from ffnlab.data import LinkSplit
from ffnlab.errors import ConfigError, at_least, check_seed
from ffnlab.graphs.netinfof_core import (
    View,
    bin_edges,
    similarities,
    table_of,
    usable_information,
)
from ffnlab.graphs.netinfof_views import VIEWS
from ffnlab.probe import Probe, rows
from ffnlab.report import Report

__all__ = [
    "InformationReport",
    "PairRows",
    "Views",
    "check_views",
    "informed",
    "netinfof",
    "pair_rows",
    "scored_pairs",
]

Views = Mapping[str, View]  # by the names of `VIEWS`, or any others


class PairRows(NamedTuple):
    """Pairs of nodes, for `netinfof`.

    Attributes:
      ends: the two nodes of each.
      joined: whether they are.
      scored: which pairs are scored; the others say where bins begin.
    """

    ends: Int32[np.ndarray, "b 2"]
    joined: Bool[np.ndarray, "b"]
    scored: Bool[np.ndarray, "b"]


@dataclasses.dataclass(frozen=True)
class InformationReport(Report):
    """Scores of embeddings.

    Attributes:
      scores: by name, in (0, 1]: what a guess by the bin alone is right about at least.
      bins: how many there were.
      least: the score of bins that tell nothing.
    """

    scores: Mapping[str, float]
    bins: Mapping[str, int]
    least: float

    def rows(self) -> list[dict[str, object]]:
        """A row for each embedding."""
        return [
            {"view": name, "of": VIEWS.get(name, ""), "information": s, "bins": self.bins[name]}
            for name, s in self.scores.items()
        ]

    def figures(self) -> dict[str, float]:
        """The score of each embedding as "information/name", and that of nothing."""
        found = {f"information/{name}": score for name, score in self.scores.items()}
        return found | {"information_of_nothing": self.least}

    def draw(self, figure: Any) -> None:
        """A bar for each embedding, and a line where there is nothing to know."""
        named = {f"{n}  {VIEWS.get(n, '')}".strip(): s for n, s in self.scores.items()}
        bars(figure, named, "usable information")
        (axes,) = figure.axes
        axes.axvline(self.least, color="0.4", linestyle=":")
        axes.set_xlim(min(self.least, *self.scores.values()) - 0.02, 1)


def netinfof(*, bins: int = 8) -> Probe[Views, tuple]:
    """A probe of how much embeddings say of which nodes are joined.

    It looks at a mapping from names to `View`s with batches of `PairRows`: those that are not
    scored, of the part to learn from, say where bins of equally many begin, whatever they are; the
    table is of those that are scored.

    Args:
      bins: of similarities, at most; the authors' 8. Equal similarities make fewer.
    Returns:
      a Probe; its report is an `InformationReport`.
    Raises:
      ConfigError: fewer than two bins; from the probe, a model that is no such mapping, or pairs of
        which all or none are scored.
    Source:
      models/nui.py of the authors' code, `compute_netinfo`.
    """
    at_least(2, bins=bins)

    def measure(views: Views, batch: PairRows) -> dict[str, Any]:
        ends = jnp.asarray(batch.ends)
        said = {name: similarities(view, ends) for name, view in views.items()}
        return {"said": said, "answer": batch.joined, "scored": batch.scored}

    def table(values: np.ndarray, found: Mapping[str, np.ndarray]) -> np.ndarray:
        edges = bin_edges(values[~found["scored"]], bins)
        return table_of(values[found["scored"]], found["answer"][found["scored"]], edges)

    return rows("netinfof", measure, lambda views, found: informed(found, table), init=check_views)


def informed(found: Mapping[str, Any], table: Any) -> InformationReport:
    """The report of what was measured; a score of numbers that are not finite is none."""
    scored = found["scored"]
    if scored.all() or not scored.any():
        raise ConfigError(
            f"{int(scored.sum())} of {len(scored)} rows are scored; some, and not all"
        )
    scores, counts = {}, {}
    for name, values in found["said"].items():
        if not np.isfinite(values).all():
            scores[name], counts[name] = float("nan"), 0
            continue
        counted = table(values, found)
        scores[name], counts[name] = usable_information(counted), len(counted)
    answers = np.unique(found["answer"][scored], return_counts=True)[1]
    return InformationReport(scores, counts, usable_information(answers[None]))


def check_views(views: object) -> None:
    """Raises ConfigError for what is no mapping of views."""
    is_one = isinstance(views, Mapping) and all(isinstance(v, View) for v in views.values())
    if not is_one or not views:
        raise ConfigError(
            f"model is a {type(views).__name__}; a mapping from names to Views is accepted: "
            "{name: view_of(z, pairs) for name, z in embeddings(x, graph).items()}"
        )


def scored_pairs(split: LinkSplit, seed: int = 0, *, part: str = "valid") -> PairRows:
    """A batch of `netinfof` from edges that are hidden.

    Args:
      split: its edges to learn from, and twice as many pairs drawn from all nodes, joined or not,
        make bins.
      seed: of the draw.
      part: whose pairs are scored, "valid" or "test".
    Raises:
      ConfigError: another part.
    """
    check_seed(seed)
    if part not in ("valid", "test"):
        raise ConfigError(f"part={part!r} is not one of ['valid', 'test']")
    known = split.train.ends[split.train.joined]
    drawn = np.random.default_rng(seed).integers(len(split.x), size=(2 * len(known), 2))
    asked = getattr(split, part)
    joined = [np.repeat([True, False], [len(known), len(drawn)]), asked.joined]
    ends = np.concatenate([known, drawn, asked.ends]).astype(np.int32)
    scored = np.repeat([False, True], [len(known) + len(drawn), len(asked.ends)])
    return PairRows(ends, np.concatenate(joined), scored)


def pair_rows(views: Views, ends: Int32[Array, "p 2"]) -> Float[Array, "p cd"]:
    """What `sparse_group` reads of pairs: products of coordinates, view by view.

    Row (i, j) holds (H z_i) * z_j of the first view, then of the second, …; the sum of a view's
    part is its similarity.
    """
    parts = [view.adjusted[ends[:, 0]] * view.z[ends[:, 1]] for view in views.values()]
    return jnp.concatenate(parts, axis=1)
