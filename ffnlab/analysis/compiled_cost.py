"""What one program over all rows needs: memory as the compiler plans it, products as counted."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jaxtyping import PyTree

from ffnlab.analysis.parts import bars
from ffnlab.errors import ConfigError, first_line
from ffnlab.graph import Bipartite, Graph
from ffnlab.models import account
from ffnlab.models.account import CompiledCost
from ffnlab.probe import Probe
from ffnlab.report import Report

__all__ = ["CostReport", "compiled_cost"]


class Shapes(NamedTuple):
    """Which batches were seen; no numbers of them are kept.

    Attributes:
      rows: how many, in all.
      row: a batch of one, abstract; None before the first.
      is_whole: it is a graph with what belongs to its nodes, which is one row.
    """

    rows: int
    row: PyTree
    is_whole: bool = False


@dataclasses.dataclass(frozen=True)
class CostReport(Report):
    """The cost of a program.

    Attributes:
      cost: see `ffnlab.models.account.CompiledCost`.
      count: rows that the program takes.
    """

    cost: CompiledCost
    count: int

    def rows(self) -> list[dict[str, object]]:
        """One row."""
        return [{"rows": self.count, **self.cost._asdict()}]

    def figures(self) -> dict[str, float]:
        """What it needs by name, and the pairs of a multiplication and an addition for a row."""
        found = {name: float(value) for name, value in self.cost._asdict().items()}
        return found | {"multiply_adds_per_row": self.cost.multiply_adds / self.count}

    def draw(self, figure: Any) -> None:
        """Bytes of arguments, results and what is kept in between."""
        kinds = ("temporary", "arguments", "results")
        bars(figure, {kind: getattr(self.cost, kind) / 1024 for kind in kinds}, "KiB")


def forward(model: Callable[[PyTree], PyTree], batch: PyTree) -> PyTree:
    """The model's output."""
    return model(batch)


def compiled_cost(
    fn: Callable[[PyTree, PyTree], PyTree] = forward,
) -> Probe[PyTree, Shapes]:
    """A probe of what a function of a model and a batch needs, compiled and not run.

    It is compiled once, for all rows as one batch: give as many rows as the program is to take. A
    batch with a graph is one row, and the only one.

    Args:
      fn: (model, batch) -> pytree of arrays, such as the gradient of a loss; `model(batch)` where
        none is given.
    Raises:
      ConfigError: from the probe, when rows are not alike or the function does not take them, or
        see `ffnlab.models.account.compiled_cost`.

    >>> from ffnlab.layers import MLP
    >>> model, x = MLP((3, 2), key=jax.random.key(0)), jax.numpy.ones((4, 3))
    >>> compiled_cost()(model, [x, x]).figures()["multiply_adds"]
    48.0
    """

    def observe(stats: Shapes, model: PyTree, batch: PyTree) -> Shapes:
        seen = jax.eval_shape(lambda batch: batch, batch)
        if any(map(is_graph, jax.tree.leaves(batch, is_leaf=is_graph))):
            if stats.rows:
                raise ConfigError("probe 'compiled_cost': a graph is one batch; here is another")
            return Shapes(1, seen, is_whole=True)
        shapes = [leaf.shape for leaf in jax.tree.leaves(seen)]
        counts = {shape[:1] for shape in shapes}
        if len(counts) != 1 or not all(counts) or (0,) in counts:
            raise ConfigError(f"probe 'compiled_cost': a batch of arrays {shapes} has no rows")
        row = with_rows(seen, 1)
        if stats.row not in (None, row):
            raise ConfigError(f"probe 'compiled_cost': rows are {row}, and were {stats.row}")
        return Shapes(stats.rows + shapes[0][0], row)

    def report(model: PyTree, stats: Shapes) -> CostReport:
        batch = stats.row if stats.is_whole else with_rows(stats.row, stats.rows)
        try:
            jax.eval_shape(fn, model, batch)
        except (AttributeError, TypeError, ValueError) as error:
            raise ConfigError(
                f"probe 'compiled_cost': fn(model, batch) takes no batch of {stats.row}: "
                f"{first_line(error)}; of pairs fn=lambda model, batch: model(batch[0]) takes one"
            ) from error
        return CostReport(account.compiled_cost(fn, model, batch), stats.rows)

    return Probe("compiled_cost", lambda model: Shapes(0, None), observe, report)


def is_graph(node: object) -> bool:
    """Whether a part of a batch is a graph."""
    return isinstance(node, Graph | Bipartite)


def with_rows(batch: PyTree, rows: int) -> PyTree:
    """An abstract batch with another number of rows."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), batch
    )
