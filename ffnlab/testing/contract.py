"""How a contract is held: line by line, each a function whose name says what has to be."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.errors import first_line
from ffnlab.storage import trees

__all__ = ["equal", "hold", "need"]

C = TypeVar("C")


def hold(subject: str, lines: Sequence[Callable[[C], None]], case: C) -> None:
    """Holds a case against the lines of a contract.

    Args:
      subject: what is checked, for messages.
      lines: functions of the case that raise where it breaks them.
      case: the example.
    Raises:
      AssertionError: the first line that is broken, and how.

    >>> def it_is_even(case):
    ...     need(case % 2 == 0, f"{case} is odd")
    >>> hold("a number", [it_is_even], 3)
    Traceback (most recent call last):
    AssertionError: a number breaks its contract: it is even: 3 is odd
    """
    for line in lines:
        try:
            line(case)
        except Exception as error:
            what = str(error).strip() if isinstance(error, AssertionError) else first_line(error)
            kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
            name = line.__name__.replace("_", " ")
            raise AssertionError(f"{subject} breaks its contract: {name}: {kind}{what}") from error


def need(holds: bool, otherwise: str) -> None:
    """Raises AssertionError with a reason unless something holds, under `python -O` too."""
    if not holds:
        raise AssertionError(otherwise)


def equal(a: PyTree, b: PyTree) -> bool:
    """Whether two trees have the same structure, dtypes, shapes and bits; keys are arrays too.

    >>> equal({"x": np.ones(2)}, {"x": np.ones(2)}), equal(np.ones(2), np.ones(2, "float32"))
    (True, False)
    """
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


def bits(leaf: object) -> tuple[np.dtype, tuple[int, ...], bytes]:
    """What a leaf is, bit by bit; a Python number is an array without dimensions."""
    is_key = isinstance(leaf, jax.Array) and trees.is_key(leaf)
    array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
    return array.dtype, array.shape, array.tobytes()
