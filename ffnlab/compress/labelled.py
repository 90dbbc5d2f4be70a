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

from ffnlab.compress.report import Score
from ffnlab.compress.task import Cost
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.models import account
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
      train: examples to calibrate on, x [n, ...] as the model takes it.
      test: examples to score.
      source: what they are, in a few words.
      item: what one of them is called.
    """

    train: Labelled
    test: Labelled
    source: str
    item: str = "image"
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
        one = jax.ShapeDtypeStruct((1, *self.test.x.shape[1:]), self.test.x.dtype)
        try:
            out = jax.eval_shape(lambda model, x: model(x), model, one)
        except (TypeError, ValueError) as error:
            shape = self.test.x.shape[1:]
            return [f"the model does not take {self.item}s of shape {shape}: {error}"]
        if not hasattr(out, "shape") or len(out.shape) != 2:
            return [f"the model gives {out}; scores [b, classes] are expected"]
        most = max(int(part.y.max(initial=0)) for part in (self.train, self.test))
        if most >= out.shape[1]:
            return [f"label {most} of {self.source}; the model has {out.shape[1]} classes"]
        return []

    def calibration(self, model: Any, settings: Calibration) -> list[np.ndarray]:
        """Batches of training inputs, whole ones."""
        wanted = settings.samples or len(self.train.x)
        if len(self.train.x) < wanted or wanted < settings.batch:
            raise ConfigError(
                f"{self.source} has {len(self.train.x)} examples to calibrate on; "
                f"samples = {wanted} in batches of {settings.batch} are asked for"
            )
        count = wanted // settings.batch
        x = self.train.x[spread(len(self.train.x), count * settings.batch)]
        return list(x.reshape(count, settings.batch, *x.shape[1:]))

    def held_out(self, model: Any, settings: Evaluation) -> Labelled:
        """The examples that are scored."""
        wanted = settings.samples or len(self.test.x)
        if not 0 < wanted <= len(self.test.x):
            raise ConfigError(
                f"{self.source} has {len(self.test.x)} held-out examples; samples = {wanted} "
                "are asked for"
            )
        chosen = spread(len(self.test.x), wanted)
        return Labelled(self.test.x[chosen], self.test.y[chosen])

    def counts(self, samples: Labelled) -> Mapping[str, int]:
        """Examples."""
        return {f"{self.item}s": len(samples.x)}

    def quality(
        self, model: Any, samples: Labelled, batch: int, *, label: str, progress: bool = False
    ) -> Mapping[str, float]:
        """Mean cross-entropy and share of right answers."""
        nats, right, n = 0.0, 0, len(samples.x)
        for start in track(range(0, n, batch), label, enabled=progress):
            part = slice(start, min(start + batch, n))
            missing = start + batch - part.stop
            x = np.pad(samples.x[part], [(0, missing)] + [(0, 0)] * (samples.x.ndim - 1))
            log_p = np.asarray(_log_probabilities(model, x), np.float64)[: batch - missing]
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
        one = jax.ShapeDtypeStruct((1, *samples.x.shape[1:]), samples.x.dtype)
        products = multiply_adds(lambda model, x: model(x), model, one)
        return Cost(account.parameters(model), account.nbytes(model), 0, 2.0 * products)

    def speeds(self, samples: Labelled, *models: Any) -> list[float]:
        """Examples per second in one batch of those that are scored, of up to 64."""
        x = jnp.asarray(samples.x[:64])
        seconds: list[list[float]] = [[] for _ in models]
        for turn in range(TURNS + 1):
            for i, model in enumerate(models):
                spent = _timed(lambda model=model: _log_probabilities(model, x))
                if turn:  # the first compiles
                    seconds[i].append(spent)
        return [REPEATS * len(x) / statistics.median(turns) for turns in seconds]

    def save(self, folder: Path) -> None:
        """Nothing stands beside a classifier."""

    def as_json(self) -> dict[str, object]:
        """Source, and SHA-256 and number of the examples of both parts."""
        parts = {"train": self.train, "held_out": self.test}
        found: dict[str, object] = {"source": self.source}
        for name, part in parts.items():
            found[f"{name}_sha256"] = _digest(part)
            found[f"{name}_{self.item}s"] = len(part.x)
        return found


def spread(n: int, wanted: int) -> np.ndarray:
    """Indices of some of n examples, evenly spaced: folders are sorted by class.

    >>> spread(6, 3).tolist(), spread(3, 3).tolist()
    ([0, 2, 4], [0, 1, 2])
    """
    return np.arange(wanted) * n // wanted


@jax.jit
def _log_probabilities(model: Any, x: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(model(x).astype(jnp.float32), axis=-1)


def _timed(call: Callable[[], jax.Array]) -> float:
    start = time.perf_counter()
    for _ in range(REPEATS):
        jax.block_until_ready(call())
    return time.perf_counter() - start


def _digest(part: Labelled) -> str:
    found = hashlib.sha256()
    for array in part:
        found.update(repr((array.shape, str(array.dtype))).encode())
        found.update(np.ascontiguousarray(array).view(np.uint8).data)
    return found.hexdigest()
