"""Cases of which a few run in the default suite, and the rest in `make test-slow`."""

from collections.abc import Iterable

import pytest

__all__ = ["often"]


def often(cases: Iterable, *kept: object) -> list:
    """Parameters of a test: those that are kept, and the others marked as slow.

    Raises:
      ValueError: what is to be kept is no case.
    """
    cases = list(cases)
    if missing := [case for case in kept if case not in cases]:
        raise ValueError(f"{missing} are none of {cases}")
    return [pytest.param(case, marks=[] if case in kept else pytest.mark.slow) for case in cases]
