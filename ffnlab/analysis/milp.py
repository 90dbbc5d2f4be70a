"""The least margin of a ReLU network over a box, exactly, as a mixed-integer linear program.

A unit z = max(p, 0) of p = w h + b in [l, u] with l < 0 < u is, by a binary a,

    z >= 0,   z >= p,   z <= p - l (1 - a),   z <= u a

(Tjeng, Xiao and Tedrake, arXiv 1711.07356); units that the box decides need none. Solved by HiGHS
(`scipy.optimize.milp`), to its tolerances.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float

from ffnlab.analysis.intervals import check_ends
from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import MLP

__all__ = ["Least", "least_margin"]


class Least(NamedTuple):
    """The least margin, and where it is.

    Attributes:
      margin: logit of the class less the largest other one; None where time was up.
      point: where, [inputs].
    """

    margin: float | None
    point: Float[np.ndarray, "n"] | None


def least_margin(
    net: MLP,
    low: Float[np.ndarray, "n"],
    high: Float[np.ndarray, "n"],
    label: int,
    *,
    seconds: float = 60.0,
) -> Least:
    """The least margin of a class over a box.

    Args:
      net: of "relu".
      low, high: ends of the box.
      label: the class.
      seconds: for each other class; where they are up the margin is None, which proves nothing.
    Raises:
      ConfigError: another nonlinearity, no such class, ends that are no box of the net's inputs,
        or seconds that are not positive.
    """
    if net.activation != "relu":
        raise ConfigError(
            f"activation={net.activation!r}: a network of 'relu' is exact as a program"
        )
    at_least(0, label=label)
    if not label < net.sizes[-1]:
        raise ConfigError(f"label={label} is outside of {net.sizes[-1]} classes")
    if not seconds > 0:
        raise ConfigError(f"seconds={seconds} must be positive")
    check_ends(low, high)
    if np.shape(low) != tuple(net.sizes[:1]):
        raise ConfigError(
            f"low {np.shape(low)} and high {np.shape(high)}: the net takes [{net.sizes[0]}]"
        )
    program = Program(net, np.asarray(low, np.float64), np.asarray(high, np.float64))
    found: list[Least] = []
    for other in range(net.sizes[-1]):
        if other == label:
            continue
        found.append(program.least(label, other, seconds))
        if found[-1].margin is None:
            return found[-1]
    return min(found, key=lambda each: float("inf") if each.margin is None else each.margin)


class Program:
    """The constraints of a network over a box; its variables are inputs, units and binaries."""

    def __init__(self, net: MLP, low: np.ndarray, high: np.ndarray):
        maps = [
            (
                np.asarray(m.weight.dense(), np.float64),
                np.zeros(m.weight.shape[1]) if m.b is None else np.asarray(m.b, np.float64),
            )
            for m in net.maps
        ]
        self.lows, self.highs, self.kinds = [*low], [*high], [0] * len(low)
        self.rows: list[tuple[dict[int, float], float, float]] = []
        before, self.inputs = list(range(len(low))), len(low)
        for w, b in maps[:-1]:
            units = []
            for j in range(w.shape[1]):
                terms = {v: w[i, j] for i, v in enumerate(before)}
                up, down = np.maximum(w[:, j], 0), np.minimum(w[:, j], 0)
                ends = low @ up + high @ down + b[j], high @ up + low @ down + b[j]
                units.append(self.unit(terms, b[j], *ends))
            low, high = (np.array([of[u] for u in units]) for of in (self.lows, self.highs))
            before = units
        self.last, self.out = before, maps[-1]

    def variable(self, low: float, high: float, kind: int = 0) -> int:
        """A new one."""
        self.lows.append(low)
        self.highs.append(high)
        self.kinds.append(kind)
        return len(self.lows) - 1

    def unit(self, terms: dict[int, float], bias: float, low: float, high: float) -> int:
        """max(p, 0) of p = terms + bias, which lies in low..high."""
        z = self.variable(max(low, 0.0), max(high, 0.0))
        if high <= 0:
            return z
        minus = {v: -c for v, c in terms.items()}
        if low >= 0:
            self.rows.append(({z: 1.0, **minus}, bias, bias))
            return z
        a = self.variable(0.0, 1.0, 1)
        self.rows.append(({z: 1.0, **minus}, bias, np.inf))
        self.rows.append(({z: 1.0, a: -low, **minus}, -np.inf, bias - low))
        self.rows.append(({z: 1.0, a: -high}, -np.inf, 0.0))
        return z

    def least(self, label: int, other: int, seconds: float) -> Least:
        """The least of one logit less another."""
        w, b = self.out
        cost = np.zeros(len(self.lows))
        cost[self.last] = w[:, label] - w[:, other]
        table = scipy.sparse.lil_matrix((max(len(self.rows), 1), len(cost)))
        lower, upper = np.full(table.shape[0], -np.inf), np.full(table.shape[0], np.inf)
        for i, (terms, least, most) in enumerate(self.rows):
            table[i, list(terms)] = list(terms.values())
            lower[i], upper[i] = least, most
        found = scipy.optimize.milp(
            cost,
            constraints=scipy.optimize.LinearConstraint(table.tocsr(), lower, upper),
            bounds=scipy.optimize.Bounds(np.array(self.lows), np.array(self.highs)),
            integrality=np.array(self.kinds),
            options={"time_limit": seconds, "mip_rel_gap": 0.0},
        )
        if found.status != 0:
            return Least(None, None)
        return Least(float(found.fun + b[label] - b[other]), found.x[: self.inputs])
