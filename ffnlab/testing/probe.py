"""The contract of a probe: a model and batches in, a report out, and nothing changed."""

import dataclasses
import functools
import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from ffnlab import models, tree
from ffnlab.errors import FFNLabError, NumericalError
from ffnlab.probe import Probe
from ffnlab.report import Report, as_png
from ffnlab.storage import files
from ffnlab.testing import small
from ffnlab.testing.compiling import counted
from ffnlab.testing.contract import equal, hold, need

__all__ = ["ProbeCase", "check_probe"]

# Sums over rows in another order, of small models; probes of what is nearly zero say their own.
RTOL = 1e-4


@dataclasses.dataclass(frozen=True)
class ProbeCase:
    """A probe with a model that it looks at, as tables of contract tests hold them.

    Attributes:
      make: the probe.
      model: makes what it looks at.
      batches: makes what it looks at it with.
      unmatched: the probe with a selector that matches nothing, where it takes one.
      rtol: see `check_probe`.
      same_stacked: see `check_probe`.
    """

    make: Callable[[], Probe]
    model: Callable[[], PyTree] = small.tiny
    batches: Callable[[], Sequence[PyTree]] = small.batches
    unmatched: Callable[[], Probe] | None = None
    rtol: float = RTOL
    same_stacked: bool = True

    def check(self) -> None:
        """Holds it against the contract (`check_probe`)."""
        check_probe(
            self.make,
            model=self.model(),
            batches=self.batches(),
            unmatched=self.unmatched,
            rtol=self.rtol,
            same_stacked=self.same_stacked,
        )


@dataclasses.dataclass(frozen=True)
class Case:
    """A probe under check.

    Attributes:
      make, model, batches, unmatched, rtol, same_stacked: see `check_probe`.
    """

    make: Callable[[], Probe]
    model: PyTree
    batches: Sequence[PyTree]
    unmatched: Callable[[], Probe] | None
    rtol: float
    same_stacked: bool

    @functools.cached_property
    def probe(self) -> Probe:
        """The probe, made once."""
        return self.make()

    @functools.cached_property
    def report(self) -> Report:
        """What it says."""
        return self.seen(self.probe, self.model, self.batches)

    def seen(self, probe: Probe, model: PyTree, batches: Sequence[PyTree]) -> Report:
        """What a probe says of a model and batches."""
        return probe(model, batches, progress=False)


def check_probe(
    make: Callable[[], Probe],
    *,
    model: PyTree | None = None,
    batches: Sequence[PyTree] | None = None,
    unmatched: Callable[[], Probe] | None = None,
    rtol: float = RTOL,
    same_stacked: bool = True,
) -> None:
    """Holds a probe against its contract (`ffnlab.probe.Probe`); takes some seconds.

    Args:
      make: the probe.
      model: what it looks at; `ffnlab.testing.tiny()` when None. Of one with layers in a list the
        stacked form (`ffnlab.models.stack`) is tried too.
      batches: two or more of one shape, every array with a row for each input;
        `ffnlab.testing.batches()` when None.
      unmatched: the probe with a selector that matches nothing, where it takes one.
      rtol: how far the numbers of a report may lie apart, relative to the larger and to 1, when
        rows are divided in another way or blocks are stacked.
      same_stacked: whether the stacked form has the same report; False for probes of programs,
        which differ: they only have to take it.
    Raises:
      AssertionError: names the line of the contract that is broken, and how.
      ValueError: fewer than two batches.

    >>> from ffnlab.analysis import weight_norms
    >>> check_probe(weight_norms)
    """
    model = small.tiny() if model is None else model
    batches = small.batches() if batches is None else batches
    if len(batches) < 2:
        raise ValueError(f"batches has {len(batches)}; two are needed")
    lines = (
        it_is_a_probe_and_gives_a_report,
        figures_are_finite_numbers_by_name,
        arguments_stay_and_the_report_repeats,
        observing_other_numbers_compiles_nothing,
        any_split_of_the_rows_gives_the_same_report,
        stacked_models_are_taken,
        what_is_written_is_read_again,
        it_prints_and_draws_on_an_empty_figure,
        without_batches_there_is_an_error_by_name,
        numbers_that_are_not_finite_are_an_error_by_name_or_do_not_matter,
        a_selector_that_matches_nothing_is_an_error,
    )
    hold("the probe", lines, Case(make, model, batches, unmatched, rtol, same_stacked))


def it_is_a_probe_and_gives_a_report(case: Case) -> None:
    kind = type(case.probe).__name__
    need(isinstance(case.probe, Probe), f"{kind} is no ffnlab.probe.Probe")
    need(isinstance(case.report, Report), f"{type(case.report).__name__} is no Report")


def arguments_stay_and_the_report_repeats(case: Case) -> None:
    before = jax.tree.map(np.array, (case.model, case.batches))
    first = case.report.as_json()
    again = case.seen(case.probe, case.model, case.batches).as_json()
    need(equal(before, (case.model, case.batches)), "the model or a batch was changed")
    need(first == again, f"the report is another the second time: {difference(first, again, 0.0)}")


def observing_other_numbers_compiles_nothing(case: Case) -> None:
    p = case.probe
    if p.observe is None:
        return
    case.seen(p, case.model, case.batches)
    larger = lambda leaf: 1.5 * leaf if tree.floating("", leaf) else leaf  # noqa: E731
    other = jax.tree.map(larger, case.model)
    stats = p.init(other)
    stats = p.observe(stats, other, case.batches[0])
    with counted() as count:
        p.observe(stats, other, case.batches[1])
    need(count.programs == 0, f"{count.programs} programs were compiled")


def any_split_of_the_rows_gives_the_same_report(case: Case) -> None:
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *case.batches)
    rows, first = (len(jax.tree.leaves(part)[0]) for part in (whole, case.batches[0]))
    singles = range(first, rows + 1)  # one new size: each is compiled
    for cuts in ([*range(rows + 1)], [0, *singles]):
        parts = [
            jax.tree.map(lambda leaf, a=a, b=b: jnp.asarray(leaf[a:b]), whole)
            for a, b in itertools.pairwise(cuts)
        ]
        found = case.seen(case.probe, case.model, parts)
        far = difference(case.report.as_json(), found.as_json(), case.rtol)
        need(not far, f"of batches of {[b - a for a, b in itertools.pairwise(cuts)]} rows {far}")


def stacked_models_are_taken(case: Case) -> None:
    layers = getattr(case.model, "layers", None)
    if layers is None or isinstance(layers, models.Stacked):
        return
    found = case.seen(case.probe, models.stack(case.model), case.batches)
    far = difference(case.report.as_json(), found.as_json(), case.rtol)
    need(not (far and case.same_stacked), f"of the stacked model {far}")


def figures_are_finite_numbers_by_name(case: Case) -> None:
    figures = case.report.figures()
    need(bool(figures), "there is none, and a log would have nothing to write")
    for name, value in figures.items():
        need(isinstance(name, str), f"{name!r} is no name")
        need(np.ndim(value) == 0 and bool(np.isfinite(value)), f"{name} is {value}")


def what_is_written_is_read_again(case: Case) -> None:
    found = case.report.as_json()
    need(files.as_json(found) == found, "as JSON it is another")
    with tempfile.TemporaryDirectory() as folder:
        case.report.write(Path(folder) / "out")
        names = {file.name for file in (Path(folder) / "out").iterdir()}
        need(names == {"report.json", "report.png"}, f"{sorted(names)} were written")
        back = files.read_json(Path(folder) / "out" / "report.json")
    need(back == found, f"the file has another: {difference(found, back, 0.0)}")


def it_prints_and_draws_on_an_empty_figure(case: Case) -> None:
    said = str(case.report)
    for row in case.report.rows():
        missing = [name for name in row if name not in said]
        need(not missing, f"columns {missing} are not in what it prints")
    empty, drawn = as_png(lambda figure: None), as_png(case.report.draw)
    need(drawn != empty, "the figure stays empty")


def without_batches_there_is_an_error_by_name(case: Case) -> None:
    if case.probe.observe is not None:
        refused(case, case.probe, case.model, [], ValueError)


def numbers_that_are_not_finite_are_an_error_by_name_or_do_not_matter(case: Case) -> None:
    broken = lambda leaf: jnp.full_like(leaf, jnp.nan) if tree.floating("", leaf) else leaf  # noqa: E731
    model, batches = (jax.tree.map(broken, part) for part in (case.model, list(case.batches)))
    for other in ((model, case.batches), (case.model, batches)):
        try:
            found = case.seen(case.probe, *other).as_json()
        except NumericalError as error:
            need(case.probe.name in str(error), f"it does not say {case.probe.name!r}: {error}")
        else:
            need(found == case.report.as_json(), "with NaN the report is another, without an error")


def a_selector_that_matches_nothing_is_an_error(case: Case) -> None:
    if case.unmatched is not None:
        refused(case, case.unmatched(), case.model, case.batches, FFNLabError, "matches nothing")


def refused(
    case: Case,
    probe: Probe,
    model: PyTree,
    batches: Sequence[PyTree],
    kind: type[Exception],
    said: str | None = None,
) -> None:
    """Raises AssertionError unless a probe refuses with an error that says its name, or `said`."""
    try:
        case.seen(probe, model, batches)
    except kind as error:
        wanted = probe.name if said is None else said
        need(wanted in str(error), f"it does not say {wanted!r}: {error}")
    else:
        need(False, "it was probed without an error")


def difference(a: object, b: object, rtol: float, where: str = "") -> str:
    """The first place where two JSON values differ, in words; empty where they do not.

    Numbers differ when they lie further apart than `rtol` of the larger, or of 1.

    >>> difference({"a": [1.0, "x"]}, {"a": [1.0, "y"]}, 0.0)
    "['a'][1] is 'x' and 'y'"
    >>> difference({"a": 1.0}, {"a": 1.001}, 0.01)
    ''
    """
    if isinstance(a, Mapping) and isinstance(b, Mapping) and list(a) == list(b):
        pairs = [(a[key], b[key], f"{where}[{key!r}]") for key in a]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(*pair, f"{where}[{i}]") for i, pair in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, int | float) and isinstance(b, int | float):
        is_near = abs(a - b) <= rtol * max(1.0, abs(a), abs(b))
        return "" if is_near else f"{where} is {a} and {b}"
    else:
        return "" if a == b else f"{where} is {a!r} and {b!r}"
    return next(filter(None, (difference(x, y, rtol, at) for x, y, at in pairs)), "")
