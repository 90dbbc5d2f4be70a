"""Whether a model was trained on the text that a command measures it on."""

import sys
from collections.abc import Iterable
from contextlib import nullcontext
from importlib import resources
from pathlib import Path

from ffnlab.data.text.documents import is_seen
from ffnlab.formats.embedded import shipped
from ffnlab.formats.untrusted import inside, read_json

__all__ = ["FILE", "provenance", "warn_of_seen"]

FILE = "training.json"


def provenance(model: Path | None) -> dict[str, object]:
    """What the training.json of a model says of its text; empty without one of ours.

    Args:
      model: as the command line names it, see `ffnlab.formats.open_model`.
    Returns:
      "text" and "documents" as `ffnlab train` wrote them.
    Raises:
      FormatError: the file is not JSON.
    """
    name = shipped(model)
    folder = resources.as_file(resources.files("ffnlab") / name) if name else nullcontext(model)
    with folder as place:
        record = read_json(inside(place, FILE)) if (place / FILE).exists() else {}
    found = record if isinstance(record, dict) else {}
    return {name: found[name] for name in ("text", "documents") if name in found}


def warn_of_seen(
    command: str, record: dict[str, object], pairs: Iterable[tuple[bytes, bytes]], advice: str = ""
) -> None:
    """Says in one line on standard error that a model was trained on what it is measured on.

    Args:
      command: its name.
      record: the `provenance` of the model.
      pairs: (measured, whole): documents, or the held-out part of each, and the documents.
      advice: what to do about it.
    """
    documents = record.get("documents")
    listed = documents.get("train") if isinstance(documents, dict) else None
    trained = frozenset(d for d in listed if isinstance(d, str)) if listed else frozenset()
    pairs = list(pairs)
    seen = sum(is_seen(trained, *pair) for pair in pairs)
    if seen:
        what = f"{seen} of the {len(pairs)} documents that it is measured on ({FILE})"
        print(
            f"ffnlab {command}: warning: the model was trained on {what}; the figures are not of "
            f"unseen text{advice}",
            file=sys.stderr,
        )
