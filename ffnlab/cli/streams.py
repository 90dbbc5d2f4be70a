"""Standard input, output and error as they may be: closed, full, or read by nobody any more."""

import contextlib
import logging
import os
import sys

__all__ = ["complain", "mute_orbax", "open_missing", "output_fails", "silence_output"]

STREAMS = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_WRONLY, "w"), ("stderr", os.O_WRONLY, "w"))


def open_missing() -> None:
    """Opens the null device in place of each standard stream that was closed (`ffnlab … >&-`).

    To be called before any file is opened: a file would get the free descriptor, and whatever
    prints, C libraries included, would write into it.
    """
    for descriptor, (name, access, mode) in enumerate(STREAMS):
        try:
            os.fstat(descriptor)
        except OSError:
            null = os.open(os.devnull, access)  # the lowest free number, which is this one
            if null != descriptor:
                os.dup2(null, descriptor)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))


def output_fails() -> bool:
    """Whether standard output takes no more text, tried with an empty line."""
    try:
        print(flush=True)
    except OSError:
        return True
    return False


def silence_output() -> None:
    """Sends what is still buffered nowhere, so that the interpreter's last flush does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def complain(message: str) -> None:
    """Prints to standard error; where that takes nothing, the exit status has to do."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr, flush=True)


def mute_orbax() -> None:
    """Keeps off standard error what orbax and its store print of errors that they also raise.

    They log each with its traceback, once per thread; writes that end after the first error report
    to an event loop that has been closed meanwhile, or to nobody.
    """
    from absl.logging import get_absl_logger  # what orbax logs with

    get_absl_logger().addFilter(_is_not_of_orbax)
    logging.getLogger("asyncio").addFilter(_is_retrieved)
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = _unraisable


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname


def _is_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _unraisable(found: "sys.UnraisableHookArgs") -> None:
    if not (isinstance(found.exc_value, RuntimeError) and "loop is closed" in str(found.exc_value)):
        sys.__unraisablehook__(found)
