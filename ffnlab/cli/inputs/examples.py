"""What a command measures an encoder or a classifier on: text, texts, images, or records."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from ffnlab.cli.inputs.data_kinds import ImagesConfig, RecordsConfig, TextsConfig
from ffnlab.cli.inputs.labelled import Reader, images, records, split
from ffnlab.cli.inputs.texts import encoded, parts_of
from ffnlab.compress import EncoderTask, LabelledTask, Text
from ffnlab.data import Labelled
from ffnlab.data.batches.records import Source
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.formats.kinds import KINDS, kind_of
from ffnlab.models import Encoder

__all__ = ["CLASSIFIERS", "encoder_task", "labelled_task", "texts_task"]

# Kinds of model that `compress` scores by their classes.
CLASSIFIERS = ("mlp", "convnet")


def labelled_task(model: Any, name: str, *, are_records: bool) -> LabelledTask:
    """Images or records as a task of a job.

    Args:
      model: of a kind in `CLASSIFIERS`.
      name: of images "digits", "mnist" or a folder, as `[data]` of a training file takes it; of
        records a safetensors file with tensors "image" and "label".
      are_records: whether it is the latter.
    Raises:
      ConfigError: the model does not take inputs of their shape, or has fewer classes.
      FFNLabError: they cannot be read.
    """
    kind = KINDS[kind_of(model) or ""]
    shape = kind.example(model).shape[1:]
    if are_records:
        stored = shape
        train, held_out, _, scale = records(RecordsConfig(name, shape))
    else:
        stored = image_shape(shape)
        data = ImagesConfig(name, size=stored[:2], colour=stored[2] == 3)
        train, held_out, _, scale = images(data)
    reader = Reader(stored, shape, classes_of(model), scale)
    if isinstance(train, Labelled):
        assert isinstance(held_out, Labelled)
        parts = [reader.all(part) for part in (train, held_out)]
    elif held_out is None:
        parts = [read(train, chosen, reader) for chosen in split(len(train))]
    else:
        parts = [read(part, np.arange(len(part)), reader) for part in (train, held_out)]
    item = "row" if len(shape) == 1 else "image"
    return LabelledTask(parts[0], parts[1], str(Path(name)), item)


def encoder_task(model: Encoder, tokenizer: Tokenizer, text: Text, where: object) -> EncoderTask:
    """Text as a task for an encoder.

    Raises:
      ConfigError: the encoder has classes, which text without labels says nothing of.
    """
    if model.config.head == "classes":
        raise ConfigError(
            f"{where} tells {model.config.classes} classes of texts apart: give --texts, a file of "
            "JSON lines with texts and labels, or 'polarity'"
        )
    return EncoderTask.of(model, tokenizer, text)


def texts_task(model: Encoder, tokenizer: Tokenizer, name: str, where: object) -> LabelledTask:
    """Texts with classes as a task for an encoder that has classes.

    Args:
      name: "polarity" or a file of JSON lines, as `[data]` of a training file takes it; one in ten
        is held out.
      where: the model is, for messages.
    Raises:
      ConfigError: the encoder has no classes, or fewer.
      FFNLabError: the texts cannot be read.
    """
    config = model.config
    if config.head != "classes":
        raise ConfigError(
            f"{where} has head={config.head!r}; --texts needs an encoder with classes of texts, "
            "others are measured on --text"
        )
    parts, _ = parts_of(TextsConfig(name), config)
    train, test = (encoded(part, tokenizer, config.max_positions, config) for part in parts)
    return LabelledTask(train, test, str(Path(name)), "text", tokenizer)


def image_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Height, width and channels of the images that a model takes, whole or as rows."""
    if len(shape) == 3:
        return shape
    side = math.isqrt(shape[0])
    if side * side != shape[0]:
        raise ConfigError(f"the model takes rows of {shape[0]} numbers, which no square image has")
    return side, side, 1


def classes_of(model: Any) -> int:
    """How many classes a classifier tells apart."""
    last = model.maps[-1] if kind_of(model) == "mlp" else model.head
    return last.weight.shape[1]


def read(source: Source, chosen: np.ndarray, reader: Reader) -> Labelled:
    """Some records of a source as arrays."""
    pairs = [reader.one(source[int(i)], "image", "label") for i in chosen]
    x, y = zip(*pairs, strict=True)
    return Labelled(np.stack(x), np.asarray(y, np.int32))
