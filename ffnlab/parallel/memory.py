"""What the loop remembers beside the rule's state, and what a run is: kept in every checkpoint.

All of it lies under the checkpoint's sum, so that what goes on is what stood there; `metrics.jsonl`
and `run.json` are for reading and decide nothing.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffnlab.errors import ConfigError, FormatError
from ffnlab.parallel.processes import is_first
from ffnlab.storage.files import read_json, write_json

__all__ = ["Identity", "Memory", "keep_table"]

RUN_FILE = "run.json"


@dataclasses.dataclass
class Memory:
    """What the loop has seen.

    Attributes:
      skipped: steps left out so far because they were not finite.
      metrics: of the last step whose metrics were kept.
      evaluations: the figures of every evaluation, by its position, in order.
    """

    skipped: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluations: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)

    def known(self) -> dict[str, float]:
        """The last known value of every figure."""
        found = dict(self.metrics)
        for figures in self.evaluations.values():
            found |= figures
        return found

    def watched(self, name: str, every: int) -> list[float]:
        """A figure of the evaluations at multiples of `every`, without those at a run's end."""
        return [
            figures[name]
            for position, figures in self.evaluations.items()
            if name in figures and position % every == 0
        ]

    def table(self) -> dict[str, Any]:
        """As JSON; a number is a string, as JSON knows no NaN."""
        return {
            "skipped": repr(self.skipped),
            "metrics": as_text(self.metrics),
            "evaluations": [[at, as_text(found)] for at, found in self.evaluations.items()],
        }


def memory_of(table: Any) -> Memory:
    """The inverse of `Memory.table`.

    Raises:
      FormatError: it is not such a table.
    """
    try:
        evaluations = {int(at): as_numbers(found) for at, found in table["evaluations"]}
        return Memory(float(table["skipped"]), as_numbers(table["metrics"]), evaluations)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise FormatError(f"{table!r:.200} is not what a loop remembers") from None


def as_text(figures: Mapping[str, float]) -> dict[str, str]:
    """Numbers as strings that give the same bits back."""
    return {name: repr(float(value)) for name, value in figures.items()}


def as_numbers(figures: Mapping[str, str]) -> dict[str, float]:
    """The inverse of `as_text`."""
    return {name: float(value) for name, value in figures.items()}


@dataclasses.dataclass(frozen=True)
class Identity:
    """What a run is: kept in each of its checkpoints, and in `run.json` for people.

    Attributes:
      table: what it is, JSON values by name.
      check: (a table, where it was read, the step of that checkpoint or None) -> what else is
        different, one phrase each, that changes the last bits at most. It raises ConfigError where
        the run cannot go on from there, and FormatError where it is no such table.
    """

    table: Mapping[str, Any]
    check: Callable[[Any, str, int | None], list[str]]

    def accept(self, about: Mapping[str, Any], source: str) -> None:
        """Raises ConfigError where a checkpoint is another run's; warns of other differences."""
        for difference in self.check(about.get("run"), source, about["step"]):
            warnings.warn(f"{difference}: the last bits may differ", stacklevel=2)


def keep_table(folder: Path, identity: Identity, resumed: Mapping[str, Any] | None) -> None:
    """Writes `run.json` of a new run; of a resumed one, checks it and mends it.

    Args:
      folder: of the run.
      identity: what the run is.
      resumed: the table in the checkpoint that it goes on from; None for a new run.
    Raises:
      ConfigError: the file is of another run than the checkpoint, or a folder is in its place.
    """
    file, table = folder / RUN_FILE, identity.table if resumed is None else resumed
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; remove it")
    if resumed is not None:
        try:
            identity.check(read_json(file), str(file), None)
            return
        except FileNotFoundError:
            problem = f"{file} is missing"
        except FormatError as error:
            problem = str(error)
        warnings.warn(f"{problem}; it is written again from the checkpoint", stacklevel=2)
    if is_first():
        write_json(file, table)
