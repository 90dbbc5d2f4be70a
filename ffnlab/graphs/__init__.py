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
from ffnlab.graphs.informative_graphs import informative_graph
from ffnlab.graphs.label_groups import label_groups
from ffnlab.graphs.nested import Nest, nested_inputs, nested_rollout
from ffnlab.graphs.netinfof import InformationReport, PairRows, netinfof, pair_rows, scored_pairs
from ffnlab.graphs.netinfof_core import (
    FittingPairs,
    View,
    compatibility,
    fitting_pairs,
    similarities,
    usable_information,
    view_of,
)
from ffnlab.graphs.netinfof_nodes import NodeRows, netinfof_nodes
from ffnlab.graphs.netinfof_views import VIEWS, embeddings, normalised_features
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
from ffnlab.graphs.signals import Signals, layer_signals
from ffnlab.graphs.sparse_group import SparseGroupState, penalty, shrunk, sparse_group
from ffnlab.graphs.virgo import VirgoStats, redrawn, virgo
from ffnlab.graphs.virgo_core import STARTS, HopNorms, hop_norms, variances
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
    "FittingPairs",
    "ForecastBatch",
    "ForecastBatches",
    "HopNorms",
    "InformationReport",
    "Nest",
    "NodeRows",
    "POWER",
    "PRECODING",
    "PairRows",
    "Rows",
    "RpHGNNOptions",
    "STARTS",
    "Signals",
    "SparseGroupState",
    "Triangles",
    "VIEWS",
    "View",
    "VirgoStats",
    "allocate",
    "ascended",
    "ascended_precoder",
    "balanced",
    "cell_free",
    "cell_free_rates",
    "cellular",
    "compatibility",
    "conjugate_gradients",
    "consistency",
    "embeddings",
    "featured",
    "fitting_pairs",
    "forecast_loss",
    "forecasts",
    "fractional",
    "globe_of",
    "hop_norms",
    "icosahedron",
    "informative_graph",
    "keyed",
    "label_groups",
    "layer_signals",
    "link_features",
    "make_globe",
    "mrt",
    "multimesh",
    "nested_inputs",
    "nested_rollout",
    "netinfof",
    "netinfof_nodes",
    "normalised_features",
    "pair_rows",
    "penalty",
    "power_loss",
    "powers",
    "precode",
    "precoding_loss",
    "precomputed",
    "propagated",
    "rates",
    "redrawn",
    "relative_distance",
    "rollout",
    "rzf",
    "scored_pairs",
    "shrunk",
    "similarities",
    "sparse_group",
    "split_by_time",
    "structured",
    "temperature_rows",
    "usable_information",
    "user_features",
    "variances",
    "view_of",
    "virgo",
    "wave_rows",
    "wmmse",
    "zf",
]
