"""The data of a run in two halves, of which what learns takes one batch each."""

import dataclasses
from collections.abc import Callable, Sequence

from ffnlab.cli.inputs.corpus import Corpus
from ffnlab.cli.inputs.labelled import LabelledData, Rows
from ffnlab.cli.training import TrainConfig
from ffnlab.data import Labelled, Zipped
from ffnlab.data.batches.records import Source
from ffnlab.errors import ConfigError

__all__ = ["halved"]


def halved(data: object, settings: TrainConfig) -> Callable[[int], object]:
    """Pairs of batches by position, of even and of odd records or documents, or of the first and
    the second half of a text that is one stream.

    Args:
      data: what the run reads; what is held out stays whole.
    Raises:
      ConfigError: data of another kind, or fewer than two records or documents.
      FFNLabError: half of the data does not fill a batch.
    """
    if not isinstance(data, Corpus | LabelledData):
        raise ConfigError(f"a {type(data).__name__} has no halves; text, images and records have")
    pair = halves(data.train)
    if min(len(half.x if isinstance(half, Labelled) else half) for half in pair) < 1:
        raise ConfigError("the data has fewer than two records or documents: no two halves")
    parts = (dataclasses.replace(data, train=half) for half in pair)  # type: ignore[arg-type]
    return Zipped(*(part.batches(settings) for part in parts))


Whole = Labelled | Source | bytes | Sequence


def halves(train: Whole) -> tuple[Whole, Whole]:
    """What is learned from, cut in two."""
    if isinstance(train, bytes):
        middle = len(train) // 2
        return train[:middle], train[middle:]
    if isinstance(train, Labelled):
        return tuple(Labelled(train.x[i::2], train.y[i::2]) for i in (0, 1))  # type: ignore
    if isinstance(train, Rows):
        return tuple(Rows(train.source, train.chosen[i::2], train.read) for i in (0, 1))  # type: ignore
    assert isinstance(train, Sequence)
    return train[::2], train[1::2]
