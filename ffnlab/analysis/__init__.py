"""Probes (`ffnlab.probe.Probe`): what a model is, what it costs, and what it learned; and measures
of what one gives, rows of features for instance.

What rewrites a model belongs to the other methods. `PROBES` names those that the command line
knows.
"""

from ffnlab.analysis.activations import Recorded, activations
from ffnlab.analysis.blahut import Bottleneck, bottleneck
from ffnlab.analysis.bounds import linear_bounds
from ffnlab.analysis.compiled_cost import CostReport, compiled_cost
from ffnlab.analysis.domain_distance import DomainDistance, domain_distance
from ffnlab.analysis.entropy import (
    Information,
    entropy,
    information,
    joint_states,
    mutual_information,
)
from ffnlab.analysis.gradient_alignment import AlignmentReport, AlignmentStats, gradient_alignment
from ffnlab.analysis.gradient_drift import DriftReport, gradient_drift
from ffnlab.analysis.information_plane import Cells, PlaneReport, information_plane
from ffnlab.analysis.interpretation import (
    InterpretationReport,
    after_embedding,
    interpretation,
)
from ffnlab.analysis.intervals import Box, interval_bounds
from ffnlab.analysis.kde import Kernels, mixture_entropy
from ffnlab.analysis.layerwise import layerwise_search
from ffnlab.analysis.linear_interpreter import Interpreter, interpret
from ffnlab.analysis.linear_queries import Singular, Votes, singular, votes
from ffnlab.analysis.locality import LocalityReport, locality
from ffnlab.analysis.lossy_information import LossyReport, lossy_information
from ffnlab.analysis.milp import Least, least_margin
from ffnlab.analysis.nearest import (
    Estimate,
    nearest_entropy,
    nearest_information,
    nearest_weights,
)
from ffnlab.analysis.principal import Components, Scatter, components_of, principal
from ffnlab.analysis.table import METHODS, PROBES
from ffnlab.analysis.universal import Construction, construct, corners_and_grid, errors_of
from ffnlab.analysis.verification import Cube, Grid, Verdict, verify
from ffnlab.analysis.weight_norms import NormReport, weight_norms

__all__ = [
    "METHODS",
    "PROBES",
    "AlignmentReport",
    "AlignmentStats",
    "Bottleneck",
    "Box",
    "Cells",
    "Components",
    "Construction",
    "CostReport",
    "Cube",
    "DomainDistance",
    "DriftReport",
    "Estimate",
    "Grid",
    "Information",
    "InterpretationReport",
    "Interpreter",
    "Kernels",
    "Least",
    "LocalityReport",
    "LossyReport",
    "NormReport",
    "PlaneReport",
    "Recorded",
    "Scatter",
    "Singular",
    "Verdict",
    "Votes",
    "activations",
    "after_embedding",
    "bottleneck",
    "compiled_cost",
    "components_of",
    "construct",
    "corners_and_grid",
    "domain_distance",
    "entropy",
    "errors_of",
    "gradient_alignment",
    "gradient_drift",
    "information",
    "information_plane",
    "interpret",
    "interpretation",
    "interval_bounds",
    "joint_states",
    "layerwise_search",
    "least_margin",
    "linear_bounds",
    "locality",
    "lossy_information",
    "mixture_entropy",
    "mutual_information",
    "nearest_entropy",
    "nearest_information",
    "nearest_weights",
    "principal",
    "singular",
    "verify",
    "votes",
    "weight_norms",
]
