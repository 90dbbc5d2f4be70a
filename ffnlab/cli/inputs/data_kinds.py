"""`[data]` of a training file, of each kind: text, questions, images, a graph, …; their options."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from ffnlab.cli.inputs.channel_kinds import CellFreeConfig, CellularConfig
from ffnlab.cli.inputs.field_kinds import WeatherConfig
from ffnlab.cli.inputs.graph_kinds import (
    BlockModelConfig,
    GraphConfig,
    HeteroConfig,
    NetworksConfig,
)
from ffnlab.cli.inputs.map_kinds import PermutationConfig, SequencesConfig
from ffnlab.cli.inputs.series_kinds import SeriesConfig
from ffnlab.errors import ConfigError, at_least

__all__ = [
    "DATA_KINDS",
    "AnyData",
    "BlockModelConfig",
    "CaptionedConfig",
    "DataConfig",
    "DomainsConfig",
    "GraphConfig",
    "HeteroConfig",
    "ImagesConfig",
    "NetworksConfig",
    "PermutationConfig",
    "QuestionsConfig",
    "RecordsConfig",
    "SequencesConfig",
    "SeriesConfig",
    "SpeechConfig",
    "TextsConfig",
    "WeatherConfig",
]


# Shape of one input of the domains that have a name.
DOMAINS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "moons": (2,),
        "turned_moons": (2,),
        "digits": (8, 8, 3),
        "photographs": (8, 8, 3),
        "books": (5000,),
        "dvd": (5000,),
        "electronics": (5000,),
    }
)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The text and how it is cut.

    Attributes:
      text: "stdlib" (the running interpreter's standard library), "stdlib-validation" (its training
        part alone, of which one module in 60 is scored: to choose settings on), or files.
      held_out: files to score on; only with files to train on, whose last tenth serves without.
      batch: rows of a batch.
      length: predictions in a row.
      stride: of the held-out windows.
      tokenizer: folder with a tokenizer.json; "" takes bytes as tokens.
      packed: rows keep documents apart: none is attended to, or predicted from, another.
    """

    text: str | tuple[str, ...] = "stdlib"
    held_out: tuple[str, ...] = ()
    batch: int = 8
    length: int = 256
    stride: int = 128
    tokenizer: str = ""
    packed: bool = False

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, length=self.length, stride=self.stride)


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Images with classes, values scaled to [0, 1]; rows are images flattened.

    Attributes:
      images: "digits" (8 x 8, of scikit-learn), "mnist" (that of FFNLAB_DATA), or a folder: with
        IDX files named as MNIST's, or with image files in one subfolder per class.
      held_out: folder to score on, like a folder of image files; one image in ten serves without.
        The others have test images of their own.
      size: height and width; image files are resized to it, the others must have it.
      colour: image files have three channels, else one.
      batch: images of a batch.
      threads: that read image files ahead.
      teacher: directory of a trained model of the same images and classes, whose answers are
        learned too (`ffnlab.losses.distilled`); "" for none.
    """

    images: str = "digits"
    held_out: str = ""
    size: tuple[int, ...] = (8, 8)
    colour: bool = False
    batch: int = 32
    threads: int = 4
    teacher: str = ""

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        at_least(0, threads=self.threads)
        if len(self.size) != 2 or min(self.size) < 1:
            raise ConfigError(f"size={list(self.size)} must be a height and a width, at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image, (h, w, c)."""
        return (*self.size, 3 if self.colour else 1)


@dataclasses.dataclass(frozen=True)
class RecordsConfig:
    """Records of an input and a class each.

    Attributes:
      records: a safetensors file with a tensor of inputs and one of classes, or a prepared dataset
        of TensorFlow Datasets (folder of one version, or a name that it knows).
      shape: of one input.
      inputs, label: names of the tensors, or of the features.
      split, held_out: of a dataset, to train and to score on; in a file one record in ten is held
        out.
      scale: inputs are multiplied by it; 1/255 makes bytes numbers in [0, 1].
      batch: records of a batch.
      threads: that read a dataset ahead.
    """

    records: str
    shape: tuple[int, ...]
    inputs: str = "image"
    label: str = "label"
    split: str = "train"
    held_out: str = "test"
    scale: float = 1.0
    batch: int = 32
    threads: int = 4

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        at_least(0, threads=self.threads)
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"shape={list(self.shape)} must be one or more sides, at least 1")


@dataclasses.dataclass(frozen=True)
class SpeechConfig:
    """Spoken digits, a question about each and its answer, the digit's character.

    Attributes:
      speakers: those that are held out, to score on.
      recordings: "fsdd" (that of FFNLAB_DATA), or a folder or archive of DIGIT_SPEAKER_TAKE.wav.
      encoders: what the model hears by, in the order of its `audio.widths`: "" for patches of
        log-mel, or a folder with an encoder of sound, which stays as it is.
      question: text before the answer, as bytes.
      seconds: of each recording.
      size: frames (10 ms) of a row of features, see `ffnlab.data.sound_rows`.
      cache: folder in which encoders' features are kept; "" for none.
      batch: recordings of a batch.
    """

    speakers: tuple[str, ...]
    recordings: str = "fsdd"
    encoders: tuple[str, ...] = ("",)
    question: str = "digit = "
    seconds: int = 1
    size: int = 8
    cache: str = ""
    batch: int = 32

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, seconds=self.seconds, size=self.size)
        if not self.question or not self.encoders:
            raise ConfigError(
                f"question={self.question!r}, encoders={list(self.encoders)}: a question of one "
                "byte or more and an encoder or more are accepted"
            )


@dataclasses.dataclass(frozen=True)
class CaptionedConfig:
    """Images as tokens between two captions, for a decoder of text and images.

    A row is <start> "a seven ", an image of 16 levels of grey, "it is seven"; of half the rows the
    first caption does not tell. Ids: 27 of letters, the start, the levels (28 to 43).

    Attributes:
      images: "digits" (8 x 8, of scikit-learn), "mnist" (that of FFNLAB_DATA), or a folder, see
        kind "images"; subfolders are named in small letters.
      held_out: folder to score on, like a folder of image files; one image in ten serves without.
      size: height and width; image files are resized to it, the others must have it.
      batch: rows of a batch.
    """

    images: str = "digits"
    held_out: str = ""
    size: tuple[int, ...] = (8, 8)
    batch: int = 16

    def __post_init__(self) -> None:
        ImagesConfig(self.images, self.held_out, self.size, batch=self.batch)


@dataclasses.dataclass(frozen=True)
class DomainsConfig:
    """Inputs with classes of a source, and inputs of a target whose classes only score.

    A domain is "moons" or "turned_moons" (two half circles, and the same ones turned), "digits" or
    "photographs" (8 x 8 of scikit-learn in three colours, and others of them on photographs),
    "books", "dvd" or "electronics" (counts of 5000 words in reviews, of FFNLAB_DATA), or a
    safetensors file with a tensor of inputs and one of classes.

    Attributes:
      source: the domain whose classes are learned.
      target: the domain that has none while it is learned from.
      batch: rows of the source in a batch.
      target_batch: rows of the target; 0 for as many as of the source.
      inputs, label: names of the tensors in files.
      shape: of one input in files.
    """

    source: str = "moons"
    target: str = "turned_moons"
    batch: int = 32
    target_batch: int = 0
    inputs: str = "image"
    label: str = "label"
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch)
        at_least(0, target_batch=self.target_batch)
        shapes = [self.shape_of(name) for name in (self.source, self.target)]
        if shapes[0] != shapes[1]:
            raise ConfigError(
                f"source={self.source!r} has inputs of shape {list(shapes[0])}, target="
                f"{self.target!r} of {list(shapes[1])}; both domains need one"
            )

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Of one input of a domain.

        Raises:
          ConfigError: it is none, or a file whose shape is not said.
        """
        if name in DOMAINS:
            return DOMAINS[name]
        if not name.endswith(".safetensors"):
            known = ", ".join(map(repr, DOMAINS))
            raise ConfigError(f"{name!r} is no domain; {known} are, and safetensors files")
        if not self.shape or min(self.shape) < 1:
            raise ConfigError(f"shape={list(self.shape)}: say that of one input of {name}")
        return self.shape

    @property
    def rows(self) -> int:
        """Rows of both domains in a batch."""
        return self.batch + self.target_rows(self.batch)

    def target_rows(self, rows: int) -> int:
        """Rows of the target in a batch with so many of the source."""
        return self.target_batch or rows


@dataclasses.dataclass(frozen=True)
class TextsConfig:
    """Texts with classes; one in ten is held out where nothing else is.

    Attributes:
      texts: "polarity" (sentences of film reviews, of FFNLAB_DATA) or a file of JSON lines, an
        object {"text": "…", "label": …} each; labels are numbers, or names.
      held_out: file to score on, like that.
      tokenizer: folder with a tokenizer.json; "" takes bytes as tokens.
      length: tokens of a row at most; longer texts lose their ends.
      batch: texts of a batch.
    """

    texts: str = "polarity"
    held_out: str = ""
    tokenizer: str = ""
    length: int = 128
    batch: int = 32

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, length=self.length)
        if self.held_out and self.texts == "polarity":
            raise ConfigError(f"held_out={self.held_out!r}: one in ten of 'polarity' is held out")


@dataclasses.dataclass(frozen=True)
class QuestionsConfig:
    """Questions whose answers are spans of a text; the texts are cut into windows.

    Attributes:
      questions: "xquad" (the English ones of FFNLAB_DATA) or a file in the format of SQuAD.
      held_out: file to score on; the questions of one article in ten serve without.
      tokenizer: folder with a tokenizer.json; "" takes bytes as tokens.
      length: tokens of a window.
      stride: tokens of the text between the starts of two windows.
      longest: tokens of an answer that is looked for.
      batch: windows of a batch.
    """

    questions: str = "xquad"
    held_out: str = ""
    tokenizer: str = ""
    length: int = 384
    stride: int = 128
    longest: int = 30
    batch: int = 16

    def __post_init__(self) -> None:
        at_least(1, batch=self.batch, length=self.length, stride=self.stride, longest=self.longest)


AnyData = (
    DataConfig
    | TextsConfig
    | QuestionsConfig
    | ImagesConfig
    | RecordsConfig
    | GraphConfig
    | BlockModelConfig
    | HeteroConfig
    | SpeechConfig
    | CaptionedConfig
    | DomainsConfig
    | PermutationConfig
    | SequencesConfig
    | NetworksConfig
    | CellularConfig
    | CellFreeConfig
    | WeatherConfig
    | SeriesConfig
)
# What `kind` may be in [data], the one without it first.
DATA_KINDS: Mapping[str, type] = MappingProxyType(
    {
        "text": DataConfig,
        "texts": TextsConfig,
        "questions": QuestionsConfig,
        "images": ImagesConfig,
        "records": RecordsConfig,
        "graph": GraphConfig,
        "block_model": BlockModelConfig,
        "hetero": HeteroConfig,
        "speech": SpeechConfig,
        "captioned": CaptionedConfig,
        "domains": DomainsConfig,
        "permutation": PermutationConfig,
        "sequences": SequencesConfig,
        "networks": NetworksConfig,
        "cellular": CellularConfig,
        "cell_free": CellFreeConfig,
        "weather": WeatherConfig,
        "series": SeriesConfig,
    }
)
