"""The sequences of numbers of a training run: pairs to learn from, pairs to score on."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from ffnlab.cli.inputs.data_kinds import SequencesConfig
from ffnlab.cli.training import TrainConfig
from ffnlab.data import ArrayBatches, SequencePairs, drawn_pairs, read_pairs
from ffnlab.data.sequence_maps import SEQUENCE_MAPS
from ffnlab.errors import ConfigError

__all__ = ["SequencesData", "load_sequences"]

HELD_OUT = 10  # one pair in so many


@dataclasses.dataclass(frozen=True, eq=False)
class SequencesData:
    """What a run reads.

    Attributes:
      train, held_out: pairs.
      identity: where they are from, and how many there are.
    """

    train: SequencePairs
    held_out: SequencePairs
    identity: dict[str, str | int]

    watched = "held_out_error"

    def batches(self, settings: TrainConfig) -> Callable[[int], SequencePairs]:
        """Batches by position, every epoch in an order of its own."""
        return ArrayBatches(self.train, settings.data.batch, settings.run.seed)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> mean squared and largest error of the pairs held out."""

        def scores(predict: Callable) -> dict[str, float]:
            found = np.asarray(predict(jnp.asarray(self.held_out.x)), np.float64)
            apart = found - self.held_out.y
            squares = float(np.mean(apart**2))
            return {self.watched: squares, "held_out_largest": float(np.abs(apart).max())}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), **scores}


def load_sequences(data: SequencesConfig, model: object) -> SequencesData:
    """Draws or reads the pairs of a run; one in ten is held out.

    Raises:
      ConfigError: the model takes or gives other numbers, or there are too few pairs for a batch.
      FormatError: as `read_pairs`.
    """
    shape = [getattr(model, name) for name in ("length", "inputs", "outputs")]
    if data.sequences in SEQUENCE_MAPS:
        pairs = drawn_pairs(
            data.sequences, data.rows, *shape[:2], low=data.low, high=data.high, seed=data.draw
        )
    else:
        pairs = read_pairs(data.sequences)
    found = [*pairs.x.shape[1:], pairs.y.shape[2]]
    if found != shape:
        raise ConfigError(
            f"[data] has sequences of {found[0]} places, {found[1]} numbers to {found[2]}; the "
            f"model's length, inputs and outputs are {shape}"
        )
    is_held = np.arange(len(pairs.x)) % HELD_OUT == HELD_OUT - 1
    train, held = (SequencePairs(pairs.x[rows], pairs.y[rows]) for rows in (~is_held, is_held))
    if len(train.x) < data.batch or not len(held.x):
        raise ConfigError(f"{len(pairs.x)} pairs are too few for batch={data.batch} and a tenth")
    identity = {"sequences": data.sequences, "train": len(train.x), "held_out": len(held.x)}
    return SequencesData(train, held, identity)
