"""Layers: `nnx.Module`s with y = layer(x) whose matrices are weights.

Parts that models are assembled from: linear maps, norms, attention, feed-forward networks, layers
on graphs (`layer(x, graph)`), blocks.
A whole network (embedding to logits) belongs in `ffnlab.models`.
"""

from ffnlab.layers.activations import ACTIVATIONS, PReLU, SReLU
from ffnlab.layers.attention.attention import Attention
from ffnlab.layers.attention.rope import Rope
from ffnlab.layers.attention.spec import AttentionSpec
from ffnlab.layers.batch_norm import BatchNorm, FixedAffine, Moments, measured
from ffnlab.layers.block import Block, Join
from ffnlab.layers.column import Column, ColumnSpec, Level
from ffnlab.layers.context import Context, LayerInputs, LayerOutputs, Memory, TokenFacts
from ffnlab.layers.conv import Conv
from ffnlab.layers.convnext import ConvNeXt
from ffnlab.layers.dropout import drop_path, dropout
from ffnlab.layers.eff_layer import EffLayer
from ffnlab.layers.ensemble_scale import EnsembleScale
from ffnlab.layers.feed_forward.choice import ByChoice
from ffnlab.layers.feed_forward.ffn import FFN, GatedFFN, JoinedGatedFFN, SparseGatedFFN
from ffnlab.layers.feed_forward.idle import FoldedFFN, IdleFFN
from ffnlab.layers.feed_forward.kernel import KernelAdapter, KernelFFN
from ffnlab.layers.feed_forward.mlp import MLP
from ffnlab.layers.feed_forward.moe import GroupedFFN, MoE, MoESpec
from ffnlab.layers.folding import fold
from ffnlab.layers.gradient_reversal import reverse_gradient
from ffnlab.layers.graph_conv import GAT, GCN, GraphSAGE
from ffnlab.layers.grouped import GroupedLinear, GroupedNorm, Groups
from ffnlab.layers.guided import Guided
from ffnlab.layers.linear import Embedding, Linear
from ffnlab.layers.linear_scan import linear_scan
from ffnlab.layers.long_skips import SkipGate, SkipScaling, scale_skips
from ffnlab.layers.mamba import Mamba, MambaState
from ffnlab.layers.mesh import EdgeMLP, MeshBlock, NormedMLP
from ffnlab.layers.modality import Blocks, EveryCopy, Modalities
from ffnlab.layers.noisy import Noisy
from ffnlab.layers.norms import GroupNorm, InstanceNorm, LayerNorm, RMSNorm, ScaleNorm
from ffnlab.layers.physical import TanhChain, Transmission, TwoBit
from ffnlab.layers.pooling import (
    avg_pool,
    global_avg_pool,
    global_max_pool,
    max_pool,
    shifted_max_pool,
)
from ffnlab.layers.random_features import FourierFeatures, ReluFeatures
from ffnlab.layers.recurrent import CELLS, Recurrent
from ffnlab.layers.residual import ConvNorm, Residual, Spatial
from ffnlab.layers.routed_linear import RoutedLinear
from ffnlab.layers.routers import Routing
from ffnlab.layers.stacking import Statistic

__all__ = [
    "EdgeMLP",
    "MeshBlock",
    "NormedMLP",
    "ACTIVATIONS",
    "CELLS",
    "FFN",
    "GAT",
    "GCN",
    "MLP",
    "Attention",
    "AttentionSpec",
    "BatchNorm",
    "Block",
    "Blocks",
    "ByChoice",
    "Column",
    "ColumnSpec",
    "Context",
    "Conv",
    "ConvNeXt",
    "ConvNorm",
    "EffLayer",
    "Embedding",
    "EnsembleScale",
    "EveryCopy",
    "FixedAffine",
    "FoldedFFN",
    "FourierFeatures",
    "GatedFFN",
    "GraphSAGE",
    "GroupNorm",
    "GroupedFFN",
    "GroupedLinear",
    "GroupedNorm",
    "Groups",
    "Guided",
    "IdleFFN",
    "InstanceNorm",
    "Join",
    "JoinedGatedFFN",
    "KernelAdapter",
    "KernelFFN",
    "LayerInputs",
    "LayerNorm",
    "LayerOutputs",
    "Level",
    "Linear",
    "Mamba",
    "MambaState",
    "Memory",
    "MoE",
    "MoESpec",
    "Noisy",
    "Modalities",
    "Moments",
    "PReLU",
    "RMSNorm",
    "Recurrent",
    "ReluFeatures",
    "Residual",
    "Rope",
    "RoutedLinear",
    "SReLU",
    "Routing",
    "ScaleNorm",
    "SkipGate",
    "SkipScaling",
    "SparseGatedFFN",
    "Spatial",
    "Statistic",
    "TanhChain",
    "TokenFacts",
    "Transmission",
    "TwoBit",
    "avg_pool",
    "drop_path",
    "dropout",
    "fold",
    "global_avg_pool",
    "global_max_pool",
    "linear_scan",
    "max_pool",
    "measured",
    "reverse_gradient",
    "scale_skips",
    "shifted_max_pool",
]
