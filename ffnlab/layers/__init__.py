"""Layers: `nnx.Module`s with y = layer(x) whose matrices are weights.

Parts that models are assembled from: linear maps, norms, attention, feed-forward networks, blocks.
A whole network (embedding to logits) belongs in `ffnlab.models`.
"""

from ffnlab.layers.activations import ACTIVATIONS, PReLU
from ffnlab.layers.attention.attention import Attention, AttentionSpec
from ffnlab.layers.attention.rope import Rope
from ffnlab.layers.block import Block, Join
from ffnlab.layers.context import Context, LayerInputs, LayerOutputs, Memory, TokenFacts
from ffnlab.layers.conv import Conv
from ffnlab.layers.feed_forward.ffn import FFN, GatedFFN, JoinedGatedFFN, SparseGatedFFN
from ffnlab.layers.feed_forward.mlp import MLP
from ffnlab.layers.linear import Embedding, Linear
from ffnlab.layers.norms import LayerNorm, RMSNorm
from ffnlab.layers.stacking import Statistic

__all__ = [
    "ACTIVATIONS",
    "FFN",
    "MLP",
    "Memory",
    "Attention",
    "AttentionSpec",
    "Block",
    "Context",
    "Conv",
    "Embedding",
    "GatedFFN",
    "Join",
    "JoinedGatedFFN",
    "LayerInputs",
    "LayerNorm",
    "LayerOutputs",
    "Linear",
    "PReLU",
    "RMSNorm",
    "Rope",
    "SparseGatedFFN",
    "Statistic",
    "TokenFacts",
]
