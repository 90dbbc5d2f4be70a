"""Asking a long run to stop: SIGTERM and Ctrl-C become a question that the loop asks.

Of several processes all must stop after the same step. There the runtime of jax takes SIGTERM: a
notice to one process reaches all, and they agree on the step after the furthest.
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_request() -> Iterator[Callable[[int], bool]]:
    """Whether to stop, asked after every step with its number; by the first SIGTERM or SIGINT.

    A second signal acts as it did before. Outside the main thread, where Python allows no
    handlers, the answer is no.
    """
    if jax.process_count() > 1:
        with several_processes() as asked:
            yield asked
        return
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield lambda position: False
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: object) -> None:
        event.set()
        restore()

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield lambda position: event.is_set()
    finally:
        restore()


@contextmanager
def several_processes() -> Iterator[Callable[[int], bool]]:
    """`stop_request` of one of several processes; Ctrl-C is made a SIGTERM."""
    from jax.experimental import multihost_utils

    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGINT, ask)
    try:
        yield multihost_utils.reached_preemption_sync_point
    finally:
        signal.signal(signal.SIGINT, before)
