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
from ffnlab.graphs.consistency import consistency, keyed
from ffnlab.graphs.globe import globe_of, make_globe
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
from ffnlab.graphs.icosphere import Box, Triangles, icosahedron, multimesh
from ffnlab.graphs.label_groups import label_groups
from ffnlab.graphs.nested import Nest, nested_inputs, nested_rollout
from ffnlab.graphs.oneforecast import (
    ForecastBatch,
    balanced,
    forecast_loss,
    relative_distance,
    rollout,
)
from ffnlab.graphs.power import ascended, cell_free_rates, fractional, powers
from ffnlab.graphs.precoding import mrt, rates, rzf, structured, wmmse, zf
from ffnlab.graphs.rounds import Entry, RpHGNNOptions
from ffnlab.graphs.rphgnn import Features, featured, precomputed, propagated
from ffnlab.graphs.weather import (
    ForecastBatches,
    Rows,
    forecasts,
    split_by_time,
    temperature_rows,
    wave_rows,
)

__all__ = [
    "Box",
    "CellFree",
    "CellFreeBatches",
    "Cellular",
    "CellularBatches",
    "Entry",
    "Features",
    "ForecastBatch",
    "ForecastBatches",
    "Nest",
    "POWER",
    "PRECODING",
    "Rows",
    "RpHGNNOptions",
    "Triangles",
    "allocate",
    "ascended",
    "ascended_precoder",
    "balanced",
    "cell_free",
    "cell_free_rates",
    "cellular",
    "conjugate_gradients",
    "consistency",
    "featured",
    "forecast_loss",
    "forecasts",
    "fractional",
    "globe_of",
    "icosahedron",
    "keyed",
    "label_groups",
    "link_features",
    "make_globe",
    "mrt",
    "multimesh",
    "nested_inputs",
    "nested_rollout",
    "power_loss",
    "powers",
    "precode",
    "precoding_loss",
    "precomputed",
    "propagated",
    "rates",
    "relative_distance",
    "rollout",
    "rzf",
    "split_by_time",
    "structured",
    "temperature_rows",
    "user_features",
    "wave_rows",
    "wmmse",
    "zf",
]
