"""The order in which a search removed sublayers, as a map: blocks across, a row for each slot."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from ffnlab.errors import ConfigError, require
from ffnlab.pruning.finercut_search import Search

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["RemovalMap", "removal_map"]

KINDS = ("attention", "ffn")
ABSENT = {"facecolor": "0.92", "edgecolor": "0.7", "hatch": "////", "linewidth": 0}


@dataclasses.dataclass(frozen=True)
class RemovalMap:
    """A removal order that prints and draws itself.

    Attributes:
      step: int [n, s], position in the order (0 is first) of each block's sublayers; -1 where it
        stays.
      present: bool [n, s], False where the model lacked the sublayer before the search.
      kinds: what the s sublayers of a block are called.
    """

    step: Int[np.ndarray, "n s"]
    present: Bool[np.ndarray, "n s"]
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if len(self.kinds) != self.step.shape[1]:
            raise ConfigError(
                f"kinds={self.kinds} for {self.step.shape[1]} sublayers of each block"
            )

    def label(self, block: int, kind: int) -> str:
        """1 for the first removal, 2 for the next …; "·" where it stays, "-" where none was."""
        if not self.present[block, kind]:
            return "-"
        return str(self.step[block, kind] + 1) if self.step[block, kind] >= 0 else "·"

    def __str__(self) -> str:
        return self.text()

    def text(self, columns: int = 100) -> str:
        """The map as text, broken into bands of blocks that fit into `columns` characters."""
        n = len(self.step)
        cell, head = len(str(self.step.size)) + 1, max(9, *map(len, self.kinds))
        band = max(1, (columns - head) // cell)
        lines = []
        for first in range(0, n, band):
            blocks = range(first, min(first + band, n))
            lines.append(f"{'block':{head}}" + "".join(f"{i:>{cell}}" for i in blocks))
            for kind, name in enumerate(self.kinds):
                cells = "".join(f"{self.label(i, kind):>{cell}}" for i in blocks)
                lines.append(f"{name:{head}}{cells}")
        return "\n".join(lines)

    def draw(self, figure: "Figure | None" = None) -> "Figure":
        """Draws a heat map: dark goes early, white stays, hatched was not there.

        Args:
          figure: an empty figure, which is resized; a new one without a display when None.
        Returns:
          the figure.
        Raises:
          MissingExtraError: matplotlib is not installed.
        """
        if figure is None:
            figure = require("matplotlib.figure", extra="run").Figure(layout="constrained")
        n, slots = self.step.shape
        figure.set_size_inches(max(4.5, 1.8 + 0.36 * n), 1.5 + 0.4 * slots)
        axes = figure.subplots()
        axes.set_facecolor("0.95")
        order = np.ma.masked_less(self.step.T, 0)
        last = max(1, int(self.step.max()))
        image = axes.imshow(order, cmap="viridis", vmin=0, vmax=last, aspect="auto")
        for block, kind in np.ndindex(n, slots):
            if not self.present[block, kind]:
                axes.fill_between((block - 0.5, block + 0.5), kind - 0.5, kind + 0.5, **ABSENT)
                continue
            is_dark = 0 <= self.step[block, kind] < 0.6 * last
            label, color = self.label(block, kind), "white" if is_dark else "black"
            axes.text(block, kind, label, ha="center", va="center", color=color, fontsize=8)
        axes.set_xticks(range(n), [str(i) for i in range(n)], fontsize=8)
        axes.set_yticks(range(slots), self.kinds)
        axes.set_xlabel("block")
        axes.set_title("order of removal (1 goes first; · stays)", fontsize=10)
        axes.set_xticks(np.arange(n + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(slots + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_ticks([0, last], labels=["first", "last"])
        return figure


def removal_map(stats: Search, kinds: tuple[str, ...] = KINDS) -> RemovalMap:
    """The map of a search, finished or not.

    Args:
      stats: what `calibrate(finercut(...), ...)` returned.
      kinds: what the sublayers of a block are called, in the order of its slots.
    Raises:
      ConfigError: another number of names than of sublayers.

    >>> from ffnlab.pruning.finercut_search import start
    >>> search = start(np.ones((3, 2), bool))
    >>> print(removal_map(search._replace(step=np.array([[-1, -1], [1, 2], [0, -1]]))))
    block     0 1 2
    attention · 2 1
    ffn       · 3 ·
    """
    return RemovalMap(step=stats.step, present=stats.present, kinds=kinds)
