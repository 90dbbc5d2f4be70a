"""Whether what was chosen lies inside of what was tried."""

from collections.abc import Sequence

__all__ = ["at_ends"]


def at_ends(chosen: Sequence[float], tried: Sequence[float]) -> str:
    """How many of the values chosen lie at an end of what was tried, where more might be better.

    >>> at_ends([0.1, 0.3, 0.3], (0.03, 0.1, 0.3))
    '2 of 3 chosen at an end of those tried'
    """
    count = sum(value in (min(tried), max(tried)) for value in chosen)
    return f"{count} of {len(chosen)} chosen at an end of those tried"
