"""Elastic training: one network whose narrow and shallow forms learn together, to be chosen from.

A super-network of a search has to be good at every size. Each step its loss is the mean over a few
of its networks, which share all their parameters; by the sandwich rule these are the largest, the
smallest and some drawn ones (Universally Slimmable Networks, arXiv 1903.05134, section 3.2):

    loss = mean over nets of loss(model cut to net, batch),   nets = largest, smallest, n drawn

A network keeps the first units of each channel group (`ffnlab.models.groups`) and the first blocks.
Inside the compiled step the others are multiplied by 0, so that one program serves all networks;
`cut` takes them out of the model for good and gives the same outputs. The networks of a step follow
each other in the program: a scan over them would keep the activations of all in one array, and was
measured to take a third longer.

What differs from Universally Slimmable Networks: every network learns from the batch (there the
smaller ones learn from the largest network's outputs), since any loss may be wrapped here; and
running statistics of batch norms are the largest network's; `models.population_norms` measures
those of another network once it is chosen.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.losses import InformedLoss, Loss, Moment
from ffnlab.models.groups import Group, check_names, groups
from ffnlab.models.masking import gated, masked
from ffnlab.models.narrow import narrow
from ffnlab.models.remove import remove
from ffnlab.models.stack import layers_of
from ffnlab.models.units import present, units

__all__ = ["Net", "cut", "elastic", "formed"]

M = TypeVar("M")
MOST = 7  # networks drawn, beside two

Widths = Mapping[str, Sequence[int]] | Iterable[tuple[str, Sequence[int]]]


class Net(NamedTuple):
    """One network of a super-network; its numbers may be traced.

    Attributes:
      widths: units that stay, the first ones, by the name of their group; others stay whole.
      depth: blocks that stay, the first ones; None for all.
    """

    widths: Mapping[str, int | Int[Array, ""]]
    depth: int | Int[Array, ""] | None = None


def elastic(
    loss: Loss | InformedLoss,
    widths: Widths = (),
    *,
    depths: Sequence[int] = (),
    drawn: int = 2,
    sandwich: bool = True,
    informed: bool = False,
) -> InformedLoss:
    """A loss of a super-network: the mean of another one over some of its networks.

    It is informed (`backprop(elastic(…), …, informed=True)`): networks are drawn by the moment's
    key, each width and the depth by itself, evenly. Every network sees the whole batch.

    Args:
      loss: of any model and batch.
      widths: by the name of a group, how many of its units a network may have.
      depths: how many blocks it may have, of a model with layers that are blocks.
      drawn: networks drawn for each step, at most 7: the program grows with them.
      sandwich: also take the largest and the smallest network in every step.
      informed: whether the wrapped loss is informed; all networks of a step get the same moment.
    Returns:
      (model, batch, moment) -> (mean over networks, metrics: the loss's own as means over networks;
      "largest" and "smallest", the losses of these two, with the sandwich rule; statistics, where
      the loss returns some, those of the first network: the largest of a sandwich).
    Raises:
      ConfigError: nothing to choose: no width and no depth at all; a group named twice; a width or
        a depth below 1; `drawn` above 7, below 0, or below 1 without the sandwich rule. From the
        loss, before any compute: a group that the model does not have, a width above its size, a
        depth above the number of its blocks, or what `models.masked` and `models.gated` refuse.

    >>> from ffnlab.layers import MLP
    >>> from ffnlab.losses import labelled
    >>> loss = elastic(labelled, {"maps[0]": (2, 4, 8)}, drawn=1)
    >>> net, batch = MLP((3, 8, 2), key=jax.random.key(0)), (jnp.ones((5, 3)), jnp.zeros(5, int))
    >>> sorted(loss(net, batch, Moment(jnp.int32(0), jax.random.key(1)))[1])
    ['accuracy', 'largest', 'smallest']
    """
    choices = checked_widths(widths)
    deep = tuple(int(depth) for depth in depths)
    if not choices and not deep:
        raise ConfigError("widths={} and depths=() leave nothing to choose; give one of them")
    at_least(1, depths=min(deep, default=None))
    if not (0 if sandwich else 1) <= drawn <= MOST:
        least = 0 if sandwich else 1
        raise ConfigError(f"drawn={drawn} with sandwich={sandwich}: {least} to {MOST} are accepted")
    nets_of = functools.partial(nets, choices, deep, drawn=drawn, sandwich=sandwich)

    def of_nets(model: PyTree, batch: PyTree, moment: Moment) -> tuple:
        check_fits(model, choices, deep)
        key, rest = jax.random.split(moment.key)
        given = (moment._replace(key=rest),) if informed else ()
        found = [loss(formed(model, net), batch, *given) for net in nets_of(key)]
        means, metrics, *statistics = zip(*found, strict=True)
        told = {name: mean_of([each[name] for each in metrics]) for name in metrics[0]}
        told |= {"largest": means[0], "smallest": means[1]} if sandwich else {}
        return mean_of(means), told, *(each[0] for each in statistics)

    return of_nets


def checked_widths(widths: Widths) -> dict[str, tuple[int, ...]]:
    """The choices by group; raises ConfigError as `elastic`."""
    found: dict[str, tuple[int, ...]] = {}
    pairs = widths.items() if isinstance(widths, Mapping) else list(widths)
    for name, choices in pairs:
        if name in found:
            raise ConfigError(f"widths names {name!r} twice; once is accepted")
        own = tuple(int(width) for width in choices)
        if not own or min(own) < 1:
            raise ConfigError(
                f"widths[{name!r}]={list(own)}: one or more widths, each at least 1, are accepted"
            )
        found[name] = own
    return found


def check_fits(model: PyTree, widths: Mapping[str, Sequence[int]], depths: Sequence[int]) -> None:
    """Raises ConfigError where a model has no such groups, units or blocks."""
    known = {group.name: group for group in groups(model)} if widths else {}
    check_names(widths, known)
    for name, choices in widths.items():
        if max(choices) > known[name].size:
            raise ConfigError(
                f"widths[{name!r}]={list(choices)}: the group has {known[name].size} units"
            )
    if depths and max(depths) > layers_of(model):
        raise ConfigError(f"depths={list(depths)}: the model has {layers_of(model)} blocks")


def nets(
    widths: Mapping[str, Sequence[int]],
    depths: Sequence[int],
    key: Array,
    *,
    drawn: int,
    sandwich: bool,
) -> list[Net]:
    """The networks of a step: the largest and the smallest, where wanted, then the drawn ones."""

    def picked(pick: Callable[[Sequence[int]], int | Array]) -> Net:
        own = {name: pick(choices) for name, choices in widths.items()}
        return Net(own, pick(depths) if depths else None)

    def random(key: Array) -> Net:
        keys = iter(jax.random.split(key, len(widths) + 1))
        return picked(lambda choices: jax.random.choice(next(keys), jnp.asarray(choices)))

    ends = [picked(max), picked(min)] if sandwich else []
    return [*ends, *(random(each) for each in jax.random.split(key, drawn))]


def mean_of(values: Sequence[Array]) -> Array:
    """The mean of some numbers."""
    return jnp.stack([jnp.asarray(value) for value in values]).mean(0)


def formed(model: M, net: Net) -> M:
    """The model that computes what one of its networks does, as large as it was.

    Args:
      model: see `ffnlab.models.groups`; with a depth, its layers are blocks.
      net: whose numbers may be traced.
    Raises:
      ConfigError: as `models.masked` and `models.gated`.
    """
    known = {group.name: group for group in groups(model)} if net.widths else {}
    check_names(net.widths, known)
    masks = {name: first_of(known[name], width) for name, width in net.widths.items()}
    new = masked(model, masks) if masks else model
    if net.depth is None:
        return new
    there = present(model)
    blocks = jnp.arange(len(there))[:, None] < net.depth
    return gated(new, jnp.broadcast_to(blocks, there.shape).astype(jnp.float32))


def first_of(group: Group, width: int | Array) -> Array:
    """The mask of a group's first units."""
    return (jnp.arange(group.size) < width).astype(jnp.float32)


def cut(model: M, net: Net) -> M:
    """One network of a super-network as a model of its own, by `models.narrow` and `models.remove`.

    Args:
      model: as for `formed`; it is not changed.
      net: of numbers.
    Raises:
      ConfigError: no such group, a width that is not in 1 .. its size, or a depth that is not in
        1 .. the number of blocks.

    >>> from ffnlab.layers import MLP
    >>> cut(MLP((3, 8, 2), key=jax.random.key(0)), Net({"maps[0]": 5})).sizes
    [3, 5, 2]
    """
    widths = checked_widths({name: (width,) for name, width in net.widths.items()})
    depths = () if net.depth is None else (net.depth,)
    at_least(1, depth=net.depth)
    check_fits(model, widths, depths)
    new = narrow(model, {name: range(width) for name, (width,) in widths.items()})
    if net.depth is None:
        return new
    gone = [u.number for u in units(new) if u.present and u.layer >= net.depth]
    return remove(new, gone)
