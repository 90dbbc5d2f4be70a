"""What a weight consists of and what a product with it takes."""

import math

import jax

from ffnlab.weights.base import Weight
from ffnlab.weights.block_diagonal import BlockDense, BlockDiagonal, BlockShuffle
from ffnlab.weights.dense import Transposed
from ffnlab.weights.low_rank import LoRA, LowRank
from ffnlab.weights.masked import Masked, SparseInput
from ffnlab.weights.merged import Merged

__all__ = ["flops", "parameters"]

BLOCKS = BlockDiagonal | BlockDense | BlockShuffle


def parameters(weight: Weight) -> int:
    """Numbers of one weight, stacked copies included; a product kept beside its factors is none."""
    if isinstance(weight, Merged):
        return parameters(weight.factors)
    if isinstance(weight, BLOCKS):
        return sum(leaf.size for leaf in jax.tree.leaves(weight))
    if isinstance(weight, Transposed | Masked | SparseInput):
        return parameters(weight.w)
    if isinstance(weight, LowRank):
        return weight.a.size + weight.b.size
    if isinstance(weight, LoRA):
        return parameters(weight.base) + weight.a.size + weight.b.size
    return math.prod(jax.tree.leaves(weight)[0].shape[:-2]) * math.prod(weight.shape)


def flops(weight: Weight) -> int:
    """Operations of one vector times one matrix of this weight, with dense input; a multiplication
    and an addition are two. Of factors with their product beside them, what many rows cost."""
    if isinstance(weight, Merged):
        return flops(weight.factors)
    if isinstance(weight, BLOCKS):
        return 2 * weight.numbers
    if isinstance(weight, Transposed | Masked | SparseInput):
        return flops(weight.w)
    if isinstance(weight, LowRank):
        return 2 * weight.a.shape[-1] * sum(weight.shape)
    if isinstance(weight, LoRA):
        return flops(weight.base) + 2 * weight.a.shape[-1] * sum(weight.shape)
    return 2 * math.prod(weight.shape)
