"""The contract of a rule: learning as pure functions over one state."""

import dataclasses
import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import PyTree

from ffnlab.rule import Metrics, Rule
from ffnlab.storage import trees
from ffnlab.testing import small
from ffnlab.testing.compiling import counted
from ffnlab.testing.contract import equal, hold, need

__all__ = ["RuleCase", "check_rule"]


def one_for_each(outputs: PyTree, inputs: PyTree) -> None:
    """Holds an output for each input."""
    need(len(outputs) == len(inputs), f"{len(outputs)} outputs of {len(inputs)} inputs")


@dataclasses.dataclass(frozen=True)
class RuleCase:
    """A rule with what it learns from, as tables of contract tests hold them.

    Attributes:
      make: the rule.
      model: makes what it starts from.
      batches: makes two that it learns from.
      inputs: of a batch, what `predict` takes.
      check: raises AssertionError for outputs that are not those of the inputs.
    """

    make: Callable[[], Rule]
    model: Callable[[], PyTree] = small.tiny
    batches: Callable[[], Sequence[PyTree]] = small.batches
    inputs: Callable[[PyTree], PyTree] = lambda batch: batch
    check: Callable[[PyTree, PyTree], None] = one_for_each

    def hold(self) -> None:
        """Holds it against the contract (`check_rule`)."""
        given = {"inputs": self.inputs, "check": self.check}
        check_rule(self.make, model=self.model(), batches=self.batches(), **given)


@dataclasses.dataclass(frozen=True)
class Case:
    """A rule under check.

    Attributes:
      make: the rule.
      model: where it starts.
      batches: at least two that it learns from.
      inputs: of a batch, what `predict` takes.
      check: raises AssertionError for outputs that are not those of the inputs.
    """

    make: Callable[[], Rule]
    model: PyTree
    batches: Sequence[PyTree]
    inputs: Callable[[PyTree], PyTree]
    check: Callable[[PyTree, PyTree], None]

    @functools.cached_property
    def rule(self) -> Rule:
        """The rule, made once."""
        return self.make()

    def begin(self) -> PyTree:
        """The state at the start, of a fixed key."""
        return self.rule.init(self.model, jax.random.key(0))

    def steps(self, count: int) -> tuple[PyTree, Metrics]:
        """State and metrics after some steps, from the start."""
        state, metrics = self.begin(), {}
        for batch in self.batches[:count]:
            state, metrics = self.rule.step(state, batch)
        return state, metrics


def check_rule(
    make: Callable[[], Rule],
    *,
    model: PyTree | None = None,
    batches: Sequence[PyTree] | None = None,
    inputs: Callable[[PyTree], PyTree] = lambda batch: batch,
    check: Callable[[PyTree, PyTree], None] = one_for_each,
) -> None:
    """Holds a rule against its contract (`ffnlab.rule.Rule`); takes some seconds.

    Args:
      make: the rule.
      model: where it starts; `ffnlab.testing.tiny()` when None.
      batches: two that it learns from; `ffnlab.testing.batches()`, of tokens, when None.
      inputs: batch -> what `predict` takes; the batch itself where left out.
      check: (outputs, inputs) -> None; raises AssertionError for outputs that cannot be those of
        the inputs. An output for each input where left out. They are finite in any case.
    Raises:
      AssertionError: names the line of the contract that is broken, and how.
      ValueError: fewer than two batches.

    >>> from ffnlab.learning import backprop
    >>> check_rule(backprop)
    """
    model = small.tiny() if model is None else model
    batches = small.batches() if batches is None else batches
    if len(batches) < 2:
        raise ValueError(f"batches has {len(batches)}; two are needed")
    lines = (
        it_is_a_rule,
        it_accepts_its_batches,
        the_model_stays_and_steps_repeat_bit_for_bit,
        the_second_step_compiles_nothing,
        a_step_learns,
        metrics_are_finite_scalars,
        the_state_goes_on_from_a_checkpoint,
        it_predicts_from_its_state,
        it_gives_its_model,
    )
    hold("the rule", lines, Case(make, model, batches, inputs, check))


def it_is_a_rule(case: Case) -> None:
    need(isinstance(case.rule, Rule), f"{type(case.rule).__name__} is no ffnlab.rule.Rule")


def it_accepts_its_batches(case: Case) -> None:
    """Of the state the check sees shapes alone."""
    state = jax.eval_shape(case.begin)
    for batch in case.batches:
        case.rule.check(state, batch)


def the_model_stays_and_steps_repeat_bit_for_bit(case: Case) -> None:
    before = jax.tree.map(np.array, (case.model, case.batches))
    (state, metrics), (again, metrics_again) = case.steps(2), case.steps(2)
    after = jax.tree.map(np.array, (case.model, case.batches))
    need(equal(before, after), "the model or a batch was changed")
    need(equal(state, again), "the state is another the second time")
    need(equal(metrics, metrics_again), "the metrics are others the second time")


def the_second_step_compiles_nothing(case: Case) -> None:
    first, second = case.batches[:2]
    state, _ = case.rule.step(case.begin(), first)
    with counted() as count:
        case.rule.step(state, second)
    need(count.programs == 0, f"{count.programs} programs were compiled")


def a_step_learns(case: Case) -> None:
    """The outputs change, not only a counter in the state."""
    x = case.inputs(case.batches[0])
    before, after = (case.rule.predict(case.steps(count)[0], x) for count in (0, 2))
    need(not equal(before, after), "predictions after two steps are those before")


def metrics_are_finite_scalars(case: Case) -> None:
    for name, value in case.steps(1)[1].items():
        need(np.ndim(value) == 0, f"{name} has shape {np.shape(value)}")
        need(bool(np.isfinite(value)), f"{name} is {value}")


def the_state_goes_on_from_a_checkpoint(case: Case) -> None:
    state, _ = case.steps(1)
    with tempfile.TemporaryDirectory() as folder:
        trees.save(Path(folder) / "state", state)
        back = trees.restore(Path(folder) / "state", jax.eval_shape(lambda: state))
    there, here = (case.rule.step(s, case.batches[1])[0] for s in (back, state))
    need(equal(there, here), "a step from the restored state gives another")


def it_predicts_from_its_state(case: Case) -> None:
    inputs = case.inputs(case.batches[0])
    out = case.rule.predict(case.begin(), inputs)
    case.check(out, inputs)
    fine = all(bool(np.all(np.isfinite(leaf))) for leaf in jax.tree.leaves(out))
    need(fine, "outputs are not finite")


def it_gives_its_model(case: Case) -> None:
    """The model as learned has the structure, shapes and dtypes of the one it began with."""
    facts = lambda tree: [(x.shape, x.dtype) for x in jax.tree.leaves(tree)]  # noqa: E731
    found = case.rule.model(case.steps(1)[0])
    need(jax.tree.structure(found) == jax.tree.structure(case.model), "it is another tree")
    need(facts(found) == facts(case.model), "its arrays have other shapes or dtypes")
