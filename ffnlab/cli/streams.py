"""Standard input, output and error as they may be: closed, full, or read by nobody any more."""

import contextlib
import logging
import os
import sys

__all__ = ["complain", "log_no_errors_of_orbax", "open_missing", "output_fails", "silence_output"]

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


def log_no_errors_of_orbax() -> None:
    """Keeps off standard error the tracebacks that orbax logs of errors that it also raises."""
    from absl.logging import get_absl_logger  # what orbax logs with

    get_absl_logger().addFilter(_is_not_of_orbax)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return record.levelno < logging.ERROR or f"{os.sep}orbax{os.sep}" not in record.pathname
