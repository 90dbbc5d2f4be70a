"""Placing models, states and batches on a mesh; a rule's step there.

Optimizer states have the structure of the parameters, axis names included, so they are cut alike;
what carries no names is kept whole on every device. Packed weights are cut like the matrix they
stand for.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ffnlab.layers.logical import LAYOUT, Layout, batch_axes, is_variable, leaf_names, partition
from ffnlab.parallel.mesh import check_use, on
from ffnlab.rule import Metrics, Rule
from ffnlab.storage import placing
from ffnlab.weights import AxisNames

__all__ = [
    "MeshStep",
    "abstract",
    "batch_part",
    "batch_shardings",
    "bytes_per_device",
    "check",
    "create",
    "make_step",
    "place_batch",
    "place_part",
    "shard",
    "shardings",
]

T = TypeVar("T")


def shardings(state: PyTree, mesh: Mesh, layout: Layout = LAYOUT) -> PyTree:
    """How every leaf of a tree is placed: the same tree with a NamedSharding per array.

    Args:
      state: a model, a rule's state, an optimizer's; of arrays or `jax.ShapeDtypeStruct`.
      mesh: where it is to lie.
      layout: logical name -> mesh axes.
    Raises:
      ConfigError: a parameter does not divide; the message has its path and axis.
    """
    whole = NamedSharding(mesh, PartitionSpec())

    def of_node(path: tuple, node: PyTree) -> PyTree:
        leaves, treedef = jax.tree.flatten(node)
        where = jax.tree_util.keystr(path).lstrip(".")
        return treedef.unflatten(
            whole
            if names is None
            else NamedSharding(
                mesh, partition(names, np.shape(leaf), mesh.shape, layout, path=where)
            )
            for leaf, names in zip(leaves, leaf_names(node), strict=True)
        )

    return jax.tree_util.tree_map_with_path(of_node, state, is_leaf=is_variable)


def check(state: PyTree, mesh: Mesh, layout: Layout = LAYOUT) -> None:
    """Raises ConfigError, naming parameter and axis, unless a tree can be cut so."""
    shardings(state, mesh, layout)


def shard(state: T, mesh: Mesh, layout: Layout = LAYOUT) -> T:
    """A tree with every array placed; arguments and errors as `shardings`.

    Of several processes each gives the whole tree.
    """
    places = shardings(state, mesh, layout)
    if mesh.is_multi_process:
        return jax.tree.map(placing.put, state, places)
    return jax.device_put(state, places)


def create(
    make: Callable[..., T], placed: tuple[PyTree, ...], mesh: Mesh, layout: Layout = LAYOUT
) -> T:
    """What a function makes, every array cut as it comes into being: nobody ever holds it whole.

    Of several processes all call this alike.

    Args:
      make: *placed -> a tree; it is traced.
      placed: what it takes, as `shard` places it.
      mesh, layout: as `shardings`.
    Returns:
      the tree, as `shard` places it.
    Raises:
      ConfigError: as `shardings`, before anything is computed.
    """
    with on(mesh, layout):
        places = shardings(jax.eval_shape(make, *placed), mesh, layout)
        return jax.jit(make, out_shardings=places)(*placed)


def abstract(state: PyTree, mesh: Mesh, layout: Layout = LAYOUT) -> PyTree:
    """A tree as `shard` places it, without its values: a `jax.ShapeDtypeStruct` per array.

    Arguments and errors as `shardings`.
    """
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        shardings(state, mesh, layout),
    )


def bytes_per_device(state: PyTree) -> int:
    """Bytes of a tree of placed arrays, abstract or not, on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(state)
    )


def batch_shardings(
    batch: PyTree, mesh: Mesh, layout: Layout = LAYOUT, *, stacked: bool = False
) -> PyTree:
    """How a batch is placed: its rows cut along the mesh axes of "batch".

    Args:
      batch: a tree of arrays or `jax.ShapeDtypeStruct`, [rows, …], or of parts that know their
        own axes (`ffnlab.layers.logical.batch_axes`).
      mesh, layout: as `shardings`.
      stacked: the arrays are of several batches, [n, rows, …]; each is cut like one.
    Raises:
      ConfigError: the rows do not divide.
    """

    def of_leaf(path: tuple, leaf: Any, names: AxisNames) -> NamedSharding:
        where = f"batch{jax.tree_util.keystr(path)}"
        return NamedSharding(mesh, partition(names, np.shape(leaf), mesh.shape, layout, path=where))

    axes = batch_axes(batch, stacked=stacked)
    return jax.tree_util.tree_map_with_path(of_leaf, batch, axes)


def place_batch(
    batch: PyTree, mesh: Mesh, layout: Layout = LAYOUT, *, stacked: bool = False
) -> PyTree:
    """A batch as `batch_shardings` says; arguments and errors as there.

    Every process gives the whole batch, of host arrays, and keeps the rows of its devices.
    """

    def of_leaf(leaf: object, sharding: NamedSharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, lambda index: leaf[index])

    places = batch_shardings(batch, mesh, layout, stacked=stacked)
    return jax.tree.map(of_leaf, batch, places)


def batch_part(mesh: Mesh, layout: Layout = LAYOUT) -> tuple[int, int]:
    """Which part of every batch this process's devices hold.

    Args:
      mesh, layout: as `shardings`.
    Returns:
      (index, count): the rows of part `index` of `count` equal ones. (0, 1), all rows, where the
      devices of the processes do not cut them evenly.
    """
    rows = math.prod(mesh.shape.values())  # divides along any axes
    sharding = batch_shardings(jax.ShapeDtypeStruct((rows,), np.int32), mesh, layout)
    held: dict[int, set[int]] = {}
    for device, (part,) in sharding.devices_indices_map((rows,)).items():
        held.setdefault(device.process_index, set()).update(range(*part.indices(rows)))
    return part_of(held, jax.process_index(), rows)


def part_of(held: dict[int, set[int]], process: int, rows: int) -> tuple[int, int]:
    """`batch_part` from the rows that each process holds.

    >>> part_of({0: {0, 1}, 1: {2, 3}}, 1, 4)
    (1, 2)
    """
    size, first = len(held[process]), min(held[process])
    even = {frozenset(range(start, start + size)) for start in range(0, rows, size)}
    if rows % size or not {frozenset(part) for part in held.values()} <= even:
        return 0, 1
    return first // size, rows // size


def place_part(
    batch: PyTree, mesh: Mesh, layout: Layout = LAYOUT, *, stacked: bool = False
) -> PyTree:
    """As `place_batch`, from the rows that this process's devices hold (`batch_part`).

    What has no rows every process gives whole.
    """
    _, count = batch_part(mesh, layout)

    def whole(leaf: Any, names: AxisNames) -> jax.ShapeDtypeStruct:
        sizes = zip(np.shape(leaf), names, strict=True)
        shape = tuple(size * count if name == "batch" else size for size, name in sizes)
        return jax.ShapeDtypeStruct(shape, np.asarray(leaf).dtype)

    def of_leaf(leaf: object, like: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(leaf), like.shape)

    like = jax.tree.map(whole, batch, batch_axes(batch, stacked=stacked))
    places = batch_shardings(like, mesh, layout, stacked=stacked)
    return jax.tree.map(of_leaf, batch, like, places)


class MeshStep:
    """A step on a mesh, from `make_step`: (state, batch) -> (state, metrics).

    Attributes:
      mesh, layout: what it was made for.
    """

    def __init__(
        self,
        step: Callable[[PyTree, PyTree], tuple[PyTree, Metrics]],
        mesh: Mesh,
        layout: Layout,
    ):
        self.mesh, self.layout = mesh, layout
        self._jitted = jax.jit(step, donate_argnums=0)
        self._checked: set[tuple] = set()

    def __call__(self, state: PyTree, batch: PyTree) -> tuple[PyTree, Metrics]:
        """Takes the step, once it has been traced and checked for batches of these shapes."""
        shapes = tuple(np.shape(leaf) for leaf in jax.tree.leaves(batch))
        if shapes not in self._checked:
            self.trace(state, batch)
            self._checked.add(shapes)
        with on(self.mesh, self.layout):
            return self._jitted(state, batch)

    def trace(self, state: PyTree, batch: PyTree) -> jax.stages.Traced:
        """The step as traced, to be lowered and compiled; nothing is computed.

        Args:
          state, batch: as for the step, or abstract.
        Raises:
          ConfigError: the rows do not divide; an axis of the mesh cuts neither a leaf of the state
            nor the batch nor an activation, so that its devices would repeat the work of others.
        """
        with on(self.mesh, self.layout):
            traced = self._jitted.trace(state, batch)
        check_use(traced.jaxpr, self.mesh, self.layout)
        return traced


def make_step(rule: Rule, mesh: Mesh, layout: Layout = LAYOUT) -> MeshStep:
    """A rule's step on a mesh.

    Args:
      rule: any; nothing is asked of it but its contract.
      mesh: where states and batches lie.
      layout: logical name -> mesh axes.
    Returns:
      (state, batch) -> (state, metrics): state as `shard` places it, and donated; batch as
      `place_batch` does.
    Raises:
      ConfigError: from the first step, see `MeshStep.trace`.
    """
    return MeshStep(placed_step(rule, mesh, layout), mesh, layout)


def placed_step(
    rule: Rule, mesh: Mesh, layout: Layout = LAYOUT
) -> Callable[[PyTree, PyTree], tuple[PyTree, Metrics]]:
    """A rule's step with all that goes in and comes out placed, to be traced on a mesh (`on`)."""
    whole = NamedSharding(mesh, PartitionSpec())

    def step(state: PyTree, batch: PyTree) -> tuple[PyTree, Metrics]:
        batch = jax.lax.with_sharding_constraint(batch, batch_shardings(batch, mesh, layout))
        state, metrics = rule.step(state, batch)
        state = jax.lax.with_sharding_constraint(state, shardings(state, mesh, layout))
        metrics = jax.lax.with_sharding_constraint(metrics, whole)  # every process reads them
        return state, metrics

    return step
