"""Sparsity: methods that drop activations at run time, so that weights need not be read.

Removing parts of a model for good belongs in `ffnlab.pruning`, masks on weights in
`ffnlab.weights`.
"""

from ffnlab.sparsity.chess import ChessStats, cats, chess
from ffnlab.sparsity.realised import Realised, realised_sparsity
from ffnlab.sparsity.sites import sparsified

__all__ = ["ChessStats", "Realised", "cats", "chess", "realised_sparsity", "sparsified"]
