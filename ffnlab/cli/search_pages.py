"""What `ffnlab search` leaves for people: points of the front, pictures, the closing table."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float
from rich.table import Table

from ffnlab.pruning.search import Log, Supernet, front
from ffnlab.report import as_png
from ffnlab.storage.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["drawn", "front_of", "points_of", "ratios", "table_of"]

LABELS: Mapping[str, str] = {
    "loss": "loss, nats",
    "macs": "multiply-adds of a row",
    "bytes": "bytes",
    "latency": "latency / the whole network's",
}


def points_of(net: Supernet, log: Log, names: Sequence[str]) -> list[dict[str, object]]:
    """All that was measured, in order, for JSON.

    Args:
      net: the super-network.
      log: of the search.
      names: of its objectives.
    Returns:
      for each network "config", "measured" and "expected" (what predictors said before) by
      objective, None where there is no number, and "front", whether nothing dominates it.
    """
    values = log.values[: log.count]
    rows = np.flatnonzero(np.isfinite(values).all(axis=1))
    best = set(rows[front(values[rows])].tolist())
    return [
        {
            "config": net.space.decode(log.vectors[i]),
            "measured": by_name(names, values[i]),
            "expected": by_name(names, log.expected[i]),
            "front": i in best,
        }
        for i in range(int(log.count))
    ]


def by_name(names: Sequence[str], values: Float[np.ndarray, "m"]) -> dict[str, float | None]:
    """Objectives by name; None for one that is not finite."""
    pairs = zip(names, values.tolist(), strict=True)
    return {name: value if np.isfinite(value) else None for name, value in pairs}


def drawn(file: Path, draw: Callable[["Figure"], None]) -> None:
    """Writes a picture; see `ffnlab.report.as_png`."""
    with atomic_write(file) as stream:
        stream.write(as_png(draw))


def front_of(
    figure: "Figure", values: Float[np.ndarray, "n m"], names: Sequence[str], row: int
) -> None:
    """Draws the first objective over each other one, or over the order of measuring.

    Args:
      figure: empty; it is resized.
      values: objectives of what was measured.
      names: of the objectives.
      row: that was chosen.
    """
    others = range(1, len(names)) if len(names) > 1 else (None,)
    figure.set_size_inches(5.5 * len(others), 4)
    panels = figure.subplots(1, len(others), squeeze=False)[0]
    for axes, column in zip(panels, others, strict=True):
        x = np.arange(len(values)) if column is None else values[:, column]
        axes.plot(x, values[:, 0], ".", color="0.6", label="measured")
        if column is None:
            axes.step(x, np.minimum.accumulate(values[:, 0]), where="post", label="lowest so far")
        else:
            best = values[front(values[:, [column, 0]])]
            axes.step(best[:, column], best[:, 0], where="post", label="front")
        axes.plot(x[row], values[row, 0], "*", color="C3", ms=12, label="chosen")
        axes.set_xlabel("networks measured" if column is None else LABELS[names[column]])
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(LABELS[names[0]])


def ratios(file: Path, figure: "Figure") -> None:
    """Draws the share of multiply-adds that a run by rule "tas" had, step by step.

    Args:
      file: metrics.jsonl of the run.
      figure: empty.
    """
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    steps = [(row["step"], row["ratio"]) for row in rows if "ratio" in row]
    axes = figure.subplots()
    axes.plot(*zip(*steps, strict=True))
    axes.set_xlabel("step")
    axes.set_ylabel("multiply-adds of the network found / the whole one's")
    axes.spines[["top", "right"]].set_visible(False)


def table_of(networks: Sequence[Mapping[str, object]]) -> Table:
    """The closing table: what networks cost, and their loss on held-out rows that chose nothing."""
    table = Table("network", "shape", title="measured on this machine")
    for name in ("MACs of a row", "bytes", "ms", "loss"):
        table.add_column(name, justify="right")
    for row in networks:
        numbers = f"{row['macs']:,}", f"{row['bytes']:,}", f"{row['ms']:.3g}"
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        table.add_row(str(row["network"]), str(row["shape"]), *numbers, loss)
    return table
