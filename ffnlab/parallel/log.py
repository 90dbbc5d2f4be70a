"""What a run writes while it goes: a line per logged step, events, and a bar on a terminal."""

import contextlib
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax

from ffnlab.parallel.events import Events
from ffnlab.parallel.processes import is_first
from ffnlab.progress import console
from ffnlab.report import json_rows
from ffnlab.storage.files import atomic_write, naming


class MetricsFile:
    """`metrics.jsonl` in a folder: one JSON object per line with step, seconds and figures.

    A row holds what was measured at its step, and a step has one row at most. Opened at a position,
    it first drops what an interrupted run wrote after its checkpoint.
    """

    def __init__(self, folder: Path | None, position: int):
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.position = position

    def __enter__(self) -> "MetricsFile":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._kept()
            with atomic_write(self.path) as file:
                file.write("".join(lines).encode())
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def write(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Appends one line."""
        if self.path is not None:
            row = {"step": step, "seconds": round(seconds, 3), **figures}
            with naming(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _kept(self) -> list[str]:
        if self.position <= 0:
            return []
        try:
            return [
                f"{json.dumps(r)}\n" for r in json_rows(self.path) if r["step"] <= self.position
            ]
        except FileNotFoundError:
            return []


def since_lowest(values: list[float]) -> int:
    """How many values follow the first lowest one; NaN is never the lowest.

    >>> since_lowest([3.0, 1.0, 2.0, 1.0])
    2
    """
    comparable = [math.inf if math.isnan(value) else value for value in values]
    return len(values) - 1 - comparable.index(min(comparable)) if values else 0


class Display:
    """A progress bar, and below it the latest figures; nothing where nobody watches."""

    def __init__(self, steps: int, position: int, enabled: bool):
        self.bar = None
        if enabled and sys.stderr.isatty():
            from rich import progress
            from rich.console import Group
            from rich.live import Live
            from rich.text import Text

            self.bar = progress.Progress(
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.BarColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
            )
            self.task = self.bar.add_task("", total=steps, completed=position)
            # Beside the bar they would leave it no room in 80 columns.
            self.figures = Text()
            parts = Group(self.bar, self.figures)
            self.live = Live(parts, console=console(), refresh_per_second=10)

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.live.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.live.stop()

    def show(self, position: int, figures: Mapping[str, float] | None = None) -> None:
        """Moves the bar, and shows figures where there are new ones."""
        if self.bar is not None:
            self.bar.update(self.task, completed=position)
            if figures:
                # Without spaces within, so that a line ends between two of them. Figures of parts
                # ("load.expert_0") are too many, and stand in the file alone.
                shown = {name: value for name, value in figures.items() if "." not in name}
                self.figures.plain = "  ".join(f"{name}={v:.4g}" for name, v in shown.items())


class Journal:
    """All that a run writes while it goes; nothing in processes other than the first.

    Attributes:
      folder: of the run; None writes no files.
      position: where the run begins.
      steps: where it ends.
      progress: whether a bar is shown.
      tensorboard: whether event files are written.
    """

    def __init__(
        self, folder: Path | None, position: int, steps: int, *, progress: bool, tensorboard: bool
    ):
        folder = folder if is_first() else None
        self.file = MetricsFile(folder, position)
        self.events = Events(folder / "events" if folder and tensorboard else None, position)
        self.display = Display(steps, position, progress and is_first())

    def __enter__(self) -> "Journal":
        with contextlib.ExitStack() as stack:
            for part in (self.file, self.display):
                stack.enter_context(part)
            self.parts = stack.pop_all()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.parts.__exit__(kind, error, trace)

    def write(self, step: int, seconds: float, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step."""
        self.file.write(step, seconds, figures)
        self.events.write(step, figures)

    def show(self, position: int, figures: Mapping[str, float] | None = None) -> None:
        """See `Display.show`."""
        self.display.show(position, figures)


class Trace:
    """A profiler trace of some steps, for TensorBoard, XProf or Perfetto.

    Attributes:
      folder: where it goes; None traces nothing.
      first: position of the first step traced.
      steps: how many; 0 for none.
    """

    def __init__(self, folder: Path | None, first: int, steps: int):
        self.folder, self.first, self.end = folder, first, first + steps
        self.running = False

    def __enter__(self) -> "Trace":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def at(self, position: int) -> None:
        """Starts or stops before the step of a position; the steps before it have ended."""
        if self.running and position >= self.end:
            self.stop()
        elif self.folder is not None and self.first <= position < self.end and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def next_turn(self, position: int, steps: int) -> int:
        """The first position after this one, up to `steps`, where it starts or stops."""
        turns = (self.first, self.end) if self.folder is not None and self.first < self.end else ()
        return min([steps, *(turn for turn in turns if turn > position)])

    def stop(self) -> None:
        """Writes the trace, if one was begun."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
