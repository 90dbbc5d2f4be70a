"""The rounds of RpHGNN, relation by relation; `ffnlab.graphs.rphgnn` says what they are."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.graph import Edges, Hetero, Relation, mean_over
from ffnlab.graphs.squashing import PROJECTIONS, SQUASHES
from ffnlab.progress import track

__all__ = ["Draw", "Entry", "Given", "Rows", "RpHGNNOptions", "entries_of", "heard", "rounds_of"]

PARITIES = ("odd", "even")
Host = Array | np.ndarray
Rows = Mapping[str, Float[Host, "_ _"]]  # by kind, a row for each node


class Entry(NamedTuple):
    """What a group is of.

    Attributes:
      parity: "odd", "even", or "own" of a kind's own rows.
      relation: as it was given; ("", "", "") of a kind's own rows.
    """

    parity: str
    relation: Relation = ("", "", "")


Given = Callable[[int, str, Entry], Array | np.ndarray]  # (round, kind, entry) -> R


@dataclasses.dataclass(frozen=True)
class RpHGNNOptions:
    """How a graph is summarized.

    Attributes:
      rounds: K.
      squash: a key of `squashing.SQUASHES`.
      projection: how R is drawn, a key of `squashing.PROJECTIONS`.
      alpha: of the first rows in those of the next round, x <- (1 - alpha) new + alpha first.
      hears: "all", or "odd" or "even" alone, of what is stored and squashed.
      with_input: even groups begin with the target's first rows.
      with_own: one more group is the target's first rows alone.
      dtype: of what is stored.
    """

    rounds: int = 3
    squash: str = "project_norm_sum"
    projection: str = "sparse"
    alpha: float = 0.0
    hears: str = "all"
    with_input: bool = False
    with_own: bool = False
    dtype: str = "float16"

    def __post_init__(self) -> None:
        at_least(1, rounds=self.rounds)
        for name, accepted in (
            ("squash", list(SQUASHES)),
            ("projection", list(PROJECTIONS)),
            ("hears", ["all", *PARITIES]),
            ("dtype", ["float16", "float32"]),
        ):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha={self.alpha} must lie in 0..1")

    @property
    def parities(self) -> tuple[str, ...]:
        """What is heard."""
        return PARITIES if self.hears == "all" else (self.hears,)


def entries_of(graph: Hetero, kind: str, options: RpHGNNOptions) -> list[Entry]:
    """What a kind hears in a round, in the order of the authors."""
    return [Entry(p, r) for r in graph.touching(kind) for p in options.parities]


Ends = tuple[tuple[Array, Array], ...]  # (odd, even) of each end of a relation


def heard(edges: Edges, x: tuple[Array, ...]) -> Ends:
    """What the ends of a relation hear of each other.

    Args:
      edges: of the relation.
      x: rows of its senders and of its receivers; those of the kind alone where it is within one.
    Returns:
      (odd, even) of the senders and of the receivers; once for a relation within a kind.
    """
    forth = mean_over(edges, x[0])
    if len(x) == 1:
        return ((forth, mean_over(edges, forth)),)
    backward = edges.transpose()
    back = mean_over(backward, x[1])
    return (back, mean_over(backward, forth)), (forth, mean_over(edges, back))


class How(NamedTuple):
    """What of the options a program of a relation depends on: not how many rounds there are.

    Attributes:
      squash, dtype: see `RpHGNNOptions`.
      parities: what is heard.
    """

    squash: str
    dtype: str
    parities: tuple[str, ...]


@functools.partial(jax.jit, static_argnames=("how", "kept"), donate_argnames="totals")
def of_relation(
    edges: Edges,
    x: tuple[Array, ...],
    totals: tuple[Array, ...],
    matrices: tuple[tuple[Array | None, ...], ...],
    *,
    how: How,
    kept: int | None,
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """One relation of a round: all that is held at once beside rows and totals is of it.

    Args:
      edges, x: as `heard`.
      totals: sums so far of the ends; none in the last round.
      matrices: of the ends, one for each parity that is heard; None where nothing is projected.
      how: of the run.
      kept: which end is the target; None for none.
    Returns:
      (the target's summaries as they are stored, the new totals).
    """
    places = [PARITIES.index(p) for p in how.parities]
    ends = [[end[i] for i in places] for end in heard(edges, x)]
    stored = () if kept is None else tuple(h.astype(how.dtype) for h in ends[kept])
    squash, sums = SQUASHES[how.squash], []
    for total, terms, given in zip(totals, ends, matrices, strict=False):  # none in the last round
        for h, matrix in zip(terms, given, strict=True):
            total = total + squash.term(h, matrix)
        sums.append(total)
    return stored, tuple(sums)


@dataclasses.dataclass(frozen=True, eq=False)
class Draw:
    """Where projections come from.

    Attributes:
      key: of the run.
      options: how they are drawn.
      given: (round, kind, entry) -> R instead; None to draw.
    """

    key: Array | None
    options: RpHGNNOptions
    given: Given | None = None

    def __call__(
        self, graph: Hetero, turn: int, kind: str, entry: Entry, rows: int, columns: int
    ) -> Array | None:
        """R of a term, [rows, columns]; None where nothing is projected.

        Raises:
          ConfigError: neither a key nor matrices are given, or one of another shape.
        """
        if not SQUASHES[self.options.squash].projects:
            return None
        if self.given is not None:
            matrix = jnp.asarray(self.given(turn, kind, entry), jnp.float32)
            if matrix.shape != (rows, columns):
                raise ConfigError(
                    f"projections({turn}, {kind!r}, {entry}) is {list(matrix.shape)}; "
                    f"[{rows}, {columns}] is projected by"
                )
            return matrix
        if self.key is None:
            raise ConfigError("key=None: projections are drawn by a key, or given")
        place = entries_of(graph, kind, RpHGNNOptions()).index(entry)
        places = turn, list(graph.counts).index(kind), place
        return drawn(self.key, places, self.options.projection, rows, columns)


@functools.partial(jax.jit, static_argnames=("projection", "rows", "columns"))
def drawn(
    key: Array, places: tuple[int | Array, ...], projection: str, rows: int, columns: int
) -> Float[Array, "rows columns"]:
    """The matrix of a place (round, kind, entry), in one program for all places of its shape."""
    key = functools.reduce(jax.random.fold_in, places, key)
    return PROJECTIONS[projection](key, rows, columns)


def round_of(
    graph: Hetero, x: Rows, target: str, turn: int, draw: Draw, *, is_last: bool
) -> Iterator[tuple[tuple[Entry, ...], tuple[Array, ...]] | dict[str, Array]]:
    """A round: propagate, collect, squash, relation by relation.

    Relations have nodes and edges of their own numbers, so each is a program of its own, compiled
    in the first round and in the last; nothing loops over them inside of one.

    Yields:
      for every relation of the target what it hears of it, by entry; in the end the rows of the
      next round by kind, not after the last.
    """
    options, widths = draw.options, {kind: rows.shape[1] for kind, rows in x.items()}
    how = How(options.squash, options.dtype, options.parities)
    zeros = lambda kind: jnp.zeros((graph.counts[kind], widths[kind]))  # noqa: E731
    totals = {} if is_last else {kind: zeros(kind) for kind in graph.counts}
    for relation, edges in zip(graph.names, graph.edges, strict=True):
        kinds = tuple(dict.fromkeys((relation[0], relation[2])))
        if is_last and target not in kinds:
            continue
        others = {kinds[0]: kinds[-1], kinds[-1]: kinds[0]}
        entries = tuple(Entry(p, relation) for p in options.parities)

        def matrix(kind: str, entry: Entry, others: Mapping[str, str] = others) -> Array | None:
            rows = widths[others[kind] if entry.parity == "odd" else kind]
            return draw(graph, turn, kind, entry, rows, widths[kind])

        squashed = () if is_last else kinds
        found, sums = of_relation(
            edges,
            tuple(x[kind] for kind in kinds),
            tuple(totals.pop(kind) for kind in squashed),
            tuple(tuple(matrix(kind, entry) for entry in entries) for kind in squashed),
            how=how,
            kept=kinds.index(target) if target in kinds else None,
        )
        totals |= dict(zip(squashed, sums, strict=True))
        if target in kinds:
            yield entries, found
    if not is_last:
        yield {kind: ended(graph, kind, totals.pop(kind), options) for kind in graph.counts}


def ended(graph: Hetero, kind: str, total: Array, options: RpHGNNOptions) -> Array:
    """The rows of a kind after a round, of the sum of its terms."""
    terms = max(len(entries_of(graph, kind, options)), 1)
    return SQUASHES[options.squash].end(total, terms)


def rounds_of(
    graph: Hetero, x: Rows, target: str, draw: Draw, *, progress: bool = False
) -> Iterator[tuple[int, Entry, Array]]:
    """(round, entry, [n, d] as stored) of all that the target hears."""
    options, first = draw.options, x
    for turn in track(range(options.rounds), "rounds", enabled=progress):
        for found in round_of(graph, x, target, turn, draw, is_last=turn + 1 == options.rounds):
            if isinstance(found, dict):
                x = mixed(found, first, options.alpha)
            else:
                yield from ((turn, *pair) for pair in zip(*found, strict=True))


def mixed(x: Rows, first: Rows, alpha: float) -> Rows:
    """(1 - alpha) x + alpha first."""
    if not alpha:
        return x
    return {kind: (1 - alpha) * rows + alpha * first[kind] for kind, rows in x.items()}
