"""The channels of a training run: drawn at every step to learn from, and once to score on."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ffnlab.cli.inputs.channel_kinds import CellFreeConfig, CellularConfig
from ffnlab.cli.inputs.reading import Reading
from ffnlab.cli.training import TrainConfig
from ffnlab.graphs import (
    POWER,
    PRECODING,
    CellFree,
    CellFreeBatches,
    Cellular,
    CellularBatches,
    cell_free,
    cell_free_rates,
    cellular,
    fractional,
    link_features,
    power_loss,
    powers,
    precoding_loss,
    rates,
    rzf,
    user_features,
)
from ffnlab.graphs.icgnn import check_network, shares
from ffnlab.graphs.precoding import gram_of, gram_rates
from ffnlab.models import ICGNNConfig

__all__ = ["ChannelData", "channel_reading", "load_channels"]

DRAW = (0, 0, 0)  # of what is scored on; draws to learn from have two numbers, seed and position
EXPONENTS = (0.0, 0.5, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelData:
    """What a run reads.

    Attributes:
      data: what is drawn.
      held_out: what is scored on, in parts.
      theirs: mean sum of rates of the baseline there.
      identity: what the parts are.
    """

    data: CellularConfig | CellFreeConfig
    held_out: Sequence[Cellular] | Sequence[CellFree]
    theirs: float
    identity: dict[str, str | int]

    watched = "held_out_shortfall"

    def batches(self, settings: TrainConfig) -> Callable[[int], Cellular | CellFree]:
        """Batches by position, all of them drawn anew."""
        data, seed = self.data, settings.run.seed
        if isinstance(data, CellFreeConfig):
            return CellFreeBatches(data.sizes, data.batch, seed)
        low, high = data.snr_db
        levels = (float(low), float(high))
        return CellularBatches(data.users, data.antennas, levels, data.batch, seed)

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> mean sum of rates, and the part of the baseline's that is missing."""

        def scores(predict: Callable) -> dict[str, float]:
            found = [judged(part, predict(told(part))) for part in self.held_out]
            rate = float(np.mean(np.concatenate(found)))
            return {self.watched: 1 - rate / self.theirs, "held_out_rate": rate}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Nothing belongs beside the model."""

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its data and figures."""
        return {"data": dict(self.identity), "baseline_rate": self.theirs, **scores}


def told(part: Cellular | CellFree) -> dict[str, jax.Array]:
    """What a network is called with, by name."""
    if isinstance(part, CellFree):
        return link_features(*map(jnp.asarray, part))
    h, valid, snr = map(jnp.asarray, part)
    return user_features(gram_of(h), valid, snr)


@jax.jit
def judged(part: Cellular | CellFree, outputs: jax.Array) -> jax.Array:
    """Sum of rates of each network, of the outputs."""
    if isinstance(part, CellFree):
        rho = powers(outputs[..., 0].astype(jnp.float32), part.served)
        return cell_free_rates(rho, part.gains, part.antennas).sum(-1)
    p, q = (part.snr[:, None] * share for share in shares(outputs, part.valid))
    return gram_rates(gram_of(part.h), p, q, 1.0).sum(-1)


def channel_reading(model: ICGNNConfig) -> Reading:
    """What a network on users or links reads.

    Raises:
      ConfigError: it takes or gives other numbers than either.
    """
    is_of_links = model.axes == POWER.axes
    check_network(model, POWER if is_of_links else PRECODING)
    if is_of_links:
        return Reading((CellFreeConfig,), "cell-free networks", lambda data: power_loss, links)
    return Reading((CellularConfig,), "cellular channels", lambda data: precoding_loss, users)


def users(data: CellularConfig, model: ICGNNConfig, rows: int, length: int) -> PyTree:
    """A batch of channels, abstract."""
    k, shaped = max(data.users), jax.ShapeDtypeStruct
    return Cellular(
        shaped((rows, k, data.antennas), np.complex64),
        shaped((rows, k), np.bool_),
        shaped((rows,), np.float32),
    )  # type: ignore[arg-type]


def links(data: CellFreeConfig, model: ICGNNConfig, rows: int, length: int) -> PyTree:
    """A batch of cell-free networks, abstract."""
    shape, shaped = (rows, max(data.points), max(data.users)), jax.ShapeDtypeStruct
    return CellFree(shaped(shape, np.float32), shaped(shape, np.bool_), shaped((rows,), np.float32))  # type: ignore[arg-type]


def load_channels(data: CellularConfig | CellFreeConfig) -> ChannelData:
    """Draws what a run is scored on, and scores its baseline: RZF, or the best split of powers."""
    if isinstance(data, CellularConfig):
        low, high = data.snr_db
        levels = (float(low), float(high))
        part = cellular(DRAW, data.held_out, data.users, data.antennas, snr_db=levels)
        v = rzf(part.h, part.snr, 1.0, valid=part.valid)
        theirs = float(rates(part.h, v, 1.0).sum(-1).mean())
        return ChannelData(data, [part], theirs, {"drawn": "cellular", "held_out": data.held_out})
    padded = max(data.points), max(data.users)
    parts = [cell_free(DRAW, data.held_out, *size, padded=padded) for size in data.sizes]
    theirs = max(float(np.mean([split(part, e) for part in parts])) for e in EXPONENTS)
    identity: dict[str, str | int] = {"drawn": "cell_free", "held_out": data.held_out * len(parts)}
    return ChannelData(data, parts, theirs, identity)


def split(part: CellFree, exponent: float) -> float:
    """Mean sum of rates of powers that are split by gains."""
    rho = fractional(part.gains, part.served, exponent=exponent)
    return float(cell_free_rates(rho, part.gains, part.antennas).sum(-1).mean())
