"""The permutation of a training run: its basis to learn from, binary inputs to score on."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.cli.inputs.data_kinds import PermutationConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import Labelled
from ffnlab.learning.exact_permutations.closed_form import safe_threshold
from ffnlab.learning.exact_permutations.ensemble import (
    basis,
    binary_inputs,
    decided,
    permuted_bits,
)

__all__ = ["PermutationData", "load_permutation"]

MOST = 10  # all binary inputs are scored up to this length, else 2^MOST of them


@dataclasses.dataclass(frozen=True, eq=False)
class PermutationData:
    """What a run reads.

    Attributes:
      basis: all that is learned from.
      bits: binary inputs that are scored, [n, k].
      identity: the permutation, and the number of inputs that are scored.
    """

    basis: Labelled
    bits: np.ndarray
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], Labelled]:
        """The same batch at every position."""
        batch = jax.tree.map(jnp.asarray, self.basis)
        return lambda position: batch

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> the share of binary inputs with all outputs right, and its rest."""
        wanted = permuted_bits(self.bits, self.basis.y)
        inputs, cut = binary_inputs(self.bits), safe_threshold(len(self.basis.y))

        def scores(predict: Callable) -> dict[str, float]:
            outputs = np.asarray(predict(jnp.asarray(inputs)), np.float32)
            accuracy = float((decided(outputs, cut) == wanted).all(-1).mean())
            return {self.watched: 1 - accuracy, "held_out_accuracy": accuracy}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_permutation(data: PermutationConfig) -> PermutationData:
    """Draws the permutation of a run, and what it is scored on."""
    k, random = data.length, np.random.default_rng(data.permutation)
    batch = basis(random.permutation(k))
    if k <= MOST:
        bits = np.arange(1, 2**k)[:, None] >> np.arange(k) & 1
    else:
        bits = random.integers(0, 2, (2**MOST, k))
        bits[bits.sum(1) == 0, 0] = 1
    told = ",".join(map(str, batch.y))
    return PermutationData(batch, bits, {"permutation": told, "held_out": len(bits)})
