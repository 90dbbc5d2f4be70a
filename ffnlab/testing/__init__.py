"""The contracts of weights, layers, transforms, rules and probes, as checks of one's own methods.

    def test_my_weight():
        check_weight(lambda key: MyWeight(...))

A check takes a small example, holds it against every line of its contract, and raises
AssertionError with the line that is broken. The library's own methods pass the same checks. No test
framework is needed.
"""

from ffnlab.testing.compiling import Count, counted
from ffnlab.testing.contract import equal
from ffnlab.testing.graph_layer import check_graph_layer
from ffnlab.testing.layer import check_layer
from ffnlab.testing.probe import ProbeCase, check_probe
from ffnlab.testing.rule import RuleCase, check_rule
from ffnlab.testing.small import batches, tiny, tiny_encoder
from ffnlab.testing.transform import TransformCase, check_transform
from ffnlab.testing.weight import check_weight

__all__ = [
    "Count",
    "ProbeCase",
    "RuleCase",
    "TransformCase",
    "batches",
    "check_graph_layer",
    "check_layer",
    "check_probe",
    "check_rule",
    "check_transform",
    "check_weight",
    "counted",
    "equal",
    "tiny",
    "tiny_encoder",
]
