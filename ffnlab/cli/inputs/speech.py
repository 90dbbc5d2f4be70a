"""The spoken digits of a training run: what is heard of each, what is asked, what is held out."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.cli.inputs.data_kinds import SpeechConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import ArrayBatches, FeatureCache, SpokenDigits, asked, fsdd, sound_rows
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer, load
from ffnlab.models import DecoderConfig
from ffnlab.routing.pal import Sounds

__all__ = ["SpeechData", "load_speech"]

PART = 64  # recordings that are scored at once


@dataclasses.dataclass(frozen=True, eq=False)
class SpeechData:
    """What a run reads.

    Attributes:
      train, held_out: (Sounds, (tokens, answers)); answers are -1 but where one is asked for.
      identity: what both are, by SHA-256 and number.
    """

    train: PyTree
    held_out: PyTree
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position."""
        return ArrayBatches(self.train, settings.data.batch, settings.run.seed)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> {"held_out_error", "held_out_accuracy"} of answers."""
        sounds, (tokens, answers) = self.held_out

        def scores(predict: Callable) -> dict[str, float]:
            right = 0
            for start in range(0, len(tokens), PART):
                # The last part is filled by repetition: one shape, one program.
                rows = np.arange(start, start + PART) % len(tokens)
                part = jax.tree.map(lambda leaf, rows=rows: leaf[rows], (sounds, tokens))
                found = np.asarray(predict(part)).argmax(-1) == answers[rows, -1]
                right += int(found[: len(tokens) - start].sum())
            accuracy = right / len(tokens)
            return {self.watched: 1 - accuracy, "held_out_accuracy": accuracy}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer, of bytes, beside a model."""
        Tokenizer.bytes().save(folder)

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_speech(data: SpeechConfig, model: DecoderConfig) -> SpeechData:
    """Reads the recordings of a run and what its encoders make of them.

    Args:
      data: where they are, and what is asked.
      model: that hears, with `audio`.
    Raises:
      ConfigError: features of other widths than the model takes, or speakers that are not there.
      FFNLabError: recordings or encoders cannot be read.
    """
    assert model.audio is not None
    widths = model.audio.widths
    digits = fsdd(None if data.recordings == "fsdd" else data.recordings)
    cache = FeatureCache(data.cache, rows=PART) if data.cache else None
    encoders = [load(place, kinds=("audio",)) if place else None for place in data.encoders]
    parts = []
    for part in digits.by_speaker(*data.speakers):
        how = {"seconds": data.seconds, "size": data.size, "cache": cache}
        rows = [sound_rows(part.waves, part.rate, encoder, **how) for encoder in encoders]
        sounds = Sounds(*map(tuple, zip(*rows, strict=True)))
        found = [features.shape[2] for features in sounds.features]
        if found != list(widths):
            raise ConfigError(
                f"encoders={list(data.encoders)} give widths {found}; the model has "
                f"audio.widths={list(widths)}"
            )
        parts.append((sounds, asked(data.question, list(map(str, part.y)))))
    train, held_out = parts
    return SpeechData(train, held_out, identity_of(data, digits))


def identity_of(data: SpeechConfig, digits: SpokenDigits) -> dict[str, str | int]:
    """The recordings by name, SHA-256 and number."""
    content = hashlib.sha256(digits.y.tobytes())
    for wave in digits.waves:
        content.update(np.ascontiguousarray(wave).tobytes())
    said = {"recordings": data.recordings, "speakers": ",".join(digits.names)}
    return {**said, "recordings_sha256": content.hexdigest(), "number": len(digits.y)}
