"""MNIST, from IDX files that are there already; nothing is downloaded."""

from pathlib import Path

import numpy as np

from ffnlab.data import folders
from ffnlab.data.clusters import Labelled
from ffnlab.data.images.files import read_idx
from ffnlab.errors import FFNLabError, FormatError

__all__ = ["mnist", "mnist_folder"]

PARTS = {"train": "train", "test": "t10k"}


def mnist_folder() -> Path | None:
    """The folder "mnist" in the one that FFNLAB_DATA names; None where it is not there."""
    return folders.find_folder("mnist")


def mnist(folder: str | Path | None = None) -> tuple[Labelled, Labelled]:
    """The handwritten digits of LeCun, Cortes and Burges, 28 x 28 pixels scaled to [0, 1].

    Args:
      folder: with the IDX files of images and labels, {train, t10k}*{images, labels}*, plain or
        gzipped; "mnist" in FFNLAB_DATA when None.
    Returns:
      (train, test), x of width 784.
    Raises:
      FFNLabError: there is no folder, or a file is missing, damaged, or does not fit the other.
    """
    folder = folders.folder("mnist") if folder is None else Path(folder)
    train, test = (_part(folder, prefix) for prefix in PARTS.values())
    return train, test


def _part(folder: Path, prefix: str) -> Labelled:
    images, labels = (read_idx(_file(folder, prefix, kind)) for kind in ("images", "labels"))
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise FormatError(f"{folder}: {prefix} has images {images.shape} and labels {labels.shape}")
    x = images.reshape(len(images), -1).astype(np.float32) / 255
    return Labelled(x, labels.astype(np.int32))


def _file(folder: Path, prefix: str, kind: str) -> Path:
    found = sorted(folder.glob(f"{prefix}*{kind}*"))
    if not found:
        raise FFNLabError(f"{folder} has no IDX file {prefix}*{kind}*")
    return found[0]
