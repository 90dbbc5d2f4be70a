"""Several tasks from one set of labelled data, as continual and multi-task learning take them."""

from collections.abc import Sequence

import numpy as np

from ffnlab.data.clusters import Labelled
from ffnlab.errors import ConfigError, at_least

__all__ = ["permuted", "split"]


def permuted(*parts: Labelled, tasks: int, seed: int = 0) -> list[tuple[Labelled, ...]]:
    """Tasks that differ in the order of their inputs; the first has the order of the data.

    Args:
      parts: of the same width (train, test); a task permutes all of them alike.
      tasks: how many, >= 1.
      seed: of the permutations; task i has the same one however many tasks there are.
    Returns:
      a tuple of parts for each task.
    Raises:
      ConfigError: no part, parts of different widths, or tasks < 1.

    >>> rows = Labelled(np.arange(6, dtype=np.float32).reshape(2, 3), np.zeros(2, np.int32))
    >>> [sorted(task[0].x[0]) for task in permuted(rows, tasks=2)] == [[0, 1, 2]] * 2
    True
    """
    at_least(1, tasks=tasks)
    widths = {part.x.shape[1:] for part in parts}
    if len(widths) != 1 or len(*widths) != 1:
        raise ConfigError(f"parts have inputs of shape {sorted(widths)}; one width is accepted")
    ((width,),) = widths
    orders = [np.arange(width)]
    orders += [np.random.default_rng((seed, i)).permutation(width) for i in range(1, tasks)]
    return [tuple(Labelled(part.x[:, order], part.y) for part in parts) for order in orders]


def split(*parts: Labelled, classes: Sequence[Sequence[int]]) -> list[tuple[Labelled, ...]]:
    """Tasks that differ in their classes, which are numbered from 0 in each.

    Args:
      parts: of the same classes (train, test).
      classes: those of each task, in the order of their new numbers.
    Returns:
      a tuple of parts for each task.
    Raises:
      ConfigError: no part, or a class twice in a task, or one that the first part has not.

    >>> rows = Labelled(np.zeros((3, 1), np.float32), np.array([4, 7, 2], np.int32))
    >>> [task[0].y.tolist() for task in split(rows, classes=[[7, 4], [2]])]
    [[1, 0], [0]]
    """
    if not parts:
        raise ConfigError("split() needs at least one part")
    tasks = []
    for chosen in classes:
        missing = sorted(set(chosen) - set(parts[0].y.tolist()))
        if missing or len(set(chosen)) != len(chosen) or not len(chosen):
            raise ConfigError(
                f"classes {list(chosen)}: {missing or 'each'} must be in the data, once in a task"
            )
        tasks.append(tuple(_renumbered(part, chosen) for part in parts))
    return tasks


def _renumbered(part: Labelled, classes: Sequence[int]) -> Labelled:
    number = {old: new for new, old in enumerate(classes)}
    keep = np.isin(part.y, classes)
    new = np.array([number[old] for old in part.y[keep].tolist()], np.int32)
    return Labelled(part.x[keep], new)
