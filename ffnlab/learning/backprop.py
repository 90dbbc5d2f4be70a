"""Backpropagation with any optax optimizer, as a rule.

    g = d loss(model, batch) / d trained;   trained <- trained + optimizer(g)

Only what `ffnlab.tree.trained` gives is trained, and of that only the selected parts: quantized
weights, masks and frozen parts pass through bit for bit, and the optimizer keeps no state for them.
A step is one step of the whole batch, in however many parts it is computed, and the optimizer works
in float32 whatever the parameters are.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.learning.accumulate import accumulated
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.rule import Rule

Metrics = Mapping[str, Array]
Loss = Callable[[PyTree, PyTree], tuple[Array, Metrics]]


class BackpropState(NamedTuple):
    """What learning by backpropagation changes.

    Attributes:
      model: the model as learned so far.
      optimizer: optax state, over the trained leaves only; float32 (`in_float32`).
      step: [] int32, steps taken.
    """

    model: PyTree
    optimizer: PyTree
    step: Int[Array, ""]


def next_token(
    model: Callable, batch: Int[Array, "b t"]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of every token given those before it in its row.

    Args:
      model: tokens [b, t - 1] -> logits [b, t - 1, v].
      batch: token ids, [b, t], t >= 2.
    Returns:
      (nats per token [], {"bits": bits per token []}).
    """
    logits = model(batch[:, :-1]).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
    return nats, {"bits": nats / math.log(2)}


def labelled(
    model: Callable, batch: tuple[Float[Array, "b *d"], Int[Array, "b"]]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of labelled inputs.

    Args:
      model: inputs [b, ...] -> logits [b, classes].
      batch: inputs and classes (`ffnlab.data.Labelled`).
    Returns:
      (nats per input [], {"accuracy": fraction whose class has the largest logit []}).
    """
    inputs, classes = batch
    logits = model(inputs).astype(jnp.float32)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, classes).mean()
    return nats, {"accuracy": jnp.mean(logits.argmax(-1) == classes)}


def computed_in(dtype: DTypeLike, loss: Loss) -> Loss:
    """A loss whose parameters are rounded to a dtype first: mixed precision.

    The trained parameters, the optimizer's state and the gradients stay as they are (float32
    masters); activations follow the rounded parameters, but on CPUs, where they are float32.
    Norms, softmax and losses are float32 in any case. What `ffnlab.tree.trained` leaves out stays
    as it is: quantized weights, thresholds, the base of a LoRA, which follows the activations.

    Args:
      dtype: of the computation, "bfloat16" for instance.
      loss: (model, batch) -> (scalar, metrics by name).
    Returns:
      the loss of the rounded model.
    """

    def rounded(leaf: Array) -> Array:
        return leaf.astype(dtype) if leaf.dtype.itemsize > jnp.dtype(dtype).itemsize else leaf

    def of_rounded(model: PyTree, batch: PyTree) -> tuple[Array, Metrics]:
        trained, fixed = tree.trained(model)
        return loss(tree.combine(jax.tree.map(rounded, trained), fixed), batch)

    return of_rounded


def backprop(
    loss: Loss = next_token,
    optimizer: optax.GradientTransformation | None = None,
    *,
    trainable: tree.Predicate | None = None,
    microbatches: int = 1,
) -> Rule:
    """The rule that follows the gradient of a loss.

    Args:
      loss: (model, batch) -> (mean, metrics by name), means over what it counts. Where rows count
        for unequal amounts, `metrics["count"]` says for how much the rows it was given count.
      optimizer: clipping, accumulation and noise are optax pieces in it; AdamW at 1e-3 when None.
        Its moments and norms are float32, and so is a copy that it keeps of each parameter
        narrower than that.
      trainable: selector of the parts that learn (`ffnlab.tree.at`, ...); all when None.
      microbatches: equal parts of a batch that are computed one after the other, each with the
        activations of a part alone; the step is that of the whole batch.
    Returns:
      a Rule; its state is `BackpropState`, its metrics are "loss", those of the loss, and
      "gradient_norm". `step` donates its state.
    Raises:
      ConfigError: microbatches below 1, or from `step` where they do not divide the rows.
      SelectionError: from `init`, when nothing is selected that can be trained.
    """
    if microbatches < 1:
        raise ConfigError(f"microbatches={microbatches} must be at least 1")
    optimizer = in_float32(optax.adamw(1e-3) if optimizer is None else optimizer)

    def init(model: PyTree, key: Array) -> BackpropState:
        del key
        model = jax.tree.map(jnp.copy, model)  # the step donates it; the caller's stays intact
        memory = optimizer.init(tree.trained(model, trainable)[0])
        return BackpropState(model, memory, jnp.int32(0))

    def step(state: BackpropState, batch: PyTree) -> tuple[BackpropState, dict[str, Array]]:
        trained, fixed = tree.trained(state.model, trainable)
        of_trained = lambda trained, part: loss(tree.combine(trained, fixed), part)  # noqa: E731
        evaluate = functools.partial(jax.value_and_grad(of_trained, has_aux=True), trained)
        (value, extra), gradient = accumulated(evaluate, batch, microbatches)
        updates, memory = optimizer.update(gradient, state.optimizer, trained, value=value)
        model = tree.combine(optax.apply_updates(trained, updates), fixed)
        return (
            BackpropState(model, memory, state.step + 1),
            {"loss": value, **extra, "gradient_norm": optax.tree.norm(gradient)},
        )

    return Rule(
        "backprop",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(lambda state, inputs: state.model(inputs)),
    )
