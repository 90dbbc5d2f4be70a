"""The models that come with the package: two small language models of Python source.

"embedded" is a byte-level Llama of 1.6 million parameters, trained by ffnlab on the standard
library of one Python version with the preset of the same name. "embedded_small" is its rival: a
dense model whose files are as large as those of the compressed embedded model, trained on as many
tokens of the same text with the preset of that name. `training.json` beside each records the
recipe, the text by SHA-256, and its held-out bits per byte.
"""

from importlib import resources
from pathlib import Path

from ffnlab.errors import FormatError
from ffnlab.formats.opening import load
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.models.decoder import Decoder

SHIPPED = ("embedded", "embedded_small")


def embedded(name: str = "embedded") -> tuple[Decoder, Tokenizer]:
    """A model that comes with the package, and its byte tokenizer.

    Args:
      name: "embedded" or "embedded_small".
    Returns:
      (Decoder, Tokenizer); the same parameters each time, in new modules.
    Raises:
      FormatError: the installation lacks the model's files.
    """
    with resources.as_file(resources.files("ffnlab") / name) as folder:
        if not (folder / "model.safetensors").exists():
            raise FormatError(f"{folder} has no model.safetensors; reinstall ffnlab")
        return load(folder, kinds=("decoder",)), Tokenizer.load(folder)


def shipped(place: Path | None) -> str | None:
    """The name of the model of the package that a command line names, None for a directory.

    >>> shipped(None), shipped(Path("embedded_small")), shipped(Path("some/model"))
    ('embedded', 'embedded_small', None)
    """
    name = "embedded" if place is None else str(place)
    return name if name in SHIPPED and (place is None or not place.exists()) else None


def open_model(place: Path | None) -> tuple[Decoder, Tokenizer]:
    """The language model that a command line names.

    Args:
      place: a model directory, else the name of a model that comes with the package; None for
        "embedded".
    Raises:
      FormatError: no such directory or name, or not a model.
      ConfigError: the directory holds a model of another kind.
    """
    name = shipped(place)
    if name:
        return embedded(name)
    return load(place, kinds=("decoder",)), Tokenizer.load(place)
