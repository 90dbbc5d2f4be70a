"""Tokens to their experts and back, on one device or over a mesh.

On a mesh each device sorts its own tokens, whatever else is cut. Where the layout cuts experts
(mesh axis `ep`), tokens are cut along that axis too: every device sends each of its rows to the one
that holds its expert (`dispatch`), multiplies what it got, and sends the results back (`combine`);
no expert is moved and no row is dropped. Two forms of one contract:

- "padded": `all_to_all` of equal blocks, on every platform. A block has room for all rows of a
  device, so n times as much is sent as where they are spread evenly.
- "ragged": `ragged_all_to_all`, which sends what there is. XLA has it on GPUs and TPUs.

In both a device has room for all rows of all, of which empty ones are multiplied by nothing.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.layers.balance import counts
from ffnlab.layers.grouped import Groups, back, group, take
from ffnlab.layers.logical import ambient, automatic, partition, row_names
from ffnlab.layers.routers import Routing
from ffnlab.weights import AxisNames, is_weight

__all__ = ["FORMS", "Sent", "combine", "dispatch", "holders_of", "loads", "mixed"]

Experts = Callable[[Array, Groups], Array]


def mixed(
    experts: nnx.Module,
    x: Float[Array, "*b d"],
    routing: Routing,
    *,
    groups: Groups | None = None,
    form: str | None = None,
) -> Float[Array, "*b out"]:
    """The sum over each token's choices of weight * expert(x); 0 for a token without.

    Args:
      experts: (rows [m, d], groups) -> [m, out], with parameters that have an axis "expert".
      x: tokens.
      routing: where they go.
      groups: of all tokens by their choices, where that is known already; on a mesh each device
        groups its own.
      form: how devices exchange rows, "padded" or "ragged"; what the platform has when None.
    Raises:
      ConfigError: another form.
    """
    ids = jnp.where(routing.kept, routing.chosen, routing.experts)
    sizes = automatic()
    if math.prod(sizes.values()) == 1:
        groups = group(ids, routing.experts) if groups is None else groups
        return combined(here(experts, x.reshape(-1, x.shape[-1]), groups), routing.weight)
    layout, leaves = ambient(), jax.tree.leaves(experts)
    structure, places = jax.tree.structure(experts), specs(experts, sizes)
    rows = partition(row_names(x.ndim), x.shape, sizes, layout)
    axes, holders = holders_of(routing.experts)
    form = default_form() if form is None else form
    if form not in FORMS:
        raise ConfigError(f"form={form!r} is not one of {sorted(FORMS)}")

    def run(leaves: list[Array], x: Array, ids: Array, weight: Array) -> Array:
        own, flat = structure.unflatten(leaves), x.reshape(-1, x.shape[-1])
        if holders == 1:
            return combined(here(own, flat, group(ids, routing.experts)), weight)
        rows, sent = dispatch(flat, ids, routing.experts, axes, form=form)
        return combined(combine(own(rows, sent.inner), sent), weight)

    spread = jax.shard_map(
        run, in_specs=(places, rows, rows, rows), out_specs=rows, check_vma=False
    )
    return spread(leaves, x, ids, routing.weight)


def holders_of(experts: int) -> tuple[tuple[str, ...], int]:
    """The axes of the mesh that is set which cut so many experts, and how many devices share them.

    ((), 1) where none does, or they do not divide.
    """
    sizes = automatic()
    axes = tuple(a for a in ambient().get("expert", ()) if sizes.get(a, 1) > 1)
    holders = math.prod(sizes[axis] for axis in axes)
    return (axes, holders) if experts % holders == 0 else ((), 1)


def default_form() -> str:
    """The form of the platform."""
    return "ragged" if jax.default_backend() in ("gpu", "tpu") else "padded"


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


def here(experts: Experts, x: Float[Array, "n d"], groups: Groups) -> Float[Array, "m out"]:
    """What experts that all lie here make of each choice, in the order of the choices."""
    return back(experts(take(x, groups), groups), groups)


# ---------------------------------------------------------------- between devices


class Sent(NamedTuple):
    """What a device knows of the rows that it sent and got; n devices share e experts.

    Attributes:
      groups: of its choices [m] by all experts.
      inner: of the rows [n m] that it got by its own e / n experts; those beyond are empty.
      sizes: [n, e / n] rows that it sent to each expert of each device.
      counts: [n, e / n] rows that it got from each device for each of its own experts.
      axes: of the mesh that the devices lie along.
      form: how rows are exchanged.
    """

    groups: Groups
    inner: Groups
    sizes: Int[Array, "n o"]
    counts: Int[Array, "n o"]
    axes: tuple[str, ...]
    form: str


def dispatch(
    x: Float[Array, "t d"], ids: Int[Array, "*b k"], e: int, axes: tuple[str, ...], *, form: str
) -> tuple[Float[Array, "r d"], Sent]:
    """Sends rows to the devices that hold their experts; within a `shard_map` over `axes`.

    Args:
      x: this device's tokens.
      ids: the expert of each of its m = t k choices, a number outside 0..e - 1 for none.
      e: experts of all devices, which divide them in order.
      axes: of the mesh that the devices (n) lie along.
      form: a key of `FORMS`; the results are the same.
    Returns:
      (rows [n m, d] that this device's experts get, by expert, and what `combine` needs).
    """
    groups, n = group(ids, e), jax.lax.axis_size(axes)
    sizes = groups.sizes.reshape(n, -1)
    sent = Sent(groups, groups, sizes, _traded(sizes, axes), axes, form)
    exchange = FORMS[form]
    sent = sent._replace(inner=group(exchange.numbers(sent), e // n))
    return take(exchange.there(take(x, groups), sent), sent.inner), sent


def combine(made: Float[Array, "r out"], sent: Sent) -> Float[Array, "m out"]:
    """What experts made of the rows of `dispatch`, where and in the order they were sent from.

    A choice of no expert gets 0.
    """
    return back(FORMS[sent.form].back(back(made, sent.inner), sent), sent.groups)


def _traded(x: Array, axes: tuple[str, ...]) -> Array:
    """Item i of [n, ...] to device i, which puts those of device j at j."""
    return jax.lax.all_to_all(x, axes, 0, 0)


class Form(NamedTuple):
    """One way to exchange rows.

    Attributes:
      there: (rows [m, d] by expert, sent) -> rows [n m, d] as they come.
      numbers: sent -> which of its own experts each of the rows [n m] is for; e / n for none.
      back: (rows [n m, out] as they came, sent) -> rows [m, out] by expert.
    """

    there: Callable[[Array, Sent], Array]
    numbers: Callable[[Sent], Array]
    back: Callable[[Array, Sent], Array]


def _place(sent: Sent) -> tuple[Array, Array]:
    """In which block, and where within it, each of a device's rows is sent."""
    holder = sent.groups.ids // sent.sizes.shape[1]  # n for rows of no expert
    starts = jnp.append(0, jnp.cumsum(sent.sizes.sum(1)))
    return holder, jnp.arange(len(holder)) - starts[holder]


def _padded_there(rows: Array, sent: Sent) -> Array:
    blocks = jnp.zeros((len(sent.sizes), *rows.shape), rows.dtype)
    blocks = blocks.at[_place(sent)].set(rows, mode="drop", unique_indices=True)
    return _traded(blocks, sent.axes).reshape(-1, rows.shape[1])


def _padded_back(made: Array, sent: Sent) -> Array:
    n, m = len(sent.sizes), len(sent.groups.order)
    returned = _traded(made.reshape(n, m, -1), sent.axes)
    return returned.at[_place(sent)].get(mode="fill", fill_value=0, unique_indices=True)


def _padded_numbers(sent: Sent) -> Array:
    rows = jnp.arange(len(sent.groups.order))
    of_source = lambda n: jnp.searchsorted(jnp.cumsum(n), rows, side="right")  # noqa: E731
    return jax.vmap(of_source)(sent.counts)


def _ragged(rows: Array, sent: Sent, *, returning: bool) -> Array:
    """Rows one source after the other, to where theirs begin at each receiver."""
    out, into = sent.sizes.sum(1), sent.counts.sum(1)
    room = len(sent.groups.order) * (1 if returning else len(out))
    out, into = (into, out) if returning else (out, into)
    starts, places = jnp.cumsum(out) - out, jnp.cumsum(into) - into
    found = jnp.zeros((room, rows.shape[1]), rows.dtype)
    offsets = _traded(places, sent.axes)
    return jax.lax.ragged_all_to_all(rows, found, starts, out, offsets, into, axis_name=sent.axes)


def _ragged_numbers(sent: Sent) -> Array:
    n, own = sent.counts.shape
    rows = jnp.arange(n * len(sent.groups.order))
    found = jnp.searchsorted(jnp.cumsum(sent.counts.reshape(-1)), rows, side="right")
    return jnp.where(found < n * own, found % own, own)


FORMS = {
    "padded": Form(_padded_there, _padded_numbers, _padded_back),
    "ragged": Form(
        partial(_ragged, returning=False), _ragged_numbers, partial(_ragged, returning=True)
    ),
}


# ---------------------------------------------------------------- who has how much to do


def loads(routings: Sequence[Routing]) -> dict[str, Float[Array, ""]]:
    """Which share of the kept choices of all layers each expert has, and each device.

    Args:
      routings: as a model reports them; what lies on the mesh that is set counts by device too.
    Returns:
      {"load.expert_0": share, …, "load.device_0": share, …}; devices are numbered along the axes
      that cut experts, and each has a share of those of every mixture. All 0 where nothing is kept.
    """
    by_expert = [counts(r).reshape(-1, r.experts).sum(0) for r in routings]
    shared = [(c, holders_of(len(c))[1]) for c in by_expert]
    by_device = [c.reshape(n, -1).sum(1) for c, n in shared if n > 1]
    found = {}
    for name, each in (("expert", by_expert), ("device", by_device)):
        size = max((len(c) for c in each), default=0)
        total = sum(jnp.pad(c, (0, size - len(c))) for c in each)
        if size:
            share = total / jnp.maximum(total.sum(), 1)
            found |= {f"load.{name}_{i}": share[i] for i in range(size)}
    return found
