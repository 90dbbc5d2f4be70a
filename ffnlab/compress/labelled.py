"""Inputs with classes as the task of a job: accuracy and cross-entropy on what is held out."""

import dataclasses
import hashlib
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ffnlab.compress.report import Score
from ffnlab.compress.task import Cost
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.formats import Tokenizer
from ffnlab.models import account
from ffnlab.models.calibration import called
from ffnlab.models.cost import multiply_adds
from ffnlab.progress import track
from ffnlab.recipes import Calibration, Evaluation, Recipe

__all__ = ["LabelledTask"]

TURNS, REPEATS = 5, 4  # of the speed: turns of every model, calls in each


@dataclasses.dataclass(frozen=True, eq=False)
class LabelledTask:
    """A classifier and examples for it; see `ffnlab.compress.task.Task`.

    In a recipe `tokens` and `window` mean nothing here: `samples` of [calibration] and [evaluation]
    says how many examples are used, evenly spaced, all of them where it is not given.

    Attributes:
      train: examples to calibrate on, x [n, ...] as the model takes it, or a mapping of such arrays
        by the names of its arguments.
      test: examples to score.
      source: what they are, in a few words.
      item: what one of them is called.
      tokenizer: of a model that reads texts.
    """

    train: Labelled
    test: Labelled
    source: str
    item: str = "image"
    tokenizer: Tokenizer | None = None
    scores: ClassVar[tuple[Score, ...]] = (
        Score("nats", "cross-entropy, nats", "less"),
        Score("accuracy", "accuracy", "more"),
    )
    axis: ClassVar[str] = "accuracy"
    phase: ClassVar[str] = "speed"

    @property
    def pace(self) -> str:
        """What speed is measured in."""
        return f"{self.item}s/s"

    def problems(self, model: Any, recipe: Recipe) -> list[str]:
        """Outputs that are no scores of classes, and labels beyond them."""
        try:
            out = jax.eval_shape(called, model, _one(self.test.x))
        except (TypeError, ValueError) as error:
            shape = jax.tree.map(lambda leaf: leaf.shape[1:], self.test.x)
            return [f"the model does not take {self.item}s of shape {shape}: {error}"]
        if not hasattr(out, "shape") or len(out.shape) != 2:
            return [f"the model gives {out}; scores [b, classes] are expected"]
        most = max(int(part.y.max(initial=0)) for part in (self.train, self.test))
        if most >= out.shape[1]:
            return [f"label {most} of {self.source}; the model has {out.shape[1]} classes"]
        return []

    def calibration(self, model: Any, settings: Calibration) -> list[PyTree]:
        """Batches of training inputs, whole ones."""
        wanted = settings.samples or len(self.train.y)
        if len(self.train.y) < wanted or wanted < settings.batch:
            raise ConfigError(
                f"{self.source} has {len(self.train.y)} examples to calibrate on; "
                f"samples = {wanted} in batches of {settings.batch} are asked for"
            )
        count = wanted // settings.batch
        chosen = spread(len(self.train.y), count * settings.batch).reshape(count, settings.batch)
        return [_rows(self.train.x, rows) for rows in chosen]

    def held_out(self, model: Any, settings: Evaluation) -> Labelled:
        """The examples that are scored."""
        wanted = settings.samples or len(self.test.y)
        if not 0 < wanted <= len(self.test.y):
            raise ConfigError(
                f"{self.source} has {len(self.test.y)} held-out examples; samples = {wanted} "
                "are asked for"
            )
        chosen = spread(len(self.test.y), wanted)
        return Labelled(_rows(self.test.x, chosen), self.test.y[chosen])

    def counts(self, samples: Labelled) -> Mapping[str, int]:
        """Examples."""
        return {f"{self.item}s": len(samples.y)}

    def quality(
        self, model: Any, samples: Labelled, batch: int, *, label: str, progress: bool = False
    ) -> Mapping[str, float]:
        """Mean cross-entropy and share of right answers."""
        nats, right, n = 0.0, 0, len(samples.y)
        for start in track(range(0, n, batch), label, enabled=progress):
            part = slice(start, min(start + batch, n))
            count = part.stop - start
            x = _rows(samples.x, start + np.arange(batch) % count)  # the last batch is filled up
            log_p = np.asarray(_log_probabilities(model, x), np.float64)[:count]
            nats -= float(np.take_along_axis(log_p, samples.y[part][:, None], 1).sum())
            right += int((log_p.argmax(1) == samples.y[part]).sum())
        if not math.isfinite(nats):
            raise NumericalError(
                f"{label}: the mean loss on held-out {self.item}s is {nats / n} nats; the model is "
                "broken at this point: leave out the last stage, or make it milder"
            )
        return {"nats": nats / n, "accuracy": right / n}

    def cost(self, model: Any, prepared: Any, samples: Labelled, batch: int) -> Cost:
        """What one example costs, its products counted."""
        products = multiply_adds(called, model, _one(samples.x))
        return Cost(account.parameters(model), account.nbytes(model), 0, 2.0 * products)

    def speeds(self, samples: Labelled, *models: Any) -> list[float]:
        """Examples per second in one batch of those that are scored, of up to 64."""
        count = min(len(samples.y), 64)
        x = jax.tree.map(jnp.asarray, _rows(samples.x, np.arange(count)))
        seconds: list[list[float]] = [[] for _ in models]
        for turn in range(TURNS + 1):
            for i, model in enumerate(models):
                spent = timed(lambda model=model: _log_probabilities(model, x), REPEATS)
                if turn:  # the first compiles
                    seconds[i].append(spent)
        return [REPEATS * count / statistics.median(turns) for turns in seconds]

    def save(self, folder: Path) -> None:
        """Writes the tokenizer of a model that reads texts."""
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def as_json(self) -> dict[str, object]:
        """Source, and SHA-256 and number of the examples of both parts."""
        parts = {"train": self.train, "held_out": self.test}
        found: dict[str, object] = {"source": self.source}
        for name, part in parts.items():
            found[f"{name}_sha256"] = _digest(part)
            found[f"{name}_{self.item}s"] = len(part.y)
        return found


def spread(n: int, wanted: int) -> np.ndarray:
    """Indices of some of n examples, evenly spaced: folders are sorted by class.

    >>> spread(6, 3).tolist(), spread(3, 3).tolist()
    ([0, 2, 4], [0, 1, 2])
    """
    return np.arange(wanted) * n // wanted


@jax.jit
def _log_probabilities(model: Any, x: PyTree) -> jax.Array:
    return jax.nn.log_softmax(called(model, x).astype(jnp.float32), axis=-1)


def _rows(x: PyTree, chosen: np.ndarray) -> PyTree:
    return jax.tree.map(lambda leaf: leaf[chosen], x)


def _one(x: PyTree) -> PyTree:
    """One input, abstract."""
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), x)


def timed(call: Callable[[], jax.Array], repeats: int) -> float:
    """Seconds that some calls take."""
    start = time.perf_counter()
    for _ in range(repeats):
        jax.block_until_ready(call())
    return time.perf_counter() - start


def _digest(part: Labelled) -> str:
    found = hashlib.sha256()
    for array in jax.tree.leaves(part):
        found.update(repr((array.shape, str(array.dtype))).encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
