"""How the last run of each study on this machine ended, for `ffnlab list`.

One small JSON file per study in the folder named by `FFNLAB_STATE`, else in `ffnlab/` of the
user's state folder (`XDG_STATE_HOME`, default `~/.local/state`). It is a note, not a result: a
folder that cannot be written is no reason for a study to fail, and a damaged note reads as none.
"""

import contextlib
import os
import time
from pathlib import Path

from ffnlab.storage.files import read_json, write_json

__all__ = ["last_status", "record"]


def folder() -> Path:
    """Where the notes lie; it need not exist."""
    if named := os.environ.get("FFNLAB_STATE"):
        return Path(named) / "studies"
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "ffnlab" / "studies"


def record(slug: str, status: str, *, quick: bool, seed: int) -> None:
    """Notes how a run ended.

    Args:
      slug: the study.
      status: one line, for example "5 of 6 claims hold" or "failed: FormatError".
      quick: whether it was the quick form.
      seed: its seed.
    """
    note = {"status": status, "quick": quick, "seed": seed, "time": time.time()}
    with contextlib.suppress(OSError):
        write_json(folder() / f"{slug}.json", note)


def last_status(slug: str) -> str:
    """How the last run ended, in one line.

    Args:
      slug: the study.
    Returns:
      for example "4 of 5 claims hold (quick, seed 0, 2026-01-31 12:00)", or "never run".

    >>> last_status("no-such-study")
    'never run'
    """
    try:
        note = read_json(folder() / f"{slug}.json")
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(note["time"]))
        form = "quick" if note["quick"] else "full"
        return f"{note['status']} ({form}, seed {note['seed']}, {when})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return "never run"
