"""The graph of a training run: the classes of some nodes are learned, those of others scored."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int, PyTree

from ffnlab.cli.inputs.data_kinds import BlockModelConfig, GraphConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import LabelledNodes, block_model, cora
from ffnlab.errors import ConfigError
from ffnlab.formats.kinds import Config
from ffnlab.graph import with_self_loops
from ffnlab.models import GraphNetworkConfig

__all__ = ["NodeData", "Nodes", "described", "load_nodes", "node_batch", "node_data", "read_nodes"]

Nodes = GraphConfig | BlockModelConfig  # [data] of a graph
HAS_TO = {"train": "learn from", "valid": "hold out"}  # by part of the nodes


@dataclasses.dataclass(frozen=True, eq=False)
class NodeData:
    """What a run reads.

    Attributes:
      nodes: the graph as its model takes it, with features, classes and parts.
      identity: SHA-256 of all of it, and the number of nodes of each part.
    """

    nodes: LabelledNodes
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], PyTree]:
        """The same batch at every position."""
        batch = jax.tree.map(jnp.asarray, node_batch(self.nodes))
        return lambda position: batch

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> accuracy on held-out nodes, which is watched, and on test nodes."""

        def scores(predict: Callable) -> dict[str, float]:
            found = np.asarray(predict(node_batch(self.nodes)[0])).argmax(-1) == self.nodes.y
            accuracy = float(found[self.nodes.valid].mean())
            figures = {self.watched: 1 - accuracy, "held_out_accuracy": accuracy}
            if self.nodes.test.any():
                figures["test_accuracy"] = float(found[self.nodes.test].mean())
            return figures

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def read_nodes(data: Nodes) -> LabelledNodes:
    """Reads or draws a graph, as it is.

    Raises:
      ConfigError: no node is to be learned from or held out.
      FFNLabError: it cannot be read.
    """
    if isinstance(data, BlockModelConfig):
        found = block_model(
            data.seed,
            nodes=data.nodes,
            classes=data.classes,
            inside=data.inside,
            across=data.across,
            width=data.width,
            noise=data.noise,
            train=data.train,
            valid=data.held_out,
        )
    else:
        found = cora(None if data.graph == "cora" else data.graph)
    for name in ("train", "valid"):
        if not getattr(found, name).any():
            raise ConfigError(f"{called(data)} has no nodes to {HAS_TO[name]}")
    return found


def load_nodes(data: Nodes, model: Config) -> LabelledNodes:
    """A graph for a model of its classes, with the self loops that `gcn` and `gat` expect.

    Raises:
      ConfigError: the model takes other features, has fewer classes or no scores, or as
        `read_nodes`.
      FFNLabError: it cannot be read.
    """
    assert isinstance(model, GraphNetworkConfig)
    found = read_nodes(data)
    width, classes = found.x.shape[1], int(found.y.max()) + 1
    if model.form != "scores":
        raise ConfigError(
            f"form={model.form!r}: such a network gives no scores of classes by itself; rule "
            "'forward_gnn' learns it"
        )
    if model.sizes[0] != width or model.sizes[-1] < classes:
        raise ConfigError(
            f"sizes={list(model.sizes)}: nodes of {called(data)} have {width} features and "
            f"{classes} classes, the first and the last of sizes"
        )
    if model.layer == "sage":
        return found
    return found._replace(graph=with_self_loops(found.graph))


def node_data(data: Nodes, model: Config) -> NodeData:
    """What `load_nodes` reads, as the data of a run."""
    nodes = load_nodes(data, model)
    return NodeData(nodes, described(data, nodes))


def described(data: Nodes, nodes: LabelledNodes) -> dict[str, str | int]:
    """What a graph is, in a word, by its content and by the nodes of its parts."""
    content = hashlib.sha256()
    for leaf in jax.tree.leaves(nodes):
        content.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    counts = {"train": nodes.train, "held_out": nodes.valid, "test": nodes.test}
    identity: dict[str, str | int] = {"graph": called(data), "sha256": content.hexdigest()}
    return identity | {name: int(part.sum()) for name, part in counts.items()}


def called(data: Nodes) -> str:
    """What a graph is called."""
    return "block_model" if isinstance(data, BlockModelConfig) else data.graph


def node_batch(nodes: LabelledNodes) -> tuple[dict[str, PyTree], Int[np.ndarray, "n"]]:
    """A batch of `ffnlab.losses.masked`: the graph, and the classes of nodes to learn from."""
    targets = np.where(nodes.train, nodes.y, -1).astype(np.int32)
    return {"x": nodes.x, "graph": nodes.graph}, targets
