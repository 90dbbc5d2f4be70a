"""Layers: `nnx.Module`s with y = layer(x) whose matrices are weights.

Parts that models are assembled from: linear maps, norms, attention, feed-forward networks, blocks.
A whole network (embedding to logits) belongs in `ffnlab.models`.
"""

from ffnlab.layers.attention.attention import Attention, AttentionSpec, Context
from ffnlab.layers.attention.rope import Rope
from ffnlab.layers.block import Block
from ffnlab.layers.conv import Conv
from ffnlab.layers.feed_forward.ffn import (
    ACTIVATIONS,
    GatedFFN,
    JoinedGatedFFN,
    SparseGatedFFN,
)
from ffnlab.layers.feed_forward.mlp import MLP
from ffnlab.layers.linear import Embedding, Linear, RMSNorm
from ffnlab.layers.stacking import Statistic

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Attention",
    "AttentionSpec",
    "Block",
    "Context",
    "Conv",
    "Embedding",
    "GatedFFN",
    "JoinedGatedFFN",
    "Linear",
    "RMSNorm",
    "Rope",
    "SparseGatedFFN",
    "Statistic",
]
