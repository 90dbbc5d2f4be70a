"""Counts XLA compilations, from jax's own monitoring events."""

import contextlib
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


@contextlib.contextmanager
def counted() -> Iterator[Count]:
    """Counts the programs that are compiled (or read from the compilation cache) inside.

    >>> with counted() as count:
    ...     _ = jax.jit(lambda x: 3 * x + 1)(0.5)
    >>> count.programs
    1
    """
    count = Count()
    open_ = True

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if open_ and event == EVENT:
            count.programs += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        open_ = False
