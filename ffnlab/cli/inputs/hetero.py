"""The graph of several kinds of a training run: rows of its target's nodes, learned in batches."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.cli.inputs.data_kinds import HeteroConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import ArrayBatches, HeteroNodes, Labelled, academic, cora_words
from ffnlab.errors import ConfigError
from ffnlab.graphs import Features, RpHGNNOptions, featured, label_groups, precomputed
from ffnlab.models import GroupNetworkConfig

__all__ = ["HeteroData", "load_hetero"]

PART = 1024  # nodes that are scored at once


@dataclasses.dataclass(frozen=True, eq=False)
class HeteroData:
    """What a run reads.

    Attributes:
      parts: rows and classes of nodes: "train", "held_out", "test".
      identity: what they are of, SHA-256 of them, and the number of each.
    """

    parts: Mapping[str, Labelled]
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], Labelled]:
        """Batches by position, every epoch in an order of its own."""
        return ArrayBatches(self.parts["train"], settings.data.batch, settings.run.seed)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> accuracy on held-out nodes, which is watched, and on test nodes."""

        def accuracy(predict: Callable, part: Labelled) -> float:
            pieces = range(0, len(part.y), PART)
            said = [np.asarray(predict(jnp.asarray(part.x[i : i + PART]))) for i in pieces]
            return float(np.mean(np.concatenate(said).argmax(-1) == part.y))

        def scores(predict: Callable) -> dict[str, float]:
            found = accuracy(predict, self.parts["held_out"])
            figures = {self.watched: 1 - found, "held_out_accuracy": found}
            return figures | {"test_accuracy": accuracy(predict, self.parts["test"])}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_hetero(data: HeteroConfig, model: object) -> HeteroData:
    """Draws or reads a graph and summarizes it for a model of its groups.

    Raises:
      ConfigError: the model is of other groups or fewer classes, or there are fewer nodes to learn
        from than a batch has.
      FFNLabError: the graph cannot be read.
    """
    assert isinstance(model, GroupNetworkConfig)
    nodes = academic(data.draw) if data.graph == "academic" else cora_words()
    classes = int(nodes.y.max()) + 1
    found = summarized(data, nodes, classes)
    if model.groups != found.sizes or model.classes < classes:
        raise ConfigError(
            f"groups={model.groups}, classes={model.classes}: [data] gives groups {found.sizes} "
            f"and {classes} classes"
        )
    if int(nodes.train.sum()) < data.batch:
        raise ConfigError(f"batch={data.batch}: there are {nodes.train.sum()} nodes to learn from")
    masks = {"train": nodes.train, "held_out": nodes.valid, "test": nodes.test}
    parts = {name: Labelled(found.rows[mask], nodes.y[mask]) for name, mask in masks.items()}
    content = hashlib.sha256(found.rows.tobytes())
    content.update(nodes.y.tobytes())
    identity: dict[str, str | int] = {"graph": data.graph, "sha256": content.hexdigest()}
    return HeteroData(parts, identity | {name: len(part.y) for name, part in parts.items()})


def summarized(data: HeteroConfig, nodes: HeteroNodes, classes: int) -> Features:
    """The groups of the target's nodes."""
    features, projections = jax.random.split(jax.random.key(data.draw))
    x = featured(nodes.graph, nodes.x, width=data.width, key=features)
    options = RpHGNNOptions(data.rounds, data.squash, with_input=data.with_input)
    found = precomputed(nodes.graph, x, nodes.target, options, key=projections)
    if not data.labels:
        return found
    return found.beside(label_groups(nodes.graph, nodes.target, nodes.y, nodes.train, classes))
