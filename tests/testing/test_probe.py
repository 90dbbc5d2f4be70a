"""`check_probe` passes a plain one, and fails one broken for each line of its contract."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.layers import MLP
from ffnlab.probe import Probe
from ffnlab.report import Report
from ffnlab.testing import ProbeCase, check_probe

MODEL = MLP((4, 3, 2), key=jax.random.key(0))
BATCHES = list(jax.random.normal(jax.random.key(1), (2, 3, 4)))


@dataclasses.dataclass(frozen=True)
class Mean(Report):
    mean: object
    name: str = "mean"

    def rows(self):
        return [{"what": "outputs", "mean": self.mean}]

    def figures(self):
        return {self.name: self.mean}

    def draw(self, figure):
        figure.subplots().bar([0], [float(self.mean)])


@jax.jit
def summed(stats, model, batch):
    total, rows = stats
    return total + model(batch).mean(-1).sum(), rows + len(batch)


def mean_of(model, stats):
    return Mean(float(stats[0] / stats[1]))


def plain(**changes) -> Callable[[], Probe]:
    """The mean of outputs; the broken ones differ in one thing."""
    parts = {"init": lambda model: (jnp.float32(0), 0), "observe": summed, "report": mean_of}
    return lambda: Probe("plain", **parts | changes)


def in_place(model, stats):
    model.maps[0].b[...] += 1
    return mean_of(model, stats)


def compiling(stats, model, batch):
    return jax.jit(lambda stats, model, batch: summed(stats, model, batch))(stats, model, batch)


def by_batches(stats, model, batch):
    return stats[0] + model(batch).mean(), stats[1] + 1


def kind(**methods) -> Callable[[], Probe]:
    """The plain probe with a report of another kind."""
    other = type("Other", (Mean,), methods)
    return plain(report=lambda model, stats: other(mean_of(model, stats).mean))


class Careless(Probe):
    """Looks at nothing that it is given twice, and not whether it was given anything."""

    def __call__(self, model, batches=(), *, progress=True):
        stats = self.init(model)
        for batch in batches:
            stats = self.observe(stats, model, batch)
        return self.report(model, stats)


def careless(report) -> Callable[[], Probe]:
    return lambda: Careless("plain", plain()().init, summed, report)


def saying_nothing(model, stats):
    value = stats[0] / stats[1]
    if not np.isfinite(value):
        raise ArithmeticError
    return Mean(float(value))


count = itertools.count()
BROKEN = {
    "it is a probe": lambda: None,
    "it is a probe and gives a report": plain(report=lambda model, stats: {"mean": 1.0}),
    "arguments stay .*model or a batch was changed": plain(report=in_place),
    r"arguments stay .*\['rows'\]\[0\]\['mean'\] is 0.0 and 1.0": plain(
        report=lambda model, stats: Mean(float(next(count)))
    ),
    "compiles nothing: 1 programs": plain(observe=compiling),
    r"any split .*of batches of \[3, 1, 1, 1\] rows": plain(observe=by_batches),
    "figures are .*there is none": kind(figures=lambda self: {}),
    "figures are .*3 is no name": kind(figures=lambda self: {3: 1.0}),
    "read again: .*as JSON it is another": kind(
        as_json=lambda self: {"figures": {"mean": (self.mean, 1.0)}}
    ),
    "read again: .*were written": kind(write=lambda self, out: out.mkdir()),
    r"prints and draws .*columns \['mean'\]": kind(__str__=lambda self: "what"),
    "prints and draws .*the figure stays empty": kind(draw=lambda self, figure: None),
    "without batches .*probed without": careless(
        lambda model, stats: Mean(float(stats[0] / max(1, stats[1])))
    ),
    "not finite .*ArithmeticError": plain(report=saying_nothing),
    "not finite .*with NaN the report is another": plain(
        report=lambda model, stats: Mean(float(jnp.nan_to_num(stats[0] / stats[1])))
    ),
}


def test_a_plain_probe_passes():
    check_probe(plain(), model=MODEL, batches=BATCHES)
    alone = plain(
        observe=None, init=lambda model: None, report=lambda model, _: Mean(model.sizes[0])
    )
    check_probe(alone, model=MODEL, batches=BATCHES)
    ProbeCase(plain(), lambda: MODEL, lambda: BATCHES).check()


@pytest.mark.parametrize("said", BROKEN)
def test_each_line_of_the_contract_is_held(said):
    with pytest.raises(AssertionError, match=f"(?s)the probe breaks its contract: .*{said}"):
        check_probe(BROKEN[said], model=MODEL, batches=BATCHES)


def test_two_batches_are_needed():
    with pytest.raises(ValueError, match="batches has 1; two are needed"):
        check_probe(plain(), model=MODEL, batches=BATCHES[:1])


def test_a_difference_has_its_tolerance():
    check_probe(plain(observe=by_batches), model=MODEL, batches=BATCHES, rtol=1.0)


def of_paths(select: str, **changes) -> Callable[[], Probe]:
    """How many weights a pattern selects, without taking blocks apart."""

    def report(model, stats):
        return Mean(float(len(tree.select(model, tree.at(select)))))

    return plain(**{"observe": None, "init": lambda model: None, "report": report} | changes)


def test_stacked_models_are_taken():
    check_probe(of_paths("embed"))
    with pytest.raises(AssertionError, match="stacked models are taken: SelectionError"):
        check_probe(of_paths("layers[0]"))
    with pytest.raises(AssertionError, match=r"stacked models are taken: of the stacked .* is 4\d"):
        check_probe(of_paths("layers**.w"))
    check_probe(of_paths("layers**.w"), same_stacked=False)
    with pytest.raises(AssertionError, match="stacked models are taken"):
        check_probe(of_paths("layers[0]"), same_stacked=False)
    with pytest.raises(AssertionError, match="stacked"):
        ProbeCase(of_paths("layers[0]")).check()
    check_probe(of_paths("layers.period[0]"), model=models.stack(ProbeCase.model()))


def test_a_selector_that_matches_nothing_is_refused():
    given = {"model": MODEL, "batches": BATCHES}
    check_probe(plain(), unmatched=of_paths("nowhere"), **given)
    with pytest.raises(AssertionError, match="matches nothing is an error: .*without an error"):
        check_probe(plain(), unmatched=of_paths("maps[0]"), **given)
