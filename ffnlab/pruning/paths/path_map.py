"""What the loss is without each path, as a table and as a picture: layers across, a row by slot."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from ffnlab.errors import ConfigError, require
from ffnlab.pruning.paths.path_search import PathSearch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PathMap", "path_map"]


@dataclasses.dataclass(frozen=True)
class PathMap:
    """The deltas of all paths; it prints and draws itself.

    Attributes:
      names: of the paths, in order.
      deltas: f64 [p], by how much the loss grows without each path; NaN of those not there.
      step: int [p], its place among those left out (0 is first), -1 where it stays.
      loss: with all paths.
    """

    names: tuple[str, ...]
    deltas: Float[np.ndarray, "p"]
    step: Int[np.ndarray, "p"]
    loss: float

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.deltas) == len(self.step):
            raise ConfigError(f"{len(self.names)} names for {len(self.deltas)} paths")

    def __str__(self) -> str:
        width = max(4, *map(len, self.names))
        lines = [f"{'path':{width}}  loss without  delta     left out"]
        for name, delta, step in zip(self.names, self.deltas, self.step, strict=True):
            value = f"{self.loss + delta:12.4f}  {delta:+8.4f}" if delta == delta else f"{'-':>22}"
            lines.append(f"{name:{width}}  {value}  {step + 1 if step >= 0 else '·'}")
        return "\n".join((*lines, f"{'all':{width}}  {self.loss:12.4f}"))

    def draw(self, figure: "Figure | None" = None) -> "Figure":
        """Draws a bar for every path, up where the loss grows without it; hollow if left out.

        Args:
          figure: an empty figure, which is resized; a new one without a display when None.
        Returns:
          the figure.
        Raises:
          MissingExtraError: matplotlib is not installed.
        """
        if figure is None:
            figure = require("matplotlib.figure", extra="run").Figure(layout="constrained")
        figure.set_size_inches(max(5.0, 1.5 + 0.32 * len(self.names)), 3.6)
        self.bars(figure.subplots())
        return figure

    def bars(self, axes) -> None:
        """Draws the bars on axes that are there."""
        slots = list(dict.fromkeys(name.split()[0] for name in self.names))
        for i, name in enumerate(self.names):
            color = f"C{slots.index(name.split()[0])}"
            face = color if self.step[i] < 0 else "white"
            axes.bar(i, np.nan_to_num(self.deltas[i]), color=face, edgecolor=color)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_xticks(range(len(self.names)), self.names, rotation=90, fontsize=8)
        axes.set_ylabel("loss without it, more than with all")
        # Paths of trained models differ by orders: below a power of ten the axis is linear.
        sizes = np.abs(self.deltas[np.isfinite(self.deltas) & (self.deltas != 0)])
        middle = float(np.median(sizes)) if len(sizes) else 1.0
        axes.set_yscale("symlog", linthresh=10.0 ** np.floor(np.log10(middle)))
        axes.spines[["top", "right"]].set_visible(False)


def path_map(stats: PathSearch, names: Sequence[str]) -> PathMap:
    """The map of a search, after its first pass.

    Args:
      stats: what `calibrate(path_ensemble(...), ...)` returned.
      names: of the paths (`ffnlab.models.paths.path_names`).
    Raises:
      ConfigError: another number of names than of paths, or nothing was observed.

    >>> from ffnlab.pruning.paths.path_search import start
    >>> search = start(np.ones(3, bool))._replace(whole=np.array([1.0, np.nan, np.nan]))
    >>> search.losses[0] = 1.5, 0.75, 2.0
    >>> print(path_map(search, ("start", "attn 0", "ffn 0")))
    path    loss without  delta     left out
    start         1.5000   +0.5000  ·
    attn 0        0.7500   -0.2500  ·
    ffn 0         2.0000   +1.0000  ·
    all           1.0000
    """
    if np.isnan(stats.whole[0]):
        raise ConfigError("stats before their first pass: nothing was observed")
    return PathMap(tuple(names), stats.deltas, stats.step, float(stats.whole[0]))
