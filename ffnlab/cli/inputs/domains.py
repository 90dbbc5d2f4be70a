"""The two domains of a training run: one with classes, one whose classes only score."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ffnlab.cli.inputs.batch_shapes import input_shape
from ffnlab.cli.inputs.data_kinds import DomainsConfig, RecordsConfig
from ffnlab.cli.inputs.labelled import Reader, records, split, sums
from ffnlab.cli.training import TrainConfig
from ffnlab.data import ArrayBatches, Labelled, Zipped, digits, moons, on_photographs, reviews
from ffnlab.formats.kinds import KINDS, Config, kind_of
from ffnlab.parallel import held_out_accuracy

__all__ = ["DomainsData", "load_domains"]

MOONS = 1000  # points of each domain, of which one in ten is held out


@dataclasses.dataclass(frozen=True, eq=False)
class DomainsData:
    """What a run reads.

    Attributes:
      source, target: (to learn from, held out); of the target no classes are learned from.
      identity: what they are, by SHA-256 and number.
    """

    source: tuple[Labelled, Labelled]
    target: tuple[Labelled, Labelled]
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position: ((x, y), inputs of the target)."""
        data, seed = settings.data, settings.run.seed
        return Zipped(
            ArrayBatches(self.source[0], data.batch, seed),
            ArrayBatches(self.target[0].x, data.target_rows(data.batch), seed),
        )

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> figures of what is held out; the source's error is watched, as a run may know
        no class of the target.
        """

        def scores(predict: Callable) -> dict[str, float]:
            here, there = (
                held_out_accuracy(predict, [part]) for part in (self.source[1], self.target[1])
            )
            return {self.watched: 1 - here, "held_out_accuracy": here, "target_accuracy": there}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_domains(data: DomainsConfig, model: Config) -> DomainsData:
    """Reads the domains of a run.

    Raises:
      ConfigError: the model does not take inputs of their shape, or has fewer classes.
      FFNLabError: they cannot be read.
    """
    stored = data.shape_of(data.source)
    shape = input_shape(RecordsConfig(data.source, stored), model)
    classes = KINDS[kind_of(model) or ""].classes
    reader = Reader(stored, shape, None if classes is None else classes(model), 1.0)
    identity: dict[str, str | int] = {"source": data.source, "target": data.target}
    found = []
    for role, name in (("source", data.source), ("target", data.target)):
        here, there = domain(name, data)
        parts = reader.all(here), reader.all(there)
        identity |= {f"{role}_{key}": value for key, value in sums(*parts).items()}
        found.append(parts)
    return DomainsData(found[0], found[1], identity)


def domain(name: str, data: DomainsConfig) -> tuple[Labelled, Labelled]:
    """A domain as (to learn from, held out)."""
    if name in ("moons", "turned_moons"):
        whole = moons(count=MOONS)[name == "turned_moons"]
        return tuple(Labelled(whole.x[rows], whole.y[rows]) for rows in split(MOONS))
    if name in ("digits", "photographs"):
        return tuple(coloured(part, on_others=name == "photographs") for part in digits())
    if name.endswith(".safetensors"):
        parts = records(RecordsConfig(name, data.shape, data.inputs, data.label))[:2]
        return tuple(parts)  # type: ignore[return-value]
    return reviews(name)


def coloured(part: Labelled, *, on_others: bool) -> Labelled:
    """Half of the digits as images in three colours, or the others on photographs."""
    x, y = part.x[on_others::2].reshape(-1, 8, 8, 1), part.y[on_others::2]
    return Labelled(on_photographs(x) if on_others else np.repeat(x, 3, axis=-1), y)
