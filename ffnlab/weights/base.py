"""What every weight is: a frozen pytree that stands where a dense matrix stood.

A weight of logical shape [in, out] is applied as `y = x @ w`. Its arrays are pytree leaves, its
facts (group size, activation format) are static. Layers call `matmul` and never ask which weight
they hold.
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from pallas_kernels import grouped

Axes = tuple[str | None, ...]
Indices = Int[np.ndarray, "_"] | None
C = TypeVar("C", bound=type)
W = TypeVar("W")


def static(default: object = dataclasses.MISSING) -> object:
    """A dataclass field that is part of the tree's structure and not a leaf."""
    return dataclasses.field(default=default, metadata={"static": True})


def register(cls: C) -> C:
    """Makes a frozen dataclass a pytree node; `static()` fields become its auxiliary data.

    Unflattening does not call `__init__`, so checks there see what a user built and never the
    placeholders that jax puts into trees (shapes, shardings, `None`).
    """
    names = [f.name for f in dataclasses.fields(cls) if not f.metadata.get("static")]
    static_names = [f.name for f in dataclasses.fields(cls) if f.metadata.get("static")]

    def flatten_with_keys(node: object) -> tuple[list, tuple]:
        children = [(jax.tree_util.GetAttrKey(n), getattr(node, n)) for n in names]
        return children, tuple(getattr(node, n) for n in static_names)

    def flatten(node: object) -> tuple[list, tuple]:
        children, aux = flatten_with_keys(node)
        return [c for _, c in children], aux

    def unflatten(aux: tuple, children: tuple | list) -> object:
        node = object.__new__(cls)
        for name, value in zip(static_names, aux, strict=True):
            object.__setattr__(node, name, value)
        for name, value in zip(names, children, strict=True):
            object.__setattr__(node, name, value)
        return node

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def rebuild(node: W, **fields: object) -> W:
    """A copy of a registered dataclass with some fields exchanged and no check run.

    For structures whose leaves are not arrays (axis names, shardings).
    """
    copy = object.__new__(type(node))
    for field in dataclasses.fields(node):
        value = fields.get(field.name, getattr(node, field.name))
        object.__setattr__(copy, field.name, value)
    return copy


class AxisNames(tuple):
    """Logical names of one array's dimensions; a leaf of trees, unlike a plain tuple."""

    __slots__ = ()


class Weight(abc.ABC):
    """A matrix of logical shape [in, out] in some format.

    Under `jax.vmap` or `lax.scan` every leaf may carry leading axes; `shape` is that of one matrix.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, int]:
        """(in, out)."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of `dense()`."""

    @abc.abstractmethod
    def dense(self) -> Float[Array, "*stack in out"]:
        """The matrix this weight stands for, [in, out]."""

    @abc.abstractmethod
    def leaf_axes(self, axes: Axes) -> "Weight":
        """This structure with, in place of each array, the logical axis names of its dimensions.

        Args:
          axes: names of the logical dimensions, (in, out), with any stacking axes before them.
        """

    def matmul(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        """x @ w, in x's dtype: the weight follows the activations."""
        return jnp.matmul(x, self.dense().astype(x.dtype))

    def matmul_grouped(
        self, x: Float[Array, "m in"], sizes: Int[Array, "e"]
    ) -> Float[Array, "m out"]:
        """y[i] = x[i] @ w[group of i], of a weight whose arrays are [e, ...], in x's dtype.

        Args:
          x: rows sorted by group, those of group 0 first.
          sizes: rows of each group; rows beyond the last become zeros.
        """
        return grouped.matmul(x, self.dense().astype(x.dtype), sizes)

    def transpose(self) -> "Weight":
        """The weight of shape [out, in], where the format has one.

        Raises:
          ValueError: the format cannot say its transpose; `Dense(w.dense().T)` always can.
        """
        raise ValueError(
            f"{type(self).__name__} has no transpose of its own format; "
            "use weights.Dense(weight.dense().T)"
        )

    def take(self, rows: Indices = None, columns: Indices = None) -> "Weight":
        """The weight of some rows and some columns, in its own format; what stays is not rounded
        again.

        Args:
          rows, columns: numbers in ascending order, each once; None for all.
        Raises:
          ValueError: the format cannot say it: it has no parts, or rows go in groups only.
        """
        raise ValueError(
            f"a {type(self).__name__} has no rows and columns to take; "
            "use weights.Dense(weight.dense())"
        )

    def prepare(self, backend: str) -> "Weight":
        """This weight in the layout `backend` ("cpu", "cuda", "tpu") reads fastest."""
        return self

    def trains(self, field: str) -> bool:
        """Whether learning may change what lies in a field; `ffnlab.tree.trained` asks."""
        return True

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays, scales and masks included."""
        return sum(nbytes(leaf) for leaf in jax.tree.leaves(self))


def nbytes(leaf: object) -> int:
    """Stored bytes of one array or abstract array; sub-byte dtypes count their real width."""
    shape, dtype = leaf.shape, leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return math.prod(shape) * 8
    bits = 4 if dtype.name in ("int4", "uint4", "float4_e2m1fn") else dtype.itemsize * 8
    return math.prod(shape) * bits // 8


def is_weight(node: object) -> bool:
    """Whether a tree node is a weight; for `is_leaf=` of `jax.tree.map`."""
    return isinstance(node, Weight)


def prepare(tree: W, backend: str | None = None) -> W:
    """Converts every weight of a tree once to the layout its backend reads fastest.

    A layer with a method `prepare(backend)` decides for the weights that it holds.

    Args:
      tree: a model or any pytree holding weights.
      backend: "cpu", "cuda" or "tpu"; the default device's platform when None.
    Returns:
      the same tree type; values are those of `dense()` (and of `matmul`, to rounding).
    """
    platform = backend or jax.default_backend()
    platform = "cuda" if platform == "gpu" else platform
    if platform not in ("cpu", "cuda", "tpu"):
        raise ValueError(f"backend={backend!r} is not one of 'cpu', 'cuda', 'tpu'")
    # Asked of the type, because a Param passes attributes of its weight on as its own.
    prepares = lambda node: hasattr(type(node), "prepare")  # noqa: E731
    ready = lambda node: node.prepare(platform) if prepares(node) else node  # noqa: E731
    return jax.tree.map(ready, tree, is_leaf=prepares)


def map_weights(fn: Callable[[Weight], object], tree: W) -> W:
    """Applies `fn` to every outermost weight of a tree and keeps the rest."""
    return jax.tree.map(lambda n: fn(n) if is_weight(n) else n, tree, is_leaf=is_weight)


def taken(
    array: Shaped[Array, "*stack in out"], rows: Indices = None, columns: Indices = None
) -> Shaped[Array, "*stack _ _"]:
    """Some rows and columns of a matrix, or of each of a stack; None for all."""
    array = array if rows is None else array[..., rows, :]
    return array if columns is None else array[..., columns]


def check_matrix(name: str, array: object) -> None:
    """Raises ValueError unless `array` has at least two dimensions."""
    if len(getattr(array, "shape", ())) < 2:
        raise ValueError(
            f"{name} must have shape [in, out], got {getattr(array, 'shape', type(array).__name__)}"
        )


def check_act(act: str | None) -> None:
    """Raises ValueError unless `act` is a known activation format."""
    if act not in (None, "e4m3"):
        raise ValueError(f"act={act!r} is not one of None, 'e4m3'")
