"""The checkpoints of a run: the newest two, of which a damaged one is named and passed over."""

import re
import shutil
import warnings
from pathlib import Path
from typing import TypeVar

import jax

from ffnlab import io
from ffnlab.errors import DamagedError

__all__ = ["exists", "restore", "save"]

T = TypeVar("T")
KEEP = 2
NAME = "step-{:09d}"


def steps(folder: Path) -> list[int]:
    """The steps there are checkpoints of, newest first; some may be unfinished or damaged."""
    found = [re.fullmatch(r"step-(\d{9,})", item.name) for item in folder.glob("step-*")]
    return sorted((int(match[1]) for match in found if match), reverse=True)


def exists(folder: Path) -> bool:
    """Whether a finished checkpoint is there."""
    return any((folder / NAME.format(step) / io.SIDECAR).exists() for step in steps(folder))


def save(folder: Path, step: int, tree: object) -> None:
    """Saves a checkpoint and then removes all but the newest two.

    Args:
      folder: of all checkpoints of the run.
      step: of this one.
      tree: see `ffnlab.io.save`.
    Raises:
      OSError: it could not be written; those before it are intact.
    """
    target = folder / NAME.format(step)
    try:
        io.save(target, tree)
    except OSError as error:
        if jax.process_index() == 0 and not (target / io.SIDECAR).exists():
            shutil.rmtree(target, ignore_errors=True)
        left = "there is no other"
        if exists(folder):
            left = f"the checkpoint of step {steps(folder)[0]} is intact"
        what = f"the checkpoint of step {step} could not be saved"
        raise OSError(f"{what}: {error}; {left}") from None
    if jax.process_index() == 0:
        for old in steps(folder)[KEEP:]:
            shutil.rmtree(folder / NAME.format(old), ignore_errors=True)


def restore(folder: Path, like: T) -> T:
    """The newest checkpoint that is whole.

    Args:
      folder: of all checkpoints of the run.
      like: see `ffnlab.io.restore`.
    Returns:
      its tree. A warning names each newer one that is damaged or unfinished.
    Raises:
      DamagedError: none is whole; the newest is named.
      FormatError: the newest is of another tree.
    """
    first = None
    for step in steps(folder):
        try:
            return io.restore(folder / NAME.format(step), like)
        except DamagedError as error:
            first = first or error
            warnings.warn(f"{error}; the checkpoint before it is tried", stacklevel=2)
    raise first or DamagedError(f"{folder} holds no checkpoint")
