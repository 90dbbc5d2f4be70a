"""A hypernetwork learns tasks one after the other (arXiv 1906.00695; 2209.07712).

A step of task t, whose embedding alone among those of tasks is trained:

    d = the optimizer's step on L_t alone (0 without lookahead), detached
    g = dL_t(w(e_t; theta)) / d(theta, e_t)  +  beta dR(theta + d) / d theta

with R of `drift`: what is given for earlier tasks shall stay. When the task of a batch is another
than that of the one before it, theta and the embeddings become theta* and e*, and the optimizer
begins anew; the change is data, so that one program serves all tasks.

Dependency preserving hypernetworks are `HypernetSpec(outputs="chunk_wise", architecture="rnn")`
under this rule. No code of theirs is public, and the abstract alone was at hand: generator,
importance and growth are built to what it says. What is given for each task is a whole target, its
last layer too: all of it is kept, and a head for each task needs no masks.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, is_known
from ffnlab.learning.continual.drift import mean_drift, outputs, table_of, with_table
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.losses import Loss, labelled
from ffnlab.models import Hypernet, Tasked
from ffnlab.rule import Rule

__all__ = ["ContinualOptions", "ContinualState", "TaskRows", "continual"]

IMPORTANCE = ("equal", "fisher", "absolute")
TARGETS = ("stored", "computed")
NONE = -1  # the task of a run that has not begun


class TaskRows(NamedTuple):
    """A batch of one task.

    Attributes:
      task: [] int32, its number.
      rows: what the loss takes, (x [b, …], classes [b]) for instance.
    """

    task: Int[Array, ""] | Int[np.ndarray, ""] | np.integer | int
    rows: PyTree


class ContinualState(NamedTuple):
    """What the rule changes.

    Attributes:
      model: the hypernetwork: theta, and the embeddings of all tasks.
      before: theta* and e*: what it was when the present task began.
      optimizer: optax state, over what is trained, since then.
      task: [] int32, the present task; -1 before the first.
      learned: [tasks], which were learned before it.
      targets: [tasks, P] w(e*; theta*), or [0, P] where they are computed anew at each step.
      importance: [tasks, P] Omega, or [0, P] where all weights matter alike.
      gathered: [P] sum over the steps of this task of g^2 or |g|, g = dL_t / dw; or [0].
      step: [] int32, all steps.
      key: that of the run.
    """

    model: PyTree
    before: PyTree
    optimizer: PyTree
    task: Int[Array, ""]
    learned: Bool[Array, "tasks"]
    targets: Float[Array, "stored P"]
    importance: Float[Array, "kept P"]
    gathered: Float[Array, "weights"]
    step: Int[Array, ""]
    key: Array


@dataclasses.dataclass(frozen=True)
class ContinualOptions:
    """How earlier tasks are kept.

    Attributes:
      beta: weight of the drift, >= 0. It multiplies a sum over weights: other targets want another.
      lookahead: the drift is that after the optimizer's step on the present task alone.
      importance: Omega of a task: "equal", 1; "fisher" or "absolute", the mean over its steps of
        the squared or absolute gradient with respect to each weight, divided by its own mean.
      targets: "stored" keeps what was given for each task, tasks x P numbers; "computed" gives it
        again at each step, from theta*.
    """

    beta: float | Array = 0.01
    lookahead: bool = True
    importance: str = "equal"
    targets: str = "stored"

    def __post_init__(self) -> None:
        if is_known(self.beta) and not 0 <= self.beta < math.inf:
            raise ConfigError(f"beta={self.beta} must be finite and at least 0")
        for name, accepted in (("importance", IMPORTANCE), ("targets", TARGETS)):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")


def continual(
    options: ContinualOptions = ContinualOptions(),
    loss: Loss = labelled,
    optimizer: optax.GradientTransformation | None = None,
) -> Rule:
    """The rule; a batch is `TaskRows`, and the model a `Hypernet` of tasks.

    Tasks may come in any order, and again: one that is learned once more is no earlier one
    meanwhile.

    Args:
      options: how earlier tasks are kept.
      loss: of the target, any of `ffnlab.losses` that is not informed and returns no statistics.
      optimizer: Adam at 1e-3 when None. It begins anew with every task.
    Returns:
      a Rule; its state is `ContinualState`, its metrics "loss" (of the present task), those of the
      loss, and "drift", the R whose gradient is taken. `predict` takes `Tasked` inputs.
      `step` donates its state.
    Raises:
      ConfigError: from `init`, a model that is no hypernetwork of static tasks with embeddings of
        their own, which is what can be kept.
      ValueError: from `check`, no such task.
    """
    optimizer = in_float32(optax.adam(1e-3) if optimizer is None else optimizer)

    def init(model: PyTree, key: Array) -> ContinualState:
        check_model(model)
        model, before, key = (jax.tree.map(jnp.copy, part) for part in (model, model, key))
        size, tasks = model.layout.size, model.spec.tasks
        kept = tasks * (options.importance != "equal")
        return ContinualState(
            model,
            before,
            optimizer.init(tree.trained(model)[0]),
            jnp.int32(NONE),
            jnp.zeros(tasks, bool),
            jnp.zeros((tasks * (options.targets == "stored"), size)),
            jnp.ones((kept, size)),
            jnp.zeros(size if kept else 0),
            jnp.int32(0),
            key,
        )

    def step(state: ContinualState, batch: TaskRows) -> tuple[ContinualState, dict[str, Array]]:
        task = jnp.asarray(batch.task, jnp.int32)
        change = functools.partial(begun, options, optimizer)
        state = jax.lax.cond(task != state.task, change, lambda state, _: state, state, task)
        (value, metrics), slope, gradient = of_task(loss, state, batch)
        trained, fixed = tree.trained(state.model)
        ahead = jax.tree.map(jnp.zeros_like, gradient)
        if options.lookahead:
            ahead = optimizer.update(gradient, state.optimizer, trained)[0]
        moved, pull = of_drift(options, state, ahead)
        total = jax.tree.map(lambda g, p: g + options.beta * p, gradient, pull)
        updates, memory = optimizer.update(total, state.optimizer, trained)
        model = tree.combine(optax.apply_updates(trained, updates), fixed)
        is_mine = (jnp.arange(model.spec.tasks) == task)[:, None]
        model = with_table(model, jnp.where(is_mine, table_of(model), table_of(state.model)))
        state = state._replace(
            model=model,
            optimizer=memory,
            gathered=gathered(options, state.gathered, slope),
            step=state.step + 1,
        )
        return state, {"loss": value, **metrics, "drift": moved}

    def predict(state: ContinualState, inputs: Tasked) -> PyTree:
        return state.model(inputs)

    return Rule(
        "continual",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(predict),
        check=lambda state, batch: check_batch(state.model, batch),
    )


def of_task(loss: Loss, state: ContinualState, batch: TaskRows) -> tuple[tuple, Array, PyTree]:
    """((loss, metrics), dL/dw [P], dL/d trained), the latter by the former and the chain rule."""
    trained, fixed = tree.trained(state.model)
    give = lambda trained: tree.combine(trained, fixed).vector(state.task)  # noqa: E731
    weights, back = jax.vjp(give, trained)

    def of_weights(weights: Array) -> tuple[Array, dict[str, Array]]:
        mean, metrics = loss(state.model.build(weights), batch.rows)[:2]
        return mean, dict(metrics)

    found, slope = jax.value_and_grad(of_weights, has_aux=True)(weights)
    return found, slope, back(slope)[0]


def of_drift(
    options: ContinualOptions, state: ContinualState, updates: PyTree
) -> tuple[Array, PyTree]:
    """(R, dR/d trained), at the parameters after some updates."""
    trained, fixed = tree.trained(state.model)
    kept = jax.lax.stop_gradient(table_of(state.before))
    old = state.learned & (jnp.arange(len(state.learned)) != state.task)
    is_stored = options.targets == "stored"
    targets = state.targets if is_stored else outputs(state.before)
    importance = None if options.importance == "equal" else state.importance

    def moved(trained: PyTree) -> Array:
        ahead = jax.tree.map(lambda value, update: value + update, trained, updates)
        found = outputs(with_table(tree.combine(ahead, fixed), kept))
        return mean_drift(found, targets, old, importance)

    return jax.value_and_grad(moved)(trained)


def begun(
    options: ContinualOptions,
    optimizer: optax.GradientTransformation,
    state: ContinualState,
    task: Array,
) -> ContinualState:
    """The state at the first batch of a task: what was learned is kept, the optimizer anew."""
    was = jnp.arange(len(state.learned)) == state.task  # none before the first task
    is_stored, matters = options.targets == "stored", options.importance != "equal"
    mean = state.gathered / jnp.maximum(state.gathered.mean(), 1e-30) if matters else None
    return state._replace(
        before=jax.tree.map(jnp.copy, state.model),
        optimizer=optimizer.init(tree.trained(state.model)[0]),
        task=task,
        learned=state.learned | was,
        targets=outputs(state.model) if is_stored else state.targets,
        importance=jnp.where(was[:, None], mean, state.importance) if matters else state.importance,
        gathered=jnp.zeros_like(state.gathered),
    )


def gathered(options: ContinualOptions, sums: Array, slope: Array) -> Array:
    """What importance is made of, with a step's gradient added."""
    more = {"fisher": slope**2, "absolute": jnp.abs(slope)}.get(options.importance)
    return sums if more is None else sums + more


def check_model(model: PyTree) -> None:
    """Raises ConfigError for a model of which nothing can be kept."""
    if not isinstance(model, Hypernet):
        raise ConfigError(f"model is a {type(model).__name__}; continual() trains a Hypernet")
    spec = model.spec
    if spec.inputs != ("task",) or spec.input_variability != "static" or not spec.shared:
        raise ConfigError(
            f"inputs={spec.inputs}, input_variability={spec.input_variability!r}, shared="
            f"{spec.shared}: what is kept is given for static tasks with embeddings of their own"
        )


def check_batch(model: Hypernet, batch: PyTree) -> None:
    """Raises ValueError for a batch of no task, or of one that is not there."""
    if not isinstance(batch, TaskRows):
        raise ConfigError(f"batch is a {type(batch).__name__}; TaskRows(task, rows) is accepted")
    task, tasks = np.asarray(batch.task), model.spec.tasks
    if task.ndim or not np.issubdtype(task.dtype, np.integer) or not 0 <= task < tasks:
        raise ConfigError(f"task={batch.task}: tasks 0 to {tasks - 1} are there, one for a batch")
