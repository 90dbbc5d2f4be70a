"""Probes (`ffnlab.probe.Probe`): what a model is, what it costs, and what it learned; and measures
of what one gives, rows of features for instance.

What rewrites a model belongs to the other methods. `PROBES` names those that the command line
knows.
"""

from ffnlab.analysis.compiled_cost import CostReport, compiled_cost
from ffnlab.analysis.domain_distance import DomainDistance, domain_distance
from ffnlab.analysis.gradient_alignment import AlignmentReport, AlignmentStats, gradient_alignment
from ffnlab.analysis.linear_interpreter import Interpreter, interpret
from ffnlab.analysis.linear_queries import Singular, Votes, singular, votes
from ffnlab.analysis.locality import LocalityReport, locality
from ffnlab.analysis.table import METHODS, PROBES
from ffnlab.analysis.weight_norms import NormReport, weight_norms

__all__ = [
    "METHODS",
    "PROBES",
    "AlignmentReport",
    "AlignmentStats",
    "CostReport",
    "DomainDistance",
    "Interpreter",
    "LocalityReport",
    "NormReport",
    "Singular",
    "Votes",
    "compiled_cost",
    "domain_distance",
    "gradient_alignment",
    "interpret",
    "locality",
    "singular",
    "votes",
    "weight_norms",
]
