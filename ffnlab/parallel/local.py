"""The local tier of checkpoints: each process saves what it holds to a disk of its own, often.

Nothing is sent and nobody waits for another, so that it costs little; the folder that all share is
written seldom. A run goes on from the newest step of which every process finds all that it needs on
its own machine, in whatever parts lie there, else from the shared folder. Where a machine has gone
with its disk, that is so only if others hold the same: under "dp" they do, under "fsdp" they do
not.
"""

import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ffnlab.errors import ConfigError, DamagedError, FFNLabError, FormatError
from ffnlab.parallel import checkpoints
from ffnlab.parallel.checkpoints import KEEP, NAME, Saver
from ffnlab.parallel.processes import from_first
from ffnlab.storage import structure
from ffnlab.storage.files import remove
from ffnlab.storage.parts import Part, begin_part, covers, read_part, restore_parts

__all__ = ["LocalSaver", "newest", "saved_anywhere"]

T = TypeVar("T")
PART = "part-{:05d}"
TRIED = 8  # savings that a process offers when a run goes on
SERIES = 2**31 - 1  # numbers of runs of the loop


class Saving(NamedTuple):
    """One saving of all processes: its step, and the number of the run of the loop that made it."""

    step: int
    series: int


class LocalSaver(Saver):
    """Saves parts while the run goes on; where the disk fails, warns and saves no more.

    Attributes:
      series: number of this run of the loop, the same in all processes.
    """

    def __init__(self, folder: Path | None, position: int):
        """A saver of a run that goes on from a position, into a folder; None saves nothing."""
        own = None if folder is None else folder / PART.format(jax.process_index())
        super().__init__(own, position, begin)
        drawn = np.random.SeedSequence().generate_state(1)[0] % SERIES
        self.series = 0 if folder is None else int(from_first(str(drawn)))

    def save(self, step: int, tree: object, about: Mapping[str, Any] | None = None) -> None:
        """Begins to save; see `Saver.save`."""
        self.wait()
        super().save(step, tree, {**(about or {}), "series": self.series})

    def wait(self) -> None:
        """Waits for the save that goes on; one that fails is the last."""
        try:
            super().wait()
        except OSError as error:
            warnings.warn(
                f"checkpoint_local: {error}; this process saves no more of them", stacklevel=2
            )
            self.folder = None


def begin(
    folder: Path, step: int, tree: object, about: Mapping[str, Any]
) -> Callable[[set[int]], None]:
    """Begins to save a part; what it returns ends that, and removes older ones and those given."""
    write = begin_part(folder / NAME.format(step), tree, about)

    def finish(passed: set[int]) -> None:
        write()
        whole = [at for at in checkpoints.steps(folder) if checkpoints.is_finished(folder, at)]
        kept = [at for at in whole if at <= step][:KEEP]
        for at in checkpoints.steps(folder):
            if at in passed or at not in kept:
                with suppress(OSError):
                    remove(folder / NAME.format(at))
        for other in parts_in(folder.parent):
            if int(other.name[5:]) >= jax.process_count():  # of a run of more processes
                shutil.rmtree(other, ignore_errors=True)

    return finish


def parts_in(folder: Path) -> list[Path]:
    """The folders of processes that lie here."""
    found = (item for item in folder.glob("part-*") if item.name[5:].isdecimal())
    return sorted(item for item in found if item.name == PART.format(int(item.name[5:])))


def savings(folder: Path) -> dict[Saving, list[Part]]:
    """What lies here, newest first; parts that were cut off or damaged are left out."""
    found: dict[Saving, list[Part]] = {}
    for own in parts_in(folder):
        for step in checkpoints.steps(own):
            with suppress(DamagedError, FormatError):
                part = read_part(own / NAME.format(step))
                if part.about.get("step") == step and isinstance(part.about.get("series"), int):
                    found.setdefault(Saving(step, part.about["series"]), []).append(part)
    return dict(sorted(found.items(), reverse=True))


def saved_anywhere(folder: Path) -> bool:
    """Whether any process finds a part here; all call it."""
    return bool(gathered(np.array([bool(savings(folder))])).any())


def newest(
    folder: Path, like: T, accept: Callable[[dict[str, Any], str], None] | None, least: int
) -> tuple[T, dict[str, Any]] | None:
    """The newest saving that is whole for all processes; all call it.

    Args:
      folder: of the parts on this machine.
      like: see `ffnlab.storage.trees.restore`.
      accept: (about, name of a part) -> None; raises where it must not be used.
      least: its step is no less.
    Returns:
      the tree, and what it was saved with; None without one.
    Raises:
      ConfigError: the parts that one of the processes finds are another run's; all raise it.
    """
    there = {saving: parts for saving, parts in savings(folder).items() if saving.step >= least}
    raise_together(lambda: check_accepted(there, like, accept))
    usable = [saving for saving, parts in there.items() if covers(parts, like)]
    for saving in agreed(usable):
        try:
            result = [restore_parts(there[saving], like)]
        except DamagedError as error:
            warnings.warn(f"{error}; an earlier checkpoint is tried", stacklevel=2)
            result = []
        if gathered(np.array([bool(result)])).all():
            return result[0], there[saving][0].about
    return None


def check_accepted(
    there: Mapping[Saving, Sequence[Part]],
    like: object,
    accept: Callable[[dict[str, Any], str], None] | None,
) -> None:
    """Raises an error of ours unless parts are of this run and of such a tree."""
    description = structure.describe(like)
    for part in (part for parts in there.values() for part in parts):
        if accept is not None:
            accept(part.about, str(part.folder))
        structure.check(part.tree, description, str(part.folder))


def raise_together(check: Callable[[], None]) -> None:
    """Calls a check in every process; where one raises, all do."""
    problem: FFNLabError | None = None
    try:
        check()
    except FFNLabError as error:
        problem = error
    failed = gathered(np.array([problem is not None])).reshape(-1)
    if problem is not None:
        raise problem
    if failed.any():
        raise ConfigError(
            f"process {failed.argmax()} finds the checkpoints of another run in its "
            "checkpoint_local; name another folder"
        )


def agreed(usable: Sequence[Saving]) -> Iterator[Saving]:
    """The savings that all processes can use, newest first."""
    mine = np.full((TRIED, 2), -1, np.int32)
    mine[: len(usable[:TRIED])] = np.array(usable[:TRIED], np.int32).reshape(-1, 2)
    every = gathered(mine).reshape(-1, TRIED, 2)
    sets = [{Saving(*map(int, row)) for row in rows if row[0] >= 0} for rows in every]
    yield from sorted(set.intersection(*sets), reverse=True)


def gathered(value: np.ndarray) -> np.ndarray:
    """The values of all processes, [processes, …]."""
    if jax.process_count() == 1:
        return value[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value))
