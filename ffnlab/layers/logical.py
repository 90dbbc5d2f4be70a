"""Logical axis names and the mesh axes they are cut along.

Parameters carry logical axis names; a layout is a table from those names to mesh axes. One table
serves data, FSDP, tensor and sequence parallelism and their mixes: a mesh without an axis leaves
that axis whole. No layer mentions a mesh; `constrain` names the axes of an activation, reads the
layout in use (`using`) and does nothing unless a mesh is set; `ffnlab.parallel.make_step` sets
both.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, MeshError
from ffnlab.weights.base import AxisNames, is_weight

__all__ = [
    "LAYOUT",
    "Layout",
    "Names",
    "ambient",
    "automatic",
    "batch_axes",
    "constrain",
    "constrain_named",
    "leaf_names",
    "partition",
    "using",
]

T = TypeVar("T")

Layout = Mapping[str, tuple[str, ...]]
# What cuts a dimension: a logical name, several of which the first cuts coarsest, or nothing.
Names = str | tuple[str, ...] | None

# Batches are cut along dp, fsdp and ep, matrices along fsdp on one side and tp on the other.
LAYOUT: Layout = MappingProxyType(
    {
        "batch": ("dp", "fsdp", "ep"),
        "length": ("sp",),
        "embed": ("fsdp",),
        "mlp": ("tp",),
        "heads": ("tp",),
        "kv_heads": ("tp",),
        "vocab": ("tp",),
        "expert": ("ep",),
        "stages": ("pp",),
    }
)


def _frozen(layout: Layout) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple((name, tuple(layout[name])) for name in sorted(layout))


# A context of jax's own: it is part of the key of every trace, so that no jitted function, a
# rule's own step inside another's included, is run as it was traced under another layout.
_AMBIENT = jax.make_user_context(_frozen(LAYOUT))


def using(layout: Layout) -> AbstractContextManager[None]:
    """A context in which `constrain` follows a layout; outside of any it follows `LAYOUT`.

    A function that was traced under another layout is traced again.

    Args:
      layout: logical name -> mesh axes.

    >>> with using({"mlp": ("model",)}):
    ...     dict(ambient())
    {'mlp': ('model',)}
    """
    return _AMBIENT(_frozen(layout))


def ambient() -> Layout:
    """The layout in use."""
    return dict(_AMBIENT.value)


def automatic() -> dict[str, int]:
    """Sizes of the axes of the mesh that is set, without those that a `shard_map` goes over.

    >>> automatic()
    {}
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind == AxisType.Auto}


def partition(
    axes: Sequence[Names],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    layout: Layout = LAYOUT,
    *,
    path: str | None = None,
) -> PartitionSpec:
    """How one array is cut; a mesh axis is used once, by the first dimension that asks for it.

    Args:
      axes: a logical name per dimension, None for no name, several for one cut by all of them.
      shape: of the array.
      sizes: of the mesh axes, by name; those of the layout that are missing are skipped.
      layout: logical name -> mesh axes; names it lacks stay whole.
      path: of the array. Without one, a dimension that does not divide stays whole.
    Raises:
      MeshError: a dimension of the array at `path` that its mesh axes do not divide.

    >>> tuple(partition(("embed", "mlp"), (8, 6), {"tp": 2, "fsdp": 4}))
    ('fsdp', 'tp')
    """
    used: set[str] = set()
    entries: list[str | tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        several = name if isinstance(name, tuple) else (name or "",)
        asked = [axis for each in several for axis in layout.get(each, ())]
        chosen = [axis for axis in asked if axis in sizes and axis not in used]
        parts = math.prod(sizes[a] for a in chosen)
        if size % parts:
            if path is not None:
                cut = " x ".join(f"{a}={sizes[a]}" for a in chosen)
                raise MeshError(
                    f"{path}: axis {name!r} of size {size} is not divisible by {parts} ({cut}); "
                    "use another mesh, layout or size"
                )
            chosen = []
        used.update(chosen)
        entries.append(chosen[0] if len(chosen) == 1 else tuple(chosen) or None)
    return PartitionSpec(*entries)


def constrain(x: Array, axes: Sequence[Names], *, path: str | None = None) -> Array:
    """x, cut as the layout in use says along the mesh that is set; x itself where none is.

    Args:
      x: an activation.
      axes: see `partition`.
      path: what x is. Without one, a dimension that does not divide stays whole.
    Raises:
      MeshError: a dimension of the array at `path` that its mesh axes do not divide.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if not sizes or math.prod(sizes.values()) == 1:
        return x
    spec = partition(axes, x.shape, sizes, ambient(), path=path)
    return jax.lax.with_sharding_constraint(x, spec)


def rowwise(fn: Callable[[Array], PyTree], x: Array, names: Sequence[Names]) -> PyTree:
    """What a function makes of each row, computed on the devices that the rows lie on.

    XLA gathers the operand of an operation that it cannot cut (TopK is one), and every device
    computes all rows.

    Args:
      fn: of rows; every result has their leading axes.
      x: the rows.
      names: of the axes of x, None where a function needs the whole of one.
    """
    sizes = automatic()
    if math.prod(sizes.values()) == 1:
        return fn(x)
    rows = partition(names, x.shape, sizes, ambient())
    return jax.shard_map(fn, in_specs=rows, out_specs=rows, check_vma=False)(x)


def row_names(dimensions: int) -> tuple[str | None, ...]:
    """The names of rows of tokens or of plain rows: [b, t, ...] or [b, ...].

    >>> row_names(2), row_names(4)
    (('batch', None), ('batch', 'length', None, None))
    """
    names = ("batch", "length")[: 1 + (dimensions > 2)]
    return (*names, *(None,) * (dimensions - len(names)))


def constrain_named(tree: T) -> T:
    """A tree whose parameters are cut by their own names, as `constrain` cuts an activation.

    Gradients with respect to them are then cut alike, wherever they come into being.

    Raises:
      ConfigError: as `constrain`.
    """

    def of_node(path: tuple, node: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(node)
        where = jax.tree_util.keystr(path).lstrip(".")
        return treedef.unflatten(
            leaf if names is None else constrain(leaf, names, path=where)
            for leaf, names in zip(leaves, leaf_names(node), strict=True)
        )

    return jax.tree_util.tree_map_with_path(of_node, tree, is_leaf=is_variable)


def leaf_names(node: PyTree) -> list[AxisNames | None]:
    """The logical names of each array of a variable; None for one that has none.

    Args:
      node: an `nnx.Variable`, which an optimizer's state may hold without some of its arrays, or
        anything else, which has no names.
    """
    leaves = jax.tree.leaves(node)
    names = node.get_metadata().get("axes") if isinstance(node, nnx.Variable) else None
    if names is None or not leaves:
        return [None] * len(leaves)
    value = node.get_value()
    axes = value.leaf_axes(names) if is_weight(value) else AxisNames(names)
    each = jax.tree.leaves(axes, is_leaf=lambda x: x is None or isinstance(x, AxisNames))
    # Of a state over what is trained, a weight lacks its other arrays.
    held = jax.tree.leaves(value, is_leaf=lambda x: x is None)
    # What an optimizer keeps of rows or columns alone, or in place of nothing, has no names.
    return [
        a if len(a) == np.ndim(x) and np.size(x) != 1 else None
        for a, x in zip(each, held, strict=True)
        if x is not None
    ]


def is_variable(node: object) -> bool:
    """Whether a node of a tree is an `nnx.Variable`, which has the names of its arrays."""
    return isinstance(node, nnx.Variable)


def batch_axes(batch: PyTree, *, stacked: bool = False) -> PyTree:
    """A batch with, in place of each array, the logical axis names of its dimensions.

    The first axis of an array is "batch", its rows. A part of a batch that knows better has a
    method `leaf_axes()`, as weights have: it gives the part's structure with the names of each
    array, and what it does not name "batch" (the edges of a graph) is never cut into rows.

    Args:
      batch: a tree of arrays, abstract or not.
      stacked: the arrays are [n, …], of n batches; names have a None before them.
    Raises:
      ConfigError: a part names another number of dimensions than one of its arrays has.

    >>> batch_axes({"x": np.zeros((4, 3)), "scale": np.float32(1)})
    {'scale': (), 'x': ('batch', None)}
    """
    before = (None,) if stacked else ()

    def knows(node: object) -> bool:
        return hasattr(type(node), "leaf_axes")

    def of_node(path: tuple, node: PyTree) -> PyTree:
        if not knows(node):
            inner = np.ndim(node) - len(before)
            return AxisNames((*before, "batch", *[None] * (inner - 1)) if inner else before)
        found = jax.tree.map(lambda names: AxisNames((*before, *names)), node.leaf_axes())
        pairs = zip(jax.tree.leaves(node), jax.tree.leaves(found), strict=True)
        for leaf, names in pairs:
            if np.ndim(leaf) != len(names):
                raise ConfigError(
                    f"batch{jax.tree_util.keystr(path)}: leaf_axes() of {type(node).__name__} "
                    f"names {tuple(names)}, of an array {np.shape(leaf)}"
                )
        return found

    return jax.tree_util.tree_map_with_path(of_node, batch, is_leaf=knows)
