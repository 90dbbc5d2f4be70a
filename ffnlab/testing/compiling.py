"""Counts XLA compilations, from jax's own monitoring events."""

import contextlib
import functools
from collections.abc import Iterator

import jax

__all__ = ["Count", "counted"]

EVENT = "/jax/core/compile/backend_compile_duration"


class Count:
    """How many programs were compiled so far.

    Attributes:
      programs: the number.
    """

    def __init__(self) -> None:
        self.programs = 0


OPEN: list[Count] = []  # those that count now


@functools.cache
def listening() -> None:
    """Makes jax tell of its events, once: what listens is asked of every event from then on."""

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == EVENT:
            for count in OPEN:
                count.programs += 1

    jax.monitoring.register_event_duration_secs_listener(listen)


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Counts the programs that are compiled (or read from the compilation cache) inside.

    >>> with counted() as count:
    ...     _ = jax.jit(lambda x: 3 * x + 1)(0.5)
    >>> count.programs
    1
    """
    listening()
    count = Count()
    OPEN.append(count)
    try:
        yield count
    finally:
        OPEN.remove(count)
