"""Systems on graphs: generators, transforms, probes and baselines; their networks are models."""

from ffnlab.graphs.ascent import ascended_precoder
from ffnlab.graphs.channels import (
    CellFree,
    CellFreeBatches,
    Cellular,
    CellularBatches,
    cell_free,
    cellular,
)
from ffnlab.graphs.conjugate import conjugate_gradients
from ffnlab.graphs.icgnn import (
    POWER,
    PRECODING,
    allocate,
    link_features,
    power_loss,
    precode,
    precoding_loss,
    user_features,
)
from ffnlab.graphs.power import ascended, cell_free_rates, fractional, powers
from ffnlab.graphs.precoding import mrt, rates, rzf, structured, wmmse, zf

__all__ = [
    "POWER",
    "PRECODING",
    "CellFree",
    "CellFreeBatches",
    "Cellular",
    "CellularBatches",
    "allocate",
    "ascended",
    "ascended_precoder",
    "cell_free",
    "cell_free_rates",
    "cellular",
    "conjugate_gradients",
    "fractional",
    "link_features",
    "mrt",
    "power_loss",
    "powers",
    "precode",
    "precoding_loss",
    "rates",
    "rzf",
    "structured",
    "user_features",
    "wmmse",
    "zf",
]
