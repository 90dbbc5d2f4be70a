"""The probes that a command may name. A new one joins by one line."""

from collections.abc import Mapping
from types import MappingProxyType

from ffnlab.outside import Methods
from ffnlab.probe import Probe

__all__ = ["METHODS", "PROBES"]

# Name -> "module:factory"; a module is imported when it is named. A factory that has a parameter
# `rule`, `loss`, `fn` (model and batch to outputs) or `fitted` (stats of `principal`) is given what
# the command makes of it.
PROBES: Mapping[str, str] = MappingProxyType(
    {
        "compiled_cost": "ffnlab.analysis.compiled_cost:compiled_cost",
        "gradient_alignment": "ffnlab.analysis.gradient_alignment:gradient_alignment",
        "information_plane": "ffnlab.analysis.information_plane:information_plane",
        "interpretation": "ffnlab.analysis.interpretation:interpretation",
        "lossy_information": "ffnlab.analysis.lossy_information:lossy_information",
        "netinfof": "ffnlab.graphs.netinfof:netinfof",
        "netinfof_nodes": "ffnlab.graphs.netinfof_nodes:netinfof_nodes",
        "oracle": "ffnlab.routing.oracle:oracle",
        "weight_norms": "ffnlab.analysis.weight_norms:weight_norms",
    }
)
METHODS = Methods(
    "probe", "ffnlab.probes", Probe, PROBES, given=frozenset({"rule", "loss", "fn", "fitted"})
)
