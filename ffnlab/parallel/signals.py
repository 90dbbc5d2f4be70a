"""Asking a long run to stop: SIGTERM, SIGHUP and Ctrl-C become a question that the loop asks.

Of several processes all must stop after the same step. There the runtime of jax takes SIGTERM: a
notice to one process reaches all, and they agree on the step after the furthest.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

# Windows has no SIGHUP, which a terminal sends when it is closed.
SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
AT_ONCE = 1.0  # seconds: `timeout` and other wrappers send a signal twice, nobody presses so fast


@contextmanager
def stop_request() -> Iterator[Callable[[int], bool]]:
    """Whether to stop, asked after every step, or group of steps, with the number of the turn.

    The first SIGTERM, SIGHUP or SIGINT makes the answer yes. Further ones change nothing, so that a
    save that goes on is not lost, but for a SIGINT a second or more later, which acts as it did
    before: it interrupts. A signal that is ignored (`nohup`, a job in the background of a script)
    stays so. Outside the main thread, where Python allows no handlers, the answer is no.
    """
    if jax.process_count() > 1:
        with several_processes() as asked:
            yield asked
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda position: False
        return
    with handled(event.set, SIGNALS):
        yield lambda position: event.is_set()


@contextmanager
def several_processes() -> Iterator[Callable[[int], bool]]:
    """`stop_request` of one of several processes; the other signals are made a SIGTERM."""
    from jax.experimental import multihost_utils

    others = tuple(number for number in SIGNALS if number != signal.SIGTERM)
    with handled(lambda: os.kill(os.getpid(), signal.SIGTERM), others):
        yield multihost_utils.reached_preemption_sync_point


@contextmanager
def handled(ask: Callable[[], None], numbers: tuple[int, ...]) -> Iterator[None]:
    """Within it, the first of these signals asks; see `stop_request` for those after it."""
    before = {number: signal.getsignal(number) for number in numbers}
    # None is a handler that was not installed by Python: it could not be put back.
    before = {n: handler for n, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    first: list[float] = []

    def handle(number: int, frame: object) -> None:
        if not first:
            first.append(time.monotonic())
            ask()
        elif number == signal.SIGINT and time.monotonic() - first[0] >= AT_ONCE:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
