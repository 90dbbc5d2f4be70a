"""Searching for smaller networks: spaces, evolution, predictors, fronts, and the loop around them.

A search is NumPy and a seed; what a network is and what it costs is asked of a `measure(config)`
that the caller gives (`meter` measures one on this machine). Cutting what was found out of a model
belongs to `ffnlab.models`.
"""

from ffnlab.pruning.search.loop import Log, Measure, measured, search, start
from ffnlab.pruning.search.measure import Costs, drawn_alike, macs, meter
from ffnlab.pruning.search.pareto import best_within, front, hypervolume, knee
from ffnlab.pruning.search.predictor import COARSE, OFFICIAL, Grid, Predictor, fit, predict
from ffnlab.pruning.search.settings import SearchOptions, Tactic
from ffnlab.pruning.search.space import Config, Space, Value, Variable
from ffnlab.pruning.search.supernet import (
    FORMATS,
    Supernet,
    elastic_ffns,
    measuring,
    supernet,
)

__all__ = [
    "COARSE",
    "FORMATS",
    "OFFICIAL",
    "Config",
    "Costs",
    "Grid",
    "Log",
    "Measure",
    "Predictor",
    "SearchOptions",
    "Space",
    "Supernet",
    "Tactic",
    "Value",
    "Variable",
    "best_within",
    "drawn_alike",
    "elastic_ffns",
    "fit",
    "front",
    "hypervolume",
    "knee",
    "macs",
    "measured",
    "measuring",
    "meter",
    "predict",
    "search",
    "start",
    "supernet",
]
