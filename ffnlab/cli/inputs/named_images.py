"""Images by what folders of them are called."""

from collections.abc import Sequence
from pathlib import Path

from ffnlab.cli.inputs.data_kinds import CaptionedConfig
from ffnlab.data.images.files import ImageFolder
from ffnlab.data.interleaved import NAMES

__all__ = ["classes_named", "has_idx"]


def classes_named(data: CaptionedConfig) -> Sequence[str]:
    """What captions call the classes: digits by their names, others as their subfolders."""
    if data.images in ("digits", "mnist") or has_idx(data.images):
        return NAMES
    return ImageFolder(data.images, data.size, mode="L").classes  # type: ignore[arg-type]


def has_idx(place: str) -> bool:
    """Whether a folder holds IDX files named as MNIST's."""
    return any(Path(place).glob("train*images*"))
