"""The search of FinerCut as data: who may be removed next, and what each pass decides.

Only NumPy computes here: a pass is minutes of a model's time and microseconds of this. Ties, the
protected prefix and the one-shot ranking follow the authors' code; `finercut.py` has the method.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from ffnlab.errors import ConfigError
from ffnlab.models.units import is_attention

__all__ = [
    "Candidates",
    "Search",
    "Units",
    "candidates",
    "decide",
    "eligible",
    "goal",
    "removal_order",
    "start",
]

Units = Literal["both", "attention", "ffn", "block"]


class Search(NamedTuple):
    """State of a search, and its result. It can be saved and taken up at any moment.

    Attributes:
      step: int [n, s], position of each block's s sublayers (attention and FFN in most) in the
        order of removal, -1 while it stays.
      scores: f64 [s n, n, s], row r: mean distance in pass r for each candidate, NaN for others.
      sums: f64 [n, s], sum of the distance terms in the running pass.
      count: f64 [], number of those terms.
      passes: int [], passes completed.
      present: bool [n, s], sublayers that the original model has.
    """

    step: Int[np.ndarray, "n s"]
    scores: Float[np.ndarray, "r n s"]
    sums: Float[np.ndarray, "n s"]
    count: Float[np.ndarray, ""]
    passes: Int[np.ndarray, ""]
    present: Bool[np.ndarray, "n s"]


def start(present: Bool[np.ndarray, "n s"]) -> Search:
    """A search before its first pass.

    Args:
      present: which sublayers the model has, [n, s].
    """
    return Search(
        step=np.full(present.shape, -1),
        scores=np.full((present.size, *present.shape), np.nan),
        sums=np.zeros(present.shape),
        count=np.zeros(()),
        passes=np.zeros((), np.int64),
        present=present,
    )


class Candidates(NamedTuple):
    """What the search may remove, in the order that decides ties.

    Attributes:
      drops: bool [c, n, s], the sublayers that candidate c removes.
      protected: bool [c], whether it is held back at first; these come last.
      reentry: removals after which the protected ones join.
    """

    drops: Bool[np.ndarray, "c n s"]
    protected: Bool[np.ndarray, "c"]
    reentry: int


def candidates(
    present: Bool[np.ndarray, "n s"],
    units: Units,
    protect: float | None,
    slots: Sequence[str] = ("attn", "ffn"),
) -> Candidates:
    """Lists the removable units as the authors' code does.

    Units are sorted by module name as a string: block 10 before block 2, and within a block the
    FFN ("mlp") before attention ("self_attn"), several of a kind in the order of the block. With N
    units, blocks 0 .. floor(N x / 2) are
    protected until floor(N x) + 1 units are gone; so even x = 0 protects block 0 at the first
    removal. Whole blocks are never protected, because their names do not match the pattern.

    Args:
      present: which sublayers the model has, [n, s].
      units: sublayers of both kinds, of one kind, or whole blocks.
      protect: x, in [0, 1); None protects nothing, not even block 0.
      slots: names of the sublayers of a block, as `ffnlab.models.units` has them.
    Returns:
      the candidates, c of them; a block counts if it has any sublayer.

    >>> units = candidates(np.ones((3, 2), bool), "both", 0.0)
    >>> [int(drop.ravel().argmax()) for drop in units.drops], units.protected.tolist()
    ([3, 2, 5, 4, 1, 0], [False, False, False, False, True, True])
    """
    blocks = sorted(range(len(present)), key=str)
    mixing = [(i,) for i, slot in enumerate(slots) if is_attention(slot)]
    others = [(i,) for i, slot in enumerate(slots) if not is_attention(slot)]
    whole = [tuple(range(len(slots)))]
    columns = {"both": others + mixing, "attention": mixing, "ffn": others, "block": whole}[units]
    found = []
    for block in blocks:
        for column in columns:
            drop = np.zeros_like(present)
            drop[block, list(column)] = present[block, list(column)]
            if drop.any():
                found.append((block, drop))
    total = len(found)
    free = 0 if protect is None or units == "block" else int(total * protect / 2) + 1
    found.sort(key=lambda item: item[0] < free)  # stable: the protected ones go to the end
    return Candidates(
        drops=np.array([drop for _, drop in found], bool).reshape(total, *present.shape),
        protected=np.array([block < free for block, _ in found], bool),
        reentry=0 if protect is None else int(total * protect) + 1,
    )


def eligible(
    of: Candidates, gone: Bool[np.ndarray, "c"], *, one_shot: bool = False
) -> Bool[np.ndarray, "c"]:
    """Which candidates the next removal chooses from.

    Args:
      of: all candidates.
      gone: those removed already, [c].
      one_shot: hold the protected ones back until no other is left, instead of for
        `of.reentry` removals.
    Returns:
      bool [c]; all False when the protected ones may not join yet and no other is left.
    """
    ordinary = ~gone & ~of.protected
    joined = not ordinary.any() if one_shot else int(gone.sum()) >= of.reentry
    return ~gone if joined else ordinary


def removed(pool: Candidates, stats: Search) -> Bool[np.ndarray, "c"]:
    """Which candidates are gone."""
    return (pool.drops & (stats.step >= 0)).any(axis=(1, 2))


def grouped(
    kept: Bool[np.ndarray, "c n s"], *, size: int, capacity: int
) -> tuple[Float[np.ndarray, "m g n s"], np.int32]:
    """Gates of the candidates in groups of equal size, and the number of groups that are used.

    The shape depends on `capacity` only, so that every pass calls the same compiled function; and
    all groups are full (of repeats), so that equal candidates get equal bits and tie.
    """
    size = min(size, capacity)
    groups = math.ceil(capacity / size)
    gates = np.ones((groups * size, *kept.shape[1:]), np.float32)
    gates[: len(kept)] = kept
    gates[len(kept) :] = kept[-1] if len(kept) else 1
    active = np.int32(math.ceil(len(kept) / size))
    return gates.reshape(groups, size, *kept.shape[1:]), active


def goal(pool: Candidates, remove: int | str | None, rate: float | None, *, one_shot: bool) -> int:
    """How many candidates are to be removed from this model, if they can be."""
    total = len(pool.drops)
    wanted = int(total * rate) if rate is not None else total if remove == "all" else int(remove)
    if wanted > total:
        raise ConfigError(f"remove={wanted}, but the model has {total} such units left")
    free = int((~pool.protected).sum())
    if wanted > free < pool.reentry and not one_shot:
        raise ConfigError(
            f"{wanted} removals: protect leaves {free} candidates, and holds {total - free} back "
            f"until {pool.reentry} are gone; remove at most {free}, or lower protect"
        )
    return wanted


def decide(
    pool: Candidates,
    open_: Bool[np.ndarray, "c"],
    stats: Search,
    wanted: int,
    one_shot: bool,
) -> Search:
    """Ends a pass: takes out the best candidate, or in one shot all that it ranked."""
    if stats.count == 0:
        raise ConfigError("no batch was observed in this pass: the calibration set is empty")
    mean = stats.sums / stats.count
    index = np.flatnonzero(open_)
    first_cell = pool.drops[index].reshape(len(index), -1).argmax(axis=1)
    ranked = index[np.argsort(mean.reshape(-1)[first_cell], kind="stable")]  # first index wins ties
    step, scores = stats.step.copy(), stats.scores.copy()
    gone = int(removed(pool, stats).sum())
    for c in ranked[: wanted - gone if one_shot else 1]:
        step[pool.drops[c]] = gone
        gone += 1
    scores[stats.passes] = np.where(pool.drops[index].any(axis=0), mean, np.nan)
    return stats._replace(
        step=step,
        scores=scores,
        sums=np.zeros_like(stats.sums),
        count=np.zeros(()),
        passes=np.asarray(stats.passes + 1),
    )


def removal_order(stats: Search, first: int | None = None) -> list[int]:
    """The units in the order of their removal.

    Args:
      stats: a search, finished or not.
      first: how many removals to list (blocks, when blocks were removed); None: all so far.
    Returns:
      numbers of units as `models.remove` takes them: with two sublayers in a block, 2 i for the
      attention and 2 i + 1 for the FFN of block i.

    >>> search = start(np.ones((2, 2), bool))
    >>> removal_order(search._replace(step=np.array([[-1, 1], [0, -1]])))
    [2, 1]
    """
    steps = stats.step.reshape(-1)
    order = np.argsort(steps, kind="stable")
    keep = (steps >= 0) & (steps < (len(steps) if first is None else first))
    return [int(unit) for unit in order if keep[unit]]
