"""Where activations are dropped: gated FFNs, and the inputs of query and output projections."""

from collections.abc import Mapping

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array

from ffnlab import models, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import ACTIVATIONS, GatedFFN, Linear, SparseGatedFFN
from ffnlab.layers.feed_forward.ffn import by_channel
from ffnlab.models.calibration import Given, Layered
from ffnlab.weights import SparseInput

__all__ = ["FFNS", "SITES", "activations", "sparsified"]

FFNS = tree.of_type(GatedFFN, SparseGatedFFN)
# Keys and values keep their dense input: they are small, and their errors would stay in the cache.
SITES = tree.of_type(Linear) & (tree.at("layers[*].attn.q") | tree.at("layers[*].attn.o"))


def activations(
    model: Layered, batch: Given, attention: bool
) -> tuple[dict[str, tuple[Array, Array]], dict[str, Array]]:
    """What the model computes on a batch at the places that can be sparsified.

    Args:
      model: with blocks, not stacked; call this under jit.
      batch: what it is called with, of t tokens in each of b rows.
      attention: also return the inputs of query and output projections.
    Returns:
      path -> (activated gate, up) of each FFN, [b, t, h] float32, as they are before any threshold;
      path -> input of each projection, [b, t, d] float32.
    """
    ffns = tree.select(model, FFNS)
    sites = tree.select(model, SITES) if attention else {}
    wanted = tree.where(lambda path, _: path in ffns or path in sites)
    _, seen = tree.capture(model, wanted, *batch.args, **batch.options)
    pairs = {}
    for path, ffn in ffns.items():
        x = seen[path].input[0]
        gate = ACTIVATIONS[ffn.activation](ffn.gate(x))
        pairs[path] = gate.astype(jnp.float32), ffn.up(x).astype(jnp.float32)
    return pairs, {path: seen[path].input[0].astype(jnp.float32) for path in sites}


def sparsified(
    model: Layered,
    thresholds: Mapping[str, ArrayLike],
    *,
    strict: bool,
) -> Layered:
    """The model with thresholds at its FFNs and projections; those it has are replaced.

    Args:
      model: with blocks, stacked or not; the result is in the same form.
      thresholds: [h] by path of an FFN, [] by path of a query or output projection.
      strict: see `SparseGatedFFN`.
    Raises:
      ConfigError: a path is no FFN or projection of this model.
    """
    was_stacked = isinstance(model.layers, models.Stacked)
    model = models.unstack(model)
    places = {
        path: node for path, node in tree.walk(model) if FFNS(path, node) or SITES(path, node)
    }
    strange = sorted(set(thresholds) - set(places))
    if strange:
        raise ConfigError(
            f"thresholds for {strange[:3]}, which this model does not have; "
            "rewrite the model that was calibrated"
        )

    def place(path: str) -> SparseGatedFFN | Linear:
        node, threshold = places[path], jnp.asarray(thresholds[path], jnp.float32)
        if isinstance(node, Linear):
            weight = node.weight
            weight = weight.w if isinstance(weight, SparseInput) else weight
            return node.replace(SparseInput(weight, threshold))
        up = node.up.replace(by_channel(node.up.weight))
        return SparseGatedFFN(
            node.gate, up, node.down, threshold, activation=node.activation, strict=strict
        )

    model = tree.replace(model, {path: place(path) for path in thresholds})
    return models.stack(model) if was_stacked else model
