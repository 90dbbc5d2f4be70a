"""The images or records of a training run: arrays or sources, and what is held out of them."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from ffnlab.cli.inputs.batch_shapes import input_shape
from ffnlab.cli.inputs.data_kinds import ImagesConfig, RecordsConfig
from ffnlab.cli.inputs.named_images import has_idx
from ffnlab.cli.inputs.teacher import sha256_of, taught, teacher_of
from ffnlab.cli.training import TrainConfig
from ffnlab.data import (
    ArrayBatches,
    ImageFolder,
    Labelled,
    RecordBatches,
    digits,
    mnist,
    tfds_records,
)
from ffnlab.data.batches.records import Source
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.kinds import KINDS
from ffnlab.formats.safetensors import open_file
from ffnlab.models import ImageInput
from ffnlab.parallel import held_out_accuracy, held_out_error, held_out_noise

__all__ = ["LabelledData", "Reader", "both_parts", "images", "load_labelled", "records", "split"]

HELD_OUT_SHARE = 10  # without held-out data of its own, one record in so many is held out
PART = 256  # records of a source that are held in memory at once while it is scored


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledData:
    """What a run reads.

    Attributes:
      train: records {"x", "y"} by index, or arrays of them.
      held_out: parts of what is scored; they can be gone through again and again.
      identity: what both are, by SHA-256 and number.
      is_target: inputs are what the model is to give back, or to find the noise in; it has no
        classes.
      threads: that read a source ahead.
      teacher: a model whose logits belong to a batch; None for none.
    """

    train: Labelled | Source
    held_out: Iterable[Labelled]
    identity: dict[str, str | int]
    is_target: bool
    threads: int
    teacher: nnx.Module | None = None

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position: (x, y), a teacher's logits too; x alone where it is the target."""
        found = self._cut(settings.data.batch, settings.run.seed)
        return found if self.teacher is None else taught(found, self.teacher)

    def _cut(self, batch: int, seed: int) -> Callable[[int], Labelled]:
        if isinstance(self.train, Labelled):
            arrays = self.train.x if self.is_target else self.train
            return ArrayBatches(arrays, batch, seed)
        pick = (lambda r: r.x) if self.is_target else None
        return RecordBatches(self.train, batch, seed, pick, self.threads, "the data")

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> figures of what is held out; the first is watched, the lower the better."""

        def scores(predict: Callable) -> dict[str, float]:
            if settings.kind == "uvit":
                return {self.watched: held_out_noise(predict, self.held_out)}
            if self.is_target:
                return {self.watched: held_out_error(predict, self.held_out)}
            accuracy = held_out_accuracy(predict, self.held_out)
            return {self.watched: 1 - accuracy, "held_out_accuracy": accuracy}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


class Rows:
    """Some records of a source as (x, y), checked and scaled.

    Attributes:
      source: records by index.
      chosen: which of them.
      read: record -> (x, y).
    """

    def __init__(self, source: Source, chosen: np.ndarray, read: Callable[[Mapping], Labelled]):
        self.source, self.chosen, self.read = source, chosen, read

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Labelled:
        return self.read(self.source[int(self.chosen[index])])


class Parts:
    """A source in parts of arrays, read anew whenever they are gone through.

    Attributes:
      rows: records (x, y) by index.
    """

    def __init__(self, rows: Rows):
        self.rows = rows

    def __iter__(self) -> Iterator[Labelled]:
        for start in range(0, len(self.rows), PART):
            chosen = range(start, min(start + PART, len(self.rows)))
            x, y = zip(*(self.rows[i] for i in chosen), strict=True)
            yield Labelled(np.stack(x), np.asarray(y, np.int32))


def load_labelled(settings: TrainConfig) -> LabelledData:
    """Opens the images or records of a run.

    Raises:
      ConfigError: the model does not take inputs of their shape, or has fewer classes.
      FFNLabError: they cannot be read.
    """
    data, kind = settings.data, KINDS[settings.kind]
    assert isinstance(data, ImagesConfig | RecordsConfig)
    shape = input_shape(data, settings.model)
    classes = None if kind.classes is None else kind.classes(settings.model)
    teacher = None
    if isinstance(data, ImagesConfig):
        train, held_out, identity, scale = images(data, settings.model)
        if data.teacher:
            teacher = teacher_of(data.teacher, shape, classes)
            identity = identity | {"teacher_sha256": sha256_of(teacher)}
    else:
        train, held_out, identity, scale = records(data)
    read = Reader(data.shape, shape, classes, scale)
    if isinstance(train, Labelled):
        parts = [read.all(part) for part in (train, held_out)]
        return LabelledData(parts[0], parts[1:], identity, classes is None, 0, teacher)
    names = ("image", "label") if isinstance(data, ImagesConfig) else (data.inputs, data.label)
    to_pair = lambda record: read.one(record, *names)  # noqa: E731
    if held_out is None:
        mine, theirs = split(len(train))
        rows = Rows(train, mine, to_pair), Rows(train, theirs, to_pair)
    else:
        both = (train, held_out)
        rows = tuple(Rows(source, np.arange(len(source)), to_pair) for source in both)
    is_target = classes is None
    return LabelledData(rows[0], Parts(rows[1]), identity, is_target, data.threads, teacher)


@dataclasses.dataclass(frozen=True)
class Reader:
    """Makes of inputs and classes as they are stored what the model takes.

    Attributes:
      stored, shape: of one input, as stored and as the model takes it.
      classes: that the model has; None where classes are not looked at.
      scale: inputs are multiplied by it.
    """

    stored: tuple[int, ...]
    shape: tuple[int, ...]
    classes: int | None
    scale: float

    def all(self, part: Labelled) -> Labelled:
        """Arrays of inputs and classes."""
        x, y = np.asarray(part.x), np.asarray(part.y)
        if x.shape[1:] != self.stored and x.shape[1:] != self.stored[:2]:
            raise ConfigError(
                f"inputs have shape {list(x.shape[1:])}, [data] says {list(self.stored)}"
            )
        if y.shape != x.shape[:1] or not np.issubdtype(y.dtype, np.integer):
            raise FormatError(f"{len(x)} inputs with classes of {y.dtype}{list(y.shape)}")
        if self.classes is not None and len(y) and not 0 <= y.min() <= y.max() < self.classes:
            raise ConfigError(
                f"classes {y.min()} to {y.max()}; the model has classes 0 to {self.classes - 1}"
            )
        x = x.reshape(len(x), *self.shape).astype(np.float32) * np.float32(self.scale)
        return Labelled(x, y.astype(np.int32))

    def one(self, record: Mapping, inputs: str, label: str) -> Labelled:
        """One record."""
        x, y = self.all(Labelled(np.asarray(record[inputs])[None], np.asarray(record[label])[None]))
        return Labelled(x[0], y[0])


def both_parts(
    train: Labelled | Source, held_out: Labelled | Source | None, reader: Reader
) -> tuple[Labelled, Labelled]:
    """What `images` or `records` found, as arrays of what the model takes.

    Args:
      train: what to train on.
      held_out: what to score on, arrays where `train` is; None: a share of `train`.
    """
    if isinstance(train, Labelled):
        assert isinstance(held_out, Labelled)
        return reader.all(train), reader.all(held_out)
    if held_out is None:
        mine, theirs = split(len(train))
        return read(train, mine, reader), read(train, theirs, reader)
    assert not isinstance(held_out, Labelled)
    mine, theirs = np.arange(len(train)), np.arange(len(held_out))
    return read(train, mine, reader), read(held_out, theirs, reader)


def read(source: Source, chosen: np.ndarray, reader: Reader) -> Labelled:
    """Some records of a source as arrays."""
    pairs = [reader.one(source[int(i)], "image", "label") for i in chosen]
    x, y = zip(*pairs, strict=True)
    return Labelled(np.stack(x), np.asarray(y, np.int32))


def split(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of records to train on, and to score on."""
    every = np.arange(n)
    is_held_out = every % HELD_OUT_SHARE == HELD_OUT_SHARE - 1
    if not is_held_out.any():
        raise ConfigError(f"{n} records; {HELD_OUT_SHARE} are needed to hold one out")
    return every[~is_held_out], every[is_held_out]


Found = tuple[Labelled | Source, Labelled | Source | None, dict[str, str | int], float]


def images(data: ImagesConfig, model: object = None) -> Found:
    """What to train on, what to score on, the record of both, and the scale of their values.

    Args:
      model: its configuration; where that says how image files are resized, they are.
    """
    if data.images in ("digits", "mnist") or has_idx(data.images):
        if data.held_out:
            raise ConfigError(f"held_out={data.held_out!r}: {data.images} has test images")
        folder = None if data.images == "mnist" else data.images
        both = digits() if data.images == "digits" else mnist(folder)
        both = tuple(Labelled(square(part.x, data), part.y) for part in both)
        return *both, {"images": data.images} | sums(*both), 1.0
    folders = [data.images, *([data.held_out] if data.held_out else [])]
    mode = "RGB" if data.colour else "L"
    how = getattr(model, "preprocess", None) or ImageInput()
    resizing = {"resize": how.resize or None, "resample": how.resample}
    found = [ImageFolder(folder, data.size, mode=mode, **resizing) for folder in folders]  # type: ignore[arg-type]
    if found[0].classes != found[-1].classes:
        raise ConfigError(
            f"classes of {data.images} are {found[0].classes}, of {data.held_out} "
            f"{found[-1].classes}"
        )
    identity: dict[str, str | int] = {"images": data.images, "classes": ",".join(found[0].classes)}
    for name, source in zip(("train", "held_out"), found, strict=False):
        said = "".join(f"{path.name}:{path.stat().st_size}:{y};" for path, y in source.files)
        identity[f"{name}_files_sha256"] = hashlib.sha256(said.encode()).hexdigest()
        identity[name] = len(source)
    return found[0], found[1] if data.held_out else None, identity, 1 / 255


def square(x: np.ndarray, data: ImagesConfig) -> np.ndarray:
    """Rows as images of the size that [data] says."""
    side = round(x.shape[1] ** 0.5)
    if data.size != (side, side) or data.colour:
        raise ConfigError(
            f"size={list(data.size)}, colour={data.colour}: {data.images} has images of "
            f"size=[{side}, {side}] without colour"
        )
    return x.reshape(len(x), side, side, 1)


def records(data: RecordsConfig) -> Found:
    """See `images`."""
    if data.records.endswith(".safetensors"):
        file = open_file(data.records)
        both = Labelled(file.read(data.inputs), file.read(data.label))
        if len(both.x) != len(both.y):
            raise FormatError(f"{data.records}: {len(both.x)} inputs and {len(both.y)} classes")
        parts = tuple(Labelled(both.x[i], both.y[i]) for i in split(len(both.x)))
        return *parts, {"records": data.records} | sums(*parts), data.scale
    found = tuple(tfds_records(data.records, name) for name in (data.split, data.held_out))
    identity: dict[str, str | int] = {"records": data.records, "split": data.split}
    identity |= {"train": len(found[0]), "held_out": len(found[1])}
    return *found, identity, data.scale


def sums(train: Labelled, held_out: Labelled) -> dict[str, str | int]:
    """SHA-256 and number of the records of arrays."""
    found: dict[str, str | int] = {}
    for name, part in (("train", train), ("held_out", held_out)):
        content = hashlib.sha256(np.ascontiguousarray(part.x).tobytes())
        content.update(np.ascontiguousarray(part.y).tobytes())
        found |= {f"{name}_sha256": content.hexdigest(), name: len(part.x)}
    return found
