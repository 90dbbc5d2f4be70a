"""Graphs of several kinds of nodes, joined by relations."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import SupportsIndex

import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, FFNLabError, first_line
from ffnlab.graph.edges import Bipartite, Edges, Indices, checked_count
from ffnlab.graph.product import aggregate
from ffnlab.graph.segments import wide
from ffnlab.weights.base import register, static

__all__ = ["Hetero", "Relation", "mean_over"]

Relation = tuple[str, str, str]  # kind of the senders, name, kind of the receivers
REVERSED = "r."  # before the name of a relation read the other way


@register
@dataclasses.dataclass(frozen=True)
class Hetero:
    """Nodes of several kinds and the relations between them; made by `make`, which checks.

    A relation between two kinds is heard both ways: its reverse is derived from the edges that are
    stored, once, and called "r." and its name. A relation within a kind is heard one way, as it is
    given; it counts as its own reverse.

    Attributes:
      edges: of each relation, in the order of `names`, senders of its first kind and receivers of
        its last.
      names: the relations as they were given, ascending (static).
      kinds: (kind, nodes of it), in the order they were given (static).
    """

    edges: tuple[Bipartite, ...]
    names: tuple[Relation, ...] = static()  # type: ignore[assignment]
    kinds: tuple[tuple[str, int], ...] = static()  # type: ignore[assignment]

    @classmethod
    def make(
        cls,
        nodes: Mapping[str, SupportsIndex],
        relations: Mapping[Relation, tuple[Indices, Indices]],
    ) -> "Hetero":
        """Checks and sorts the edges of every relation.

        Args:
          nodes: how many there are of each kind, >= 1.
          relations: by (kind of senders, name, kind of receivers) the two ends of each edge, [e]
            each; an edge that is there several times counts as often in every mean.
        Raises:
          FFNLabError: no relation, one without edges, of a kind there is not, with a name that
            begins with "r.", with an index out of range, or a count that is none.

        >>> graph = Hetero.make({"a": 2, "b": 3}, {("a", "x", "b"): ([0, 1], [2, 2])})
        >>> graph.relations
        (('a', 'x', 'b'), ('b', 'r.x', 'a'))
        """
        counts = {kind: checked_count(f"nodes[{kind!r}]", n) for kind, n in nodes.items()}
        empty = [kind for kind, n in counts.items() if not n]
        if empty or not relations:
            raise ConfigError(
                f"nodes={dict(counts)} and relations={list(relations)}: one node or more of every "
                "kind, and one relation or more are accepted"
            )
        for relation in relations:
            check_relation(relation, counts)
        edges = tuple(made(r, *relations[r], counts) for r in sorted(relations))
        return cls(edges, tuple(sorted(relations)), tuple(counts.items()))

    @property
    def counts(self) -> Mapping[str, int]:
        """Nodes of each kind."""
        return MappingProxyType(dict(self.kinds))

    @property
    def relations(self) -> tuple[Relation, ...]:
        """The relations as they were given, and the reverses of those between two kinds."""
        backward = (reverse_of(r) for r in self.names if r[0] != r[2])
        return (*self.names, *backward)

    def edges_of(self, relation: Relation) -> Edges:
        """The edges of a relation or of a reverse.

        Raises:
          ConfigError: there is no such relation.
        """
        if relation not in self.relations:
            raise ConfigError(f"relation={relation} is not one of {list(self.relations)}")
        if relation in self.names:
            return self.edges[self.names.index(relation)]
        return self.edges[self.names.index(reverse_of(relation))].transpose()

    def touching(self, kind: str) -> tuple[Relation, ...]:
        """The relations, as they were given, that begin or end at a kind; ascending.

        Raises:
          ConfigError: there is no such kind.
        """
        self.check_kind(kind)
        return tuple(name for name in self.names if kind in (name[0], name[2]))

    def check_kind(self, kind: str) -> None:
        """Raises ConfigError unless there are nodes of a kind."""
        if kind not in self.counts:
            raise ConfigError(f"kind={kind!r} is not one of {list(self.counts)}")

    def mean(self, relation: Relation, x: Float[Array, "m d"]) -> Float[Array, "n d"]:
        """The mean over what each node hears by a relation or a reverse: a row-normalized product.

        Args:
          relation: one of `relations`.
          x: a row for each node of its first kind.
        Returns:
          a row for each node of its last kind; 0 where it hears nothing.
        Raises:
          ConfigError: there is no such relation.
        """
        return mean_over(self.edges_of(relation), x)


def mean_over(edges: Edges, x: Float[Array, "m d"]) -> Float[Array, "n d"]:
    """y[i] = mean of x over the senders of receiver i; 0 where there are none.

    Args:
      edges: a Graph or Bipartite.
      x: [m, d].
    """
    total = aggregate(edges, None, wide(x))
    degrees = jnp.maximum(edges.degrees, 1).astype(total.dtype)
    return (total / degrees[:, None]).astype(x.dtype)


def reverse_of(relation: Relation) -> Relation:
    """A relation between two kinds, read the other way; one within a kind is its own.

    >>> reverse_of(("a", "x", "b")), reverse_of(("b", "r.x", "a"))
    (('b', 'r.x', 'a'), ('a', 'x', 'b'))
    """
    first, name, last = relation
    if first == last:
        return relation
    is_reverse = name.startswith(REVERSED)
    return last, name.removeprefix(REVERSED) if is_reverse else f"{REVERSED}{name}", first


def check_relation(relation: Relation, counts: Mapping[str, int]) -> None:
    """Raises ConfigError unless a relation has a name of its own and kinds that there are."""
    if len(relation) != 3 or relation[1].startswith(REVERSED):
        raise ConfigError(
            f"relation={relation}: (kind, name, kind) is accepted, with a name that does not begin "
            f"with {REVERSED!r}, as those of reverses do"
        )
    for kind in (relation[0], relation[2]):
        if kind not in counts:
            raise ConfigError(f"relation={relation} has {kind!r}, nodes are {list(counts)}")


def made(
    relation: Relation, senders: Indices, receivers: Indices, counts: Mapping[str, int]
) -> Bipartite:
    """The edges of a relation."""
    try:
        edges = Bipartite.make(senders, receivers, counts[relation[0]], counts[relation[2]])
    except FFNLabError as error:
        raise ConfigError(f"relation={relation}: {first_line(error)}") from None
    if not edges.num_edges:
        raise ConfigError(f"relation={relation} has no edges; leave it out")
    return edges
