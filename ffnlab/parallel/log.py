"""What a run writes while it goes: a line per logged step, and a bar on a terminal."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from ffnlab import io


class MetricsFile:
    """`metrics.jsonl` in a folder: one JSON object per line with step, seconds and figures.

    Opened at a position, it first drops what an interrupted run wrote after its checkpoint.
    """

    def __init__(self, folder: Path | None, position: int):
        self.path = None if folder is None else folder / "metrics.jsonl"
        self.position = position

    def __enter__(self) -> "MetricsFile":
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = self._kept()
            with io.atomic_write(self.path) as file:
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
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def _kept(self) -> list[str]:
        if not self.path.exists():
            return []
        kept = []
        for line in self.path.read_text("utf-8").splitlines(keepends=True):
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError):
                continue  # a line cut off by a kill
            if step <= self.position:
                kept.append(line)
        return kept


class Display:
    """A progress bar with the latest figures; nothing where nobody watches."""

    def __init__(self, steps: int, position: int, enabled: bool):
        self.bar = None
        if enabled and sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self.bar = progress.Progress(
                progress.TextColumn("{task.completed}/{task.total}"),
                progress.BarColumn(),
                progress.TimeElapsedColumn(),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.description}"),
                console=Console(stderr=True),
            )
            self.task = self.bar.add_task("", total=steps, completed=position)

    def __enter__(self) -> "Display":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def show(self, position: int, figures: Mapping[str, float]) -> None:
        """Moves the bar and shows the figures."""
        if self.bar is not None:
            text = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self.bar.update(self.task, completed=position, description=text)
