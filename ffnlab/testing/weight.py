"""The contract of a weight: what may stand where a dense matrix stood."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from ffnlab import compat, weights
from ffnlab.storage import trees
from ffnlab.testing.compiling import counted
from ffnlab.testing.contract import equal, hold, need
from ffnlab.weights import Weight

__all__ = ["check_weight"]

Product = Callable[[Weight, Array], Array]


def plain(w: Weight, x: Array) -> Array:
    """x @ w, of the matrix that a weight stands for."""
    return x @ w.dense().astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class Case:
    """A weight under check.

    Attributes:
      make: the weight of a key.
      product: what its `matmul` has to give.
    """

    make: Callable[[Array], Weight]
    product: Product

    @functools.cached_property
    def w(self) -> Weight:
        """The weight of a fixed key."""
        return self.make(jax.random.key(0))

    def x(self, *rows: int) -> Array:
        """A fixed Gaussian input, [*rows, in]."""
        return jax.random.normal(jax.random.key(11), (*rows, self.w.shape[0]))


def check_weight(make: Callable[[Array], Weight], *, product: Product = plain) -> None:
    """Holds a weight against its contract (`ffnlab.weights.Weight`); takes a second or two.

    Args:
      make: key -> the weight; small, its numbers drawn from the key, its structure always the same.
        Its product is tried in two parts where there are two devices and its columns are even.
      product: (w, x [*b, in]) -> [*b, out]: what `matmul` has to give, where that is not
        `x @ w.dense()`: for weights that round or drop a part of their input.
    Raises:
      AssertionError: names the line of the contract that is broken, and how.

    >>> check_weight(lambda key: weights.Dense(jax.random.normal(key, (8, 6))))
    """
    lines = (
        it_is_a_weight,
        it_is_a_pytree_of_arrays,
        the_same_key_gives_the_same_weight,
        shape_dtype_and_bytes_are_those_of_its_arrays,
        matmul_is_the_product_with_dense,
        transpose_says_so_or_transposes,
        arguments_stay_and_the_second_call_compiles_nothing,
        stacked_weights_are_mapped_and_scanned,
        grouped_products_are_those_of_each_weight,
        gradients_flow_to_the_input_and_to_float_arrays,
        what_is_saved_and_restored_is_equal,
        leaf_axes_name_every_dimension_of_every_array,
        a_prepared_weight_is_the_same_function,
        abstract_values_pass_through,
    )
    hold("the weight", lines, Case(make, product))


def it_is_a_weight(case: Case) -> None:
    need(isinstance(case.w, Weight), f"{type(case.w).__name__} is no ffnlab.weights.Weight")


def it_is_a_pytree_of_arrays(case: Case) -> None:
    leaves, structure = jax.tree.flatten(case.w)
    is_whole = any(leaf is case.w for leaf in leaves)
    need(not is_whole, "it is one leaf; decorate its class with ffnlab.weights.register")
    for leaf in leaves:
        need(isinstance(leaf, jax.Array), f"a leaf is {type(leaf).__name__}, no array")
    need(equal(jax.tree.unflatten(structure, leaves), case.w), "it is not rebuilt from its leaves")
    hash(structure)
    jax.tree.map(lambda _: None, case.w)  # jax puts placeholders into trees
    other = jax.tree.structure(case.make(jax.random.key(5)))
    need(structure == other, f"its structure depends on its numbers: {structure} and {other}")


def the_same_key_gives_the_same_weight(case: Case) -> None:
    need(equal(case.w, case.make(jax.random.key(0))), "it gives another")


def shape_dtype_and_bytes_are_those_of_its_arrays(case: Case) -> None:
    w, dense = case.w, case.w.dense()
    need(len(tuple(w.shape)) == 2, f"shape is {w.shape}; (in, out) is needed")
    need(dense.shape == tuple(w.shape), f"shape is {w.shape}, that of dense() {dense.shape}")
    need(dense.dtype == w.dtype, f"dtype is {w.dtype}, that of dense() {dense.dtype}")
    stored = sum(weights.nbytes(leaf) for leaf in jax.tree.leaves(w))
    need(w.nbytes == stored, f"nbytes is {w.nbytes}, its arrays have {stored}")


def matmul_is_the_product_with_dense(case: Case) -> None:
    # float32: order of summation. bfloat16: one rounding of each factor and of the result.
    for dtype, limit in ((jnp.float32, 1e-4), (jnp.bfloat16, 0.1)):
        x = case.x(2, 3).astype(dtype)
        y, expected = case.w.matmul(x), case.product(case.w, x)
        need(y.dtype == dtype, f"of {jnp.dtype(dtype)} it is {y.dtype}; it follows its input")
        need(y.shape == expected.shape, f"its shape is {y.shape}, not {expected.shape}")
        close(y.astype(jnp.float32), expected.astype(jnp.float32), limit)


def close(a: Array, b: Array, limit: float) -> None:
    """Raises AssertionError where arrays differ by more than a limit, absolute and relative."""
    np.testing.assert_allclose(a, b, rtol=limit, atol=limit)


def transpose_says_so_or_transposes(case: Case) -> None:
    w = case.w
    if type(w).transpose is Weight.transpose:
        return  # which raises
    turned = w.transpose()
    need(tuple(turned.shape) == tuple(w.shape)[::-1], f"its shape is {turned.shape}")
    np.testing.assert_array_equal(turned.dense(), w.dense().T)


def arguments_stay_and_the_second_call_compiles_nothing(case: Case) -> None:
    w, x = case.w, case.x(4)
    before = jax.tree.map(np.array, w)
    w.matmul(x)
    product = jax.jit(lambda w, x: w.matmul(x))
    first, other = product(w, x), case.make(jax.random.key(5))
    with counted() as count:
        product(other, x)
        again = product(w, x)
    need(count.programs == 0, f"{count.programs} programs were compiled for other numbers")
    need(equal(first, again), "the same product has other bits the second time")
    need(equal(before, w), "matmul changes the weight")


def stacked_weights_are_mapped_and_scanned(case: Case) -> None:
    ws = [case.make(key) for key in jax.random.split(jax.random.key(0), 3)]
    stacked, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws), case.x(2)
    each = jnp.stack([w.matmul(x) for w in ws])
    close(jax.vmap(lambda w: w.matmul(x))(stacked), each, 1e-4)  # batched sums reorder
    scanned = jax.lax.scan(lambda carry, w: (carry, w.matmul(x)), 0, stacked)[1]
    close(scanned, each, 1e-4)


def grouped_products_are_those_of_each_weight(case: Case) -> None:
    ws = [case.make(key) for key in jax.random.split(jax.random.key(0), 3)]
    stacked, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws), case.x(6)
    expected = [ws[0].matmul(x[:2]), ws[2].matmul(x[2:5]), jnp.zeros((1, case.w.shape[1]))]
    y = stacked.matmul_grouped(x, jnp.array([2, 0, 3], jnp.int32))
    close(y, jnp.concatenate(expected), 1e-4)


def gradients_flow_to_the_input_and_to_float_arrays(case: Case) -> None:
    squares = lambda w, x: (w.matmul(x) ** 2).sum()  # noqa: E731
    of_w, of_x = jax.jit(jax.grad(squares, (0, 1), allow_int=True))(case.w, case.x(4))
    need(bool(np.all(np.isfinite(of_x))), "that of the input is not finite")
    need(bool(np.any(of_x != 0)), "that of the input is zero")
    floats = [g for g in jax.tree.leaves(of_w) if g.dtype != jax.dtypes.float0]
    for gradient in floats:
        finite = np.isfinite(gradient.astype(jnp.float32))
        need(bool(np.all(finite)), f"that of an array {gradient.shape} is not finite")
    moved = any(np.any(np.asarray(g.astype(jnp.float32)) != 0) for g in floats)
    need(moved or not floats, "those of all its float arrays are zero")


def what_is_saved_and_restored_is_equal(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trees.save(Path(folder) / "w", case.w)
        back = trees.restore(Path(folder) / "w", jax.eval_shape(lambda: case.w))
    need(equal(back, case.w), "it is not")


def leaf_axes_name_every_dimension_of_every_array(case: Case) -> None:
    w, x = case.w, case.x(4)
    is_names = lambda node: isinstance(node, weights.AxisNames)  # noqa: E731
    named = w.leaf_axes(("embed", "mlp"))
    same = jax.tree.structure(named, is_leaf=is_names) == jax.tree.structure(w)
    need(same, "leaf_axes gives another structure; each array becomes an AxisNames")
    names = jax.tree.leaves(named, is_leaf=is_names)
    for axes, leaf in zip(names, jax.tree.leaves(w), strict=True):
        need(len(axes) == leaf.ndim, f"{tuple(axes)} for an array {leaf.shape}")
    if jax.device_count() < 2 or w.shape[1] % 2:
        return
    mesh = compat.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    place = lambda axes: NamedSharding(  # noqa: E731
        mesh, PartitionSpec(*["tp" if axis == "mlp" else None for axis in axes])
    )
    sharded = jax.device_put(w, jax.tree.map(place, named, is_leaf=is_names))
    cut = any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    need(cut, "no array has the columns' axis, so that none is cut with them")
    close(jax.jit(lambda w, x: w.matmul(x))(sharded, x), w.matmul(x), 1e-5)


def a_prepared_weight_is_the_same_function(case: Case) -> None:
    w, x = case.w, case.x(4)
    for backend in ("cpu", "cuda", "tpu"):
        prepared = weights.prepare(w, backend)
        need(tuple(prepared.shape) == tuple(w.shape), f"for {backend} its shape is another")
        close(prepared.matmul(x), w.matmul(x), 1e-4)


def abstract_values_pass_through(case: Case) -> None:
    w = jax.eval_shape(case.make, jax.random.key(0))
    need(tuple(w.shape) == tuple(case.w.shape), f"an abstract one has shape {w.shape}")
    need(w.nbytes == case.w.nbytes, f"an abstract one has {w.nbytes} bytes")
    y = jax.eval_shape(lambda w, x: w.matmul(x), w, case.x(4))
    need(y.shape == (4, w.shape[1]), f"an abstract product has shape {y.shape}")
