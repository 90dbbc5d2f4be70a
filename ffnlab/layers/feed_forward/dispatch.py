"""Tokens to their experts and back, on one device or over a mesh.

On a mesh each device sorts its own tokens, whatever else is cut. Where the layout cuts experts
(mesh axis `ep`), tokens are cut along that axis too: every device sends each of its rows to the one
that holds its expert, multiplies what it got, and sends the results back; no expert is moved. Room
is made for all rows of a device going to one other, so that none is dropped: n times as much as is
needed where they are spread evenly, of which empty rows are multiplied by nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ffnlab.layers.grouped import Groups, back, group, take
from ffnlab.layers.logical import ambient, automatic, partition
from ffnlab.layers.routers import Routing
from ffnlab.weights import AxisNames, is_weight

__all__ = ["mixed"]

Experts = Callable[[Array, Groups], Array]


def mixed(
    experts: nnx.Module,
    x: Float[Array, "*b d"],
    routing: Routing,
    *,
    groups: Groups | None = None,
) -> Float[Array, "*b out"]:
    """The sum over each token's choices of weight * expert(x); 0 for a token without.

    Args:
      experts: (rows [m, d], groups) -> [m, out], with parameters that have an axis "expert".
      x: tokens.
      routing: where they go.
      groups: of all tokens by their choices, where that is known already; on a mesh each device
        groups its own.
    """
    ids = jnp.where(routing.kept, routing.chosen, routing.experts)
    sizes = automatic()
    if math.prod(sizes.values()) == 1:
        groups = group(ids, routing.experts) if groups is None else groups
        return combined(here(experts, x, groups), routing.weight)
    layout, leaves = ambient(), jax.tree.leaves(experts)
    structure, places = jax.tree.structure(experts), specs(experts, sizes)
    names = ("batch", *(("length",) if x.ndim > 2 else ()))
    names = (*names, *(None,) * (x.ndim - len(names)))
    rows = partition(names, x.shape, sizes, layout)
    cut = tuple(a for a in layout.get("expert", ()) if sizes.get(a, 1) > 1)
    holders = math.prod(sizes[axis] for axis in cut)
    apart = holders > 1 and routing.experts % holders == 0

    def run(leaves: list[Array], x: Array, ids: Array, weight: Array) -> Array:
        own = structure.unflatten(leaves)
        if not apart:
            return combined(here(own, x, group(ids, routing.experts)), weight)
        return combined(exchanged(own, x, ids, routing.experts, cut, holders), weight)

    spread = jax.shard_map(
        run, in_specs=(places, rows, rows, rows), out_specs=rows, check_vma=False
    )
    return spread(leaves, x, ids, routing.weight)


def specs(experts: nnx.Module, sizes: dict[str, int]) -> list[PartitionSpec]:
    """How each array of the experts is cut: along their axis, and along no other."""
    found, layout = [], {"expert": ambient().get("expert", ())}
    for variable in jax.tree.leaves(experts, is_leaf=lambda node: isinstance(node, nnx.Variable)):
        value = variable.get_value()
        axes = value.leaf_axes(variable.axes) if is_weight(value) else AxisNames(variable.axes)
        each = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, AxisNames))
        pairs = zip(each, jax.tree.leaves(value), strict=True)
        found += [partition(own, leaf.shape, sizes, layout) for own, leaf in pairs]
    return found


def combined(y: Float[Array, "m d"], weight: Float[Array, "*b k"]) -> Float[Array, "*b d"]:
    """The weighted sum over each token's choices."""
    *tokens, k = weight.shape
    weighted = y.reshape(-1, k, y.shape[-1]) * weight.reshape(-1, k, 1).astype(y.dtype)
    return jnp.sum(weighted, axis=1).reshape(*tokens, y.shape[-1])


def here(experts: Experts, x: Float[Array, "*b d"], groups: Groups) -> Float[Array, "m out"]:
    """What experts that all lie here make of each choice, in the order of the choices."""
    return back(experts(take(x.reshape(-1, x.shape[-1]), groups), groups), groups)


def exchanged(
    experts: Experts,
    x: Float[Array, "*b d"],
    ids: Int[Array, "*b k"],
    e: int,
    axes: tuple[str, ...],
    holders: int,
) -> Float[Array, "m out"]:
    """`here`, of experts of which each of `holders` devices along `axes` has e / holders."""
    groups, m = group(ids, e), ids.size
    rows, sizes = take(x.reshape(-1, x.shape[-1]), groups), groups.sizes.reshape(holders, -1)
    holder = groups.ids // sizes.shape[1]  # `holders` for rows of no expert
    ends = jnp.cumsum(sizes.sum(1))
    place = jnp.arange(m) - jnp.append(0, ends)[holder]

    def trade(blocks: Array) -> Array:
        return jax.lax.all_to_all(blocks, axes, 0, 0)

    sent = jnp.zeros((holders, m, rows.shape[1]), rows.dtype)
    got = trade(sent.at[holder, place].set(rows, mode="drop", unique_indices=True))
    counts = trade(sizes)
    of_source = lambda n: jnp.searchsorted(jnp.cumsum(n), jnp.arange(m), side="right")  # noqa: E731
    inner = group(jax.vmap(of_source)(counts), sizes.shape[1])
    made = back(experts(take(got.reshape(holders * m, -1), inner), inner), inner)
    returned = trade(made.reshape(holders, m, -1))
    own = returned.at[holder, place].get(mode="fill", fill_value=0, unique_indices=True)
    return back(own, groups)
