"""What forward learning is given, checked on the host before any compute."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ffnlab.data import LabelledNodes
from ffnlab.errors import ConfigError
from ffnlab.learning.forward_gnn.inputs import GraphBatch, GraphInputs
from ffnlab.learning.forward_gnn.options import ForwardGNNOptions
from ffnlab.learning.labels import check_labels
from ffnlab.models import GraphNetwork
from ffnlab.models.graph_network import Repeated

__all__ = ["check_batch", "check_classes", "check_model", "check_nodes", "classes_of"]


def classes_of(like: GraphBatch, options: ForwardGNNOptions) -> int:
    """How many classes a batch is of, by its shapes; 0 of pairs.

    Raises:
      ConfigError: it is not of the objective.
    """
    for argument, value, kind in (
        ("like", like, GraphBatch),
        ("options", options, ForwardGNNOptions),
    ):
        if not isinstance(value, kind):
            raise ConfigError(f"{argument} is a {type(value).__name__}; a {kind.__name__}")
    inputs, asked, name = like.inputs, like.asked, options.objective
    labels = np.shape(inputs.labels) if inputs.labels is not None else None
    nodes, targets = np.shape(inputs.x)[0], np.shape(like.targets)[0]
    if name == "links":
        fits = inputs.pairs is not None and asked is not None and asked.pairs is not None
        need(fits, name, "pairs to learn from and pairs asked for (link_batch)")
        return 0
    need(inputs.pairs is None, name, "no pairs (node_batch)")
    if name == "single_forward":
        need(nodes > targets and asked is None, name, "a virtual node for each class (node_batch)")
        if options.top_down == "input":
            wanted = (1, nodes, nodes - targets)
            need(
                labels == wanted, name, f"labels {wanted}, which the last layer reads (node_batch)"
            )
        return nodes - targets
    need(asked is not None, name, "what is asked, with each class written to it (node_batch)")
    assert asked is not None
    if name == "label_appending":
        need(
            labels is not None and labels[0] > 1, name, "labels of two copies or more (node_batch)"
        )
        assert labels is not None
        return labels[-1]
    need(np.ndim(inputs.graph.starts) == 2, name, "a graph of each copy (node_batch)")
    return nodes - targets


def need(fits: bool, objective: str, what: str) -> None:
    """Raises ConfigError unless a batch fits."""
    if not fits:
        raise ConfigError(f"like is no batch of objective={objective!r}: it has not {what}")


def check_model(model: PyTree, like: GraphBatch, options: ForwardGNNOptions, classes: int) -> None:
    """Raises ConfigError where a network does not fit a batch, or what its layers are told."""
    if not isinstance(model, GraphNetwork):
        raise ConfigError(f"model is a {type(model).__name__}; a GraphNetwork is accepted")
    config = model.config
    if config.form != options.form:
        raise ConfigError(
            f"form={config.form!r}: with top_down={options.top_down!r} networks of form "
            f"{options.form!r} learn"
        )
    if any(isinstance(part, Repeated) for part in model.layers):
        raise ConfigError("model is stacked, and layers learn one by one: model.unstacked()")
    width = np.shape(like.inputs.x)[1] + (classes if options.objective == "label_appending" else 0)
    if config.sizes[0] != width:
        raise ConfigError(f"sizes={config.sizes}: the first must be {width}, as wide as features")
    if options.top_down == "input" and config.sizes[-1] != classes:
        raise ConfigError(
            f"sizes={config.sizes}: the last must be {classes}, which the last layer is told of"
        )
    if options.top_down == "loss" and len(set(config.sizes[1:])) > 1:
        raise ConfigError(f"sizes={config.sizes}: layers told from above in their loss are alike")


def check_batch(batch: PyTree, like: GraphBatch, options: ForwardGNNOptions, classes: int) -> None:
    """Raises ValueError for a batch that a step must not be given."""
    if not isinstance(batch, GraphBatch):
        raise ValueError(f"batch is a {type(batch).__name__}; a GraphBatch is accepted")
    found, wanted = shapes(batch), shapes(like)
    if found != wanted:
        names = [name for name in sorted(found | wanted) if found.get(name) != wanted.get(name)]
        said = ", ".join(f"{n} {found.get(n)} and not {wanted.get(n)}" for n in names)
        raise ValueError(f"batch has other shapes than `like`, of which the state is: {said}")
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if any(isinstance(v, jax.Array) and not v.is_fully_addressable for _, v in leaves):
        return
    for path, leaf in leaves:
        if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) and not np.isfinite(leaf).all():
            where = jax.tree_util.keystr(path).lstrip(".")
            raise ValueError(f"{where} has values that are no finite numbers")
    for name in ("targets", "held_out"):
        y = np.asarray(getattr(batch, name))
        if options.objective == "links":
            check_pairs(name, y, batch.inputs if name == "targets" else batch.asked)
        elif name == "targets":
            check_classes(name, y, classes)
        elif options.patience:
            check_labels(y[y != -1], classes)
            if not (y >= 0).any():
                raise ValueError("held_out has no node to validate on; patience=0 needs none")


def shapes(tree: PyTree) -> dict[str, str]:
    """Shapes and dtypes by path."""
    return {
        jax.tree_util.keystr(path).lstrip("."): f"{jnp.result_type(leaf)}{list(np.shape(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_nodes(nodes: LabelledNodes) -> None:
    """Raises ValueError for a graph whose features, classes and parts do not fit together."""
    if not isinstance(nodes, LabelledNodes):
        raise ValueError(f"nodes is a {type(nodes).__name__}; a LabelledNodes is accepted")
    n = nodes.graph.num_nodes
    for name in ("x", "y", "train", "valid", "test"):
        value, axes = np.asarray(getattr(nodes, name)), 2 if name == "x" else 1
        kind = {"x": "f", "y": "i"}.get(name, "b")
        if value.ndim != axes or len(value) != n or value.dtype.kind != kind:
            said = {"f": "floats [n, d]", "i": "integers [n]", "b": "bool [n]"}[kind]
            raise ValueError(
                f"{name} is {value.dtype}{list(value.shape)}; {said} of the graph's n={n} nodes"
            )
    if not np.isfinite(nodes.x).all():
        raise ValueError("x has values that are no finite numbers")
    parts = np.sum([nodes.train, nodes.valid, nodes.test], axis=0)
    if (parts > 1).any():
        raise ValueError(
            f"node {int(np.argmax(parts))} is in several of train, valid and test; one is accepted"
        )


def check_classes(name: str, y: np.ndarray, classes: int) -> None:
    """Raises ValueError unless -1 and all of 0..classes - 1, and nothing else, are in y."""
    there = np.unique(y[y != -1])
    if not there.size:
        raise ValueError(f"{name} has no node to learn from; all are -1")
    check_labels(there, classes)
    absent = np.setdiff1d(np.arange(classes), there).tolist()
    if absent:
        raise ValueError(
            f"{name} has no node of class {absent[0]} to learn from; every one of the {classes} "
            "classes needs some, its virtual node would have no edge"
        )


def check_pairs(name: str, y: np.ndarray, inputs: GraphInputs | None) -> None:
    """Raises ValueError for pairs out of range, or of one kind alone."""
    assert inputs is not None
    pairs, nodes = np.asarray(inputs.pairs), np.shape(inputs.x)[0]
    if pairs.size and not (0 <= pairs.min() and pairs.max() < nodes):
        raise ValueError(f"pairs of {name} has nodes {pairs.min()} to {pairs.max()} of {nodes}")
    if set(np.unique(y).tolist()) != {0, 1}:
        raise ValueError(
            f"{name} has the values {np.unique(y).tolist()}; pairs of both kinds, 0 and 1"
        )
