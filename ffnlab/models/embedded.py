"""The model that comes with the package: a small language model of Python source.

A byte-level Llama of 1.6 million parameters, trained by ffnlab on the standard library of one
Python version with the preset "embedded". `training.json` beside it records the recipe, the text by
SHA-256, and its held-out bits per byte; `equal_bytes.json` what a dense model of the compressed
model's size reaches with the same training.
"""

from importlib import resources

from ffnlab import io
from ffnlab.errors import FormatError
from ffnlab.models.decoder import Decoder
from ffnlab.models.load import load
from ffnlab.models.tokenizer import Tokenizer


def embedded() -> tuple[Decoder, Tokenizer]:
    """The embedded model and its byte tokenizer.

    Returns:
      (Decoder, Tokenizer); the same parameters each time, in new modules.
    Raises:
      FormatError: the installation lacks the model's files.
    """
    with resources.as_file(resources.files("ffnlab") / "embedded") as folder:
        if not (folder / "model.safetensors").exists():
            raise FormatError(f"{folder} has no model.safetensors; reinstall ffnlab")
        return load(folder), Tokenizer.load(folder)


def training_record() -> dict:
    """How the embedded model was trained and what it reached: the content of training.json."""
    with resources.as_file(resources.files("ffnlab") / "embedded" / "training.json") as file:
        return io.read_json(file)
