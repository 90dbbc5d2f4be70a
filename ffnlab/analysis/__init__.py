"""Probes (`ffnlab.probe.Probe`): what a model is, what it costs, and what it learned.

What rewrites a model belongs to the other methods. `PROBES` names those that the command line
knows.
"""

from ffnlab.analysis.compiled_cost import CostReport, compiled_cost
from ffnlab.analysis.gradient_alignment import AlignmentReport, AlignmentStats, gradient_alignment
from ffnlab.analysis.linear_interpreter import Interpreter, interpret
from ffnlab.analysis.linear_queries import Singular, Votes, singular, votes
from ffnlab.analysis.table import METHODS, PROBES
from ffnlab.analysis.weight_norms import NormReport, weight_norms

__all__ = [
    "METHODS",
    "PROBES",
    "AlignmentReport",
    "AlignmentStats",
    "CostReport",
    "Interpreter",
    "NormReport",
    "Singular",
    "Votes",
    "compiled_cost",
    "gradient_alignment",
    "interpret",
    "singular",
    "votes",
    "weight_norms",
]
