"""The graph of a training run whose layers learn by losses of their own (`forward_gnn`)."""

import dataclasses
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, PyTree

from ffnlab.cli.inputs.nodes import NodeData, Nodes, described, read_nodes
from ffnlab.cli.rules import RULES
from ffnlab.cli.training import TrainConfig
from ffnlab.learning import ForwardGNNOptions, GraphBatch, GraphInputs, forward_gnn_answers
from ffnlab.learning.forward_gnn import batches
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from ffnlab.models.cost import multiply_adds

__all__ = ["ForwardNodeData", "forward_batch", "forward_data", "forward_work"]


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardNodeData(NodeData):
    """What a run reads.

    Attributes:
      nodes, identity: of the graph as it is.
      options: of the rule.
      batch: of every step; its classes to validate on are those of held-out nodes.
      question: what is asked of test nodes.
    """

    options: ForwardGNNOptions
    batch: GraphBatch
    question: GraphInputs

    def batches(self, settings: TrainConfig) -> Callable[[int], PyTree]:
        """The same batch at every position."""
        batch = jax.tree.map(jnp.asarray, self.batch)
        return lambda position: batch

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> accuracy on held-out nodes, which is watched, and on test nodes."""
        nodes, batch = self.nodes, self.batch
        held_out = batch.inputs if batch.asked is None else batch.asked

        def accuracy(predict: Callable, inputs: GraphInputs, part: np.ndarray) -> float:
            found = np.asarray(predict(inputs)).argmax(-1)
            return float((found == nodes.y)[part].mean())

        def scores(predict: Callable) -> dict[str, float]:
            value = accuracy(predict, held_out, nodes.valid)
            figures = {self.watched: 1 - value, "held_out_accuracy": value}
            if nodes.test.any():
                figures["test_accuracy"] = accuracy(predict, self.question, nodes.test)
            return figures

        return scores

    def predictor(self, model: nnx.Module) -> Callable[[GraphInputs], Array]:
        """Inputs -> scores of a trained network, of all its layers."""
        answers = jax.jit(forward_gnn_answers(self.batch, self.options))
        return lambda inputs: answers(model, inputs)


def options_of(settings: TrainConfig) -> ForwardGNNOptions:
    """The options of a run's rule."""
    given = RULES.read(settings.rule, settings.rule_options, "[rule_options]")
    return ForwardGNNOptions(**given)  # type: ignore[arg-type]


def has_loops(settings: TrainConfig) -> bool:
    """Whether layers expect self loops."""
    return typing.cast(GraphNetworkConfig, settings.model).layer != "sage"


def forward_batch(settings: TrainConfig) -> GraphBatch:
    """The one batch of a run."""
    nodes = read_nodes(typing.cast(Nodes, settings.data))
    given = {"seed": settings.run.seed, "loops": has_loops(settings)}
    return batches.node_batch(nodes, options_of(settings), **given)


def forward_data(settings: TrainConfig) -> ForwardNodeData:
    """What a run reads.

    Raises:
      ConfigError, ValueError: as `read_nodes` and `ffnlab.learning.node_batch`.
    """
    data = typing.cast(Nodes, settings.data)
    nodes, options = read_nodes(data), options_of(settings)
    given = {"seed": settings.run.seed, "loops": has_loops(settings)}
    made = (make(nodes, options, **given) for make in (batches.node_batch, batches.node_question))
    return ForwardNodeData(nodes, described(data, nodes), options, *made)


def forward_work(settings: TrainConfig, model: nnx.Module) -> float:
    """Operations of a forward pass, of one layer on average where they learn one by one."""
    batch, options = forward_batch(settings), options_of(settings)
    answers = forward_gnn_answers(batch, options)
    whole = 2.0 * multiply_adds(answers, model, batch.inputs)
    layers = typing.cast(GraphNetwork, model).layers
    return whole / len(layers) if options.top_down == "none" else whole
