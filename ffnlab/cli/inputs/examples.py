"""What a command shows a model that is no decoder: text, texts, images, or records."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ffnlab.cli.inputs.data_kinds import ImagesConfig, RecordsConfig, TextsConfig
from ffnlab.cli.inputs.labelled import Reader, both_parts, images, records
from ffnlab.cli.inputs.texts import encoded, parts_of
from ffnlab.compress import EncoderTask, LabelledTask, Text
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, first_line
from ffnlab.formats import Tokenizer
from ffnlab.formats.kinds import KINDS, kind_of, reads_of
from ffnlab.models import Encoder

__all__ = [
    "CLASSIFIERS",
    "Examples",
    "encoder_task",
    "examples",
    "labelled_task",
    "texts_task",
]

# Kinds of model that `compress` scores by their classes.
CLASSIFIERS = ("mlp", "convnet", "vit", "resnet", "revcol")


class Examples(NamedTuple):
    """What a model is shown.

    Attributes:
      train, held_out: inputs as the model takes them, with classes.
      item: what one of them is called.
      identity: what they are, by name, SHA-256 and number.
    """

    train: Labelled
    held_out: Labelled
    item: str
    identity: dict[str, str | int]


def labelled_task(model: Any, name: str, *, are_records: bool) -> LabelledTask:
    """Images or records as a task of a job.

    Args:
      model: of a kind in `CLASSIFIERS`.
      name, are_records: see `examples`, as for the errors.
    """
    found = examples(model, name, are_records=are_records)
    return LabelledTask(found.train, found.held_out, str(Path(name)), found.item)


def examples(model: Any, name: str, *, are_records: bool, size: tuple[int, ...] = ()) -> Examples:
    """Images or records for a model.

    Args:
      model: of a kind that reads rows or images.
      name: of images "digits", "mnist" or a folder, as `[data]` of a training file takes it; of
        records a safetensors file with tensors "image" and "label".
      are_records: whether it is the latter.
      size: height and width of the images; the least that the model takes when (), and of rows a
        square.
    Raises:
      ConfigError: the model does not take inputs of their shape, or has fewer classes.
      FFNLabError: they cannot be read.
    """
    kind = KINDS[kind_of(model) or ""]
    shape = kind.example(model).shape[1:]
    if are_records:
        train, held_out, identity, scale = records(RecordsConfig(name, shape))
        stored = train.x.shape[1:] if isinstance(train, Labelled) else shape
        shape = input_shape(model, stored)
    else:
        stored = image_shape(shape, size)
        shape = input_shape(model, stored)
        data = ImagesConfig(name, size=stored[:2], colour=stored[2] == 3)
        train, held_out, identity, scale = images(data, getattr(model, "config", None))
    reader = Reader(stored, shape, classes_of(model), scale)
    parts = both_parts(train, held_out, reader)
    return Examples(parts[0], parts[1], "row" if len(shape) == 1 else "image", identity)


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


def image_shape(shape: tuple[int, ...], size: tuple[int, ...] = ()) -> tuple[int, ...]:
    """Height, width and channels of the images that a model takes, whole or as rows.

    >>> image_shape((8, 8, 3)), image_shape((64,)), image_shape((24,), (2, 4))
    ((8, 8, 3), (8, 8, 1), (2, 4, 3))
    """
    if size and len(shape) == 3:
        return (*size, shape[2])
    if size:
        pixels = math.prod(size)
        if shape[0] not in (pixels, 3 * pixels):
            raise ConfigError(
                f"size={list(size)} is {pixels} pixels; the model takes rows of {shape[0]} numbers"
            )
        return (*size, shape[0] // pixels)
    if len(shape) == 3:
        return shape
    side = math.isqrt(shape[0])
    if side * side != shape[0]:
        raise ConfigError(f"the model takes rows of {shape[0]} numbers, which no square image has")
    return side, side, 1


def input_shape(model: Any, stored: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of one input as the model takes it, by its shape as it is stored.

    Raises:
      ConfigError: the model does not take such inputs.
    """
    kind = kind_of(model) or ""
    is_row, is_flat = reads_of(model) == "rows", len(stored) == 2
    shape = (math.prod(stored),) if is_row else (*stored, 1) if is_flat else stored
    try:
        jax.eval_shape(KINDS[kind].call, model, jax.ShapeDtypeStruct((1, *shape), np.float32))
    except (TypeError, ValueError) as error:
        said = f"this {kind} does not take inputs of shape {list(stored)}"
        raise ConfigError(f"{said}: {first_line(error)}") from None
    return shape


def classes_of(model: Any) -> int | None:
    """How many classes a model tells apart; None where it has none."""
    kind = kind_of(model) or ""
    if KINDS[kind].classes is None:
        return None
    if kind == "physical":
        return model.classes
    if hasattr(model, "config"):
        return KINDS[kind].classes(model.config)
    last = {"mlp": lambda: model.maps[-1], "noprop": lambda: model.out}
    return last.get(kind, lambda: model.head)().weight.shape[1]
