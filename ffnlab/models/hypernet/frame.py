"""The weights of a target as one vector: what is where in it, and in which pieces it comes."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import PyTreeDef
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.models.hypernet.spec import HypernetSpec

__all__ = ["Frame", "Leaf", "Pieces", "gates_of", "pieces_of"]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One array of a target.

    Attributes:
      path: of it (`ffnlab.tree`).
      owner: path of the innermost module that it is in.
      shape: of it.
      dtype: its name; that of the generated vector when "".
      generated: whether it is; what learning does not change (statistics) is kept.
    """

    path: str
    owner: str
    shape: tuple[int, ...]
    dtype: str
    generated: bool

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Frame:
    """A target without its arrays.

    Attributes:
      structure: of its tree.
      arrays: in the order of the tree.
    """

    structure: PyTreeDef
    arrays: tuple[Leaf, ...]

    @classmethod
    def of(cls, target: PyTree, *, typed: bool = True) -> "Frame":
        """The frame of a module, abstract or not.

        Args:
          target: any module.
          typed: whether its arrays have dtypes of their own, or that of the vector.
        Raises:
          ConfigError: it has an array that is neither floating nor a statistic, or none to
            generate.
        """
        found = jax.tree.leaves(target)
        for (path, _), leaf in zip(located(target), found, strict=True):
            if not tree.floating(path, leaf):
                raise ConfigError(
                    f"target: {path} is of {getattr(leaf, 'dtype', type(leaf).__name__)}; codes "
                    "and counters are not generated: quantize what was generated instead"
                )
        if not found:
            raise ConfigError(f"target: a {type(target).__name__} without floating arrays")
        mine, others = tree.trained(target)
        marks = jax.tree.map(lambda _: True, mine), jax.tree.map(lambda _: False, others)
        arrays = tuple(
            Leaf(path, owner, leaf.shape, leaf.dtype.name if typed else "", is_generated)
            for (path, owner), leaf, is_generated in zip(
                located(target), found, jax.tree.leaves(tree.combine(*marks)), strict=True
            )
        )
        return cls(jax.tree.structure(target), arrays)

    @property
    def generated(self) -> list[Leaf]:
        """The arrays that are."""
        return [leaf for leaf in self.arrays if leaf.generated]

    @property
    def size(self) -> int:
        """P, numbers that are generated."""
        return sum(leaf.size for leaf in self.generated)

    def build(self, vector: Float[Array, "P"], kept: Sequence[Array]) -> PyTree:
        """The module whose arrays are these.

        Args:
          vector: its generated arrays in a row, in the order of `jax.flatten_util.ravel_pytree`.
          kept: the others.
        """
        ends = list(itertools.accumulate(leaf.size for leaf in self.generated))
        parts, others = iter(jnp.split(vector, ends[:-1])), iter(kept)
        leaves = [
            next(parts).reshape(leaf.shape).astype(leaf.dtype or vector.dtype)
            if leaf.generated
            else next(others)
            for leaf in self.arrays
        ]
        return jax.tree.unflatten(self.structure, leaves)


def located(node: object, path: str = "", owner: str = "") -> Iterator[tuple[str, str]]:
    """(path, path of the innermost module) of every array, in the order of the tree."""
    named, structure = tree.children(node)
    if structure is None:
        if node is not None:
            yield path, owner
        return
    if isinstance(node, nnx.Module) and not isinstance(node, nnx.List):
        owner = path
    for key, child in named:
        yield from located(child, (path + key).removeprefix("."), owner)


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """In which pieces a vector comes.

    Attributes:
      count, size: how many pieces (K), and the numbers in each (S).
      place: [P], where in the K S numbers that come each one of the vector is; None where they are
        the first P.
      source: [K, S], which one of the vector each number that comes is, -1 for none.
    """

    count: int
    size: int
    place: Int[np.ndarray, "P"] | None
    source: Int[np.ndarray, "K S"]

    def joined(self, pieces: Float[Array, "K S"]) -> Float[Array, "P"]:
        """The vector of its pieces; what is beyond it is cut."""
        flat = pieces.reshape(-1)
        if self.place is None:
            return flat[: int((self.source >= 0).sum())]
        return flat[self.place]


@functools.lru_cache(maxsize=64)
def pieces_of(spec: HypernetSpec, frame: Frame) -> Pieces:
    """The pieces of a target's vector; those of heads are pieces too."""
    total = frame.size
    if spec.outputs == "component_wise":
        parts = components(frame, spec.component)
    else:
        size = {"once": total, "chunk_wise": min(spec.chunk, total)}.get(spec.outputs)
        size = -(-total // spec.heads) if size is None else size
        parts = np.split(np.arange(total), range(size, total, size))
        if spec.outputs == "multi_head":  # one without weights still stands
            parts += [np.arange(0)] * (spec.heads - len(parts))
    size = max(map(len, parts))
    source = np.full((len(parts), size), -1)
    for row, part in zip(source, parts, strict=True):
        row[: len(part)] = part
    place = np.zeros(total, np.int64)
    at = np.flatnonzero(source.reshape(-1) >= 0)
    place[source.reshape(-1)[at]] = at
    is_row = np.array_equal(place, np.arange(total))
    return Pieces(len(parts), size, None if is_row else place, source)


def components(frame: Frame, component: str) -> list[Int[np.ndarray, "n"]]:
    """Which numbers of a vector belong together: to a module, or to a channel of one."""
    start, found = 0, {}
    for leaf in frame.generated:
        numbers = np.arange(start, start + leaf.size)
        start += leaf.size
        if component == "layer":
            found.setdefault(leaf.owner, []).append(numbers)
            continue
        channels = leaf.shape[-1] if leaf.shape else 1
        for j, column in enumerate(numbers.reshape(-1, channels).T):
            found.setdefault((leaf.owner, channels, j), []).append(column)
    return [np.concatenate(parts) for parts in found.values()]


@functools.lru_cache(maxsize=64)
def gates_of(frame: Frame, optional: str) -> tuple[int, Int[np.ndarray, "P"]]:
    """(channels that may be absent (G), which of them each number of a vector is of, G for none).

    Arrays of one module with equal last axes share its channels.

    Raises:
      ConfigError: nothing generated is at those paths.
    """
    selector, channels = tree.at(optional), {}
    marks = []
    for leaf in frame.generated:
        last = leaf.shape[-1] if leaf.shape else 1
        if not selector(leaf.path, None):
            marks.append(np.full(leaf.size, -1))
            continue
        first = channels.setdefault((leaf.owner, last), sum(n for _, n in channels))
        marks.append(first + np.arange(leaf.size) % last)
    count = sum(last for _, last in channels)
    if not count:
        near = [leaf.path for leaf in frame.generated[:3]]
        raise ConfigError(f"optional={optional!r} matches nothing generated; paths: {near}, …")
    found = np.concatenate(marks)
    return count, np.where(found < 0, count, found)
