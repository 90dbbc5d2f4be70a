"""Where data is that is there already; nothing is downloaded."""

import os
from pathlib import Path

from ffnlab.errors import FFNLabError

__all__ = ["VARIABLE", "find_folder", "folder"]

VARIABLE = "FFNLAB_DATA"


def find_folder(name: str) -> Path | None:
    """The folder of a data set in the one that FFNLAB_DATA names; None where it is not there."""
    named = os.environ.get(VARIABLE)
    found = Path(named) / name if named else None
    return found if found is not None and found.is_dir() else None


def folder(name: str) -> Path:
    """The folder of a data set in the one that FFNLAB_DATA names.

    Args:
      name: of the folder, "mnist" for instance.
    Raises:
      FFNLabError: FFNLAB_DATA is not set, or there is no such folder in what it names.
    """
    found = find_folder(name)
    if found is None:
        named = os.environ.get(VARIABLE)
        where = f"there is no folder {Path(named) / name}" if named else f"{VARIABLE} is not set"
        raise FFNLabError(
            f"data {name!r}: {where}; set {VARIABLE} to a folder with {name!r} in it, "
            "or give the loader a path"
        )
    return found
