"""The dense model of equal bytes, with which the compressed embedded model is compared.

It was trained once, on as many tokens (`ffnlab train --preset embedded_small`), and
measured as the default recipe measures:

    python -m ffnlab.compress.rival runs/small/model > ffnlab/embedded/equal_bytes.json
"""

import dataclasses
import json
import sys
from importlib import resources
from pathlib import Path

from ffnlab import models, recipes, tree, weights
from ffnlab.compress import measure
from ffnlab.compress.report import Rival, Row
from ffnlab.compress.text import Text, held_out, standard_text
from ffnlab.errors import FormatError
from ffnlab.files import StrPath, read_json
from ffnlab.models import Tokenizer

__all__ = ["embedded_rival", "record"]

FILE = "equal_bytes.json"
PYTHON = "measured on the standard library of Python {}"


def embedded_rival(row: Row, *, text: Text) -> Rival | None:
    """The committed figures of the dense model, beside those of the compressed one.

    Args:
      row: the compressed model.
      text: what it was measured on.
    Returns:
      None where the installation lacks the figures.
    Raises:
      FormatError: the file is damaged.
    """
    file = resources.files("ffnlab") / "embedded" / FILE
    if not file.is_file():
        return None
    with resources.as_file(file) as path:
        found = read_json(path)
    try:
        nbytes, bits = int(found["nbytes"]), float(found["bits_per_byte"])
        same = found["text"]["held_out_sha256"] == text.as_json()["held_out_sha256"]
        where = "on the same text" if same else PYTHON.format(found["text"]["python"])
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file}: not the figures of a model: {error!r}") from None
    note = f"trained on as many tokens; {where}"
    return Rival(nbytes, bits, bits < row.bits_per_byte, note)


def record(directory: StrPath) -> dict[str, object]:
    """Measures a model directory as the default recipe does.

    Args:
      directory: holds the dense model and its tokenizer.
    Returns:
      what `equal_bytes.json` holds.
    """
    model, tokenizer, text = models.load(directory), Tokenizer.load(directory), standard_text()
    settings = recipes.default().evaluation
    samples = held_out(text, tokenizer, settings, model.config.vocab)
    found = measure.quality(weights.prepare(model), samples, settings.batch)
    return {
        "nbytes": tree.nbytes(model),
        "bits_per_byte": found.bits_per_byte,
        "evaluation": dataclasses.asdict(settings),
        "text": text.as_json(),
        "training": read_json(Path(directory) / "training.json"),
    }


if __name__ == "__main__":
    json.dump(record(sys.argv[1]), sys.stdout, indent=1)
    print()
