"""Layers in stages that work at the same time, each on another microbatch (GPipe, arXiv 1811.06965;
circular where a stage has several parts, arXiv 2104.04473).

Stages are an axis of every array, logically "stages": a tick is one `vmap` over it, so that devices
between which it is cut compute side by side, and what goes from stage to stage is a `roll` along
it, which compiles to collective-permutes. All microbatches of a batch lie on one ring, whose length
is the stages and the waiting places beside each of them:

    tick t, stage s:  microbatch (t - s) mod P in repeat (t - s) div P,   P = S ceil(M / S)

Each tick the ring turns by one place. A stage leaves what is no microbatch of its repeats as it
is; in the last ticks only the stages turn, so that every microbatch ends where it began. No device
holds more than its share of the batch, before, during or after.

    ticks = (R - 1) P + M + S - 1,   bubble = 1 - R M / ticks  ( = (S - 1) / (R M + S - 1), S | M )
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers.logical import Names, ambient, constrain
from ffnlab.layers.stacking import rematerialized

__all__ = ["Schedule", "circulate"]

# (weights and given of a stage in a repeat, number of the microbatch, h, rows) -> (h, outputs)
Stage = Callable[[PyTree, Int[Array, ""], Array, PyTree], tuple[Array, PyTree]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When which stage works on which microbatch.

    Attributes:
      stages: S, parts of a model that work at the same time.
      microbatches: M, equal parts of a batch.
      repeats: R, how often a microbatch goes through all stages, each time through other layers.

    >>> Schedule(4, 8).ticks, Schedule(4, 8).bubble, Schedule(2, 4, repeats=2).ticks
    (11, 0.2727272727272727, 9)
    """

    stages: int
    microbatches: int
    repeats: int = 1

    def __post_init__(self) -> None:
        at_least(1, **dataclasses.asdict(self))

    @property
    def slots(self) -> int:
        """Microbatches at each stage, the one in work included."""
        return -(-self.microbatches // self.stages)

    @property
    def period(self) -> int:
        """P, ticks from one repeat of a microbatch to the next."""
        return self.stages * self.slots

    @property
    def ticks(self) -> int:
        """How often all stages work."""
        return (self.repeats - 1) * self.period + self.microbatches + self.stages - 1

    @property
    def bubble(self) -> float:
        """The share of its time in which a stage has nothing to do."""
        return 1 - self.repeats * self.microbatches / self.ticks

    @property
    def is_even(self) -> bool:
        """Whether every place of the ring holds a microbatch."""
        return self.microbatches == self.period

    @property
    def rows(self) -> Names:
        """By what the rows of a batch are cut outside the stages, where all of them work alike."""
        return ("stages", "batch") if self.is_even else "batch"

    def work(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What each stage does in each tick, all [ticks, stages]: (repeat, microbatch, whether).

        Where it does nothing, repeat and microbatch are ones that there are.
        """
        at = np.arange(self.ticks)[:, None] - np.arange(self.stages)
        repeat, number = at // self.period, at % self.period
        busy = (repeat >= 0) & (repeat < self.repeats) & (number < self.microbatches)
        return np.where(busy, repeat, 0), np.where(busy, number, 0), busy

    def numbers(self) -> Int[np.ndarray, "s k"]:
        """The microbatch at each place of the ring at first; from `microbatches` on there is none.

        The place in work is the first of each stage; the others are where it waits.
        """
        numbers = np.empty((self.stages, self.slots), np.int64)
        numbers[:, 0] = -np.arange(self.stages) % self.period
        numbers[:, 1:] = 1 + np.arange(self.period - self.stages).reshape(self.stages, -1)
        return numbers

    def places(self, rows: int) -> Int[np.ndarray, "s j k"]:
        """Which row of a batch lies at each place, [stages, rows of a microbatch, slots].

        Rows that lie together stay on one device, whatever else cuts them. Where there is no
        microbatch a row stands in for it.

        Raises:
          ConfigError: the microbatches do not divide the rows.
        """
        if rows % self.microbatches:
            raise ConfigError(
                f"microbatches={self.microbatches} do not divide the {rows} rows of a batch"
            )
        each = rows // self.microbatches
        there = np.broadcast_to(
            (self.numbers() < self.microbatches)[:, None], (self.stages, each, self.slots)
        )
        places = np.zeros(there.shape, np.int64)
        places[there] = np.arange(rows)
        return places

    def by_number(self, rows: int) -> Int[np.ndarray, "m j"]:
        """The rows of each microbatch; errors as `places`."""
        numbers, places = self.numbers(), self.places(rows)
        found = np.empty((self.period, places.shape[1]), np.int64)
        found[numbers] = np.moveaxis(places, 1, 2)
        return found[: self.microbatches]


def circulate(
    schedule: Schedule,
    stage: Stage,
    given: PyTree,
    h: Float[Array, "b *d"],
    rows: PyTree,
    *,
    remat: str | None = None,
) -> tuple[Float[Array, "b *d"], PyTree]:
    """Sends a batch through stages, microbatch after microbatch.

    Args:
      schedule: of S stages, M microbatches, R repeats.
      stage: what one stage does with one microbatch in one repeat, (given [...], number of the
        microbatch, h [b / M, ...], rows [b / M, ...]) -> (h of the same shape, outputs).
      given: weights and whatever else belongs to a stage, leaves [S, R, ...].
      h: rows that stages change.
      rows: leaves [b, ...] that go along with them and do not change.
      remat: what a stage keeps of a tick for the backward pass (`rematerialized`).
    Returns:
      (h, outputs), the latter with leaves [R, S, M, ...].
    Raises:
      ConfigError: the microbatches do not divide the rows, or the mesh does not divide those of a
        microbatch.
    """
    ring = jax.tree.map(lambda x: _on_ring(schedule, x), (h, rows))
    work, line = (jax.tree.map(lambda x: x[:, 0], ring), jax.tree.map(lambda x: x[:, 1:], ring))

    def one(given: PyTree, repeat: Array, number: Array, h: Array, rows: PyTree) -> tuple:
        own = jax.tree.map(lambda x: _pick(x, repeat), given)
        return stage(own, number, h, rows)

    mesh = jax.sharding.get_abstract_mesh().shape
    axes = tuple(axis for axis in ambient().get("stages", ()) if axis in mesh)
    every = jax.vmap(rematerialized(one, remat), spmd_axis_name=axes or None)

    def tick(ring: tuple, now: tuple) -> tuple[tuple, PyTree]:
        (h, rows), line = ring
        (repeat, number, busy), turn = now
        y, outputs = every(given, repeat, number, h, rows)
        y = jnp.where(_at_stages(busy, h), y, h)
        return _turned(schedule, (y, rows), line, turn), outputs

    ticks = np.arange(schedule.ticks)
    turns = ticks % max(schedule.slots - 1, 1), ticks < schedule.repeats * schedule.period
    now = jax.tree.map(jnp.asarray, (schedule.work(), turns))
    (work, line), outputs = jax.lax.scan(tick, (work, line), now)
    # The last ticks turned the stages alone, short of one whole turn.
    last = jnp.roll(work[0], 1 + schedule.period - schedule.microbatches, axis=0)
    # Whose turn it is in the line goes round by itself, and did not end where it began.
    waiting = jnp.roll(line[0], -schedule.repeats * schedule.period, axis=1)
    ring = jnp.concatenate([last[:, None], waiting], axis=1)
    return _off_ring(schedule, ring), jax.tree.map(lambda x: _of_ticks(schedule, x), outputs)


def _turned(schedule: Schedule, work: PyTree, line: PyTree, turn: tuple) -> tuple[PyTree, PyTree]:
    """The ring one place on: from stage to stage, and from the last one by the line to the first.

    Args:
      turn: which place of the line is next, and whether it turns with the stages.
    """
    moved = jax.tree.map(lambda x: _cut(jnp.roll(x, 1, axis=0)), work)
    if schedule.slots == 1:
        return moved, line
    (column, feeds), places = turn, np.arange(schedule.stages)
    heads = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, column, 1, False), line)

    def next_work(moved: Array, head: Array) -> Array:
        return _cut(jnp.where(_at_stages((places == 0) & feeds, moved), head, moved))

    def next_line(line: Array, head: Array, done: Array) -> Array:
        moved = jnp.roll(head, -1, axis=0)
        new = jnp.where(_at_stages(places == schedule.stages - 1, done), done, moved)
        new = jnp.where(feeds, new, head)
        return _cut(jax.lax.dynamic_update_index_in_dim(line, new, column, 1), line=True)

    return jax.tree.map(next_work, moved, heads), jax.tree.map(next_line, line, heads, work)


def _on_ring(schedule: Schedule, x: Array) -> Array:
    """[b, ...] -> [stages, slots, b / M, ...]."""
    places = schedule.places(x.shape[0])
    x = x if schedule.is_even else x[places.reshape(-1)]
    x = constrain(x, (schedule.rows, *[None] * (x.ndim - 1)))
    ring = jnp.moveaxis(x.reshape(*places.shape, *x.shape[1:]), 2, 1)
    return _cut(ring, line=True)


def _off_ring(schedule: Schedule, ring: Array) -> Array:
    """The inverse of `_on_ring`."""
    h = jnp.moveaxis(ring, 1, 2).reshape(-1, *ring.shape[3:])
    if not schedule.is_even:
        there = np.broadcast_to(
            (schedule.numbers() < schedule.microbatches)[:, None],
            (schedule.stages, ring.shape[2], schedule.slots),
        )
        h = h[np.flatnonzero(there)]
    return constrain(h, (schedule.rows, *[None] * (h.ndim - 1)))


def _cut(x: Array, *, line: bool = False) -> Array:
    """A part of the ring, cut between stages and, within a microbatch, as rows are."""
    names = ("stages", None, "batch") if line else ("stages", "batch")
    return constrain(x, (*names, *[None] * (x.ndim - len(names))), path="rows of a microbatch")


def _pick(x: Array, repeat: Array) -> Array:
    """What a stage has for a repeat; of one repeat there is nothing to look up."""
    return x[0] if x.shape[0] == 1 else jax.lax.dynamic_index_in_dim(x, repeat, 0, False)


def _at_stages(flags: Array | np.ndarray, x: Array) -> Array:
    return jnp.asarray(flags).reshape(-1, *[1] * (x.ndim - 1))


def _of_ticks(schedule: Schedule, x: Array) -> Array:
    """[ticks, S, ...] -> [R, S, M, ...], of the tick at which each was made."""
    sizes = (schedule.repeats, schedule.stages, schedule.microbatches)
    repeat, stage, number = np.indices(sizes)
    return x[repeat * schedule.period + stage + number, stage]
