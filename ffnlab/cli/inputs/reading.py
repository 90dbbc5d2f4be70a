"""What a model reads when it is trained, and the loss that it learns by: one line for each sort."""

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxtyping import PyTree

from ffnlab.cli.inputs.batch_shapes import (
    arrays,
    between_captions,
    first_network,
    grouped,
    hidden,
    pairs_of,
    speech,
    stream,
    texts,
    two_domains,
    whole_basis,
    whole_graph,
    windows,
)
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
from ffnlab.cli.inputs.series_kinds import SeriesConfig, series_batch, series_loss
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError
from ffnlab.formats.kinds import KINDS, kind_of, reads_of
from ffnlab.graphs import keyed
from ffnlab.learning.exact_permutations.ensemble import one_hot_squares
from ffnlab.learning.squares import squares
from ffnlab.losses import (
    InformedLoss,
    Loss,
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

__all__ = [
    "Reading",
    "by_name",
    "inputs_of",
    "reading_of",
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


def of_source(model: Callable, batch: PyTree) -> tuple:
    """Cross-entropy of the source's classes; the target is not looked at."""
    return measuring(labelled)(model, batch[0])


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
        "series": Reading((SeriesConfig,), "series", series_loss, series_batch),
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
