"""The checkpoints of a run: the newest two, of which a damaged one is named and passed over."""

import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, TypeVar

import jax

from ffnlab.errors import DamagedError
from ffnlab.parallel.processes import meet
from ffnlab.storage import trees
from ffnlab.storage.files import remove

__all__ = ["Saver", "exists", "resume", "restore", "save"]

T = TypeVar("T")
KEEP = 2
NAME = "step-{:09d}"

# (folder, step, tree, about) -> what ends the save, told the steps that were passed over.
Begin = Callable[[Path, int, object, Mapping[str, Any]], Callable[[set[int]], None]]


def steps(folder: Path) -> list[int]:
    """The steps there are checkpoints of, newest first; some may be unfinished or damaged."""
    names = [item.name for item in folder.glob("step-*")]
    found = [int(name[5:]) for name in names if re.fullmatch(r"step-[0-9]{9,}", name)]
    return sorted((step for step in found if NAME.format(step) in names), reverse=True)


def exists(folder: Path) -> bool:
    """Whether a finished checkpoint is there; it may be damaged."""
    return any(is_finished(folder, step) for step in steps(folder))


def newest(folder: Path) -> int:
    """The newest step that was finished; 0 without one."""
    return next((step for step in steps(folder) if is_finished(folder, step)), 0)


def is_finished(folder: Path, step: int) -> bool:
    """Whether the checkpoint of a step was written to its end, whatever has become of it."""
    return os.path.lexists(folder / NAME.format(step) / trees.SIDECAR)


def save(folder: Path, step: int, tree: object, about: Mapping[str, Any] | None = None) -> None:
    """Saves a checkpoint and then removes all but the newest two.

    What stands in its place, left unfinished or passed over as damaged, is removed first.

    Args:
      folder: of all checkpoints of the run.
      step: of this one; the checkpoint knows it, whatever its folder is called later.
      tree: see `ffnlab.storage.trees.save`.
      about: JSON values to keep under its sum; "step" is added.
    Raises:
      OSError: it could not be written; those before it are intact.
    """
    with Saver(folder) as saver:
        saver.save(step, tree, about)


class Saver:
    """Saves checkpoints while the run goes on: one at a time, the last one when it is left.

    The run waits where a save is not over when the next begins. An error of writing is raised
    then, or when the saver is left.

    Attributes:
      folder: of all checkpoints of the run; None saves nothing.
      passed: steps whose checkpoints were passed over as damaged or unfinished, when the run took
        up an earlier one; the first save removes them.
    """

    def __init__(
        self, folder: Path | None, position: int | None = None, begin: Begin | None = None
    ):
        """A saver of a run that goes on from a position; None for a run of no known one.

        Args:
          begin: how; by all processes together when None.
        """
        self.folder, self._begin = folder, begin or _begin
        known = folder is not None and position is not None
        self.passed = {step for step in steps(folder) if step > position} if known else set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except OSError as unsaved:
            if error is None:
                raise
            error.add_note(str(unsaved))
        finally:
            self._thread.shutdown()

    def save(self, step: int, tree: object, about: Mapping[str, Any] | None = None) -> None:
        """Begins to save; arguments and errors as `save`."""
        if self.folder is None:
            return
        self.wait()
        self.passed.discard(step)
        end = self._begin(self.folder, step, tree, {**(about or {}), "step": step})
        passed, self.passed = self.passed, set()
        self._running = self._thread.submit(lambda: end(passed))

    def wait(self) -> None:
        """Waits for the save that goes on, and raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _begin(
    folder: Path, step: int, tree: object, about: Mapping[str, Any]
) -> Callable[[set[int]], None]:
    target = folder / NAME.format(step)
    with _write_errors(folder, step):
        if jax.process_index() == 0:
            remove(target)
        meet(f"the place of {target.name} is free")
        end = trees.begin_save(target, tree, about)

    def finish(passed: set[int]) -> None:
        with _write_errors(folder, step):
            end()
        if jax.process_index() == 0:
            _prune(folder, step, passed)

    return finish


@contextmanager
def _write_errors(folder: Path, step: int) -> Iterator[None]:
    """Says which checkpoint could not be saved, and which one is left."""
    try:
        yield
    except OSError as error:
        target = folder / NAME.format(step)
        if jax.process_index() == 0 and not is_finished(folder, step):
            shutil.rmtree(target, ignore_errors=True)
        whole = [step for step in steps(folder) if is_finished(folder, step)]
        left = f"the checkpoint of step {whole[0]} is intact" if whole else "there is no other"
        what = f"the checkpoint of step {step} could not be saved"
        raise OSError(f"{what}: {error}; {left}") from None


def _prune(folder: Path, last: int, passed: set[int]) -> None:
    """Removes all up to the last one but the newest two, and those that were passed over."""
    there = steps(folder)
    kept = [step for step in there if step <= last and is_finished(folder, step)][:KEEP]
    for step in there:
        if step in passed or (step <= last and step not in kept):
            with suppress(OSError):
                remove(folder / NAME.format(step))


def restore(folder: Path, like: T) -> T:
    """The tree of `resume`; arguments and errors as there."""
    return resume(folder, like)[0]


def resume(
    folder: Path,
    like: T,
    accept: Callable[[dict[str, Any], str], None] | None = None,
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[T, dict[str, Any]]:
    """The newest checkpoint that is whole.

    Args:
      folder: of all checkpoints of the run.
      like: see `ffnlab.storage.trees.restore`.
      accept: (about, name of the checkpoint) -> None; raises where it must not be used.
      absent: see `ffnlab.storage.trees.restore_about`.
    Returns:
      its tree, and what it was saved with. A warning names each newer one that is damaged,
      unfinished, or of another step than its folder says.
    Raises:
      DamagedError: none is whole; the newest is named.
      FormatError: the newest is of another tree, or of another version's format.
    """
    first = None
    for step in steps(folder):
        target = folder / NAME.format(step)

        def check(about: dict[str, Any], target: Path = target, step: int = step) -> None:
            if about.get("step") != step:
                raise DamagedError(f"{target} holds the checkpoint of step {about.get('step')}")
            if accept is not None:
                accept(about, str(target))

        try:
            return trees.restore_about(target, like, check, absent)
        except DamagedError as error:
            first = first or error
            warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
    raise first or DamagedError(f"{folder} holds no checkpoint")
