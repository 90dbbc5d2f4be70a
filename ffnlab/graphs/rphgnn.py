"""Random projection: heterogeneous graphs summarized once, before a small network learns.

Efficient Heterogeneous Graph Learning via Random Projection (RpHGNN, TKDE 2024, arXiv 2310.14481).
Messages are passed before training. In each of K rounds, and for a relation between kinds s and t,

    odd:   t hears the mean of x_s,  h = M x_s;       s hears that of x_t,  h' = M' x_t
    even:  each hears its own odd echo:  t  M h',  s  M' h    (of a relation within a kind, M M x)

What the target kind hears is stored, a group for each relation and parity. Then every kind squashes
all that it heard to its first width by random projections, x <- sum_i u(h_i R_i) (`squashing`), so
that a round costs the same however many came before, where unsquashed paths would multiply. The
groups [n, K, d] of the target are rows for mini-batches of `models.GroupNetwork`.

    M, M'  row-normalized edges of a relation and of its reverse; 0 where nothing is heard
    R_i    random, [width of h_i, first width of the kind], fresh for every term and round

What differs from the authors' code (CrawlScript/RpHGNN): means only, of two hops a round, as in all
their runs. The last round squashes nothing, where theirs throws it away, and asks relations of the
target alone. Groups lie side by side in one array of half precision, a row for each node.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, NumericalError, at_least
from ffnlab.graph import Hetero
from ffnlab.graphs.rounds import (
    Draw,
    Entry,
    Given,
    Rows,
    RpHGNNOptions,
    entries_of,
    rounds_of,
)
from ffnlab.graphs.squashing import SQUASHES

__all__ = ["Features", "featured", "precomputed", "propagated"]

USUAL = RpHGNNOptions()


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Summaries of the target's nodes: rows for `data.ArrayBatches`.

    Attributes:
      rows: [n, w], groups one after the other, the rounds of a group one after the other.
      entries: what each group is of.
      sizes: (rounds, width) of each group, w = sum of their products; what
        `models.GroupNetworkConfig` is told.
    """

    rows: Float[np.ndarray, "n w"]
    entries: tuple[Entry, ...]
    sizes: tuple[tuple[int, int], ...]

    @property
    def groups(self) -> list[Float[np.ndarray, "n k d"]]:
        """The groups, views of the rows."""
        ends = np.cumsum([k * d for k, d in self.sizes])[:-1]
        parts = np.split(self.rows, ends, axis=1)
        return [p.reshape(len(p), *size) for p, size in zip(parts, self.sizes, strict=True)]

    def beside(self, other: "Features") -> "Features":
        """These groups, then those of another, of the same nodes.

        Raises:
          ConfigError: they are of other nodes.
        """
        if len(self.rows) != len(other.rows):
            raise ConfigError(f"{len(self.rows)} nodes beside {len(other.rows)}: both are of one")
        rows = np.concatenate([self.rows, other.rows.astype(self.rows.dtype)], axis=1)
        return Features(rows, self.entries + other.entries, self.sizes + other.sizes)


def featured(
    graph: Hetero, x: Rows, *, width: int | None = None, key: Array | None = None
) -> dict[str, Float[Array, "n d"]]:
    """Rows of every kind: those that are given, and N(0, 1) / sqrt(width) for the others.

    Args:
      graph: the nodes.
      x: of some kinds, [n, d] each.
      width: of the rows that are drawn.
      key: of the draw.
    Raises:
      ConfigError: a kind without rows and no width or key to draw them, rows of a kind that there
        is not, of another number of nodes, or not finite.
    """
    check_rows(graph, x, is_whole=False)
    missing = [kind for kind in graph.counts if kind not in x]
    if missing and (width is None or key is None):
        raise ConfigError(
            f"width={width}, key={'none' if key is None else 'given'}: nodes of {missing} have no "
            "rows; give a width and a key to draw some, or rows"
        )
    at_least(1, width=width)
    found = {kind: jnp.asarray(rows, jnp.float32) for kind, rows in x.items()}
    for i, (kind, n) in enumerate(graph.kinds):
        if kind in missing and width is not None and key is not None:
            drawn = jax.random.normal(jax.random.fold_in(key, i), (n, width))
            found[kind] = drawn * width**-0.5
    return {kind: found[kind] for kind in graph.counts}


def check_rows(graph: Hetero, x: Rows, *, is_whole: bool = True) -> None:
    """Raises ConfigError unless there are finite rows for the nodes of every kind."""
    unknown = sorted(set(x) - set(graph.counts))
    missing = [kind for kind in graph.counts if kind not in x] if is_whole else []
    if unknown or missing:
        raise ConfigError(
            f"x has rows of {sorted(x)}, nodes are {list(graph.counts)}: "
            f"unknown {unknown}, missing {missing} (`featured` draws some)"
        )
    for kind, rows in x.items():
        if np.ndim(rows) != 2 or rows.shape[0] != graph.counts[kind] or rows.shape[1] < 1:
            raise ConfigError(f"x[{kind!r}] is {list(rows.shape)}; [{graph.counts[kind]}, d] is it")
        if not isinstance(rows, jax.core.Tracer) and not np.isfinite(np.asarray(rows)).all():
            raise ConfigError(f"x[{kind!r}] has numbers that are not finite")


def check(graph: Hetero, x: Rows, target: str, options: RpHGNNOptions) -> None:
    """Raises ConfigError for what cannot be summarized."""
    check_rows(graph, x)
    if not graph.touching(target):
        raise ConfigError(f"target={target!r} has no relation, of {list(graph.names)}")
    widths = {kind: rows.shape[1] for kind, rows in x.items()}
    if not SQUASHES[options.squash].projects and len(set(widths.values())) > 1:
        raise ConfigError(
            f"squash={options.squash!r} adds rows as they are, and kinds have widths {widths}; use "
            "'project_norm_sum', or rows of one width"
        )


def propagated(
    graph: Hetero,
    x: Rows,
    target: str,
    options: RpHGNNOptions = USUAL,
    *,
    key: Array | None = None,
    projections: Given | None = None,
) -> dict[Entry, Float[Array, "n k d"]]:
    """What a kind hears in all rounds, on the device; may be traced.

    Args:
      graph: nodes and relations.
      x: rows of every kind, [n, d] float32, d any width of its own (`featured`).
      target: the kind whose nodes are classified.
      options: of the run; `with_input`, `with_own` are of `precomputed`.
      key: of the projections.
      projections: (round from 0, kind, entry) -> R instead of drawn ones.
    Returns:
      by entry, [n, rounds, d], as they are stored.
    Raises:
      ConfigError: rows that do not fit the graph, a target without relations, kinds of unequal
        widths where nothing is projected, or no key.
    """
    check(graph, x, target, options)
    x = {kind: jnp.asarray(rows, jnp.float32) for kind, rows in x.items()}
    found: dict[Entry, list[Array]] = {e: [] for e in entries_of(graph, target, options)}
    for _, entry, rows in rounds_of(graph, x, target, Draw(key, options, projections)):
        found[entry].append(rows)
    return {entry: jnp.stack(each, axis=1) for entry, each in found.items()}


def precomputed(
    graph: Hetero,
    x: Rows,
    target: str,
    options: RpHGNNOptions = USUAL,
    *,
    key: Array | None = None,
    projections: Given | None = None,
    progress: bool = False,
) -> Features:
    """What a kind hears in all rounds, as rows on the host, written as they are found.

    Args: as `propagated`, and
      progress: show a bar.
    Returns:
      groups by entry, (rounds, d) each; even ones one longer where they begin with the input, and
      a last one of (1, d) where the target's own rows are asked for.
    Raises:
      ConfigError: as `propagated`.
      NumericalError: what is stored is not finite in half precision.
    """
    check(graph, x, target, options)
    x = {kind: jnp.asarray(rows, jnp.float32) for kind, rows in x.items()}
    entries, sizes = layout_of(graph, x, target, options)
    starts = dict(zip(entries, np.cumsum([0, *(k * d for k, d in sizes)]).tolist(), strict=False))
    rows = np.empty((graph.counts[target], sum(k * d for k, d in sizes)), options.dtype)

    def write(entry: Entry, place: int, values: Array | np.ndarray) -> None:
        start = starts[entry] + place * values.shape[1]
        with np.errstate(over="ignore"):  # looked at in the end
            rows[:, start : start + values.shape[1]] = np.asarray(values)

    for entry in entries:
        if entry.parity == "own" or has_input(entry, options):
            write(entry, 0, x[target])
    draw = Draw(key, options, projections)
    for turn, entry, values in rounds_of(graph, x, target, draw, progress=progress):
        write(entry, turn + has_input(entry, options), values)
    if not np.isfinite(rows).all():
        raise NumericalError(
            f"what {target!r} hears is not finite in {options.dtype}: scale its rows down, or use "
            "dtype='float32'"
        )
    return Features(rows, tuple(entries), tuple(sizes))


def has_input(entry: Entry, options: RpHGNNOptions) -> bool:
    """Whether a group begins with the target's first rows."""
    return options.with_input and entry.parity == "even"


def layout_of(
    graph: Hetero, x: Rows, target: str, options: RpHGNNOptions
) -> tuple[list[Entry], list[tuple[int, int]]]:
    """What the groups of a target are of, and (rounds, width) of each."""
    own, entries, sizes = x[target].shape[1], entries_of(graph, target, options), []
    for entry in entries:
        first, _, last = entry.relation
        width = own if entry.parity == "even" else x[first if last == target else last].shape[1]
        sizes.append((options.rounds + has_input(entry, options), width))
    if options.with_own:
        entries, sizes = [*entries, Entry("own")], [*sizes, (1, own)]
    return entries, sizes
