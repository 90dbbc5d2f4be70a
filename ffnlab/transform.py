"""The shape of every rewriting method: `Transform(init, observe, advance, rewrite)`.

Deciding and doing are separate. Calibration makes *stats* (masks, orders, scales: arrays that can
be printed, saved and compared); `rewrite` only applies them. `chain(a, b)` is itself a Transform
in which b calibrates on the model that a rewrote.
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple, TypeVar

from ffnlab.progress import track
from ffnlab.storage import npz

M = TypeVar("M")
S = TypeVar("S")


def finished(model: M, stats: S) -> tuple[S, bool]:
    """The `advance` of a transform that needs one pass only."""
    return stats, True


@dataclasses.dataclass(frozen=True)
class Transform(Generic[M, S]):
    """A way of rewriting a model, as pure functions.

    Attributes:
      name: for logs, recipes and errors.
      init: model -> stats before anything was observed. Checks that the model can be rewritten.
      observe: (stats, model, batch) -> stats; None when there is nothing to observe (no pass is
        made).
      advance: (model, stats) -> (stats, done), after each full pass over the batches.
      rewrite: (model, stats) -> the new model; the argument stays intact.
    """

    name: str
    init: Callable[[M], S]
    observe: Callable[[S, M, object], S] | None
    rewrite: Callable[[M, S], M]
    advance: Callable[[M, S], tuple[S, bool]] = finished


class ChainStats(NamedTuple):
    """Where a chain is.

    Attributes:
      done: stats of the transforms that have finished, in order.
      model: the model that they rewrote, on which the next one calibrates.
      current: stats of the transform that is calibrating, None when all have finished.
    """

    done: tuple
    model: object
    current: object


def chain(*transforms: Transform) -> Transform:
    """The transform that applies each of `transforms` in turn.

    Each calibrates, with as many passes as it asks for, on the model its predecessors rewrote.

    Raises:
      ValueError: no transform is given.
    """
    if not transforms:
        raise ValueError("chain() needs at least one transform")

    def start(done: tuple, model: object) -> ChainStats:
        """The chain with its next observing transform initialised; others run at once."""
        while len(done) < len(transforms):
            step = transforms[len(done)]
            stats = step.init(model)
            if step.observe is not None:
                return ChainStats(done, model, stats)
            stats = _advance_unobserved(step, model, stats)
            done, model = (*done, stats), step.rewrite(model, stats)
        return ChainStats(done, model, None)

    def observe(stats: ChainStats, model: object, batch: object) -> ChainStats:
        step = transforms[len(stats.done)]
        return stats._replace(current=step.observe(stats.current, stats.model, batch))

    def advance(model: object, stats: ChainStats) -> tuple[ChainStats, bool]:
        if stats.current is not None:
            step = transforms[len(stats.done)]
            current, done = step.advance(stats.model, stats.current)
            if not done:
                return stats._replace(current=current), False
            stats = start((*stats.done, current), step.rewrite(stats.model, current))
        return stats, stats.current is None

    def rewrite(model: object, stats: ChainStats) -> object:
        if stats.current is not None:
            step = transforms[len(stats.done)].name
            raise ValueError(f"the chain has not finished calibrating: {step} is still observing")
        for step, decided in zip(transforms, stats.done, strict=True):
            model = step.rewrite(model, decided)
        return model

    return Transform(
        name="+".join(t.name for t in transforms),
        init=lambda model: start((), model),
        observe=observe if any(t.observe is not None for t in transforms) else None,
        advance=advance,
        rewrite=rewrite,
    )


def _advance_unobserved(transform: Transform, model: object, stats: S) -> S:
    stats, done = transform.advance(model, stats)
    if not done:
        raise ValueError(f"{transform.name} observes nothing and yet asks for another pass")
    return stats


def calibrate(
    transform: Transform[M, S],
    model: M,
    batches: Iterable = (),
    *,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
) -> S:
    """Runs a transform's passes over the batches until it is done, and returns its final stats.

    Args:
      batches: re-iterable (a list, or an object whose `iter` starts anew), not a generator; one
        pass of it is made per round of the transform.
      progress: show a bar (quiet when the output is not a terminal).
      checkpoint: file that receives the stats at the end of every pass; when it exists, calibration
        goes on from there. Not for chains, whose stats hold models: calibrate their parts one by
        one.
    Raises:
      ValueError: batches is a generator or empty.
    """
    stats, observe = transform.init(model), transform.observe
    if observe is None:
        return _advance_unobserved(transform, model, stats)
    check_iterable_again(batches)
    if checkpoint is not None and isinstance(stats, ChainStats):
        raise ValueError("checkpoint= does not take a chain; calibrate its transforms one by one")
    if checkpoint is not None and os.path.exists(checkpoint):
        stats = npz.load_stats(checkpoint, stats)
        stats, done = transform.advance(model, stats)
        if done:
            return stats
    done = False
    while not done:
        stats = one_pass(transform.name, observe, stats, model, batches, progress=progress)
        if checkpoint is not None:
            npz.save_stats(checkpoint, stats)
        stats, done = transform.advance(model, stats)
    return stats


def check_iterable_again(batches: Iterable) -> None:
    """Raises ValueError for a generator, which one pass uses up."""
    if iter(batches) is batches:
        raise ValueError(
            "batches is an iterator, which only runs once; pass a list or another "
            "re-iterable object"
        )


def one_pass(
    name: str,
    observe: Callable[[S, M, object], S],
    stats: S,
    model: M,
    batches: Iterable,
    *,
    progress: bool = True,
) -> S:
    """The stats after one pass over the batches.

    Args:
      name: of what observes, for the bar and for errors.
    Raises:
      ValueError: there are no batches.
    """
    count = 0
    for batch in track(batches, name, enabled=progress):
        stats = observe(stats, model, batch)
        count += 1
    if count == 0:
        raise ValueError(f"batches is empty: {name} has nothing to observe")
    return stats


def apply(
    transform: Transform[M, S],
    model: M,
    batches: Iterable = (),
    *,
    progress: bool = True,
    checkpoint: str | os.PathLike | None = None,
) -> tuple[M, S]:
    """Calibrates (see `calibrate`) and rewrites: returns (new model, what was decided)."""
    stats = calibrate(transform, model, batches, progress=progress, checkpoint=checkpoint)
    return transform.rewrite(model, stats), stats
