"""The search for paths to leave out, as data: what was measured, and what each pass decides.

Only NumPy computes here; `path_ensemble.py` has the method.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.errors import ConfigError

__all__ = ["PathSearch", "decide", "goal", "left_out", "start"]


class PathSearch(NamedTuple):
    """State of a search, and its result. It can be saved and taken up at any moment.

    Attributes:
      step: int [p], position of each path in the order in which they are left out, -1 of those
        that stay.
      losses: f64 [p, p], row r: mean loss without each path in pass r; NaN of those that were not
        there, and of passes that were not made.
      whole: f64 [p], mean loss of what pass r began with; NaN likewise.
      sums: f64 [p], sums of the running pass, by path left out.
      total: f64 [], sum of the running pass with nothing more left out.
      count: f64 [], number of terms in each of these.
      passes: int [], passes completed.
      present: bool [p], paths that the head read before the search.
    """

    step: Int[np.ndarray, "p"]
    losses: Float[np.ndarray, "p p"]
    whole: Float[np.ndarray, "p"]
    sums: Float[np.ndarray, "p"]
    total: Float[np.ndarray, ""]
    count: Float[np.ndarray, ""]
    passes: Int[np.ndarray, ""]
    present: Bool[np.ndarray, "p"]

    @property
    def left(self) -> Bool[np.ndarray, "p"]:
        """Paths that are still read."""
        return self.present & (self.step < 0)

    @property
    def deltas(self) -> Float[np.ndarray, "p"]:
        """By how much the loss grows without each path alone, in the first pass.

        Negative of one that hurts; NaN of paths that were not there.
        """
        return self.losses[0] - self.whole[0]


def start(present: Bool[np.ndarray, "p"]) -> PathSearch:
    """A search before its first pass.

    Args:
      present: paths that the head reads, one or more.
    """
    paths = len(present)
    return PathSearch(
        step=np.full(paths, -1),
        losses=np.full((paths, paths), np.nan),
        whole=np.full(paths, np.nan),
        sums=np.zeros(paths),
        total=np.zeros(()),
        count=np.zeros(()),
        passes=np.zeros((), np.int64),
        present=np.asarray(present, bool),
    )


def goal(present: Bool[np.ndarray, "p"], remove: int | None, rate: float | None) -> int:
    """How many paths are to be left out, if so many can be.

    Raises:
      ConfigError: no path would stay.
    """
    paths = int(present.sum())
    wanted = int(remove or 0) if rate is None else int(rate * paths)
    if wanted >= paths:
        raise ConfigError(f"remove={wanted} of the {paths} paths that are read; one has to stay")
    return wanted


def decide(stats: PathSearch, wanted: int, *, greedy: bool) -> PathSearch:
    """Ends a pass: leaves out the path without which the loss is least, or all that are wanted.

    Args:
      stats: with the sums of a whole pass.
      wanted: paths to leave out in all.
      greedy: one path in a pass; else the best of this one.
    Raises:
      ConfigError: nothing was observed.
    """
    if stats.count == 0:
        raise ConfigError("no batch was observed in this pass: the calibration set is empty")
    mean, open_ = stats.sums / stats.count, np.flatnonzero(stats.left)
    ranked = open_[np.argsort(mean[open_], kind="stable")]  # the first path wins ties
    gone = int((stats.step >= 0).sum())
    step, losses, whole = stats.step.copy(), stats.losses.copy(), stats.whole.copy()
    chosen = ranked[: min(wanted - gone, 1 if greedy else wanted)]
    step[chosen] = gone + np.arange(len(chosen))
    losses[stats.passes] = np.where(stats.left, mean, np.nan)
    whole[stats.passes] = stats.total / stats.count
    return stats._replace(
        step=step,
        losses=losses,
        whole=whole,
        sums=np.zeros_like(stats.sums),
        total=np.zeros(()),
        count=np.zeros(()),
        passes=np.asarray(stats.passes + 1),
    )


def left_out(stats: PathSearch, first: int | None = None) -> list[int]:
    """The numbers of the paths in the order in which they are left out.

    Args:
      stats: a search, finished or not.
      first: how many to list; all so far when None.

    >>> left_out(start(np.ones(3, bool))._replace(step=np.array([1, -1, 0])))
    [2, 0]
    """
    order = np.argsort(stats.step, kind="stable")
    return [int(path) for path in order if stats.step[path] >= 0][:first]
