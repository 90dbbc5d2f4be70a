"""Backpropagation with any optax optimizer, as a rule.

    g = d loss(model, batch) / d trained;   trained <- trained + optimizer(g)

Only floating leaves are trained, and of those only the selected ones: integer codes, masks and
frozen parts pass through bit for bit, and the optimizer keeps no state for them.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.rule import Rule

Metrics = Mapping[str, Array]
Loss = Callable[[PyTree, PyTree], tuple[Array, Metrics]]


class BackpropState(NamedTuple):
    """What learning by backpropagation changes.

    Attributes:
      model: the model as learned so far.
      optimizer: optax state, over the trained leaves only.
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
    model: Callable, batch: tuple[Float[Array, "b d"], Int[Array, "b"]]
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Mean cross-entropy of labelled inputs.

    Args:
      model: inputs [b, d] -> logits [b, classes].
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
    Norms, softmax and losses are float32 in any case.

    Args:
      dtype: of the computation, "bfloat16" for instance.
      loss: (model, batch) -> (scalar, metrics by name).
    Returns:
      the loss of the rounded model.
    """

    def rounded(leaf: Array) -> Array:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return lambda model, batch: loss(jax.tree.map(rounded, model), batch)


def backprop(
    loss: Loss = next_token,
    optimizer: optax.GradientTransformation | None = None,
    *,
    trainable: tree.Predicate | None = None,
) -> Rule:
    """The rule that follows the gradient of a loss.

    Args:
      loss: (model, batch) -> (scalar, metrics by name).
      optimizer: clipping, accumulation and noise are optax pieces in it; AdamW at 1e-3 when None.
      trainable: selector of the parts that learn (`ffnlab.tree.at`, ...); all when None.
    Returns:
      a Rule; its state is `BackpropState`, its metrics are "loss", those of the loss, and
      "gradient_norm". `step` donates its state.
    Raises:
      SelectionError: from `init`, when nothing trainable is selected.
    """
    optimizer = optax.adamw(1e-3) if optimizer is None else optimizer

    def split(model: PyTree) -> tuple[PyTree, Callable[[PyTree], PyTree]]:
        chosen, rest = (model, None) if trainable is None else tree.partition(model, trainable)
        trained, fixed = tree.partition(chosen, tree.floating)

        def join(trained: PyTree) -> PyTree:
            whole = tree.combine(trained, fixed)
            return whole if rest is None else tree.combine(whole, rest)

        return trained, join

    def init(model: PyTree, key: Array) -> BackpropState:
        del key
        model = jax.tree.map(jnp.copy, model)  # the step donates it; the caller's stays intact
        return BackpropState(model, optimizer.init(split(model)[0]), jnp.int32(0))

    def step(state: BackpropState, batch: PyTree) -> tuple[BackpropState, dict[str, Array]]:
        trained, join = split(state.model)
        value_and_grad = jax.value_and_grad(lambda t: loss(join(t), batch), has_aux=True)
        (value, extra), gradient = value_and_grad(trained)
        updates, memory = optimizer.update(gradient, state.optimizer, trained)
        model = join(optax.apply_updates(trained, updates))
        norm = optax.tree.norm(gradient)
        return (
            BackpropState(model, memory, state.step + 1),
            {"loss": value, **extra, "gradient_norm": norm},
        )

    return Rule(
        "backprop",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(lambda state, inputs: state.model(inputs)),
    )
