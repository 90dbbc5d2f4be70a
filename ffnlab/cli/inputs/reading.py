"""What a model reads when it is trained, and the loss that it learns by: one line for each sort."""

import functools
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.cli.inputs.data_kinds import (
    BlockModelConfig,
    CaptionedConfig,
    DataConfig,
    DomainsConfig,
    GraphConfig,
    HeteroConfig,
    ImagesConfig,
    NetworksConfig,
    PermutationConfig,
    QuestionsConfig,
    RecordsConfig,
    SequencesConfig,
    SpeechConfig,
    TextsConfig,
)
from ffnlab.cli.inputs.field_kinds import WeatherConfig, weather_batch, weather_loss
from ffnlab.cli.inputs.named_images import classes_named
from ffnlab.data import CaptionedDigits, Labelled, Packed, SequencePairs
from ffnlab.data.interleaved import caption_length
from ffnlab.data.sound_rows import PER_SECOND
from ffnlab.errors import ConfigError, first_line
from ffnlab.formats.kinds import KINDS, Config, kind_of, reads_of
from ffnlab.graphs import keyed
from ffnlab.learning.exact_permutations.ensemble import one_hot_squares
from ffnlab.learning.squares import squares
from ffnlab.losses import (
    InformedLoss,
    Loss,
    Taught,
    denoising,
    distilled,
    labelled,
    masked,
    measuring,
    next_token,
    packed_next_token,
    span,
)
from ffnlab.models.calibration import called
from ffnlab.pruning import meta_loss
from ffnlab.routing import pal

__all__ = [
    "Reading",
    "by_name",
    "check_speech",
    "input_shape",
    "inputs_of",
    "reading_of",
    "speech",
]


class Reading(NamedTuple):
    """What models of a sort read.

    Attributes:
      data: classes of [data] that give it.
      what: what they give, in words.
      loss: [data] -> what a rule minimizes that takes a loss.
      batch: ([data], [model], rows, length) -> a batch, abstract where the data need not be read.
    """

    data: tuple[type, ...]
    what: str
    loss: Callable[[Any], Loss | InformedLoss]
    batch: Callable[[Any, Any, int, int], PyTree]


def reading_of(model: object, data: object = None) -> Reading:
    """What a model reads, given its configuration.

    Args:
      model: configuration that it begins with.
      data: what it is to read: questions and texts with classes are for any encoder, whose head a
        transform may make.
    Raises:
      ConfigError: there is no kind of [data] for its head.
    """
    kind = kind_of(model)
    if kind == "encoder" and isinstance(data, QuestionsConfig):
        return OF_HEADS["span"]
    if kind == "encoder" and isinstance(data, TextsConfig):
        return OF_HEADS["classes"]
    if getattr(model, "audio", None) is not None:
        return SPEECH
    if kind == "decoder" and isinstance(data, CaptionedConfig):
        return CAPTIONED
    known = KINDS[kind or ""]
    has_classes = known.classes is not None and known.classes(model)
    if kind == "groups" and not isinstance(data, DomainsConfig):
        return OF_GROUPS
    if isinstance(data, PermutationConfig) and kind == "mlp":
        return OF_BASIS
    if isinstance(data, DomainsConfig) and has_classes and known.reads in ("rows", "images"):
        return OF_DOMAINS
    if kind == "encoder":
        head = getattr(model, "head", None)
        if head not in OF_HEADS:
            raise ConfigError(
                f"an encoder with head={head!r} has no kind of [data] to be trained on; "
                f"{' and '.join(map(repr, OF_HEADS))} have, others are trained in Python, by "
                "ffnlab.learning.backprop and a loss"
            )
        return OF_HEADS[head]
    if kind == "uvit":
        if getattr(model, "classes", None) is not None:
            raise ConfigError(
                "a model of kind 'uvit' that is told of classes has no kind of [data] to be "
                "trained on; leave classes out, or train it in Python"
            )
        return NOISED
    reads = reads_of(model)
    if reads == "channels":
        from ffnlab.cli.inputs.channels import channel_reading  # which needs this module

        return channel_reading(model)  # type: ignore[arg-type]
    if kind == "hypernet":
        check_generated(model, reads)
    if reads not in READINGS:
        raise ConfigError(
            f"a model of kind {kind!r} reads {reads}, which no kind of [data] gives; train it in "
            "Python, by a rule and a loss of its own"
        )
    has_none = KINDS[kind or ""].classes is not None and KINDS[kind or ""].classes(model) is None
    if reads == "images" and has_none:
        raise ConfigError(
            f"a model of kind {kind!r} with classes=None has no kind of [data] to be trained on; "
            "set classes"
        )
    return READINGS[reads]


def check_generated(model: Any, reads: str) -> None:
    """Raises ConfigError unless a hypernetwork of one task gives the weights of a classifier."""
    why = None
    if model.spec.tasks > 1:
        why = f"tasks={model.spec.tasks} is told which task a batch is of"
    elif reads not in ("rows", "images") or KINDS["hypernet"].classes(model) is None:
        why = f"a target of kind {kind_of(model.target)!r} is no classifier of rows or images"
    if why:
        raise ConfigError(
            f"a model of kind 'hypernet' has no kind of [data] to be trained on, as {why}; train "
            "it in Python, by a rule and a loss (ffnlab.learning.generated)"
        )


def by_name(loss: Loss) -> Loss:
    """A loss whose batches hold a model's arguments by their names, see `called`."""

    @functools.wraps(loss)
    def named(model: Callable, batch: PyTree) -> tuple:
        return loss(functools.partial(called, model), batch)

    return named


def inputs_of(batch: PyTree) -> PyTree:
    """What of a batch the model is given; of two domains, the source."""
    if isinstance(batch, tuple):
        return batch[0].x if isinstance(batch[0], Labelled) else batch[0]
    return batch


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


def of_source(model: Callable, batch: PyTree) -> tuple:
    """Cross-entropy of the source's classes; the target is not looked at."""
    return measuring(labelled)(model, batch[0])


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


def of_arrays(data: object) -> Loss:
    """Cross-entropy of classes; batch norms, where there are some, in training form."""
    return measuring(distilled() if getattr(data, "teacher", "") else labelled)


IMAGES = Reading((ImagesConfig, RecordsConfig), "images or records", of_arrays, arrays)
# Of models that find the noise in images, whose classes are not looked at; the rest
NOISED = Reading((ImagesConfig, RecordsConfig), "images or records", lambda data: denoising, arrays)
# by what a kind reads (`ffnlab.formats.kinds.Kind`) …
READINGS: Mapping[str, Reading] = MappingProxyType(
    {
        "tokens": Reading(
            (DataConfig,),
            "text",
            lambda data: packed_next_token if data.packed else next_token,
            stream,
        ),
        "rows": IMAGES,
        "images": IMAGES,
        "graphs": Reading(
            (GraphConfig, BlockModelConfig), "a graph", lambda data: by_name(masked), whole_graph
        ),
        "networks": Reading(
            (NetworksConfig,),
            "networks",
            lambda data: meta_loss(reg=data.reg, alpha=data.alpha),
            first_network,
        ),
        "fields": Reading((WeatherConfig,), "weather", weather_loss, weather_batch),
        "sequences": Reading(
            (SequencesConfig,), "sequences of numbers", lambda data: squares, pairs_of
        ),
    }
)
# … of decoders that hear, the loss being of a model that does (`ffnlab.routing.pal.heard`) …
SPEECH = Reading((SpeechConfig,), "speech", lambda data: masked, speech)
# … or read images between captions …
CAPTIONED = Reading(
    (CaptionedConfig,), "text or captioned images", lambda data: packed_next_token, between_captions
)
# … of classifiers that two domains are shown …
OF_DOMAINS = Reading(
    (DomainsConfig,), "images, records or two domains", lambda data: of_source, two_domains
)
# … of networks that learn where basis vectors go …
OF_BASIS = Reading(
    (PermutationConfig,),
    "images, records or a permutation",
    lambda data: one_hot_squares,
    whole_basis,
)
# … or groups of summaries, and drop some …
OF_GROUPS = Reading(
    (ImagesConfig, RecordsConfig, HeteroConfig),
    "images, records or a graph of several kinds",
    lambda data: keyed(of_arrays(data)),
    grouped,
)
# … and of encoders by their head.
OF_HEADS: Mapping[str, Reading] = MappingProxyType(
    {
        "masked": Reading((DataConfig,), "text", lambda data: by_name(masked), hidden),
        "classes": Reading(
            (TextsConfig,), "texts with classes", lambda data: by_name(labelled), texts
        ),
        "span": Reading((QuestionsConfig,), "questions", lambda data: by_name(span), windows),
    }
)
