"""Writing the compressed model, and proving that what was written is what was measured."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx

from ffnlab import tree, weights
from ffnlab.compress.report import Export
from ffnlab.errors import FormatError
from ffnlab.formats import load, save
from ffnlab.formats.opening import format_of
from ffnlab.storage.files import sha256, write_json

__all__ = ["checksums", "export"]

Format = Literal["dense", "compressed-tensors", "ffnlab"]
# Relative tolerances of the score. On a CPU both models compute the same in float32, up to the
# order of additions; elsewhere the one in memory may use kernels and dtypes of its formats.
EXACT, ROUNDED = 1e-5, 1e-2
PROVENANCE = "training.json"  # what a model was trained on; no part of it, and not counted
ADVICE = "was something else writing there, or is the disk failing?"


def export(
    model: Any,
    beside: Callable[[Path], None],
    out: Path,
    score: float,
    measure: Callable[[Any, str], float],
    *,
    dense: bool = False,
    origin: Mapping[str, object] = MappingProxyType({}),
) -> tuple[Export, ...]:
    """Writes the model directories, loads each again, and measures both ways of reading it.

    OUT/model is packed (compressed-tensors) if the model has a weight that can be, else dense; of a
    model that no Hugging Face family can say it is in the native format.

    Args:
      model: the compressed model, not prepared.
      beside: writes into a directory what belongs beside the model, its tokenizer.
      out: where to.
      score: of the model in memory.
      measure: (prepared model, label) -> the score on the same data.
      dense: write OUT/dense too, if OUT/model is packed.
      origin: what the original model was trained on, for training.json; empty for none.
    Returns:
      what was written, OUT/model first.
    Raises:
      FormatError: a loaded model has other values or another score than that in memory.
    """
    first = format_of(model)
    formats: dict[str, Format] = {"model": first}
    if dense and first == "compressed-tensors":
        formats["dense"] = "dense"
    return tuple(
        write(model, beside, out / name, format, score, measure, origin)
        for name, format in formats.items()
    )


def write(
    model: Any,
    beside: Callable[[Path], None],
    folder: Path,
    format: Format,
    score: float,
    measure: Callable[[Any, str], float],
    origin: Mapping[str, object],
) -> Export:
    """Writes one directory in one format and checks it; see `export`."""
    ignored = save(model, folder, format=format)
    beside(folder)
    (folder / PROVENANCE).unlink(missing_ok=True)  # of what stood here before
    if origin:
        write_json(folder / PROVENANCE, dict(origin))
    files = checksums(folder)
    loaded = load(folder)
    check_values(folder, model, loaded)
    loaded = weights.prepare(loaded)
    found = measure(loaded, f"written {folder.name}")
    check_score(folder, found, score)
    elsewhere = found
    if (folder / "ffnlab.json").exists():
        del loaded
        plain = weights.prepare(load(folder, extras=False))
        elsewhere = measure(plain, f"written {folder.name} without ffnlab.json")
    return Export(
        folder=folder.name,
        format=format,
        nbytes=sum((folder / name).stat().st_size for name in files if name != PROVENANCE),
        files=files,
        score=found,
        score_elsewhere=elsewhere,
        ignored=ignored,
    )


def check_values(folder: Path, memory: Any, loaded: Any) -> None:
    """Raises FormatError unless a loaded model has the very values of the one in memory."""
    ours, theirs = values(memory), values(loaded)
    wrong = [
        path
        for path in sorted(ours.keys() | theirs.keys())
        if path not in ours
        or path not in theirs
        or not np.array_equal(stored(ours[path]), stored(theirs[path]))
    ]
    if wrong:
        raise FormatError(
            f"{folder}: loaded again, {len(wrong)} parameters are not those that were written, the "
            f"first {wrong[0]}; {ADVICE}"
        )


def values(model: Any) -> dict[str, nnx.Variable]:
    """The variables of a model by path."""
    return {path: node for path, node in tree.walk(model) if isinstance(node, nnx.Variable)}


def stored(variable: nnx.Variable) -> np.ndarray:
    """The values of a variable, of a weight those of its matrix; float32 holds all of them."""
    value = variable.get_value()
    return np.asarray(value.dense() if weights.is_weight(value) else value, np.float32)


def check_score(folder: Path, found: float, expected: float) -> None:
    """Raises FormatError unless a directory gives the score that was measured."""
    exact = jax.default_backend() == "cpu"
    if not math.isclose(found, expected, rel_tol=EXACT if exact else ROUNDED):
        raise FormatError(
            f"{folder}: loaded again, the model scores {found:.6g}, and {expected:.6g} was "
            f"measured before it was written; {ADVICE}"
        )


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a directory by name."""
    return {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
