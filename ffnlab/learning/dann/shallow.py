"""The shallow algorithm of domain-adversarial training (arXiv 1505.07818, algorithm 1).

A network of one hidden layer and a logistic regression of the domain (1 source, 0 target) on it
take a step for each row of the source, beside a row of the target drawn for it:

    h = sigmoid(x W + b),  f = softmax(h V + c),  o = sigmoid(h . U + d);   h', o' of the target

With e = f - onehot(y), r = lambda (1 - o) and r' = -lambda o',

    dV = h^T e,  dc = e,   dU = r h + r' h',  dd = r + r'
    db = (e V^T + r U) h (1 - h) + r' U h' (1 - h'),   dW likewise with x and x'

W, b, V and c descend, U and d ascend. lambda scales what U and d learn by, too. It is the authors'
numpy class (GRAAL-Research/domain_adversarial_neural_network) in a scan; their draws of the target
are a batch's rows here, and their early stopping is the loop's (`LoopOptions.patience`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError, is_known
from ffnlab.layers import MLP, Linear
from ffnlab.layers.gradient_reversal import check_strength
from ffnlab.learning.dann.rule import check_batch, domain_parts
from ffnlab.rule import Rule
from ffnlab.weights import Dense

__all__ = ["ShallowState", "Weights", "after_pair", "shallow_dann"]


class Weights(NamedTuple):
    """The arrays that the algorithm moves.

    Attributes:
      W, b: [d, h] and [h], of the hidden layer.
      V, c: [h, classes] and [classes], of the label.
      U, d: [h] and [], of the domain.
    """

    W: Float[Array, "d h"]
    b: Float[Array, "h"]
    V: Float[Array, "h c"]
    c: Float[Array, "c"]
    U: Float[Array, "h"]
    d: Float[Array, ""]


class ShallowState(NamedTuple):
    """What the shallow algorithm changes.

    Attributes:
      model: the network, an `MLP` of one hidden layer.
      domain: Linear from the hidden layer to a logit of the source; it begins at zero.
      step: [] int32, batches taken.
    """

    model: MLP
    domain: Linear
    step: Int[Array, ""]


def after_pair(
    weights: Weights,
    x: Float[Array, "d"],
    y: Int[Array, ""],
    other: Float[Array, "d"],
    rate: Float[Array, ""],
    strength: Float[Array, ""],
) -> tuple[Weights, dict[str, Array]]:
    """The weights after one step, and what was measured before it.

    Args:
      x, y: a row of the source and its class.
      other: a row of the target.
      rate: of the step.
      strength: lambda.
    Returns:
      (weights, {"loss": nats of the class, "domain": nats of a row's domain}).
    """
    W, b, V, c, U, d = weights
    h, there = jax.nn.sigmoid(x @ W + b), jax.nn.sigmoid(other @ W + b)
    scores = h @ V + c
    error = jax.nn.softmax(scores) - jax.nn.one_hot(y, len(c), dtype=c.dtype)
    logits = U @ h + d, U @ there + d
    r, away = strength * (1 - jax.nn.sigmoid(logits[0])), -strength * jax.nn.sigmoid(logits[1])
    mine, others = (V @ error + r * U) * h * (1 - h), away * U * there * (1 - there)
    moved = Weights(
        W - rate * (jnp.outer(x, mine) + jnp.outer(other, others)),
        b - rate * (mine + others),
        V - rate * jnp.outer(h, error),
        c - rate * error,
        U + rate * (r * h + away * there),
        d + rate * (r + away),
    )
    nats = jax.nn.softplus(-logits[0]) + jax.nn.softplus(logits[1])
    return moved, {"loss": -jax.nn.log_softmax(scores)[y], "domain": nats / 2}


def shallow_dann(*, rate: float | Array = 0.05, strength: float | Array = 1.0) -> Rule:
    """The rule: a step for each row of a batch, in their order.

    A batch is ((x, y), target), `ffnlab.data.Zipped(source, target)`, of equal numbers of rows. The
    authors draw W and V from U(-a, a), a = sqrt(6 / (inputs + outputs)): an `MLP((d, h, classes),
    activation="sigmoid", init=jax.nn.initializers.glorot_uniform(), key=key)`.

    Args:
      rate: of every step, > 0.
      strength: lambda, at least 0.
    Returns:
      a Rule; its state is `ShallowState`, its metrics "loss" and "domain", means over the rows,
      each before its step.
    Raises:
      ConfigError: a rate that is not positive, a strength that is negative or not finite; from
        `init`, a network of another form.
      ValueError: from `check`, as of `dann`, another width, or other numbers of rows.
    """
    check_strength(strength)
    if is_known(rate) and not 0 < float(rate) < np.inf:
        raise ConfigError(f"rate={rate} must be positive and finite")

    def init(model: MLP, key: Array) -> ShallowState:
        del key  # nothing is drawn
        check_network(model)
        first, last = model.maps
        width, dtype = last.weight.shape[0], first.weight.dtype
        zeros = Dense(jnp.zeros((width, 1), dtype)), jnp.zeros((1,), dtype)
        domain = Linear.of(*zeros, axes=("mlp", "embed"))
        return ShallowState(jax.tree.map(jnp.copy, model), domain, jnp.int32(0))

    def step(state: ShallowState, batch: PyTree) -> tuple[ShallowState, dict[str, Array]]:
        (x, y), target = domain_parts(batch)
        weights = weights_of(state)
        pace, force = (jnp.asarray(value, weights.W.dtype) for value in (rate, strength))

        def one(weights: Weights, row: tuple[Array, Array, Array]) -> tuple[Weights, dict]:
            x, y, other = row
            return after_pair(weights, x, y, other, pace, force)

        weights, metrics = jax.lax.scan(one, weights, (x, y, target))
        after = with_weights(state, weights)._replace(step=state.step + 1)
        return after, jax.tree.map(jnp.mean, metrics)

    def check(state: ShallowState, batch: PyTree) -> None:
        check_batch(state.model, batch, "maps[1]")
        (x, _), target = batch
        if x.shape[1:] != (state.model.sizes[0],):
            raise ValueError(f"source {x.shape}; the network takes [n, {state.model.sizes[0]}]")
        if len(x) != len(target):
            raise ValueError(
                f"source has {len(x)} rows, target {len(target)}; equal numbers are needed"
            )

    step = jax.jit(step, donate_argnums=0)
    return Rule("shallow-dann", init, step, jax.jit(lambda s, x: s.model(x)), check=check)


def weights_of(state: ShallowState) -> Weights:
    """The arrays of a state."""
    first, last = state.model.maps
    domain = state.domain.weight.dense()[:, 0], state.domain.bias[0]
    return Weights(first.weight.dense(), first.bias, last.weight.dense(), last.bias, *domain)


def with_weights(state: ShallowState, weights: Weights) -> ShallowState:
    """A state with other arrays."""
    W, b, V, c, U, d = weights
    model = jax.tree.map(lambda leaf: leaf, state.model)
    model.maps[0] = state.model.maps[0].replace(Dense(W), b)
    model.maps[1] = state.model.maps[1].replace(Dense(V), c)
    domain = state.domain.replace(Dense(U[:, None]), d[None])
    return state._replace(model=model, domain=domain)


def check_network(model: object) -> None:
    """Raises ConfigError unless a network is what the algorithm is of."""
    is_mlp = isinstance(model, MLP) and len(model.maps) == 2 and model.activation == "sigmoid"
    if not is_mlp or any(
        linear.b is None or not isinstance(linear.weight, Dense) for linear in model.maps
    ):
        what = f"a {type(model).__name__}"
        if isinstance(model, MLP):
            what = f"an MLP of sizes {model.sizes} and activation {model.activation!r}"
        raise ConfigError(
            f"model is {what}; an MLP with one hidden layer, activation='sigmoid', biases and "
            "dense weights is needed"
        )
