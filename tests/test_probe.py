"""The shape of a probe: one pass, one report; rows kept on the host; figures along training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import parallel, probe
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.probe import Probe
from ffnlab.report import Report, Series

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Mean(Report):
    mean: float

    def rows(self):
        return [{"mean": self.mean}]

    def figures(self):
        return {"mean": self.mean}

    def draw(self, figure):
        figure.subplots().bar([0], [self.mean])


def mean_output():
    """The mean of the first output, by sums: that of all logits no step changes."""

    @jax.jit
    def observe(stats, model, batch):
        return stats[0] + model(batch)[:, 0].sum(), stats[1] + len(batch)

    return Probe(
        "mean-output",
        lambda model: (jnp.float32(0), 0),
        observe,
        lambda model, stats: Mean(float(stats[0] / stats[1])),
    )


@pytest.fixture
def model(key):
    return MLP((3, 1), key=key)


def batches(*sizes):
    return list(map(jnp.asarray, np.split(X, np.cumsum(sizes)[:-1])))


def test_a_probe_passes_once_and_reports_once(model):
    found = mean_output()(model, batches(2, 4), progress=False)
    assert found.mean == pytest.approx(float(model(jnp.asarray(X)).mean()), rel=1e-6)


def test_a_probe_of_the_model_alone_reads_no_batches(model):
    size = Probe(
        "size", lambda model: model.sizes, None, lambda model, stats: Mean(float(sum(stats)))
    )
    assert size(model).mean == 4
    assert size(model, iter(())).mean == 4


@pytest.mark.parametrize("given", [[], iter([X])], ids=["none", "iterator"])
def test_batches_that_cannot_be_observed_are_refused(model, given):
    said = "an iterator" if given != [] else "batches is empty: mean-output has nothing"
    with pytest.raises(ValueError, match=said):
        mean_output()(model, given)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_figures_are_finite_or_an_error_that_names_them(model, value):
    one = jnp.zeros((1, 3)).at[0, 0].set(value)
    with pytest.raises(
        NumericalError, match="probe 'mean-output': the figure 'mean' is .?(nan|inf)"
    ):
        mean_output()(model, [one])


# Rows.


@dataclasses.dataclass(frozen=True)
class Kept(Mean):
    found: object = None


def kept(measure, **options):
    return probe.rows("kept", measure, lambda model, found: Kept(0.0, found), **options)


def test_rows_are_concatenated_on_the_host(model):
    seen = kept(lambda model, x: {"y": model(x), "first": x[:, 0]})
    (a, b), whole = batches(2, 4), jnp.asarray(X)
    stats = seen.observe(seen.observe(seen.init(model), model, a), model, b)
    found = seen.report(model, stats).found
    assert {type(leaf) for leaf in jax.tree.leaves((stats, found))} == {np.ndarray}
    np.testing.assert_array_equal(found["first"], X[:, 0])
    np.testing.assert_allclose(found["y"], model(whole), rtol=1e-6)  # other batches, other sums


def test_rows_are_measured_by_one_program(model):
    traced = []
    seen = kept(lambda model, x: (traced.append(x), model(x))[1])
    stats = seen.init(model)
    for batch in batches(2, 2, 2):
        stats = seen.observe(stats, model, batch)
    assert len(traced) == 1 and len(stats) == 3


@pytest.mark.parametrize(
    ("measure", "said"),
    [
        (lambda m, x: m(x).sum(), r"measures arrays \[\(\)\]; a row for each input"),
        (lambda m, x: (), r"measures arrays \[\]; a row"),
        (lambda m, x: (m(x), x[:1]), r"measures arrays \[\(2, 1\), \(1, 3\)\], not alike"),
        (lambda m, x: x.T @ x if len(x) == 2 else x.T, r"\(3,\)\)\] before"),
    ],
)
def test_what_is_not_rows_is_an_error_that_names_the_probe(model, measure, said):
    seen = kept(measure)
    with pytest.raises(ConfigError, match=f"probe 'kept' .*{said}"):
        stats = seen.init(model)
        for batch in batches(2, 4):
            stats = seen.observe(stats, model, batch)


def test_rows_check_the_model_first():
    def refuse(model):
        raise ConfigError("an MLP is needed")

    with pytest.raises(ConfigError, match="an MLP"):
        kept(lambda model, x: x, init=refuse)("no model", [X])


# Along training.


def test_figures_along_training_are_those_of_the_model_so_far(model, key):
    rule, given = backprop(labelled, optax.sgd(0.5)), batches(2, 4)
    # What was learned is not in the state's own place: only the rule says where.
    hidden = dataclasses.replace(
        rule,
        init=lambda model, key: {"inner": rule.init(model, key)},
        step=lambda state, batch: (lambda s, m: ({"inner": s}, m))(
            *rule.step(state["inner"], batch)
        ),
        model=lambda state: state["inner"].model,
    )
    data = lambda position: (X, np.zeros(6, int))  # noqa: E731
    net = MLP((3, 2), key=key)
    watch = probe.along(mean_output(), hidden, given)
    options = parallel.LoopOptions(evaluate_every=2, evaluate_at=(0, 1), progress=False)
    found = parallel.train(hidden, net, data, 4, key=key, evaluate=watch, options=options)
    assert list(found.evaluations) == [0, 1, 2, 4]
    assert found.evaluations[0] == mean_output()(net, given).figures()
    last = mean_output()(found.state["inner"].model, given).figures()
    assert found.evaluations[4] == last
    assert abs(last["mean"] - found.evaluations[0]["mean"]) > 0.01
    assert Series(found.evaluations).names == ["mean"]


def test_along_takes_batches_that_can_be_read_again():
    with pytest.raises(ValueError, match="an iterator"):
        probe.along(mean_output(), backprop(labelled), iter([X]))
