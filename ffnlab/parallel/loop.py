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

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from ffnlab.errors import ConfigError, NumericalError, at_least
from ffnlab.layers.logical import LAYOUT, Layout
from ffnlab.parallel import checkpoints, local
from ffnlab.parallel.clock import Clock
from ffnlab.parallel.feed import Feed, step_of
from ffnlab.parallel.guard import Figures, first_bad, skip_bad_steps
from ffnlab.parallel.lock import locked
from ffnlab.parallel.log import Journal, Trace, since_lowest
from ffnlab.parallel.memory import Identity, Memory, keep_table, memory_of
from ffnlab.parallel.mesh import on, parse_mesh
from ffnlab.parallel.options import LoopOptions
from ffnlab.parallel.rates import Meter, Work
from ffnlab.parallel.sharding import abstract, create, shard
from ffnlab.parallel.signals import stop_request
from ffnlab.rule import Rule
from ffnlab.storage import trees

Evaluate = Callable[[PyTree], Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where a run stands.

    Attributes:
      state: the rule's state.
      position: steps taken.
      finished: False where a signal stopped the run; True too where it stopped early by itself.
      seconds: wall clock spent in the loop, earlier parts of a resumed run included.
      metrics: of the last step that was logged or saved, and the last evaluation's figures.
      evaluations: the figures of every evaluation by its position, in order; those of earlier parts
        of a resumed run included.
    """

    state: PyTree
    position: int
    finished: bool
    seconds: float
    metrics: dict[str, float]
    evaluations: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)


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
    together: int = 1,
) -> Outcome:
    """Learns for `steps` steps.

    Args:
      rule: what to do with a batch.
      model: where learning starts; left intact.
      batches: position -> batch, the same batch whenever asked (`ffnlab.data.TextBatches`). Of
        several processes each reads its rows only where it is `Parted`, else keeps them.
      steps: position to stop at; a resumed run takes the steps that are left.
      key: for the rule's `init`.
      folder: receives `checkpoint/`, `metrics.jsonl`, `times.jsonl` (see `Goodput`) and what the
        options ask for; nothing is written when None. It is locked meanwhile.
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
      together: steps taken in one compiled loop over batches that are read together, for steps so
        small that starting each costs more than computing it. Logs, evaluations, checkpoints and
        signals fall between such groups, which end where one of them is due: the rows and figures
        are those of single steps, to 1e-6 a step (an MLP under Adam had their bits on a CPU). Two
        runs in groups, of whatever sizes, have the same bits.
    Returns:
      an `Outcome`. SIGTERM and Ctrl-C end the run after the current step or group, with a
      checkpoint and finished=False.
    Raises:
      ConfigError: another run is in the folder, it holds one and resume is False, or what is to be
        resumed has another identity or stands beyond `steps`; or the mesh does not divide a
        parameter or the batch, or one of its axes cuts nothing.
      NumericalError: a metric is not finite, where the options do not skip such steps; the message
        names the step and the first bad part of the state after it, or after its group, which is
        saved in `failed/`. The last checkpoint is intact.
      ValueError: the rule refuses a batch (`Rule.check`).
      FormatError: the checkpoint is of another rule, model or optimizer, or all are damaged; a
        damaged newest one is named in a warning, and the one before it used.
      OSError: a checkpoint could not be written; the last one is intact.
    """
    at_least(1, together=together)
    options = LoopOptions() if options is None else options
    mesh = mesh_of("", layout) if mesh is None else mesh
    where = None if mesh is None else (mesh, layout)
    rule = skip_bad_steps(rule) if options.on_bad == "skip" else rule
    path = None if folder is None else Path(folder).absolute()  # whoever changes the directory
    with locked(path):
        clock = Clock(path, options.began, fresh=not resume)
        run = _Run(rule, steps, path, evaluate, options, where, work, identity, together, clock)
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


@dataclasses.dataclass
class _Notes:
    """What is written down while a run goes; `begin` is when all parts of it would have begun."""

    journal: Journal
    meter: Meter
    memory: Memory
    begin: float
    rates: dict[str, float] = dataclasses.field(default_factory=dict)

    def seconds(self) -> float:
        return time.perf_counter() - self.begin

    def measured(self) -> dict[str, float]:
        """The rates since the last call."""
        found = self.meter.figures()
        self.rates |= found
        return found


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
    together: int
    clock: Clock

    def start(self, model: PyTree, key: Array, resume: bool) -> _Begun:
        """Restores or initializes; only `run.json` has been written when it returns."""
        saved, near = self._in("checkpoint"), self._local()
        for folder in (saved, near):
            if folder is not None and folder.exists() and not folder.is_dir():
                raise ConfigError(f"{folder} is not a folder; remove it or name another folder")
        shared = saved is not None and checkpoints.exists(saved)
        there = {self.folder: shared, near: near is not None and local.saved_anywhere(near)}
        if any(there.values()) and not resume:
            where = next(folder for folder, found in there.items() if found)
            raise ConfigError(f"{where} holds a run already; resume it or name another folder")
        begun = self._resumed(model, key, shared) if any(there.values()) else None
        if resume and begun is None and saved is not None and checkpoints.steps(saved):
            warnings.warn(
                f"{saved} holds no finished checkpoint: the run begins at step 0", stacklevel=3
            )
        begun = self._new(model, key) if begun is None else begun
        if self.identity is not None and self.folder is not None:
            keep_table(self.folder, self.identity, begun.table)
        return begun

    def _new(self, model: PyTree, key: Array) -> _Begun:
        if self.where is None:
            state = self.rule.init(model, key)
            if self.together > 1:  # a group donates it, and a rule need not have copied anything
                state = jax.tree.map(jnp.copy, state)
        else:
            placed = (shard(model, *self.where),)
            state = create(lambda model: self.rule.init(model, key), placed, *self.where)
        return _Begun(state, 0, 0.0, Memory(), None)

    def _resumed(self, model: PyTree, key: Array, shared: bool) -> _Begun | None:
        """Restores the newest checkpoint; None where no local one serves, and none is shared."""
        state = jax.eval_shape(self.rule.init, model, key)
        state = state if self.where is None else abstract(state, *self.where)
        like = _checkpoint(state, 0, 0.0)
        accept = None if self.identity is None else self.identity.accept
        # Not every state held a key from the beginning; it is the run's where it does.
        absent = {"['state'].key": jnp.copy(key)}  # a step donates it; this one is the caller's
        folder, near = self._in("checkpoint"), self._local()
        least = checkpoints.newest(folder) if shared else 0
        found = None if near is None else local.newest(near, like, accept, least)
        if found is None and not shared:
            return None
        saved, about = found or checkpoints.resume(folder, like, accept, absent)
        if saved["position"] > self.steps:
            raise ConfigError(
                f"steps={self.steps}, but {self.folder} has taken {saved['position']} already; "
                "ask for as many or more, or train into another folder"
            )
        memory = memory_of(about.get("loop"))
        return _Begun(saved["state"], saved["position"], saved["seconds"], memory, about.get("run"))

    def go(self, batches: Callable[[int], PyTree], begun: _Begun) -> Outcome:
        state, position, memory = begun.state, begun.position, begun.memory
        metrics, stopped, taken, turn, clock = {}, False, 1, position, self.clock
        step = step_of(self.rule, self.where, self.together)
        feed = Feed(batches, self.rule, self.where, self.together)
        figures = Figures(memory.skipped if self.options.on_bad == "skip" else None)
        settled = self._settled(memory)
        with (
            self._journal(position) as journal,
            stop_request() as asked_to_stop,
            checkpoints.Saver(self._in("checkpoint"), position) as saver,
            local.LocalSaver(self._local(), position) as near,
            Trace(self._in("profile"), position + 2, self.options.profile) as trace,
        ):
            notes = _Notes(journal, self._meter(), memory, time.perf_counter() - begun.seconds)
            clock.write(position)
            if position == 0 and self.evaluate is not None and 0 in self.options.evaluate_at:
                journal.write(0, notes.seconds(), self._evaluate(state, 0, memory))
            clock.to("steps")
            while position < self.steps and not stopped and not settled:
                end = min(self._next_due(position), trace.next_turn(position, self.steps))
                with clock.reading(metrics):
                    batch, count = feed(state, position, end)
                self._read(figures, metrics, state, position, taken)
                trace.at(position)
                with clock.dispatching():
                    state, metrics = step(state, batch)
                # The first turn is not counted: it compiles.
                meter = notes.meter
                meter.count(position, count) if position > begun.position else meter.restart()
                position, taken, turn = position + count, count, turn + 1
                stopped = asked_to_stop(turn)
                writes = self._evaluates(position) or self._due("log_every", position)
                saves = stopped or self._due("checkpoint_every", position)
                nearby = self._due("checkpoint_local_every", position)
                if writes or saves or nearby:
                    memory.metrics = self._read(figures, metrics, state, position, taken)
                if writes:
                    settled = self._note(notes, state, position)
                if saves or settled or nearby:
                    with clock.during("saving"):
                        tree = _checkpoint(state, position, notes.seconds())
                        tier = saver if saves or settled else near
                        tier.save(position, tree, self._about(begun, memory, figures))
                journal.show(position)
            clock.to("saving")
        clock.write(position, ended=True)
        done, spent = position >= self.steps or settled, notes.seconds()
        evaluations = dict(memory.evaluations)
        return Outcome(state, position, done, spent, memory.known(), evaluations)

    def _note(self, notes: "_Notes", state: PyTree, position: int) -> bool:
        """Evaluates where it is due, and logs; whether the run ends by itself."""
        row, settled = notes.memory.metrics | notes.measured(), False
        if self._evaluates(position):
            row |= self._evaluate(state, position, notes.memory)
            settled = self._settled(notes.memory)
            notes.meter.restart()
        with self.clock.during("logging"):
            notes.journal.write(position, notes.seconds(), row)
            notes.journal.show(position, notes.memory.known() | notes.rates)
            self.clock.write(position)
        return settled

    def _about(self, begun: _Begun, memory: Memory, figures: Figures) -> dict[str, object]:
        """What a checkpoint says of its run beside the state."""
        if figures.skipped is not None:
            memory.skipped = figures.skipped
        table = begun.table if self.identity is None else self.identity.table
        return {"run": table, "loop": memory.table()}

    def _due(self, what: str, position: int) -> bool:
        return self.options.due(what, position, self.steps)

    def _next_due(self, position: int) -> int:
        return self.options.next_due(position, self.steps)

    def _evaluates(self, position: int) -> bool:
        return self.evaluate is not None and self._due("evaluate_every", position)

    def _meter(self) -> Meter:
        here = jax.devices()[:1] if self.where is None else list(self.where[0].devices.flat)
        return Meter(self.work, here)

    def _journal(self, position: int) -> Journal:
        options = self.options
        shown = {"progress": options.progress, "tensorboard": options.tensorboard}
        return Journal(self.folder, position, self.steps, **shown)

    def _local(self) -> Path | None:
        name = self.options.checkpoint_local
        return Path(name).absolute() if name and self.folder is not None else None

    def _in(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name

    def _settled(self, memory: Memory) -> bool:
        options = self.options
        if not options.patience:
            return False
        history = memory.watched(options.watch, options.evaluate_every)
        return since_lowest(history) >= options.patience

    def _evaluate(self, state: PyTree, position: int, memory: Memory) -> dict[str, float]:
        mesh = contextlib.nullcontext() if self.where is None else on(*self.where)
        with self.clock.during("evaluating"), mesh:
            found = {name: float(value) for name, value in self.evaluate(state).items()}
        if self.options.patience and self.options.watch not in found:
            raise ConfigError(f"watch={self.options.watch!r} is not one of {sorted(found)}")
        memory.evaluations[position] = found
        return found

    def _read(
        self,
        figures: Figures,
        metrics: Mapping[str, Array],
        state: PyTree,
        position: int,
        steps: int,
    ) -> dict[str, float]:
        """The metrics of the steps that ended at a position, once they have ended.

        Raises:
          NumericalError: one is not finite, and such steps are not left out.
        """
        with self.clock.waiting(metrics):
            found = figures.read(metrics, position, steps)
        if not figures.bad or figures.skipped is not None:
            return found
        path = first_bad(state)
        where = "all of the state is finite" if path is None else f"the first bad part is {path}"
        folder = self._in("failed")
        if folder is not None:
            trees.save(folder, _checkpoint(state, position, 0.0))
            where += f" (saved in {folder})"
        if figures.bad_step != position:
            where = f"after step {position}, where its group ends, {where}"
        raise NumericalError(
            f"step {figures.bad_step}: {figures.bad}; {where}; lower the learning rate, clip, or "
            "lengthen the warm-up, and resume from the last checkpoint, or skip such steps"
        )


def _checkpoint(state: PyTree, position: int, seconds: float) -> dict[str, PyTree]:
    return {"position": position, "seconds": seconds, "state": state}
