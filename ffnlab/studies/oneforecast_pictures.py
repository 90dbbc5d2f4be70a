"""Pictures of forecasts: maps beside the truth, errors by day, and by distance from a border."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ffnlab.studies.oneforecast_measure import Measured, Task

__all__ = ["draw_days", "draw_maps", "draw_rings"]

FIELD = 0  # the stream function


def draw_maps(figure: Any, world: Task, found: np.ndarray) -> None:
    """Truth, forecast and what lies between them, of one wave on the first and the last day.

    Args:
      figure: empty.
      world: the task.
      found: forecasts of its test rows, [r, s, h, w, o].
    """
    figure.set_size_inches(9, 4)
    days = (0, found.shape[1] - 1)
    axes = figure.subplots(len(days), 3)
    images = []
    top = float(np.abs(world.test.y[0, ..., FIELD]).max())
    for row, day in zip(axes, days, strict=True):
        truth, said = world.test.y[0, day, ..., FIELD], found[0, day, ..., FIELD]
        for axis, field, name in zip(
            row, (truth, said, said - truth), ("truth", "forecast", "error"), strict=True
        ):
            image = axis.imshow(field, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
            axis.invert_yaxis()
            images.append(image)
            axis.set_title(f"day {day + 1}: {name}", fontsize=9)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.colorbar(images[0], ax=axes, label="stream function (standard deviations)")


def draw_days(figure: Any, found: Mapping[str, Measured]) -> None:
    """Errors by day of every way to forecast the world, with the range over seeds."""
    axis = figure.subplots()
    first = next(iter(found.values()))
    days = np.arange(1, len(first.still) + 1)
    axis.plot(days, first.still, "k--", label="persistence")
    for name, each in found.items():
        (line,) = axis.plot(days, each.errors.mean(0), marker="o", label=name)
        low, high = each.errors.min(0), each.errors.max(0)
        axis.fill_between(days, low, high, alpha=0.2, color=line.get_color())
    axis.set_xticks(days)
    axis.set_xlabel("days ahead")
    axis.set_ylabel("root mean square error (standard deviations)")
    axis.set_ylim(bottom=0)
    axis.legend()


def draw_rings(figure: Any, rings: Mapping[str, np.ndarray]) -> None:
    """Errors in the region by distance from its border."""
    axis = figure.subplots()
    for name, errors in rings.items():
        axis.plot(np.arange(len(errors)), errors, marker="o", label=name)
    axis.set_xlabel("places from the border")
    axis.set_ylabel("root mean square error a day ahead")
    axis.set_ylim(bottom=0)
    axis.legend()
