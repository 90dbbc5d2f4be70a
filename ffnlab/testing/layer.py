"""The contract of a layer: an `nnx.Module` that is a pytree, whose matrices are weights."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from ffnlab import tree
from ffnlab.storage import trees
from ffnlab.testing.compiling import counted
from ffnlab.testing.contract import equal, hold, need
from ffnlab.weights import AxisNames, is_weight

__all__ = ["check_layer"]

Call = Callable[[nnx.Module, Array], Array]


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer under check.

    Attributes:
      make: the layer of a key.
      x: its input.
      call: how it is applied.
    """

    make: Callable[[Array], nnx.Module]
    x: Array
    call: Call

    @functools.cached_property
    def layer(self) -> nnx.Module:
        """The layer of a fixed key."""
        return self.make(jax.random.key(0))

    @property
    def is_float(self) -> bool:
        """Whether the input is of numbers, not of ids."""
        return jnp.issubdtype(self.x.dtype, jnp.floating)


def check_layer(
    make: Callable[[Array], nnx.Module], x: Array, *, call: Call = lambda layer, x: layer(x)
) -> None:
    """Holds a layer against its contract; takes a second or two.

    Args:
      make: key -> the layer; small, its parameters drawn from the key.
      x: an input, floating or ids.
      call: (layer, x) -> y, an array; where the layer takes more than x, or returns more than y.
    Raises:
      AssertionError: names the line of the contract that is broken, and how.

    >>> from ffnlab.layers import RMSNorm
    >>> check_layer(lambda key: RMSNorm(8), jnp.ones((2, 8)) + jnp.arange(8.0))
    """
    lines = (
        it_is_a_module_and_a_function_of_its_key,
        every_array_lies_in_a_variable_that_names_its_axes,
        flax_splits_and_merges_it_without_graph_updates,
        calling_it_changes_nothing,
        the_second_call_compiles_nothing,
        gradients_flow,
        the_output_follows_the_dtype_of_the_input,
        what_is_saved_and_restored_is_equal,
    )
    hold("the layer", lines, Case(make, x, call))


def it_is_a_module_and_a_function_of_its_key(case: Case) -> None:
    need(isinstance(case.layer, nnx.Module), f"{type(case.layer).__name__} is no nnx.Module")
    need(equal(case.layer, case.make(jax.random.key(0))), "the same key gives another layer")


def every_array_lies_in_a_variable_that_names_its_axes(case: Case) -> None:
    found = variables(case.layer)
    need(bool(found), "it has no parameter and no statistic")
    for variable in found:
        is_one = isinstance(variable, nnx.Variable)
        need(is_one, f"a {type(variable).__name__} lies outside of a Variable")
        value, axes = variable.get_value(), variable.get_metadata().get("axes")
        what = f"axes={axes} of a {type(variable).__name__} of shape {tuple(value.shape)}"
        need(axes is not None, what)
        # A weight may be several on axes before its own two, as its arrays tell.
        names = value.leaf_axes(tuple(axes)) if is_weight(value) else AxisNames(axes)
        names = jax.tree.leaves(names, is_leaf=lambda node: isinstance(node, AxisNames))
        for own, leaf in zip(names, jax.tree.leaves(value), strict=True):
            need(len(own) == leaf.ndim, what)


def variables(layer: nnx.Module) -> list:
    """The Variables of a layer, and what array lies outside of one."""
    return jax.tree.leaves(layer, is_leaf=lambda node: isinstance(node, nnx.Variable))


def flax_splits_and_merges_it_without_graph_updates(case: Case) -> None:
    with nnx.set_graph_mode(False), nnx.set_graph_updates(False):
        for layer in (case.layer, jax.eval_shape(lambda: case.layer)):
            merged = nnx.merge(*nnx.split(layer))
            same = jax.tree.structure(merged) == jax.tree.structure(layer)
            need(same, "split and merged it is another")


def calling_it_changes_nothing(case: Case) -> None:
    before = jax.tree.map(np.array, case.layer)
    first, again = case.call(case.layer, case.x), case.call(case.layer, case.x)
    need(equal(before, case.layer), "a call changes the layer")
    need(equal(first, again), "the same call has other bits the second time")


def the_second_call_compiles_nothing(case: Case) -> None:
    run, other = jax.jit(case.call), case.make(jax.random.key(5))
    first = run(case.layer, case.x)
    with counted() as count:
        run(other, case.x)
        again = run(case.layer, case.x)
    need(count.programs == 0, f"{count.programs} programs were compiled for other numbers")
    need(equal(first, again), "the same call has other bits the second time")


def gradients_flow(case: Case) -> None:
    fixes_all = not any(isinstance(v, nnx.Param) for v in variables(case.layer))
    trained, fixed = (None, case.layer) if fixes_all else tree.trained(case.layer)

    def of_both(trained: PyTree, x: Array) -> Array:
        layer = fixed if fixes_all else tree.combine(trained, fixed)
        y = case.call(layer, x).astype(jnp.float32)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum()  # a norm fixes plain sums

    names = {0: "its parameters", 1: "its input"}
    arguments = ((), (0,))[not fixes_all] + ((), (1,))[case.is_float]
    if not arguments:  # a table that is asked for ids
        return
    found = jax.jit(jax.grad(of_both, arguments))(trained, case.x)
    for name, part in zip((names[i] for i in arguments), found, strict=True):
        gradients = [np.asarray(g, np.float32) for g in jax.tree.leaves(part)]
        need(all(np.all(np.isfinite(g)) for g in gradients), f"those of {name} are not finite")
        need(any(np.any(g != 0) for g in gradients), f"those of {name} are all zero")


def the_output_follows_the_dtype_of_the_input(case: Case) -> None:
    dtype = jnp.bfloat16
    if case.is_float:
        y = jax.eval_shape(case.call, case.layer, case.x.astype(dtype))
        need(y.dtype == dtype, f"of {jnp.dtype(dtype)} it is {y.dtype}")


def what_is_saved_and_restored_is_equal(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trees.save(Path(folder) / "layer", case.layer)
        back = trees.restore(Path(folder) / "layer", jax.eval_shape(lambda: case.layer))
    need(equal(back, case.layer), "it is not")
