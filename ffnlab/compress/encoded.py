"""Text as the task of a job for an encoder: hidden tokens found again, or vectors that stay.

An encoder with a masked head is scored by the tokens that are hidden from it. One without has no
figure of its own on plain text: it is scored by how near its vectors of the text stay to those of
the model that the job was given. (One with classes is scored on texts with classes, by
`ffnlab.compress.LabelledTask`.)
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab.compress.labelled import timed
from ffnlab.compress.report import Score
from ffnlab.compress.task import Cost
from ffnlab.compress.text import Text, encode
from ffnlab.data import MaskedWindows, Masking, masked_windows, masking_of
from ffnlab.data.text.documents import around, check_ids
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.formats import Tokenizer
from ffnlab.models import Encoder, account
from ffnlab.models.calibration import called
from ffnlab.models.cost import multiply_adds
from ffnlab.models.encoder import sentence_vectors
from ffnlab.parallel import held_out_masked
from ffnlab.recipes import Calibration, Evaluation, Recipe

__all__ = ["EncoderTask"]

TURNS, REPEATS, ROWS = 5, 2, 8  # of the speed: turns of every model, calls in each, rows of a call
HIDDEN = (
    Score("bits_per_token", "bits per hidden token", "less"),
    Score("found", "hidden tokens found", "more"),
)
VECTORS = (Score("cosine", "cosine to the original's vectors", "more"),)


@dataclasses.dataclass(frozen=True)
class EncoderTask:
    """An encoder and text for it; see `ffnlab.compress.task.Task`.

    In a recipe `window` is the length of a row with what stands around a text, cut to what the
    model takes; 15 % of the ordinary tokens of held-out rows are hidden, always the same ones.

    Attributes:
      tokenizer: of the model.
      text: what to calibrate and to measure on.
      original: the model whose vectors are compared, where it has no masked head; else None.
    """

    tokenizer: Tokenizer
    text: Text
    original: Encoder | None = None
    item: ClassVar[str] = "token"
    pace: ClassVar[str] = "encode tok/s"
    phase: ClassVar[str] = "encode"

    @classmethod
    def of(cls, model: Encoder, tokenizer: Tokenizer, text: Text) -> "EncoderTask":
        """The task for a model, by its head."""
        return cls(tokenizer, text, None if model.config.head == "masked" else model)

    @property
    def scores(self) -> tuple[Score, ...]:
        """Of hidden tokens, or of vectors."""
        return HIDDEN if self.original is None else VECTORS

    @property
    def axis(self) -> str:
        """The first of the scores."""
        return self.scores[0].name

    def problems(self, model: Any, recipe: Recipe) -> list[str]:
        """None beside what the data says of itself."""
        if not isinstance(model, Encoder):
            raise ConfigError(f"model is a {type(model).__name__}; an Encoder is accepted")
        return []

    def calibration(self, model: Encoder, settings: Calibration) -> list[dict[str, np.ndarray]]:
        """Batches {"tokens", "valid"} of training text, evenly spaced, whole ones."""
        found = self._windows(self.text.train, model, settings.window, settings.tokens)
        count, length = found.tokens.shape
        count -= count % settings.batch
        if not count:
            raise ConfigError(
                f"{self.text.source} gives {len(found.tokens)} windows of {length} tokens to "
                f"calibrate on; one batch of {settings.batch} is needed: give more text, or change "
                "[calibration]"
            )
        rows = {"tokens": found.tokens[:count], "valid": found.valid[:count]}
        starts = range(0, count, settings.batch)
        return [{name: a[i : i + settings.batch] for name, a in rows.items()} for i in starts]

    def held_out(self, model: Encoder, settings: Evaluation) -> MaskedWindows:
        """Windows of the held-out text; nothing is hidden where vectors are compared."""
        return self._windows(self.text.held_out, model, settings.window, settings.tokens)

    def counts(self, samples: MaskedWindows) -> Mapping[str, int]:
        """Rows, their tokens, and how many of them were hidden."""
        found = {"tokens": int(samples.valid.sum()), "windows": len(samples.tokens)}
        hidden = int((samples.targets >= 0).sum())
        return found | ({"hidden": hidden} if self.original is None else {})

    def quality(
        self,
        model: Encoder,
        samples: MaskedWindows,
        batch: int,
        *,
        label: str,
        progress: bool = False,
    ) -> Mapping[str, float]:
        """Bits of a hidden token and the share found; or the mean cosine of the rows' vectors."""
        del progress
        if self.original is None:
            bits, found = held_out_masked(functools.partial(_output, model), samples, batch)
            scores = {"bits_per_token": bits, "found": found}
        else:
            found = [
                _cosines(model, self.original, part.tokens, part.valid)
                for part in samples.batches(batch)
            ]
            # The last batch is filled up with rows that do not count.
            cosines = np.concatenate(found)[: len(samples.tokens)]
            scores = {"cosine": float(cosines.mean(dtype=np.float64))}
        if not all(map(np.isfinite, scores.values())):
            raise NumericalError(
                f"{label}: {scores} on held-out text; the model is broken at this point: leave out "
                "the last stage, or make it milder"
            )
        return scores

    def cost(self, model: Encoder, prepared: Encoder, samples: MaskedWindows, batch: int) -> Cost:
        """What a token costs in a row of one window, its products counted."""
        length = samples.tokens.shape[1]
        row = {"tokens": jax.ShapeDtypeStruct((1, length), np.int32)}
        products = multiply_adds(called, model, row) / length
        return Cost(account.parameters(model), account.nbytes(model), 0, 2.0 * products)

    def speeds(self, samples: MaskedWindows, *models: Any) -> list[float]:
        """Tokens per second in one batch of rows."""
        rows = {"tokens": jnp.asarray(samples.tokens[:ROWS])}
        seconds: list[list[float]] = [[] for _ in models]
        for turn in range(TURNS + 1):
            for i, model in enumerate(models):
                spent = timed(lambda model=model: _output(model, rows), REPEATS)
                if turn:  # the first compiles
                    seconds[i].append(spent)
        return [REPEATS * rows["tokens"].size / statistics.median(turns) for turns in seconds]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer."""
        self.tokenizer.save(folder)

    def as_json(self) -> dict[str, object]:
        """Source, split rule, and SHA-256 and size of both parts."""
        return self.text.as_json()

    def _windows(self, text: bytes, model: Encoder, window: int, tokens: int) -> MaskedWindows:
        """Rows of a text: all of it where `tokens` is 0, else evenly spaced ones."""
        config = model.config
        words, _ = encode(text, self.tokenizer, tokens)
        if not len(words.tokens):
            raise ConfigError(f"{self.text.source} has no tokens: give more text")
        check_ids(words.tokens, config.vocab)
        found = masked_windows(
            words.tokens,
            min(window, config.max_positions),
            self._masking(config.vocab),
            words.counted,
            self.text.source,
        )
        wanted = math.ceil(tokens / found.tokens.shape[1])
        if 0 < wanted < len(found.tokens):
            chosen = np.linspace(0, len(found.tokens) - 1, wanted).astype(int)
            found = MaskedWindows(*(array[chosen] for array in found))
        return found

    def _masking(self, vocab: int) -> Masking:
        """How tokens are hidden: none where vectors are compared."""
        if self.original is None:
            return masking_of(self.tokenizer, vocab)
        first, last = around(self.tokenizer)
        return Masking(0, vocab, (), tuple(first), tuple(last), share=0.0)


@jax.jit
def _output(model: Encoder, inputs: Mapping[str, Array]) -> Float[Array, "b *s"]:
    return called(model, inputs)


@jax.jit
def _cosines(
    model: Encoder,
    original: Encoder,
    tokens: Int[Array | np.ndarray, "b t"],
    valid: Bool[Array | np.ndarray, "b t"],
) -> Float[Array, "b"]:
    """Cosine of the two vectors of each row."""
    a, b = (sentence_vectors(m.hidden(tokens, valid=valid), valid) for m in (model, original))
    return jnp.einsum("bd,bd->b", a, b)
