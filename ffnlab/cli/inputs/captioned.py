"""The captioned images of a training run: rows of two kinds of token, scored by what is named."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ffnlab.cli.inputs.data_kinds import CaptionedConfig, ImagesConfig
from ffnlab.cli.inputs.labelled import Reader, both_parts, images
from ffnlab.cli.inputs.named_images import classes_named
from ffnlab.cli.training import TrainConfig
from ffnlab.data import CaptionedDigits, Labelled, Packed, captioned
from ffnlab.data.interleaved import answered
from ffnlab.errors import ConfigError
from ffnlab.losses import packed_next_token

__all__ = ["CaptionedData", "load_captioned"]

PART = 64  # rows that are scored at once


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionedData:
    """What a run reads.

    Attributes:
      train: images as rows, with classes.
      held_out: rows of tokens to score on; every other one is told what it shows.
      names: of the classes.
      identity: what both are, by SHA-256 and number.
    """

    train: Labelled
    held_out: Packed
    names: Sequence[str]
    identity: dict[str, str | int]

    watched = "held_out_bits"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position."""
        return CaptionedDigits(self.train, settings.data.batch, settings.run.seed, self.names)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> bits per token of what is held out, and the share of untold images named.

        An image is named where every token of its answer is the likeliest after those before it.
        """
        rows, n = self.held_out, len(self.held_out.tokens)
        answers = answered(rows)[:, 1:]

        def scores(predict: Callable) -> dict[str, float]:
            bits, right = 0.0, np.zeros(n, bool)
            for start in range(0, n, PART):
                # The last part is filled by repetition: one shape, one program.
                chosen = np.arange(start, start + PART) % n
                logits = np.asarray(predict(rows.tokens[chosen]), np.float32)
                logits, kept = logits[: n - start, :-1], chosen[: n - start]
                part = Packed(*(leaf[kept] for leaf in rows))
                _, told = packed_next_token(lambda *_, found=logits, **__: found, part)
                bits += float(told["bits"] * told["count"])
                is_right = logits.argmax(-1) == part.tokens[:, 1:]
                right[kept] = (is_right | ~answers[kept]).all(1)
            predicted = int((rows.segments > 0).sum()) - n
            return {self.watched: bits / predicted, "held_out_named": float(right[1::2].mean())}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model: its tokens are not those of a text."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_captioned(data: CaptionedConfig) -> CaptionedData:
    """Reads the images of a run.

    Raises:
      ConfigError: images of another size, classes whose names are no words.
      FFNLabError: they cannot be read.
    """
    names = classes_named(data)
    whole = ImagesConfig(data.images, data.held_out, data.size, batch=data.batch)
    train, held_out, identity, scale = images(whole)
    reader = Reader(whole.shape, (int(np.prod(data.size)),), len(names), scale)
    parts = both_parts(train, held_out, reader)
    if len(parts[1].y) < 2:
        raise ConfigError(
            f"images={data.images!r}: {len(parts[1].y)} are held out, of which every other one is "
            "named; two are needed (one in ten is held out)"
        )
    told = np.arange(len(parts[1].y)) % 2 == 0
    return CaptionedData(parts[0], captioned(parts[1], told, names), names, identity)
