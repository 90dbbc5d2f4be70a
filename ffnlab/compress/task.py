"""What a model is for: how a job calibrates and scores it, what it costs and how fast it is.

A job knows models and recipes; all that depends on what goes in and comes out is asked of its task.
`ffnlab.compress.language` is text for a decoder, `ffnlab.compress.encoded` text for an encoder,
`ffnlab.compress.labelled` inputs with classes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

from ffnlab.compress.report import Score
from ffnlab.recipes import Calibration, Evaluation, Recipe

__all__ = ["Cost", "Task"]

Samples = TypeVar("Samples")


class Cost(NamedTuple):
    """What a model needs; see `ffnlab.models.account`.

    Attributes:
      parameters: numbers that it has.
      nbytes: stored, with scales and thresholds.
      cache_bytes: of keys and values per token of context; 0 where there are none.
      flops: per item of the task.
    """

    parameters: int
    nbytes: int
    cache_bytes: int
    flops: float


@runtime_checkable
class Task(Protocol[Samples]):
    """What a job asks of the data that a model is for.

    Attributes:
      item: what costs and speeds are per: "token", "image".
      scores: the figures of quality; the first is compared when what was written is loaded again.
      axis: name of the one that pictures show.
      pace: what speed is measured in, "decode tok/s".
      phase: what the time of measuring speed is counted as.
    """

    item: str
    scores: tuple[Score, ...]
    axis: str
    pace: str
    phase: str

    def problems(self, model: Any, recipe: Recipe) -> list[str]:
        """What of a recipe does not fit the model, a sentence each."""
        ...

    def calibration(self, model: Any, settings: Calibration) -> list:
        """Batches as the model takes them; ConfigError where there is too little data."""
        ...

    def held_out(self, model: Any, settings: Evaluation) -> Samples:
        """What is scored; ConfigError where there is too little data."""
        ...

    def counts(self, samples: Samples) -> Mapping[str, int]:
        """How much is scored, for the report."""
        ...

    def quality(
        self, model: Any, samples: Samples, batch: int, *, label: str, progress: bool
    ) -> Mapping[str, float]:
        """Every score by name; NumericalError where a loss is NaN or infinite."""
        ...

    def cost(self, model: Any, prepared: Any, samples: Samples, batch: int) -> Cost:
        """What the model needs, as it is stored and as it is run."""
        ...

    def speeds(self, samples: Samples, *models: Any) -> Sequence[float]:
        """Items per second of several prepared models, measured in turns."""
        ...

    def save(self, folder: Path) -> None:
        """Writes what belongs beside the model, such as its tokenizer."""
        ...

    def as_json(self) -> dict[str, object]:
        """What the data is, with digests: a job that is resumed has the same."""
        ...
