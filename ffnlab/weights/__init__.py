"""Weights: what may stand where a dense matrix stood.

Every format here is a small frozen pytree of logical shape [in, out] with `matmul`, `dense`,
`nbytes` and `leaf_axes`; a model, transform, exporter or layout takes any of them. KV-cache
formats live in `ffnlab.weights.kv`. How to choose the values of a format (calibration, search)
does not belong here.
"""

from ffnlab.weights.activations import fake_e4m3, quantize_e4m3
from ffnlab.weights.base import (
    AxisNames,
    Weight,
    is_weight,
    map_weights,
    nbytes,
    prepare,
    rebuild,
    register,
    static,
)
from ffnlab.weights.block_diagonal import BlockDense, BlockDiagonal, BlockShuffle
from ffnlab.weights.dense import Dense, Transposed
from ffnlab.weights.float8 import Float8
from ffnlab.weights.int4 import Int4
from ffnlab.weights.int8 import Int8
from ffnlab.weights.joined_int4 import JoinedInt4
from ffnlab.weights.low_rank import LoRA, LowRank
from ffnlab.weights.masked import Masked, SparseInput
from ffnlab.weights.merged import Merged
from ffnlab.weights.packed_int4 import PackedInt4

# What a file of dense matrices would multiply out.
FACTORED: tuple[type[Weight], ...] = (LowRank, BlockDiagonal, BlockDense, BlockShuffle, Merged)

__all__ = [
    "FACTORED",
    "AxisNames",
    "BlockDense",
    "BlockDiagonal",
    "BlockShuffle",
    "Dense",
    "Float8",
    "Int4",
    "Int8",
    "JoinedInt4",
    "LoRA",
    "LowRank",
    "Masked",
    "Merged",
    "PackedInt4",
    "SparseInput",
    "Transposed",
    "Weight",
    "fake_e4m3",
    "is_weight",
    "map_weights",
    "nbytes",
    "prepare",
    "quantize_e4m3",
    "rebuild",
    "register",
    "static",
]
