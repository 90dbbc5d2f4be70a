"""The batch that each sort of data gives a model, abstract: what a plan compiles a step for.

Of each, `(data, model, rows, length) -> batch`: the tables of a file, and how many rows, and tokens
of a row, where the data do not say so themselves.
"""

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.cli.inputs.data_kinds import (
    CaptionedConfig,
    DomainsConfig,
    HeteroConfig,
    ImagesConfig,
    NetworksConfig,
    PermutationConfig,
    RecordsConfig,
    SequencesConfig,
    SpeechConfig,
)
from ffnlab.cli.inputs.named_images import classes_named
from ffnlab.data import CaptionedDigits, Labelled, Packed, SequencePairs
from ffnlab.data.interleaved import caption_length
from ffnlab.data.sound_rows import PER_SECOND
from ffnlab.errors import ConfigError, first_line
from ffnlab.formats.kinds import KINDS, Config, kind_of, reads_of
from ffnlab.losses import Taught
from ffnlab.routing import pal

__all__ = [
    "arrays",
    "between_captions",
    "check_speech",
    "first_network",
    "grouped",
    "hidden",
    "input_shape",
    "ints",
    "pairs_of",
    "speech",
    "stream",
    "texts",
    "two_domains",
    "whole_basis",
    "whole_graph",
    "windows",
]


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    """Whole numbers, abstract."""
    return jax.ShapeDtypeStruct(shape, np.int32)


def stream(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """A batch of text of which every next token is predicted."""
    tokens = ints(rows, length + 1)
    return Packed(tokens, tokens, tokens) if data.packed else tokens


def hidden(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """A batch of text of which hidden tokens are predicted."""
    return ints(rows, length), ints(rows, length)


def texts(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """A batch of texts with classes."""
    valid = jax.ShapeDtypeStruct((rows, length), np.bool_)
    return Labelled({"tokens": ints(rows, length), "valid": valid}, ints(rows))  # type: ignore


def windows(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """A batch of windows of questions, and the ends of their answers."""
    valid = jax.ShapeDtypeStruct((rows, length), np.bool_)
    types = {"types": ints(rows, length)} if model.types > 1 else {}
    return {"tokens": ints(rows, length), "valid": valid} | types, ints(rows, 2)


def arrays(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """A batch of images or records, with classes where the model has some."""
    x = jax.ShapeDtypeStruct((rows, *input_shape(data, model)), np.float32)
    classes = KINDS[kind_of(model) or ""].classes
    if classes is None:
        return x
    if not getattr(data, "teacher", ""):
        return Labelled(x, ints(rows))  # type: ignore
    answers = jax.ShapeDtypeStruct((rows, classes(model) or 0), np.float32)
    return Taught(x, ints(rows), answers)  # type: ignore


def grouped(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """A batch of summaries of nodes, or as `arrays`."""
    if not isinstance(data, HeteroConfig):
        return arrays(data, model, rows, length)
    return Labelled(jax.ShapeDtypeStruct((rows, model.width), np.float16), ints(rows))  # type: ignore


def two_domains(data: DomainsConfig, model: Any, rows: int, length: int) -> PyTree:
    """A batch of two domains: inputs with classes, and inputs alone."""
    shape = input_shape(RecordsConfig(data.source, data.shape_of(data.source)), model)
    one, other = (
        jax.ShapeDtypeStruct((n, *shape), np.float32) for n in (rows, data.target_rows(rows))
    )
    return Labelled(one, ints(rows)), other  # type: ignore[arg-type]


def whole_basis(data: PermutationConfig, model: Any, rows: int, length: int) -> PyTree:
    """The one batch of a permutation, abstract.

    Raises:
      ConfigError: the model has other inputs or outputs.
    """
    k = data.length
    if (model.sizes[0], model.sizes[-1]) != (k, k):
        raise ConfigError(
            f"sizes={list(model.sizes)}: a permutation of length={k} has {k} inputs and outputs"
        )
    return Labelled(jax.ShapeDtypeStruct((k, k), np.float32), ints(k))  # type: ignore[arg-type]


def pairs_of(data: SequencesConfig, model: Any, rows: int, length: int) -> PyTree:
    """A batch of sequences and what they are mapped to."""
    parts = (
        jax.ShapeDtypeStruct((rows, model.length, n), np.float32)
        for n in (model.inputs, model.outputs)
    )
    return SequencePairs(*parts)  # type: ignore[arg-type]


def whole_graph(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """The one batch of a graph, as it is."""
    from ffnlab.cli.inputs.nodes import load_nodes, node_batch  # which needs this module

    return node_batch(load_nodes(data, model))


def first_network(data: NetworksConfig, model: Any, rows: int, length: int) -> PyTree:
    """The batch of the first network, as it is."""
    from ffnlab.cli.inputs.networks import load_networks  # which needs this module

    return load_networks(data, model).lessons[0]


def speech(data: Any, model: Any, rows: int, length: int) -> PyTree:
    """(Sounds, (tokens, answers)) of recordings."""
    shape = rows, data.seconds * PER_SECOND // data.size
    widths = model.audio.widths
    features = tuple(jax.ShapeDtypeStruct((*shape, width), np.float32) for width in widths)
    valid = (jax.ShapeDtypeStruct(shape, np.bool_),) * len(widths)
    tokens = ints(rows, len(data.question.encode()))
    return pal.Sounds(features, valid), (tokens, tokens)  # type: ignore[arg-type]


def between_captions(data: CaptionedConfig, model: Any, rows: int, length: int) -> PyTree:
    """A batch of images between captions.

    Raises:
      ConfigError: the model has too few tokens or positions.
    """
    length = caption_length(classes_named(data), math.prod(data.size))
    if model.vocab < CaptionedDigits.vocab or model.max_positions < length:
        raise ConfigError(
            f"vocab={model.vocab}, max_positions={model.max_positions}: captioned images have "
            f"{CaptionedDigits.vocab} tokens and rows of {length}"
        )
    tokens = ints(rows, length)
    return Packed(tokens, tokens, tokens)  # type: ignore[arg-type]


def check_speech(data: SpeechConfig, model: Any) -> None:
    """Raises ConfigError unless a model takes the features and the question of recordings."""
    widths = model.audio.widths
    if len(data.encoders) != len(widths):
        raise ConfigError(
            f"encoders={list(data.encoders)}; the model hears {len(widths)}, of {list(widths)}"
        )
    last = max(*data.question.encode(), *b"0123456789")
    if last >= model.vocab:
        raise ConfigError(
            f"the question and digits have the byte {last}; the model has {model.vocab}"
        )


def input_shape(data: ImagesConfig | RecordsConfig, model: Config) -> tuple[int, ...]:
    """Shape of one image or record as the model is given it: a row where it reads rows.

    Raises:
      ConfigError: the model does not take inputs of that shape.
    """
    name = kind_of(model) or ""
    kind = KINDS[name]
    shape = (math.prod(data.shape),) if reads_of(model) == "rows" else data.shape
    network = jax.eval_shape(lambda key: kind.make(model, key=key), jax.random.key(0))
    try:
        jax.eval_shape(kind.call, network, jax.ShapeDtypeStruct((1, *shape), np.float32))
    except (TypeError, ValueError) as error:
        said = f"[data] gives inputs of shape {list(shape)}, which a {name} of {model} does not"
        raise ConfigError(f"{said} take: {first_line(error)}") from None
    return shape
