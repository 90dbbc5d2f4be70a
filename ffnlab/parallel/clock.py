"""Where the time of a run goes: every moment of it lies in one phase, and rows of it in a file.

    starting    from the beginning of the process to the first batch: imports, data, restoring
    compiling   steps during which XLA compiled
    input       reading batches while the device had nothing to do
    steps       everything else: the steps themselves
    evaluating, saving, logging

`times.jsonl` in the folder of the run grows with every part of it, those that died included;
`ffnlab.parallel.goodput` reads it.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import jax
from jaxtyping import PyTree

from ffnlab.parallel.processes import is_first
from ffnlab.storage.files import naming

__all__ = ["PHASES", "TIMES", "Clock", "process_began"]

PHASES = ("starting", "compiling", "input", "steps", "evaluating", "saving", "logging")
TIMES = "times.jsonl"

_compiled = 0  # programs that XLA has compiled in this process


def _count(event: str, _: float, **__: object) -> None:
    global _compiled
    _compiled += event.endswith("backend_compile_duration")


jax.monitoring.register_event_duration_secs_listener(_count)


class Clock:
    """Divides the time of a part of a run among phases, which sum to it.

    Attributes:
      path: of the rows; None writes none.
      began: when the part began, seconds since 1970.
      seconds: of each phase until now, but for the one that goes on.
    """

    def __init__(self, folder: Path | None, began: float | None = None, *, fresh: bool):
        """A clock in phase "starting".

        Args:
          folder: of the run; of several processes only the first one writes.
          began: when the process began, seconds since 1970; now when None.
          fresh: whether the run is a new one, whose folder may hold rows of another.
        """
        now = time.time()
        self.path = folder / TIMES if folder is not None and is_first() else None
        self.began = now if began is None else began
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.phase, self.since = "starting", time.perf_counter() - (now - self.began)
        self._mode, self._first = "w" if fresh else "a", not fresh
        self._dispatched, self._whole = 0.0, 0.0

    def to(self, phase: str) -> str:
        """Begins another phase; the one that ends."""
        now, ended = time.perf_counter(), self.phase
        self.seconds[ended] += now - self.since
        self.phase, self.since = phase, now
        return ended

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within it that phase goes on, afterwards the one before."""
        before = self.to(phase)
        try:
            yield
        finally:
            self.to(before)

    @contextlib.contextmanager
    def reading(self, ahead: PyTree) -> Iterator[None]:
        """Reads a batch, while the device may still be at the step before.

        What the device worked meanwhile is no time lost to input: all of it where the step has not
        ended, else as much as the last step took whose end was waited for.

        Args:
          ahead: arrays that the step before gives.
        """
        was_busy, begin, before = is_busy(ahead), time.perf_counter(), self.to("input")
        yield
        self.to(before)
        spent = self.since - begin
        left = max(self._dispatched + self._whole - begin, 0.0)
        hidden = (spent if is_busy(ahead) else min(spent, left)) if was_busy else 0.0
        self.seconds["input"] -= hidden
        self.seconds["steps"] += hidden

    @contextlib.contextmanager
    def dispatching(self) -> Iterator[None]:
        """Hands a step to the device; where that compiles, all of it is compiling."""
        known, before = _compiled, self.to("steps")
        self._dispatched = self.since
        yield
        if _compiled > known:
            self.phase = "compiling"
        self.to(before)
        if _compiled > known:
            self._dispatched = self.since

    @contextlib.contextmanager
    def waiting(self, ahead: PyTree) -> Iterator[None]:
        """Waits for the step that was handed over last, and learns how long it takes."""
        was_busy = is_busy(ahead)
        yield
        if was_busy:
            self._whole = time.perf_counter() - self._dispatched

    def write(self, step: int, *, ended: bool = False) -> None:
        """Appends a row; the first one of a new run removes those of another.

        Args:
          step: that has been reached.
          ended: whether the part ends here, in order.
        """
        if self.path is None:
            return
        self.to(self.phase)
        row = {"began": self.began, "time": time.time(), "step": step}
        row |= {"seconds": {name: round(spent, 6) for name, spent in self.seconds.items()}}
        row |= {"ended": True} if ended else {}
        with naming(self.path), self.path.open(self._mode, encoding="utf-8") as file:
            # The last line before may have been cut off when its process was killed.
            file.write("\n" * self._first + json.dumps(row) + "\n")
        self._mode, self._first = "a", False


def process_began() -> float | None:
    """When this process began, seconds since 1970; None where the system does not tell."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return time.time() - age


def is_busy(arrays: PyTree) -> bool:
    """Whether the device has yet to compute one of these.

    >>> is_busy({"loss": 1.0})
    False
    """
    return any(isinstance(x, jax.Array) and not x.is_ready() for x in jax.tree.leaves(arrays))
