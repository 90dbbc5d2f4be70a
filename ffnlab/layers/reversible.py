"""A scan over layers that can be undone: its backward pass rebuilds what they read.

Autodiff of a scan keeps what every layer needs, so that memory grows with their number. Here the
backward pass begins with what the last layer gave and goes back layer by layer: each gives what it
read and its gradients (`Column.undo`). A per-layer rule in an unrolled loop would save nothing: the
compiler computes what is to be rebuilt as early as it likes. In a scan it cannot.

Rebuilding divides by the layers' scales time after time, and rounding grows. `save_every` keeps
what every so many-th layer gave, and rebuilding begins anew there: 1 keeps errors local, as the
authors of reversible columns do (arXiv 2212.11696).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ffnlab.layers.stacking import of_one, with_axes

__all__ = ["reversible"]

Carry = tuple[Array, ...]


def reversible(
    stacked: PyTree, x: Array, c: Carry, *, save_every: int, keys: Array | None = None
) -> Carry:
    """Runs alike layers one after the other: c = layer_i(x, c, key=keys[i]).

    Args:
      stacked: n layers on a leading axis (`stack_modules`); each is called like `Column` and has
        its `undo`.
      x: what all read.
      c: what the first one reads of a layer before; shapes and dtypes stay.
      save_every: layers after which what they give is kept, >= 1; from n on all but the last
        are rebuilt. Where it does not divide n, the first group is the smaller one.
      keys: [n], of what layers draw.
    """
    leaves, treedef = jax.tree.flatten(stacked)
    n = leaves[0].shape[0]
    every = min(save_every, n)
    learned = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
    starts = [0, n % every] if n % every else [0]
    for start, stop in zip(starts, [*starts[1:], n], strict=True):
        part = leaves if start == 0 and stop == n else [leaf[start:stop] for leaf in leaves]
        own = keys if keys is None else keys[start:stop]
        run = rule(treedef, learned, min(every, stop - start))
        c = run(*split(part, learned), own, x, c)
    return c


def split(leaves: Sequence[Any], learned: Sequence[bool]) -> tuple[list, list]:
    """Leaves that have gradients, and the others."""
    pairs = list(zip(leaves, learned, strict=True))
    return [leaf for leaf, yes in pairs if yes], [leaf for leaf, yes in pairs if not yes]


def rule(treedef: Any, learned: Sequence[bool], every: int) -> Any:
    """The run of groups of `every` layers, differentiated by undoing them."""

    def layer(own: list, fixed: list) -> Any:
        rest = {True: iter(own), False: iter(fixed)}
        module = jax.tree.unflatten(treedef, [next(rest[yes]) for yes in learned])
        return with_axes(module, of_one)

    def grouped(parts: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.reshape(-1, every, *leaf.shape[1:]), parts)

    def forward(own: list, fixed: list, keys: Array | None, x: Array, c: Carry) -> tuple:
        def one(c: Carry, part: tuple) -> tuple[Carry, None]:
            own, fixed, key = part
            return layer(own, fixed)(x, c, key=key), None

        def group(c: Carry, parts: tuple) -> tuple[Carry, Carry]:
            c, _ = jax.lax.scan(one, c, parts)
            return c, c

        return jax.lax.scan(group, c, grouped((own, fixed, keys)))

    @jax.custom_vjp
    def run(own: list, fixed: list, keys: Array | None, x: Array, c: Carry) -> Carry:
        return forward(own, fixed, keys, x, c)[0]

    def kept(own: list, fixed: list, keys: Array | None, x: Array, c: Carry) -> tuple:
        last, ends = forward(own, fixed, keys, x, c)
        return last, (own, fixed, keys, x, ends)

    def backward(residuals: tuple, of_last: Carry) -> tuple:
        own, fixed, keys, x, ends = residuals

        def one(carry: tuple, part: tuple) -> tuple[tuple, list]:
            (new, of_new, of_x), (own, fixed, key) = carry, part
            found = layer(own, fixed).undo(x, new, of_new, key=key)
            gradients, _ = split(jax.tree.leaves(found.of_column), learned)
            return (found.c, found.of_c, of_x + found.of_x), gradients

        def group(carry: tuple, given: tuple) -> tuple[tuple, list]:
            (of_c, of_x), (parts, end) = carry, given
            (_, *carry), gradients = jax.lax.scan(one, (end, of_c, of_x), parts, reverse=True)
            return tuple(carry), gradients

        begin = of_last, jnp.zeros(x.shape, jnp.promote_types(x.dtype, jnp.float32))
        parts = grouped((own, fixed, keys))
        (of_c, of_x), found = jax.lax.scan(group, begin, (parts, ends), reverse=True)
        gradients = [leaf.reshape(-1, *leaf.shape[2:]) for leaf in found]
        return gradients, None, None, of_x.astype(x.dtype), of_c

    run.defvjp(kept, backward)
    return run
