"""Compares measurements with the limits in `limits.toml`; `python -m ffnlab.bench.check [NAME …]`.

A new figure joins by a table in that file. A measure is run once for all figures that name it, and
again, up to `tries` times, while one of them is out of its limit: the machine may have been busy.
"""

import argparse
import dataclasses
import importlib
import math
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ffnlab.errors import ConfigError, MissingExtraError

__all__ = ["Limit", "Outcome", "check", "read_limits"]


@dataclasses.dataclass(frozen=True)
class Limit:
    """One figure and what is accepted for it.

    Attributes:
      name: of the figure.
      measure: "module:function" that returns it.
      key: which of the figures that the measure returns; "" when it returns one.
      bound: the accepted extreme, in `unit`.
      at_most: whether the figure must be <= bound; else >= bound.
      unit: printed beside it.
      why: where the bound comes from.
      tries: measurements made before being out of the limit counts, >= 1.
    """

    name: str
    measure: str
    bound: float
    at_most: bool
    key: str = ""
    unit: str = ""
    why: str = ""
    tries: int = 3

    def holds(self, figure: float) -> bool:
        """Whether a figure is within the limit; NaN never is."""
        return figure <= self.bound if self.at_most else figure >= self.bound

    def better(self, a: float, b: float) -> float:
        """The figure further inside the limit; a number before NaN."""
        if math.isnan(a) or math.isnan(b):
            return b if math.isnan(a) else a
        return min(a, b) if self.at_most else max(a, b)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A limit with the best figure measured, or the reason why there is none."""

    limit: Limit
    figure: float = math.nan
    absent: str = ""

    @property
    def status(self) -> str:
        """ "ok", "OUT OF LIMIT" or "not measured"."""
        if self.absent:
            return "not measured"
        return "ok" if self.limit.holds(self.figure) else "OUT OF LIMIT"


def read_limits(path: Path | None = None) -> list[Limit]:
    """Reads a limits file.

    Args:
      path: the TOML file; the one shipped with ffnlab when None.
    Returns:
      the limits, in the file's order.
    Raises:
      ConfigError: a table that lacks something or has an unknown entry; the message names it.
    """
    source = path or resources.files("ffnlab.bench") / "limits.toml"
    tables = tomllib.loads(source.read_text(encoding="utf-8"))
    return [parse_limit(name, table) for name, table in tables.items()]


def parse_limit(name: str, table: object) -> Limit:
    """One table of the limits file."""
    if not isinstance(table, dict):
        raise ConfigError(f"limits: {name!r} is not a table")
    rest = dict(table)
    bounds = {side: rest.pop(side) for side in ("max", "min") if side in rest}
    accepted = {"measure": str, "key": str, "unit": str, "why": str, "tries": int}
    unknown = [k for k, v in rest.items() if k not in accepted or type(v) is not accepted[k]]
    if unknown or len(bounds) != 1 or ":" not in rest.get("measure", ""):
        raise ConfigError(
            f"limits: [{name}] needs measure = 'module:function' and one of max, min; "
            f"it may have key, unit, why, tries; not accepted: {unknown or list(table)}"
        )
    ((side, bound),) = bounds.items()
    return Limit(name=name, bound=float(bound), at_most=side == "max", **rest)


def check(limits: Sequence[Limit]) -> list[Outcome]:
    """Measures and compares.

    Args:
      limits: what to check; figures of one measure are taken from the same runs.
    Returns:
      one outcome per limit, in their order.
    Raises:
      ConfigError: a measure that does not exist or does not return the key asked for.
    """
    outcomes: dict[str, Outcome] = {}
    for measure in dict.fromkeys(limit.measure for limit in limits):
        group = [limit for limit in limits if limit.measure == measure]
        outcomes |= {outcome.limit.name: outcome for outcome in check_group(measure, group)}
    return [outcomes[limit.name] for limit in limits]


def check_group(measure: str, group: Sequence[Limit]) -> list[Outcome]:
    """All figures of one measure, measured again while one of them is out of its limit."""
    function = find(measure)
    best: dict[str, float] = {}
    for _ in range(max(limit.tries for limit in group)):
        try:
            result = function()
        except MissingExtraError as error:
            return [Outcome(limit, absent=str(error)) for limit in group]
        for limit in group:
            figure = pick(result, limit)
            best[limit.name] = limit.better(best.get(limit.name, math.nan), figure)
        if all(limit.holds(best[limit.name]) for limit in group):
            break
    return [Outcome(limit, best[limit.name]) for limit in group]


def find(measure: str) -> Callable[[], float | Mapping[str, float]]:
    """The function that "module:function" names."""
    module, _, name = measure.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ConfigError(f"limits: there is no measure {measure!r}: {error}") from None


def pick(result: float | Mapping[str, float], limit: Limit) -> float:
    """The figure of one limit in what its measure returned."""
    if not isinstance(result, Mapping):
        return float(result)
    if limit.key not in result:
        raise ConfigError(
            f"limits: {limit.measure} has no figure {limit.key!r} for [{limit.name}]; "
            f"it has {sorted(result)}"
        )
    return float(result[limit.key])


def table_of(outcomes: Sequence[Outcome]) -> Table:
    """The outcomes for the terminal."""
    table = Table("figure", "measured", "limit", "status", "where the limit comes from")
    for outcome in outcomes:
        limit = outcome.limit
        measured = escape(outcome.absent) or f"{outcome.figure:.3g} {limit.unit}"
        bound = f"{'<=' if limit.at_most else '>='} {limit.bound:g} {limit.unit}"
        table.add_row(limit.name, measured, bound, outcome.status, escape(limit.why))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 1 when a figure is out of its limit (or, with --all, not measured)."""
    parser = argparse.ArgumentParser(prog="bench-check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="*", help="figures to check; default: all")
    parser.add_argument("--all", action="store_true", help="a figure not measured is a failure")
    options = parser.parse_args(arguments)
    limits = {limit.name: limit for limit in read_limits()}
    unknown = sorted(set(options.names) - limits.keys())
    if unknown:
        parser.error(f"no figures {unknown}; there are {sorted(limits)}")
    outcomes = check([limits[name] for name in options.names or limits])
    Console().print(table_of(outcomes))
    bad = {"OUT OF LIMIT", "not measured"} if options.all else {"OUT OF LIMIT"}
    return int(any(outcome.status in bad for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
