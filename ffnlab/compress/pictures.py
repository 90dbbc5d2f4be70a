"""The pictures of a report: quality against bytes and against decode speed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ffnlab.compress.report import Report, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["pareto"]

MEGA = 1e6


def pareto(report: Report, figure: "Figure") -> None:
    """Draws a score over stored bytes and over speed, a point per stage.

    Args:
      report: a finished report.
      figure: an empty figure; it is resized.
    """
    figure.set_size_inches(11, 4.6)
    left, right = figure.subplots(1, 2, sharey=True)
    rows, rival = report.rows, report.rival
    score = next(score for score in report.scores if score.name == report.axis)
    heights = [row.scores[score.name] for row in rows]
    panel(left, rows, [row.nbytes / MEGA for row in rows], heights)
    left.set_xlabel("stored bytes, MB (less is better)")
    left.set_ylabel(f"held-out {score.title} ({score.better} is better)")
    if rival is not None:
        place = rival.nbytes / MEGA, rival.verdicts[0].dense
        left.plot(*place, "D", color="tab:red")
        label(left, "dense, equal files", *place)
    # Speeds are relative to the original's, which is measured in turns with each stage.
    panel(right, rows, [row.speed / row.speed_original for row in rows], heights)
    word, unit = report.pace.rpartition(" ")[0], f"{report.item}s/s"
    right.set_xlabel(f"{word} speed, 1 = {rows[0].speed:.0f} {unit} (more is better)".strip())
    figure.suptitle("What each stage cost and bought", fontsize=12)


def panel(axes: "Axes", rows: Sequence[Row], x: Sequence[float], y: Sequence[float]) -> None:
    """One curve through the stages, each point with its name."""
    axes.plot(x, y, "-", color="0.75", zorder=1)
    axes.scatter(x, y, c=range(len(rows)), cmap="viridis", vmax=max(1, len(rows)), s=50, zorder=2)
    for row, a, b, up in zip(rows, x, y, nudges(y), strict=True):
        label(axes, row.stage, a, b, up)
    axes.grid(alpha=0.3)
    axes.margins(y=0.12)
    axes.set_xlim(0, 1.3 * max(x))


def nudges(y: Sequence[float]) -> list[int]:
    """By how many points the names of points at nearly one height move apart, up or down."""
    span = max(y) - min(y)
    near = [[b for b in y if b != a and abs(b - a) < 0.05 * span] for a in y]
    pairs = zip(y, near, strict=True)
    return [0 if not others else 5 if a > max(others) else -5 for a, others in pairs]


def label(axes: "Axes", text: str, x: float, y: float, up: int = 0) -> None:
    """A name to the right of a point, moved up by some points."""
    place = {"xytext": (8, up), "textcoords": "offset points", "va": "center", "fontsize": 9}
    axes.annotate(text, (x, y), **place)
