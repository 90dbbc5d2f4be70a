"""Backpropagation with any optax optimizer, as a rule.

    g = d loss(model, batch) / d trained;   trained <- trained + optimizer(g)

Only what `ffnlab.tree.trained` gives is trained, and of that only the selected parts: quantized
weights, masks and frozen parts pass through bit for bit, and the optimizer keeps no state for them.
A step is one step of the whole batch, in however many parts it is computed, and the optimizer works
in float32 whatever the parameters are. What a loss measured is written into the model's statistics
after the step.
"""

import functools
import inspect
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.learning.accumulate import Measured, accumulated
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.learning.statistics import written
from ffnlab.losses import InformedLoss, Loss, Moment, next_token
from ffnlab.rule import Rule

AnyLoss = TypeVar("AnyLoss", Loss, InformedLoss)


class BackpropState(NamedTuple):
    """What learning by backpropagation changes.

    Attributes:
      model: the model as learned so far.
      optimizer: optax state, over the trained leaves only; float32 (`in_float32`).
      step: [] int32, steps taken.
      key: that of the run; step t draws by `fold_in(key, t)`.
    """

    model: PyTree
    optimizer: PyTree
    step: Int[Array, ""]
    key: Array


def computed_in(dtype: DTypeLike, loss: AnyLoss) -> AnyLoss:
    """A loss whose parameters are rounded to a dtype first: mixed precision.

    The trained parameters, the optimizer's state and the gradients stay as they are (float32
    masters); activations follow the rounded parameters, but on CPUs, where they are float32.
    Norms, softmax and losses are float32 in any case. What `ffnlab.tree.trained` leaves out stays
    as it is: quantized weights, thresholds, the base of a LoRA, which follows the activations.

    Args:
      dtype: of the computation, "bfloat16" for instance.
      loss: see `ffnlab.losses`, informed or not.
    Returns:
      the loss of the rounded model.
    """

    def rounded(leaf: Array) -> Array:
        return leaf.astype(dtype) if leaf.dtype.itemsize > jnp.dtype(dtype).itemsize else leaf

    @functools.wraps(loss)
    def of_rounded(model: PyTree, *given: PyTree) -> tuple:
        trained, fixed = tree.trained(model)
        return loss(tree.combine(jax.tree.map(rounded, trained), fixed), *given)

    return of_rounded


def backprop(
    loss: Loss | InformedLoss = next_token,
    optimizer: optax.GradientTransformation | None = None,
    *,
    trainable: tree.Predicate | None = None,
    informed: bool = False,
    microbatches: int = 1,
) -> Rule:
    """The rule that follows the gradient of a loss.

    Args:
      loss: (model, batch) -> (mean, metrics by name), means over what it counts. Where rows count
        for unequal amounts, `metrics["count"]` says for how much the rows it was given count. A
        third item, {path: value}, becomes the model's statistics of these paths
        (`ffnlab.losses`).
      optimizer: clipping, accumulation and noise are optax pieces in it; AdamW at 1e-3 when None.
        Its moments and norms are float32, and so is a copy that it keeps of each parameter
        narrower than that.
      trainable: selector of the parts that learn (`ffnlab.tree.at`, ...); all when None.
      informed: whether the loss is (model, batch, moment), `moment` the step and a key of its own
        (`ffnlab.losses.Moment`); part i of a batch draws by `fold_in(moment.key, i)`.
      microbatches: equal parts of a batch that are computed one after the other, each with the
        activations of a part alone. The step is that of the whole batch where the loss is a mean
        over rows; a term that multiplies means, as the balance of `ffnlab.losses.routed` does, is
        that of each part. Statistics are averaged over the parts, by what each counts, and written
        once (`ffnlab.learning.accumulate`).
    Returns:
      a Rule; its state is `BackpropState`, its metrics are "loss", those of the loss, and
      "gradient_norm". `step` donates its state.
    Raises:
      ConfigError: microbatches below 1, or from `step` where they do not divide the rows; the loss
        takes a moment where it is not informed, or none where it is.
      SelectionError: from `init`, when nothing is selected that can be trained; from `step`, when
        the loss returns a statistic that the model does not have.
      ValueError: from `step`, when it returns one of another shape or dtype.
    """
    if microbatches < 1:
        raise ConfigError(f"microbatches={microbatches} must be at least 1")
    check_loss(loss, informed)
    optimizer = in_float32(optax.adamw(1e-3) if optimizer is None else optimizer)

    def init(model: PyTree, key: Array) -> BackpropState:
        # The step donates both; the caller's stay intact.
        model, key = jax.tree.map(jnp.copy, (model, key))
        memory = optimizer.init(tree.trained(model, trainable)[0])
        return BackpropState(model, memory, jnp.int32(0), key)

    def step(state: BackpropState, batch: PyTree) -> tuple[BackpropState, dict[str, Array]]:
        trained, fixed = tree.trained(state.model, trainable)

        def of_trained(trained: PyTree, rows: PyTree, part: Array | None) -> tuple[Array, Measured]:
            moment = (moment_of(state, part),) if informed else ()
            mean, metrics, *more = loss(tree.combine(trained, fixed), rows, *moment)
            return mean, (metrics, more[0] if more else {})

        evaluate = functools.partial(jax.value_and_grad(of_trained, has_aux=True), trained)
        (value, (extra, statistics)), gradient = accumulated(evaluate, batch, microbatches)
        updates, memory = optimizer.update(gradient, state.optimizer, trained, value=value)
        model = tree.combine(optax.apply_updates(trained, updates), fixed)
        return (
            BackpropState(written(model, statistics), memory, state.step + 1, state.key),
            {"loss": value, **extra, "gradient_norm": optax.tree.norm(gradient)},
        )

    return Rule(
        "backprop",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(lambda state, inputs: state.model(inputs)),
    )


def moment_of(state: BackpropState, part: Array | None) -> Moment:
    """The moment of a step, or of a part of its batch."""
    key = jax.random.fold_in(state.key, state.step)
    return Moment(state.step, key if part is None else jax.random.fold_in(key, part))


def check_loss(loss: Loss | InformedLoss, informed: bool) -> None:
    """Raises ConfigError for a loss that cannot be called as it would be."""
    given = ("model", "batch", "moment") if informed else ("model", "batch")
    try:
        inspect.signature(loss).bind(*given)
    except TypeError as error:
        raise ConfigError(
            f"informed={informed}: the loss is called with ({', '.join(given)}), and it does not "
            f"take them: {error}"
        ) from None
