"""The training loop: runs any rule, logs, evaluates, checkpoints, stops cleanly and resumes.

A run is a pure function of (rule, model, key, batches): its only memory is the rule's state and
one integer, the position. Interrupted and resumed, on the same machine and versions, it ends in
the same bits as without the interruption.
"""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers.logical import LAYOUT, Layout
from ffnlab.parallel import checkpoints
from ffnlab.parallel.guard import Figures, first_bad, skip_bad_steps
from ffnlab.parallel.lock import locked
from ffnlab.parallel.log import Journal, Trace, since_lowest
from ffnlab.parallel.memory import Identity, Memory, keep_table, memory_of
from ffnlab.parallel.mesh import on, parse_mesh
from ffnlab.parallel.rates import Meter, Work
from ffnlab.parallel.sharding import (
    abstract,
    batch_part,
    create,
    make_step,
    place_batch,
    place_part,
    shard,
)
from ffnlab.parallel.signals import stop_request
from ffnlab.rule import Rule
from ffnlab.storage import trees


@runtime_checkable
class Parted(Protocol):
    """Batches of which a process can read its rows only."""

    def part(self, index: int, count: int) -> Callable[[int], PyTree]:
        """The same batches, of each only the rows of part `index` of `count` equal ones."""
        ...


Evaluate = Callable[[PyTree], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class LoopOptions:
    """How often the loop does what, all in steps, 0 for never before the end; and what else.

    Attributes:
      log_every: metrics are written; they also are where `evaluate` runs.
      evaluate_every: `evaluate` runs; it also runs after the last step.
      checkpoint_every: the state is saved; it is also saved after the last step and when stopped.
      progress: a progress bar where standard error is a terminal.
      on_bad: what a metric that is not finite does: "stop" ends the run and saves the state beside
        the checkpoints; "skip" undoes the step, counts it, and goes on.
      watch: the figure of `evaluate` by which the run stops early; the lower the better.
      patience: evaluations in a row without a new lowest `watch` after which it stops; 0 for never.
      tensorboard: event files too, in `events/`; needs the extra "log".
      profile: steps traced by the profiler, from the third one on, into `profile/`.
    """

    log_every: int = 20
    evaluate_every: int = 0
    checkpoint_every: int = 0
    progress: bool = True
    on_bad: str = "stop"
    watch: str = ""
    patience: int = 0
    tensorboard: bool = False
    profile: int = 0

    def __post_init__(self) -> None:
        for name in ("log_every", "evaluate_every", "checkpoint_every", "patience", "profile"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}={getattr(self, name)} must not be negative")
        if self.on_bad not in ("stop", "skip"):
            raise ConfigError(f"on_bad={self.on_bad!r} is not one of 'stop', 'skip'")
        if self.patience and not (self.watch and self.evaluate_every):
            raise ConfigError(
                f"patience={self.patience} needs a figure to watch (watch={self.watch!r}) and "
                f"evaluations (evaluate_every={self.evaluate_every})"
            )


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a run stands.

    Attributes:
      state: the rule's state.
      position: steps taken.
      finished: False where a signal stopped the run; True too where it stopped early by itself.
      seconds: wall clock spent in the loop, earlier parts of a resumed run included.
      metrics: of the last step that was logged or saved, and the last evaluation's figures.
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
    work: Work | None = None,
    identity: Identity | None = None,
) -> Outcome:
    """Learns for `steps` steps.

    Args:
      rule: what to do with a batch.
      model: where learning starts; left intact.
      batches: position -> batch, the same batch whenever asked (`ffnlab.data.TextBatches`). Of
        several processes each reads its rows only where it is `Parted`, else keeps them.
      steps: position to stop at; a resumed run takes the steps that are left.
      key: for the rule's `init`.
      folder: receives `checkpoint/`, `metrics.jsonl` and what the options ask for; nothing is
        written when None. It is locked meanwhile.
      resume: continue from the folder's checkpoint, if it has one.
      evaluate: state -> named figures; the mesh and its layout are set (`on`), so that activations
        are cut in it too.
      options: see `LoopOptions`.
      mesh: where state and batches are placed; when None the default device, or "dp=-1" for
        several processes, which all call this alike (`ffnlab.parallel.joined`). A checkpoint may
        be resumed on another mesh and by another number of processes.
      layout: of the mesh, see `ffnlab.parallel.shardings`.
      work: what a step does; tokens per second and MFU are logged with it.
      identity: what the run is; kept in its checkpoints and in `run.json`, and checked when it is
        resumed.
    Returns:
      an `Outcome`. SIGTERM and Ctrl-C end the run after the current step, with a checkpoint and
      finished=False.
    Raises:
      ConfigError: another run is in the folder, it holds one and resume is False, or what is to be
        resumed has another identity or stands beyond `steps`; or the mesh does not divide a
        parameter or the batch, or one of its axes cuts nothing.
      NumericalError: a metric is not finite, where the options do not skip such steps; the message
        names the step and the first bad part of the state, which is saved in `failed/`. The last
        checkpoint is intact.
      FormatError: the checkpoint is of another rule, model or optimizer, or all are damaged; a
        damaged newest one is named in a warning, and the one before it used.
      OSError: a checkpoint could not be written; the last one is intact.
    """
    options = LoopOptions() if options is None else options
    mesh = mesh_of("", layout) if mesh is None else mesh
    where = None if mesh is None else (mesh, layout)
    rule = skip_bad_steps(rule) if options.on_bad == "skip" else rule
    path = None if folder is None else Path(folder).absolute()  # whoever changes the directory
    run = _Run(rule, steps, path, evaluate, options, where, work, identity)
    with locked(path):
        return run.go(batches, run.start(model, key, resume))


def mesh_of(text: str, layout: Layout = LAYOUT) -> Mesh | None:
    """The mesh of a run: as described, else over rows alone for several processes, else None.

    Args:
      text: see `parse_mesh`; "" leaves it to this function.
      layout: that the mesh is for.
    """
    if text or jax.process_count() > 1:
        return parse_mesh(text or "dp=-1", layout=layout)
    return None


@dataclasses.dataclass(frozen=True)
class _Begun:
    """Where a run begins, or goes on; `table` is what its checkpoint says that it is."""

    state: PyTree
    position: int
    seconds: float
    memory: Memory
    table: Mapping[str, object] | None


@dataclasses.dataclass(frozen=True)
class _Run:
    rule: Rule
    steps: int
    folder: Path | None
    evaluate: Evaluate | None
    options: LoopOptions
    where: tuple[Mesh, Layout] | None
    work: Work | None
    identity: Identity | None

    def start(self, model: PyTree, key: Array, resume: bool) -> _Begun:
        """Restores or initializes; only `run.json` has been written when it returns."""
        saved = self._in("checkpoint")
        if saved is not None and saved.exists() and not saved.is_dir():
            raise ConfigError(f"{saved} is not a folder; remove it or name another folder")
        there = saved is not None and checkpoints.exists(saved)
        if there and not resume:
            raise ConfigError(
                f"{self.folder} holds a run already; resume it or name another folder"
            )
        if resume and not there and saved is not None and checkpoints.steps(saved):
            warnings.warn(
                f"{saved} holds no finished checkpoint: the run begins at step 0", stacklevel=3
            )
        begun = self._resumed(model, key) if there else self._new(model, key)
        if self.identity is not None and self.folder is not None:
            keep_table(self.folder, self.identity, begun.table)
        return begun

    def _new(self, model: PyTree, key: Array) -> _Begun:
        if self.where is None:
            state = self.rule.init(model, key)
        else:
            placed = (shard(model, *self.where),)
            state = create(lambda model: self.rule.init(model, key), placed, *self.where)
        return _Begun(state, 0, 0.0, Memory(), None)

    def _resumed(self, model: PyTree, key: Array) -> _Begun:
        state = jax.eval_shape(self.rule.init, model, key)
        state = state if self.where is None else abstract(state, *self.where)
        like = _checkpoint(state, 0, 0.0)
        accept = None if self.identity is None else self.identity.accept
        saved, about = checkpoints.resume(self._in("checkpoint"), like, accept)
        if saved["position"] > self.steps:
            raise ConfigError(
                f"steps={self.steps}, but {self.folder} has taken {saved['position']} already; "
                "ask for as many or more, or train into another folder"
            )
        memory = memory_of(about.get("loop"))
        return _Begun(saved["state"], saved["position"], saved["seconds"], memory, about.get("run"))

    def go(self, batches: Callable[[int], PyTree], begun: _Begun) -> Outcome:
        state, position, memory = begun.state, begun.position, begun.memory
        metrics, rates, stopped = {}, {}, False
        step, batch_at = self.rule.step, _placed(batches, self.where)
        if self.where is not None:
            step = make_step(self.rule, *self.where)
        devices = jax.devices()[:1] if self.where is None else list(self.where[0].devices.flat)
        meter = Meter(self.work, devices)
        figures = Figures(memory.skipped if self.options.on_bad == "skip" else None)
        settled = self._settled(memory)
        begin = time.perf_counter() - begun.seconds
        with (
            self._journal(position) as journal,
            stop_request() as asked_to_stop,
            checkpoints.Saver(self._in("checkpoint"), position) as saver,
            Trace(self._in("profile"), position + 2, self.options.profile) as trace,
        ):
            while position < self.steps and not stopped and not settled:
                batch = batch_at(position)  # while the device is at the step before
                self._read(figures, metrics, state, position)
                trace.at(position)
                state, metrics = step(state, batch)
                # The first step is not counted: it compiles.
                meter.count(position) if position > begun.position else meter.restart()
                position += 1
                stopped = asked_to_stop(position)
                evaluates = self.evaluate is not None and self._due("evaluate_every", position)
                writes = evaluates or self._due("log_every", position)
                saves = stopped or self._due("checkpoint_every", position)
                if writes or saves:
                    memory.metrics = self._read(figures, metrics, state, position)
                if writes:
                    measured = meter.figures()
                    rates |= measured
                    row = memory.metrics | measured
                    if evaluates:
                        row |= self._evaluate(state, position, memory)
                        settled = self._settled(memory)
                        meter.restart()
                    journal.write(position, time.perf_counter() - begin, row)
                    journal.show(position, memory.known() | rates)
                if saves or settled:
                    spent = time.perf_counter() - begin
                    tree = _checkpoint(state, position, spent)
                    saver.save(position, tree, self._about(begun, memory, figures))
                journal.show(position)
        done = position >= self.steps or settled
        return Outcome(state, position, done, time.perf_counter() - begin, memory.known())

    def _about(self, begun: _Begun, memory: Memory, figures: Figures) -> dict[str, object]:
        """What a checkpoint says of its run beside the state."""
        if figures.skipped is not None:
            memory.skipped = figures.skipped
        table = begun.table if self.identity is None else self.identity.table
        return {"run": table, "loop": memory.table()}

    def _due(self, what: str, position: int) -> bool:
        every = getattr(self.options, what)
        return position == self.steps or (every > 0 and position % every == 0)

    def _journal(self, position: int) -> Journal:
        options = self.options
        shown = {"progress": options.progress, "tensorboard": options.tensorboard}
        return Journal(self.folder, position, self.steps, **shown)

    def _in(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _settled(self, memory: Memory) -> bool:
        options = self.options
        if not options.patience:
            return False
        history = memory.watched(options.watch, options.evaluate_every)
        return since_lowest(history) >= options.patience

    def _evaluate(self, state: PyTree, position: int, memory: Memory) -> dict[str, float]:
        with contextlib.nullcontext() if self.where is None else on(*self.where):
            found = {name: float(value) for name, value in self.evaluate(state).items()}
        if self.options.patience and self.options.watch not in found:
            raise ConfigError(f"watch={self.options.watch!r} is not one of {sorted(found)}")
        memory.evaluations[position] = found
        return found

    def _read(
        self, figures: Figures, metrics: Mapping[str, Array], state: PyTree, position: int
    ) -> dict[str, float]:
        """Waits for a step and reads its metrics.

        Raises:
          NumericalError: one is not finite, and such steps are not left out.
        """
        found = figures.read(metrics, position)
        if not figures.bad or figures.skipped is not None:
            return found
        path = first_bad(state)
        where = "all of the state is finite" if path is None else f"the first bad part is {path}"
        folder = self._in("failed")
        if folder is not None:
            trees.save(folder, _checkpoint(state, position, 0.0))
            where += f" (saved in {folder})"
        raise NumericalError(
            f"step {position}: {figures.bad}; {where}; lower the learning rate, clip, or lengthen "
            "the warm-up, and resume from the last checkpoint, or skip such steps"
        )


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
