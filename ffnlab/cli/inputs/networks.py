"""The networks of a training run: a metanetwork learns to correct some, and is scored on others."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.cli.inputs.data_kinds import NetworksConfig
from ffnlab.cli.inputs.examples import CLASSIFIERS, examples
from ffnlab.cli.inputs.teacher import sha256_of
from ffnlab.cli.training import TrainConfig
from ffnlab.data import Labelled
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.losses import labelled
from ffnlab.models import MetaNetworkConfig
from ffnlab.pruning import group_penalty, lesson
from ffnlab.pruning.meta import Lesson, Lessons, layout_of
from ffnlab.pruning.meta.correcting import check_fits

__all__ = ["NetworksData", "load_networks"]


@dataclasses.dataclass(frozen=True, eq=False)
class NetworksData:
    """What a run reads.

    Attributes:
      lessons: of the networks that are learned from.
      scored: networks that are scored, each with rows that none was trained on.
      identity: what both are.
    """

    lessons: tuple[Lesson, ...]
    scored: tuple[tuple[Any, Labelled], ...]
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], Lesson]:
        """A network after the other."""
        return Lessons(self.lessons)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> error of the corrected networks, which is watched, and their penalty by that
        of the networks as they were: means over networks."""

        @jax.jit
        def judged(model: Any, x: Any, y: Any) -> tuple:
            nats, metrics = labelled(model, (x, y))[:2]
            return nats, metrics["accuracy"], group_penalty(model)

        def scores(predict: Callable) -> dict[str, float]:
            rows = []
            for model, held_out in self.scored:
                layout = layout_of(model)
                nodes, edges = layout.read(model)
                named = {"nodes": nodes, "edges": edges, "graph": layout.graph()}
                found = layout.write(model, *predict(named))
                x, y = jnp.asarray(held_out.x), jnp.asarray(held_out.y)
                nats, accuracy, penalty = map(float, judged(found, x, y))
                rows.append((accuracy, nats, penalty / float(judged(model, x, y)[2])))
            accuracy, nats, penalty = np.mean(rows, axis=0).tolist()
            figures = {self.watched: 1 - accuracy, "held_out_accuracy": accuracy}
            return figures | {"held_out_nats": nats, "held_out_penalty": penalty}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_networks(data: NetworksConfig, config: object) -> NetworksData:
    """Opens the networks of a run, and what they were trained on.

    Raises:
      ConfigError: a network is of another layout than the metanetwork, or of no kind with classes,
        or does not take the inputs; fewer rows than a batch.
      FFNLabError: it, or the data, cannot be read.
    """
    assert isinstance(config, MetaNetworkConfig)
    lessons, scored = [], []
    identity: dict[str, str | int] = {}
    for place in dict.fromkeys((*data.networks, *data.held_out)):
        model = load(place, kinds=CLASSIFIERS, progress=False)
        try:
            check_fits(config, layout_of(model))
        except ConfigError as error:
            raise ConfigError(f"networks: {place}: {error}") from None
        are_records = data.labelled.endswith(".safetensors")
        found = examples(model, data.labelled, are_records=are_records)
        identity |= found.identity | {f"{place} sha256": sha256_of(model)}
        if place in data.networks:
            rows = len(found.train.y)
            if rows < data.batch:
                raise ConfigError(
                    f"batch={data.batch}: {data.labelled} has {rows} rows to learn from"
                )
            lessons.append(lesson(model, tuple(found.train), batches=rows // data.batch))
        if place in data.held_out or not data.held_out:
            scored.append((model, found.held_out))
    return NetworksData(tuple(lessons), tuple(scored), identity)
