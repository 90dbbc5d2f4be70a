"""The training loop: runs any rule, logs, evaluates, checkpoints, stops cleanly and resumes.

A run is a pure function of (rule, model, key, batches): its only memory is the rule's state and
one integer, the position. Interrupted and resumed, on the same machine and versions, it ends in
the same bits as without the interruption.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers.logical import LAYOUT, Layout
from ffnlab.parallel import checkpoints
from ffnlab.parallel.log import Display, MetricsFile
from ffnlab.parallel.processes import is_first
from ffnlab.parallel.sharding import (
    abstract,
    batch_part,
    make_step,
    parse_mesh,
    place_batch,
    place_part,
    shard,
)
from ffnlab.parallel.signals import stop_request
from ffnlab.rule import Rule


@runtime_checkable
class Parted(Protocol):
    """Batches of which a process can read its rows only."""

    def part(self, index: int, count: int) -> Callable[[int], PyTree]:
        """The same batches, of each only the rows of part `index` of `count` equal ones."""
        ...


Evaluate = Callable[[PyTree], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How often the loop does what; all in steps, 0 for never before the end.

    Attributes:
      log_every: metrics are read from the device, checked and written.
      evaluate_every: `evaluate` runs; it also runs after the last step.
      checkpoint_every: the state is saved; it is also saved after the last step and when stopped.
      progress: a progress bar where standard error is a terminal.
    """

    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("log_every", "evaluate_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a run stands.

    Attributes:
      state: the rule's state.
      position: steps taken.
      finished: False where a signal stopped the run early.
      seconds: wall clock spent in the loop, earlier parts of a resumed run included.
      metrics: the last logged metrics and evaluation.
    """

    state: PyTree
    position: int
    finished: bool
    seconds: float
    metrics: dict[str, float]


def train(
    rule: Rule,
    model: PyTree,
    batches: Callable[[int], PyTree],
    steps: int,
    *,
    key: Array,
    folder: str | Path | None = None,
    resume: bool = False,
    evaluate: Evaluate | None = None,
    options: LoopOptions | None = None,
    mesh: Mesh | None = None,
    layout: Layout = LAYOUT,
) -> Outcome:
    """Learns for `steps` steps.

    Args:
      rule: what to do with a batch.
      model: where learning starts; left intact.
      batches: position -> batch, the same batch whenever asked (`ffnlab.data.TextBatches`). Of
        several processes each reads its rows only where it is `Parted`, else keeps them.
      steps: position to stop at; a resumed run takes the steps that are left.
      key: for the rule's `init`.
      folder: receives `checkpoint/` and `metrics.jsonl`; nothing is written when None.
      resume: continue from the folder's checkpoint, if it has one.
      evaluate: state -> named figures.
      options: see `LoopOptions`.
      mesh: where state and batches are placed; when None the default device, or "dp=-1" for
        several processes, which all call this alike (`ffnlab.parallel.joined`). A checkpoint may
        be resumed on another mesh and by another number of processes.
      layout: of the mesh, see `ffnlab.parallel.shardings`.
    Returns:
      an `Outcome`. SIGTERM and Ctrl-C end the run after the current step, with a checkpoint and
      finished=False.
    Raises:
      ConfigError: the folder holds a run and resume is False, or the mesh does not divide a
        parameter or the batch.
      NumericalError: a metric is not finite; the last checkpoint is intact.
      FormatError: the checkpoint is of another rule, model or optimizer, or all are damaged; a
        damaged newest one is named in a warning, and the one before it used.
      OSError: a checkpoint could not be written; the last one is intact.
    """
    options = LoopOptions() if options is None else options
    mesh = parse_mesh("dp=-1") if mesh is None and jax.process_count() > 1 else mesh
    where = None if mesh is None else (mesh, layout)
    run = _Run(rule, steps, None if folder is None else Path(folder), evaluate, options, where)
    state, position, seconds = run.start(model, key, resume)
    return run.go(state, batches, position, seconds)


@dataclasses.dataclass(frozen=True)
class _Run:
    rule: Rule
    steps: int
    folder: Path | None
    evaluate: Evaluate | None
    options: LoopOptions
    where: tuple[Mesh, Layout] | None = None

    def start(self, model: PyTree, key: Array, resume: bool) -> tuple[PyTree, int, float]:
        """State, position and seconds at which to begin."""
        if self.folder is None or not checkpoints.exists(self.folder / "checkpoint"):
            state = self.rule.init(model, key)
            return state if self.where is None else shard(state, *self.where), 0, 0.0
        if not resume:
            raise ConfigError(
                f"{self.folder} holds a run already; resume it or name another folder"
            )
        state = jax.eval_shape(self.rule.init, model, key)
        state = state if self.where is None else abstract(state, *self.where)
        like = _checkpoint(state, 0, 0.0)
        saved = checkpoints.restore(self.folder / "checkpoint", like)
        return saved["state"], saved["position"], saved["seconds"]

    def go(
        self, state: PyTree, batches: Callable[[int], PyTree], position: int, seconds: float
    ) -> Outcome:
        metrics, latest, stopped = {}, {}, False
        step = self.rule.step if self.where is None else make_step(self.rule, *self.where)
        batch_at = _placed(batches, self.where)
        begin = time.perf_counter() - seconds
        with (
            MetricsFile(self.folder if is_first() else None, position) as log,
            Display(self.steps, position, self.options.progress and is_first()) as display,
            stop_request() as asked_to_stop,
            checkpoints.Saver(None if self.folder is None else self.folder / "checkpoint") as saver,
        ):
            while position < self.steps and not stopped:
                batch = batch_at(position)  # while the device is at the step before
                jax.block_until_ready(metrics)
                state, metrics = step(state, batch)
                position += 1
                stopped = asked_to_stop(position)
                if self._due(self.options.log_every, position) or stopped:
                    latest |= _finite(metrics, position)
                    log.write(position, time.perf_counter() - begin, latest)
                if self.evaluate is not None and self._due(self.options.evaluate_every, position):
                    found = {k: float(v) for k, v in self.evaluate(state).items()}
                    latest |= found
                    log.write(position, time.perf_counter() - begin, found)
                if self._due(self.options.checkpoint_every, position) or stopped:
                    seconds = time.perf_counter() - begin
                    saver.save(position, _checkpoint(state, position, seconds))
                display.show(position, latest)
        done = position >= self.steps
        return Outcome(state, position, done, time.perf_counter() - begin, latest)

    def _due(self, every: int, position: int) -> bool:
        return position == self.steps or (every > 0 and position % every == 0)


def _placed(
    batches: Callable[[int], PyTree], where: tuple[Mesh, Layout] | None
) -> Callable[[int], PyTree]:
    """Batches by position as the step wants them; of several processes each reads its rows."""
    if where is None:
        return batches
    index, count = batch_part(*where)
    if count > 1 and isinstance(batches, Parted):
        part = batches.part(index, count)
        return lambda position: place_part(part(position), *where)
    return lambda position: place_batch(batches(position), *where)


def _checkpoint(state: PyTree, position: int, seconds: float) -> dict[str, PyTree]:
    return {"position": position, "seconds": seconds, "state": state}


def _finite(metrics: Mapping[str, Array], position: int) -> dict[str, float]:
    found = {name: float(value) for name, value in metrics.items()}
    bad = {name: value for name, value in found.items() if not np.isfinite(value)}
    if bad:
        raise NumericalError(
            f"step {position}: {bad}; lower the learning rate, clip, or lengthen the warm-up, and "
            "resume from the last checkpoint"
        )
    return found
