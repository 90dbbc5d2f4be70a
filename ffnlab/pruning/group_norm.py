"""Channels go by the norms of their weights: a share of each group, or all over to a budget.

The plain criterion of DepGraph (2023) that Meta Pruning via Graph Metanetworks (2025) prunes with:
importance as `ffnlab.pruning.group_importance` has it, taken anew after every small step, for what
went took rows of one matrix and columns of another with it.

What differs from `torch-pruning`: only its order is decided in steps; how much of it goes is found
by bisection, so that the budget is met at the first unit that meets it and not at the end of a
step. Nothing is cut while the order is found: sums leave out what is gone. The most important unit
of each group stays whatever the others do; there a group all of whose units would go is left as it
is in that step.
"""

import bisect
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats.kinds import KINDS, kind_of
from ffnlab.models import groups, narrow
from ffnlab.models.cost import multiply_adds
from ffnlab.models.groups import COLUMNS, ROWS, Group
from ffnlab.pruning.group_importance import Counted, counted
from ffnlab.transform import Transform

__all__ = ["Kept", "group_norm", "kept_of", "products", "removal_steps", "to_budget"]

Kept = dict[str, Bool[np.ndarray, "_"]]  # by name of the group: which of its units stay
STEPS = 200  # the authors'


def group_norm(
    *,
    rate: float | None = None,
    speed_up: float | None = None,
    select: str = "**",
    steps: int = STEPS,
) -> Transform[nnx.Module, Kept]:
    """Takes the units with the smallest norms out of the groups of a model.

    Args:
      rate: share of the units of each group that go, in [0, 1); rounded down. Exactly one of `rate`
        and `speed_up` is given.
      speed_up: how many times fewer multiplications the model is to do (`products`), >= 1: units
        go from whichever groups have the least important ones.
      select: names of the groups that units go from: `*` stands for any one name or index, `**`
        for anything; "layers[*].ffn" are the FFNs of all layers.
      steps: after how large a part of all units importance is taken anew, for `speed_up`.
    Returns:
      a transform that observes nothing; its stats say which units stay (`Kept`), and its rewrite
      is `ffnlab.models.narrow`.
    Raises:
      ConfigError: an option out of range; at `init`, no such groups, or a speed-up that is not
        reached with one unit left of each.

    >>> group_norm(speed_up=2.0).name
    'group_norm'
    """
    check_options(rate, speed_up, steps)

    def init(model: nnx.Module) -> Kept:
        return kept_of(model, rate=rate, speed_up=speed_up, select=select, steps=steps)

    return Transform(name="group_norm", init=init, observe=None, rewrite=narrow)


def check_options(rate: float | None, speed_up: float | None, steps: int) -> None:
    """Refuses options that make no sense for any model."""
    if (rate is None) == (speed_up is None):
        raise ConfigError(f"rate={rate!r} and speed_up={speed_up!r}: give exactly one of them")
    if rate is not None and not 0 <= rate < 1:
        raise ConfigError(f"rate={rate} is outside [0, 1): it is the share of units that go")
    if speed_up is not None and not speed_up >= 1:
        raise ConfigError(
            f"speed_up={speed_up} must be at least 1: the work before over that after"
        )
    at_least(1, steps=steps)


def kept_of(
    model: nnx.Module,
    *,
    rate: float | None = None,
    speed_up: float | None = None,
    select: str = "**",
    steps: int = STEPS,
) -> Kept:
    """Which units stay; arguments and errors as for `group_norm`."""
    check_options(rate, speed_up, steps)
    chosen = selected(model, select)
    if speed_up is not None:
        return to_budget(model, removal_steps(model, select=select, steps=steps), speed_up)
    sums = Squares(model, {group.name for group in chosen})
    whole = {group.name: np.ones(group.size, bool) for group in chosen}
    return {
        name: largest(sums.importance(name, stays), rate or 0.0) for name, stays in whole.items()
    }


def largest(values: Float[np.ndarray, "units"], rate: float) -> Bool[np.ndarray, "units"]:
    """All but a share of the values, rounded down; of equal ones the first stay.

    >>> largest(np.array([3.0, 1.0, 2.0, 1.0]), 0.5).tolist()
    [True, False, True, False]
    """
    order = np.argsort(-values, kind="stable")
    stay = np.zeros(len(values), bool)
    gone = math.floor(len(values) * rate * (1 + 1e-12))  # 100 * 0.29 is 28.999999999999996
    stay[order[: len(values) - gone]] = True
    return stay


def selected(model: nnx.Module, select: str) -> list[Group]:
    """The groups whose names fit a pattern.

    Raises:
      ConfigError: none does.
    """
    every = groups(model)
    chosen = [group for group in every if tree.at(select)(group.name, None)]
    if not chosen:
        there = ", ".join(group.name for group in every) or "no groups"
        raise ConfigError(f"select={select!r} fits no group of this model; it has {there}")
    return chosen


def removal_steps(
    model: nnx.Module, *, select: str = "**", steps: int = STEPS
) -> dict[str, Int[np.ndarray, "_"]]:
    """The order in which units go, the least important of all selected groups first.

    Args:
      model: see `ffnlab.models.groups`; its arrays are read.
      select, steps: see `group_norm`.
    Returns:
      by name of the group, the position of each unit in the order, 0 the first to go; -1 for the
      one that stays.
    Raises:
      ConfigError: no such groups.
    """
    names = {group.name for group in selected(model, select)}
    sums = Squares(model, names)
    place = {name: np.full(group.size, -1) for name, (group, _) in sums.groups.items()}
    total = sum(map(len, place.values()))
    gone, last = 0, total - len(place)
    for step in range(1, steps + 1):
        wanted = min(last, -(-total * step // steps))
        if wanted == gone:
            continue
        for name, unit in sums.least(place, wanted - gone):
            place[name][unit] = gone
            sums.take_out(name, unit)
            gone += 1
    return place


class Squares:
    """The squares of all numbers that count, and which of them are still there.

    Attributes:
      groups: the selected ones by name, each with its parts and their squares.
      there: by path and axis, 1 for each row or column that is there, else 0.
    """

    def __init__(self, model: nnx.Module, names: set[str]):
        self.groups: dict[str, tuple[Group, list]] = {}
        self.there: dict[tuple[str, int], np.ndarray] = {}
        for group, parts in counted(model):
            if group.name in names:
                self.groups[group.name] = group, self.read(parts)

    def read(self, parts: Counted) -> list:
        """The squares of some parts, as (part, array) again."""
        found = []
        for part, x in parts:
            square = np.square(np.asarray(x, np.float64))
            found.append((part, square))
            for axis in (ROWS, COLUMNS)[-square.ndim :]:
                self.there.setdefault((part.path, axis), np.ones(square.shape[axis]))
        return found

    def importance(self, name: str, stays: Bool[np.ndarray, "units"]) -> np.ndarray:
        """Of the units of a group, what is gone left out of every sum; divided by the largest."""
        group, parts = self.groups[name]
        total = np.zeros(group.size)
        for part, square in parts:
            if square.ndim > 1:
                other = {COLUMNS: ROWS, ROWS: COLUMNS}[part.axis]
                there = self.there[part.path, other]
                square = there @ square if part.axis == COLUMNS else square @ there
            total += square[part.index].sum(1)
        return total / max(total[stays].max(), np.finfo(float).tiny)

    def least(self, place: Mapping[str, np.ndarray], count: int) -> list[tuple[str, int]]:
        """The least important units that may go, the most important one of each group not among
        them."""
        found = []
        for name, at in place.items():
            values, stays = self.importance(name, at < 0), np.flatnonzero(at < 0)
            best = stays[values[stays].argmax()]
            found += [(values[unit], name, int(unit)) for unit in stays if unit != best]
        found.sort(key=lambda each: each[0])  # stable: equal ones in the order of the model
        return [(name, unit) for _, name, unit in found[:count]]

    def take_out(self, name: str, unit: int) -> None:
        """Counts a unit no more."""
        for part, _ in self.groups[name][1]:
            self.there[part.path, part.axis][part.index[unit]] = 0


def to_budget(model: nnx.Module, order: Mapping[str, np.ndarray], speed_up: float) -> Kept:
    """The units that stay when as few go as a budget asks for.

    Args:
      model: whose work is counted (`products`); its arrays may be abstract.
      order: see `removal_steps`.
      speed_up: the work before over the work that is left, >= 1.
    Raises:
      ConfigError: it is below 1, or more than what is reached with one unit left of each group.
    """
    check_options(None, speed_up, STEPS)
    shapes = jax.eval_shape(lambda model: model, model)
    last = max(int(at.max()) for at in order.values()) + 1

    def stays(gone: int) -> Kept:
        return {name: (at < 0) | (at >= gone) for name, at in order.items()}

    @functools.cache
    def work(gone: int) -> int:
        return products(jax.eval_shape(lambda model: narrow(model, stays(gone)), shapes))

    whole = work(0)
    if work(last) * speed_up > whole:
        raise ConfigError(
            f"speed_up={speed_up} of {whole:,} multiplications is not reached: the smallest model, "
            f"with one unit of each group, does {work(last):,}, {whole / work(last):.2f} times less"
        )
    gone = bisect.bisect_left(range(last), True, key=lambda n: work(n) * speed_up <= whole)
    return stays(gone)


def products(model: Any) -> int:
    """Multiplications of a model for its least input (`ffnlab.formats.kinds.Kind.example`): a row,
    a token, an image of the size that its configuration says.

    Args:
      model: of a kind; its arrays may be abstract.
    Raises:
      ConfigError: it is of no kind.

    >>> from ffnlab.layers import MLP
    >>> products(MLP((4, 3, 2), key=jax.random.key(0)))
    18
    """
    kind = KINDS.get(kind_of(model) or "")
    if kind is None:
        raise ConfigError(f"a {type(model).__name__} is of no kind whose work can be counted")
    return multiply_adds(kind.call, model, kind.example(model))
