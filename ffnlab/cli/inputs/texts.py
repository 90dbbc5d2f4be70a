"""Texts with classes of a command: read, held out in part, and made tokens."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ffnlab.cli.inputs.data_kinds import TextsConfig
from ffnlab.cli.inputs.labelled import split
from ffnlab.cli.training import TrainConfig
from ffnlab.data import (
    ArrayBatches,
    Labelled,
    LabelledTexts,
    labelled_texts,
    sentence_polarity,
    token_rows,
)
from ffnlab.data.text.documents import check_ids
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import EncoderConfig
from ffnlab.parallel import held_out_accuracy

__all__ = ["TextsData", "load_texts", "parts_of"]


@dataclasses.dataclass(frozen=True, eq=False)
class TextsData:
    """What a run reads.

    Attributes:
      train, held_out: x {"tokens": [n, t], "valid": [n, t]}, y [n].
      tokenizer: that made the tokens.
      identity: what both are, by SHA-256 and number.
    """

    train: Labelled
    held_out: Labelled
    tokenizer: Tokenizer
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches (x, y) by position."""
        return ArrayBatches(self.train, settings.data.batch, settings.run.seed)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> figures of what is held out; the first is watched, the lower the better."""

        def scores(predict: Callable) -> dict[str, float]:
            accuracy = held_out_accuracy(predict, [self.held_out])
            return {self.watched: 1 - accuracy, "held_out_accuracy": accuracy}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer beside a model."""
        self.tokenizer.save(folder)

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_texts(data: TextsConfig, model: EncoderConfig) -> TextsData:
    """Reads the texts of a run.

    Raises:
      ConfigError: the model has fewer classes or ids, or is shorter than `length`.
      FFNLabError: texts or tokenizer cannot be read.
    """
    if data.length > model.max_positions:
        raise ConfigError(
            f"length={data.length} is more than max_positions={model.max_positions} of the model"
        )
    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else Tokenizer.bytes()
    parts, identity = parts_of(data, model)
    train, held_out = (encoded(part, tokenizer, data.length, model) for part in parts)
    return TextsData(train, held_out, tokenizer, identity)


def parts_of(
    data: TextsConfig, model: EncoderConfig
) -> tuple[tuple[LabelledTexts, LabelledTexts], dict[str, str | int]]:
    """(texts to learn from, texts held out), and what they are by SHA-256 and number.

    Raises:
      ConfigError: more classes than the model has, or too few texts to hold one out.
      FFNLabError: they cannot be read.
    """
    names = model.labels or ()
    read = lambda path: labelled_texts(path, names)  # noqa: E731
    whole = sentence_polarity() if data.texts == "polarity" else read(data.texts)
    if data.held_out:
        parts = whole, labelled_texts(data.held_out, names or whole.classes)
    else:
        parts = tuple(chosen(whole, which) for which in split(len(whole.texts)))
    most = max(int(part.y.max()) for part in parts)
    if model.classes is None or most >= model.classes:
        raise ConfigError(f"{data.texts} has classes 0 to {most}; the model has {model.classes}")
    identity: dict[str, str | int] = {"texts": data.texts, "classes": ",".join(whole.classes)}
    for name, part in zip(("train", "held_out"), parts, strict=True):
        content = hashlib.sha256("\0".join(part.texts).encode())
        content.update(part.y.tobytes())
        identity |= {f"{name}_sha256": content.hexdigest(), name: len(part.texts)}
    return parts, identity  # type: ignore[return-value]


def chosen(texts: LabelledTexts, which: Sequence[int] | np.ndarray) -> LabelledTexts:
    """Some of the texts."""
    return texts._replace(texts=tuple(texts.texts[i] for i in which), y=texts.y[which])


def encoded(
    texts: LabelledTexts, tokenizer: Tokenizer, length: int, model: EncoderConfig
) -> Labelled:
    """Texts as the model takes them; ConfigError for ids that it does not have."""
    rows = token_rows(texts.texts, tokenizer, length)
    check_ids(rows.tokens.ravel(), model.vocab)
    return Labelled(rows._asdict(), texts.y)  # type: ignore[arg-type]
