"""The table that ends a study of a search: networks, found and other, beside each other.

Every row is a network that exists: its shape is read from its own groups, its products are counted
in its own program, and all are timed in turns in one run.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from ffnlab import tree
from ffnlab.clock import Spread, compiled, in_turns
from ffnlab.models.calibration import called
from ffnlab.models.groups import groups, owner_of
from ffnlab.models.stack import Stacked, unstack
from ffnlab.pruning.search.measure import macs
from ffnlab.weights import Dense, Weight

__all__ = ["Entry", "row", "rows", "shape"]


class Entry(NamedTuple):
    """A network of the table.

    Attributes:
      model: itself, in the form that is saved.
      accuracy: on test rows, of every seed.
    """

    model: Any
    accuracy: tuple[float, ...]


def rows(
    entries: Mapping[str, Entry], inputs: PyTree, *, turns: int = 41
) -> list[dict[str, object]]:
    """A row for each network, all timed in turns.

    Args:
      entries: networks by name.
      inputs: what they are called with, rows on the first axis; all rows are timed at once.
      turns: of all networks.
    Returns:
      columns "network", "shape", "MACs" (of one row), "bytes", "latency ms" (median, of all rows),
      "latency quartiles ms", "accuracy" (mean over seeds).
    """
    calls = {name: compiled(called, entry.model, inputs) for name, entry in entries.items()}
    times = in_turns(calls, turns)
    return [
        row(name, entry.model, inputs, accuracy=entry.accuracy, seconds=times.of(name))
        for name, entry in entries.items()
    ]


def row(
    name: str, model: Any, inputs: PyTree, *, accuracy: tuple[float, ...], seconds: Spread
) -> dict[str, object]:
    """The row of one network, see `rows`; `seconds` were measured in turns with the others."""
    low, high = (f"{1e3 * end:.3g}" for end in (seconds.low, seconds.high))
    return {
        "network": name,
        "shape": shape(model),
        "MACs": macs(model, inputs),
        "bytes": tree.nbytes(model),
        "latency ms": 1e3 * seconds.median,
        "latency quartiles ms": f"{low} to {high}",
        "accuracy": float(np.mean(accuracy)),
    }


def shape(model: Any) -> str:
    """The sizes of a model's channel groups by what they are of, in order; formats but dense ones.

    >>> import jax
    >>> from ffnlab.layers import MLP
    >>> shape(MLP((4, 8, 3, 2), key=jax.random.key(0)))
    'maps 8-3'
    """
    flat = unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model
    nodes, said = dict(tree.walk(flat)), {}
    for group in groups(flat):
        kind = re.sub(r"\[\d+\]", "", group.name).rpartition(".")[2]
        owner, attribute = owner_of(nodes, group.parts[0].path)
        value = getattr(owner, attribute).get_value()
        is_plain = isinstance(value, Dense) or not isinstance(value, Weight)
        form = "" if is_plain else f" {type(value).__name__.lower()}"
        said.setdefault(kind, []).append(f"{group.size}{form}")
    return ", ".join(f"{kind} {'-'.join(sizes)}" for kind, sizes in said.items())
