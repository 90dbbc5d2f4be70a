"""Goodput: how much of a run's wall clock took it forward, and where the rest went.

    wall clock = productive + repeated + restarts + starting + compiling + input + evaluating + …

Every part of a run writes what it did to `times.jsonl` (`ffnlab.parallel.clock`). A part that died
is followed by one that begins at an earlier checkpoint: steps beyond it were taken for nothing, and
the time from its last row until the next process began is lost to the restart. After a part that
was stopped in order the machine was free, and the time until the next is no part of the clock.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ffnlab.errors import FormatError
from ffnlab.parallel.clock import PHASES, TIMES
from ffnlab.report import Report, json_rows
from ffnlab.storage.files import StrPath

__all__ = ["Goodput", "Part"]

LOST = ("repeated", "restarts", *(phase for phase in PHASES if phase != "steps"))


@dataclasses.dataclass(frozen=True)
class Part:
    """What one process, or one set of them, did of a run.

    Attributes:
      began: seconds since 1970.
      times: of its rows, seconds since 1970.
      steps: reached at its rows; the first is where it began.
      seconds: by phase, at its rows.
      ended: whether it ended in order.
    """

    began: float
    times: Sequence[float]
    steps: Sequence[int]
    seconds: Sequence[Mapping[str, float]]
    ended: bool

    def beyond(self, step: int) -> float:
        """Seconds of its steps after one, between rows in proportion."""
        spent = [each["steps"] for each in self.seconds]
        return spent[-1] - float(np.interp(step, self.steps, spent))


@dataclasses.dataclass(frozen=True)
class Goodput(Report):
    """Where the time of a run went.

    Attributes:
      seconds: "productive", and what was lost, by cause; they sum to the wall clock.
      wall: seconds from the beginning of the first part to the last row, without the time between
        parts of which the earlier one had ended in order.
      parts: in order.
    """

    seconds: Mapping[str, float]
    wall: float
    parts: Sequence[Part]

    @classmethod
    def read(cls, run: StrPath) -> "Goodput":
        """The times that a run wrote.

        Args:
          run: its folder, or the `times.jsonl` in it; it may still go on.
        Raises:
          FormatError: there is no row of any part.
          FileNotFoundError: there is no such file.
        """
        path = Path(run) / TIMES if Path(run).is_dir() else Path(run)
        parts = parts_of([row for row in json_rows(path) if is_row(row)])
        if not parts:
            raise FormatError(f"{path} has no row of a run's times")
        return cls(*divided(parts), parts)

    def rows(self) -> list[dict[str, object]]:
        """A row for what was productive, and for each cause that took any time."""
        found = {"productive": self.seconds["productive"]}
        found |= {name: self.seconds[name] for name in LOST if self.seconds[name] > 0}
        whole = self.wall or 1.0
        return [
            {"time": name, "seconds": spent, "share, %": 100 * spent / whole}
            for name, spent in found.items()
        ]

    def figures(self) -> dict[str, float]:
        """The productive share, the wall clock, parts, and the last step."""
        return {
            "goodput": self.seconds["productive"] / (self.wall or 1.0),
            "wall clock, s": self.wall,
            "parts": len(self.parts),
            "step": self.parts[-1].steps[-1],
        }

    def draw(self, figure: Any) -> None:
        """Shares of the wall clock, and steps over time with what was repeated."""
        figure.set_size_inches(8, 6)
        shares, steps = figure.subplots(2, 1, height_ratios=(1, 2))
        rows, left = self.rows(), 0.0
        for i, row in enumerate(rows):
            name, spent = str(row["time"]), self.seconds[str(row["time"])]
            shares.barh([0], [spent], left=left, color=f"C{i}", label=f"{name} {spent:.4g} s")
            left += spent
        shares.set_yticks([])
        shares.set_xlabel("seconds")
        shares.set_title(f"goodput {self.figures()['goodput']:.1%}")
        shares.legend(
            ncols=3, fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.5)
        )
        first = self.parts[0].began
        for part in self.parts:
            at = [part.began - first, *(time - first for time in part.times)]
            steps.plot(
                at, [part.steps[0], *part.steps], color="C0", label="a part" if not i else None
            )
        for before, after in zip(self.parts, self.parts[1:], strict=False):
            if not before.ended:
                area = (before.times[-1] - first, after.began - first)
                steps.axvspan(*area, color="C3", alpha=0.2, lw=0)
                steps.plot([area[0]], [before.steps[-1]], "x", color="C3")
        steps.set_xlabel("seconds since the beginning; x: a part died")
        steps.set_ylabel("step")
        for axes in (shares, steps):
            axes.spines[["top", "right"]].set_visible(False)


def is_row(row: Mapping[str, Any]) -> bool:
    """Whether a row holds all that a part's row does."""
    seconds = row.get("seconds")
    if not isinstance(seconds, Mapping) or set(seconds) != set(PHASES) or row["step"] < 0:
        return False
    numbers = [row.get("began"), row.get("time"), *seconds.values()]
    return all(isinstance(each, int | float) and math.isfinite(each) for each in numbers)


def parts_of(rows: Sequence[Mapping[str, Any]]) -> list[Part]:
    """Rows grouped by the part that wrote them, in order of their beginnings."""
    found: dict[float, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(float(row["began"]), []).append(row)
    return [
        Part(
            began,
            [float(row["time"]) for row in each],
            [int(row["step"]) for row in each],
            [{name: float(spent) for name, spent in row["seconds"].items()} for row in each],
            bool(each[-1].get("ended")),
        )
        for began, each in sorted(found.items())
    ]


def divided(parts: Sequence[Part]) -> tuple[dict[str, float], float]:
    """(seconds by cause, wall clock) of the parts of a run."""
    found = dict.fromkeys(("productive", *LOST), 0.0)
    wall = parts[-1].times[-1] - parts[0].began
    for i, part in enumerate(parts):
        for phase, spent in part.seconds[-1].items():
            found["productive" if phase == "steps" else phase] += spent
        later = parts[i + 1 :]
        if later:
            repeated = part.beyond(min(each.steps[0] for each in later))
            found["repeated"] += repeated
            found["productive"] -= repeated
            gap = later[0].began - part.times[-1]
            if part.ended:
                wall -= gap
            else:
                found["restarts"] += gap
    return found, wall
