"""Asking a long run to stop: SIGTERM and Ctrl-C become a flag that the loop reads."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def stop_request() -> Iterator[threading.Event]:
    """An event that the first SIGTERM or SIGINT sets; a second one acts as it did before.

    Outside the main thread, where Python allows no handlers, the event is never set.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
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
        yield event
    finally:
        restore()
