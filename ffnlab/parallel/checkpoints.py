"""The checkpoints of a run: the newest two, of which a damaged one is named and passed over."""

import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import jax

from ffnlab import io
from ffnlab.errors import DamagedError

__all__ = ["Saver", "exists", "restore", "save"]

T = TypeVar("T")
KEEP = 2
NAME = "step-{:09d}"


def steps(folder: Path) -> list[int]:
    """The steps there are checkpoints of, newest first; some may be unfinished or damaged."""
    found = [re.fullmatch(r"step-(\d{9,})", item.name) for item in folder.glob("step-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def exists(folder: Path) -> bool:
    """Whether a finished checkpoint is there."""
    return any(is_finished(folder, step) for step in steps(folder))


def is_finished(folder: Path, step: int) -> bool:
    """Whether the checkpoint of a step was written to its end."""
    return (folder / NAME.format(step) / io.SIDECAR).exists()


def save(folder: Path, step: int, tree: object) -> None:
    """Saves a checkpoint and then removes all but the newest two.

    Args:
      folder: of all checkpoints of the run.
      step: of this one.
      tree: see `ffnlab.io.save`.
    Raises:
      OSError: it could not be written; those before it are intact.
    """
    _begin(folder, step, tree)()


class Saver:
    """Saves checkpoints while the run goes on: one at a time, the last one when it is left.

    The run waits where a save is not over when the next begins. An error of writing is raised
    then, or when the saver is left.

    Attributes:
      folder: of all checkpoints of the run; None saves nothing.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
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

    def save(self, step: int, tree: object) -> None:
        """Begins to save; arguments and errors as `save`."""
        if self.folder is not None:
            self.wait()
            self._running = self._thread.submit(_begin(self.folder, step, tree))

    def wait(self) -> None:
        """Waits for the save that goes on, and raises its error."""
        running, self._running = self._running, None
        if running is not None:
            running.result()


def _begin(folder: Path, step: int, tree: object) -> Callable[[], None]:
    with _write_errors(folder, step):
        end = io.begin_save(folder / NAME.format(step), tree)

    def finish() -> None:
        with _write_errors(folder, step):
            end()
        if jax.process_index() == 0:
            _prune(folder)

    return finish


@contextmanager
def _write_errors(folder: Path, step: int) -> Iterator[None]:
    """Says which checkpoint could not be saved, and which one is left."""
    try:
        yield
    except OSError as error:
        target = folder / NAME.format(step)
        if jax.process_index() == 0 and not (target / io.SIDECAR).exists():
            shutil.rmtree(target, ignore_errors=True)
        whole = [step for step in steps(folder) if is_finished(folder, step)]
        left = f"the checkpoint of step {whole[0]} is intact" if whole else "there is no other"
        what = f"the checkpoint of step {step} could not be saved"
        raise OSError(f"{what}: {error}; {left}") from None


def _prune(folder: Path) -> None:
    """Removes all but the newest two, and what kills have left unfinished before them."""
    kept = [step for step in steps(folder) if is_finished(folder, step)][:KEEP]
    for step in steps(folder):
        if step not in kept and step <= max(kept):
            shutil.rmtree(folder / NAME.format(step), ignore_errors=True)


def restore(folder: Path, like: T) -> T:
    """The newest checkpoint that is whole.

    Args:
      folder: of all checkpoints of the run.
      like: see `ffnlab.io.restore`.
    Returns:
      its tree. A warning names each newer one that is damaged or unfinished.
    Raises:
      DamagedError: none is whole; the newest is named.
      FormatError: the newest is of another tree.
    """
    first = None
    for step in steps(folder):
        try:
            return io.restore(folder / NAME.format(step), like)
        except DamagedError as error:
            first = first or error
            warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
    raise first or DamagedError(f"{folder} holds no checkpoint")
