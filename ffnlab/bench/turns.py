"""Tasks that two sides do in turns, so that what else the machine does falls on both."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from rich.table import Table

__all__ = ["Comparison", "Task", "about"]


@dataclasses.dataclass(frozen=True)
class Task:
    """One task, both sides.

    Attributes:
      ours, theirs: median seconds.
      ratio: how many times faster ours is; median over turns.
      difference: of the results, relative.
      form: in which the peer did it.
    """

    ours: float
    theirs: float
    ratio: float
    difference: float
    form: str

    @classmethod
    def of(cls, turns: Sequence[tuple[float, float]], difference: float, form: str) -> "Task":
        """The figures of (our seconds, the peer's seconds) by turn."""
        ours, theirs = (statistics.median(side) for side in zip(*turns, strict=True))
        ratio = statistics.median(b / a for a, b in turns)
        return cls(ours, theirs, ratio, difference, form)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All tasks, and what the two sides are.

    Attributes:
      title: what was compared.
      tasks: by name.
      about: versions; one line.
      peaks: largest resident set of our and of the peer's process, bytes, all tasks in it; None
        where it was not asked for.
    """

    title: str
    tasks: Mapping[str, Task]
    about: str
    peaks: tuple[float, float] | None = None

    def ratios(self) -> dict[str, float]:
        """How many times faster ours is, by task."""
        return {name: task.ratio for name, task in self.tasks.items()}

    def __rich__(self) -> Table:
        caption = f"float32 both; {self.about}"
        if self.peaks is not None:
            ours, theirs = (f"{peak / 2**20:,.0f}" for peak in self.peaks)
            caption += f"; peak memory of the processes {ours} MiB, the peer's {theirs} MiB"
        table = Table(title=self.title, caption=caption)
        for name in ("task", "ffnlab ms", "peer ms", "ratio", "results differ", "peer's form"):
            table.add_column(name, justify="left" if name in ("task", "peer's form") else "right")
        for name, task in self.tasks.items():
            times = (f"{1e3 * seconds:.2f}" for seconds in (task.ours, task.theirs))
            table.add_row(name, *times, f"{task.ratio:.2f}", f"{task.difference:.0e}", task.form)
        return table


def about(peer: Any) -> str:
    """Versions and threads of both sides."""
    versions = ", ".join(f"{k} {v}" for k, v in peer.about["versions"].items())
    return f"jax {jax.__version__}; {versions}, up to {peer.about['threads']} threads"
