"""Text as the task of a job: perplexity and bits per byte on held-out text, speed of decoding."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from ffnlab.compress import measure
from ffnlab.compress.report import Score
from ffnlab.compress.task import Cost
from ffnlab.compress.text import Samples, Text, calibration, held_out
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder
from ffnlab.recipes import Calibration, Evaluation, Recipe

__all__ = ["TextTask"]


@dataclasses.dataclass(frozen=True)
class TextTask:
    """A decoder and text for it; see `ffnlab.compress.task.Task`.

    Attributes:
      tokenizer: of the model.
      text: what to calibrate and to measure on.
    """

    tokenizer: Tokenizer
    text: Text
    item: ClassVar[str] = "token"
    scores: ClassVar[tuple[Score, ...]] = (
        Score("perplexity", "perplexity", "less"),
        Score("bits_per_byte", "bits per byte", "less"),
    )
    axis: ClassVar[str] = "bits_per_byte"
    pace: ClassVar[str] = "decode tok/s"
    phase: ClassVar[str] = "decode"

    def problems(self, model: Decoder, recipe: Recipe) -> list[str]:
        """The windows that are longer than the model's context."""
        if not isinstance(model, Decoder):
            raise ConfigError(f"text is for a Decoder; model is a {type(model).__name__}")
        longest = model.config.max_positions
        windows = {f"stage {i}": s.calibration.window for i, s in enumerate(recipe.stages, 1)}
        windows["[evaluation]"] = recipe.evaluation.window
        return [
            f"{name}: window = {window} is longer than the model's context of {longest} tokens"
            for name, window in windows.items()
            if window > longest
        ]

    def calibration(self, model: Decoder, settings: Calibration) -> list[np.ndarray]:
        """Batches [b, t] of training text."""
        return calibration(self.text, self.tokenizer, settings, model.config.vocab)

    def held_out(self, model: Decoder, settings: Evaluation) -> Samples:
        """Windows of the held-out text."""
        return held_out(self.text, self.tokenizer, settings, model.config.vocab)

    def counts(self, samples: Samples) -> Mapping[str, int]:
        """Counted tokens, and the windows they are in."""
        return {"tokens": int(samples.counted.sum()), "windows": len(samples.tokens)}

    def quality(
        self, model: Decoder, samples: Samples, batch: int, *, label: str, progress: bool = False
    ) -> Mapping[str, float]:
        """Perplexity and bits per byte."""
        found = measure.quality(model, samples, batch, label=label, progress=progress)
        return {"perplexity": found.perplexity, "bits_per_byte": found.bits_per_byte}

    def cost(self, model: Decoder, prepared: Decoder, samples: Samples, batch: int) -> Cost:
        """What a token costs at a context of one window."""
        return measure.cost(model, prepared, samples.tokens[:batch, :-1])

    def speeds(self, samples: Samples, *models: Decoder) -> list[float]:
        """Greedy decode speed at batch 1, tokens per second."""
        return measure.decode_speeds(*models)

    def save(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save(folder)

    def as_json(self) -> dict[str, object]:
        """Source, split rule, and SHA-256 and size of both parts."""
        return self.text.as_json()
