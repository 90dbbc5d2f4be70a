"""The shape of everything that only looks: `Probe(name, init, observe, report)`.

    report = probe(model, batches)

A probe is a Transform that rewrites nothing: *stats* are gathered batch by batch in bounded memory,
and one report is made of them in the end. What was looked at stays as it was.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.errors import ConfigError, NumericalError
from ffnlab.report import Report
from ffnlab.rule import Rule
from ffnlab.transform import check_iterable_again, one_pass

__all__ = ["Probe", "along", "rows"]

M = TypeVar("M")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Probe(Generic[M, S]):
    """A way of looking at a model, as pure functions.

    Attributes:
      name: for logs, tables and errors.
      init: model -> stats before anything was observed. Checks that the model can be probed.
      observe: (stats, model, batch) -> stats; compiled once for batches of one shape. None where
        only the model is looked at.
      report: (model, stats) -> `ffnlab.report.Report`; on the host, once. Its figures are finite.
    """

    name: str
    init: Callable[[M], S]
    observe: Callable[[S, M, PyTree], S] | None
    report: Callable[[M, S], Report]

    def __call__(self, model: M, batches: Iterable = (), *, progress: bool = True) -> Report:
        """Looks at a model and at all batches.

        Args:
          model: it stays as it is.
          batches: re-iterable, not a generator; how rows are divided among them makes no
            difference. They are not read where the probe looks at the model alone.
          progress: show a bar (quiet when the output is not a terminal).
        Raises:
          ValueError: batches is a generator or empty, or the model cannot be probed.
          NumericalError: a figure is NaN or infinite.
        """
        stats = self.init(model)
        if self.observe is not None:
            check_iterable_again(batches)
            stats = one_pass(self.name, self.observe, stats, model, batches, progress=progress)
        report = self.report(model, stats)
        for name, value in report.figures().items():
            if not math.isfinite(value):
                raise NumericalError(
                    f"probe {self.name!r}: the figure {name!r} is {value}; look for NaN and "
                    "infinity in the model and in the batches"
                )
        return report


def rows(
    name: str,
    measure: Callable[[M, PyTree], PyTree],
    report: Callable[[M, PyTree], Report],
    *,
    init: Callable[[M], object] = lambda model: None,
) -> Probe[M, tuple[PyTree, ...]]:
    """A probe of what is measured of each row, kept for all rows.

    Args:
      name: of the probe.
      measure: (model, batch) -> pytree of arrays [b, …], a row for each of the batch; jitted.
      report: (model, the same of all rows, as NumPy arrays) -> Report.
      init: raises where a model cannot be probed.
    Returns:
      a probe; its stats are what was measured of each batch, on the host.
    Raises:
      ConfigError: from the probe, where what was measured has no rows, or others than before.
    """
    compiled = jax.jit(measure)

    def begin(model: M) -> tuple[PyTree, ...]:
        init(model)
        return ()

    def observe(stats: tuple[PyTree, ...], model: M, batch: PyTree) -> tuple[PyTree, ...]:
        found = jax.tree.map(np.asarray, compiled(model, batch))
        kinds = [_kind(name, each) for each in (*stats[:1], found)]
        if kinds[0] != kinds[-1]:
            raise ConfigError(f"probe {name!r} measures {kinds[-1]} of a batch, {kinds[0]} before")
        return (*stats, found)

    def finished(model: M, stats: tuple[PyTree, ...]) -> Report:
        return report(model, jax.tree.map(lambda *parts: np.concatenate(parts), *stats))

    return Probe(name, begin, observe, finished)


def _kind(name: str, measured: PyTree) -> str:
    """Structure, shapes of rows and dtypes of what was measured, in words."""
    leaves, structure = jax.tree.flatten(measured)
    if not leaves or any(leaf.ndim < 1 for leaf in leaves):
        shapes = [leaf.shape for leaf in leaves]
        raise ConfigError(
            f"probe {name!r} measures arrays {shapes}; a row for each input is needed"
        )
    if len({len(leaf) for leaf in leaves}) > 1:
        shapes = [leaf.shape for leaf in leaves]
        raise ConfigError(f"probe {name!r} measures arrays {shapes}, not alike in their rows")
    return f"{structure} of {[(str(leaf.dtype), leaf.shape[1:]) for leaf in leaves]}"


def along(probe: Probe, rule: Rule, batches: Iterable = ()) -> Callable[[PyTree], dict[str, float]]:
    """A probe as an `evaluate` of `ffnlab.parallel.train`: it looks at what was learned so far.

        watch = along(probe, rule, batches)
        outcome = train(rule, …, evaluate=watch, options=LoopOptions(evaluate_every=100))
        Series(outcome.evaluations)

    Args:
      probe: of the models that the rule learns.
      rule: its `model` says what was learned.
      batches: what the probe looks at each time; re-iterable.
    Returns:
      state -> the report's figures.
    Raises:
      ValueError: batches is a generator.
    """
    check_iterable_again(batches)

    def evaluate(state: PyTree) -> dict[str, float]:
        return dict(probe(rule.model(state), batches, progress=False).figures())

    return evaluate
