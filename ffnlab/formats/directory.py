"""What else lies in a model directory when a model is written anew: it stays."""

import os
import shutil
from pathlib import Path

from ffnlab.formats.safetensors import MODEL_FILES
from ffnlab.storage.files import StrPath

__all__ = ["CONFIG_FILE", "IMAGES_FILE", "NATIVE_FILE", "SIDECAR_FILE", "keep_others"]

CONFIG_FILE = "config.json"
SIDECAR_FILE = "ffnlab.json"
NATIVE_FILE = "ffnlab_model.json"
IMAGES_FILE = "preprocessor_config.json"  # of a network of images
# Files that say what the model is, of either format: none of an earlier one is left.
OF_MODELS = (CONFIG_FILE, SIDECAR_FILE, NATIVE_FILE)


def keep_others(source: Path, target: Path) -> None:
    """Puts what is in a directory and not of its model (a tokenizer, notes) into another.

    Args:
      source: the directory as it is; it may be missing.
      target: an empty directory that will take its place.
    """
    if not source.is_dir():
        return
    for item in source.iterdir():
        if not MODEL_FILES.fullmatch(item.name) and item.name not in OF_MODELS:
            _keep(item, target / item.name)


def _keep(item: Path, target: Path) -> None:
    if item.is_dir() and not item.is_symlink():
        target.mkdir()
        for inside in item.iterdir():
            _keep(inside, target / inside.name)
        shutil.copystat(item, target)
    else:
        _link(item, target)


def _link(source: StrPath, target: StrPath) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)
