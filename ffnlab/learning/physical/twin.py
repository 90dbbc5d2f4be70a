"""Backpropagation through a learned digital twin: what physical local learning does without.

Beside every physical system stands a network that learns to answer as it does, its twin. The maps
between the systems follow the gradient of one loss of the whole network, which goes through the
twins, as nobody can differentiate a system:

    twin loss = sum_l rms(T_l(h_l) - G_l(h_l)),   h_l, G_l(h_l) measured
    loss = mean softplus(-theta sum_l (g_l(right) - g_l(wrong)))

With `forward="twin"` the whole network is simulated by the twins and the systems serve prediction
alone (training in silico); with "system" they are asked on the way forward and the twins give the
slopes (physics-aware training, Wright et al., Nature 2022).

The twins are those of the authors' scripts (MomeniAli/PhyLL): three hidden layers of 100, 200 and
100 with SiLU, Adam at 1e-4, root mean square error. Theirs are trained beforehand on recorded
pairs; here on the pairs that the network itself makes, as long as the systems are measured.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import MLP
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.learning.physical.rule import (
    THETA,
    check_batch,
    check_network,
    check_theta,
    opaque_boxes,
    pairs_of,
    scores,
    whole_loss,
)
from ffnlab.models.physical_net import Box, PhysicalNet, noise_key
from ffnlab.rule import Rule

__all__ = ["TwinState", "digital_twin", "surrogates", "twins_of"]

HIDDEN = (100, 200, 100)
FORWARD = ("system", "twin")


class TwinState(NamedTuple):
    """What learning by a digital twin changes.

    Attributes:
      model: the network as learned so far.
      twins: an MLP for each layer, None where a layer has no system.
      optimizer: optax state of the maps.
      memory: that of the twins.
      step: [] int32, steps taken.
      key: that of the run; step t draws by `fold_in(key, t)`.
    """

    model: PhysicalNet
    twins: tuple[MLP | None, ...]
    optimizer: PyTree
    memory: PyTree
    step: Int[Array, ""]
    key: Array


def twins_of(
    net: PhysicalNet, key: Array, hidden: Sequence[int] = HIDDEN
) -> tuple[MLP | None, ...]:
    """A twin for each system, drawn.

    Args:
      net: whose systems.
      key: of the draw; the twin of layer l draws by `fold_in(key, l)`.
      hidden: widths between its input and its output.
    """
    widths = [net.inputs + net.slots, *(layer.map.weight.shape[1] for layer in net.layers)]

    def of_layer(i: int) -> MLP | None:
        box = net.layers[i].box
        if box is None:
            return None
        sizes = (widths[i], *hidden, box.outputs)
        return MLP(sizes, key=jax.random.fold_in(key, i), activation="silu")

    return tuple(map(of_layer, range(len(net.layers))))


def surrogates(
    boxes: Sequence[Box | None], twins: Sequence[MLP | None], forward: str
) -> list[Box | None]:
    """What stands for the systems on a way that is differentiated.

    Args:
      boxes: the systems.
      twins: of them.
      forward: "twin" for the twin itself; "system" for the system's value with the twin's slope.
    """

    def of_layer(box: Box | None, twin: MLP | None) -> Box | None:
        if twin is None:
            return None

        def stands(h: Array, key: Array | None) -> Array:
            guess = twin(h)
            if forward == "twin":
                return guess
            return guess + stop_gradient(box(stop_gradient(h), key) - guess)

        return stands

    return [of_layer(*both) for both in zip(boxes, twins, strict=True)]


def measured_pairs(
    net: PhysicalNet, h: Float[Array, "n e"], key: Array
) -> list[tuple[Float[Array, "n d"], Float[Array, "n o"] | None]]:
    """What each system is given by a network as it is, and what it answers."""
    found = []
    for i, (layer, box) in enumerate(zip(net.layers, opaque_boxes(net), strict=True)):
        k = noise_key(key, i)
        answer = None if box is None else box(h, k)
        found.append((h, answer))
        h = layer(layer.read(h, k, None if answer is None else lambda h, key, y=answer: y))
    return found


def twin_error(twins: Sequence[MLP | None], pairs: Sequence[tuple]) -> Float[Array, ""]:
    """The sum of the root mean square errors of all twins."""
    errors = [
        jnp.sqrt(jnp.mean((twin(h) - y) ** 2) + jnp.finfo(jnp.float32).tiny)
        for twin, (h, y) in zip(twins, pairs, strict=True)
        if twin is not None
    ]
    return jnp.stack(errors).sum()


def digital_twin(
    optimizer: optax.GradientTransformation | None = None,
    twin_optimizer: optax.GradientTransformation | None = None,
    *,
    theta: float | Array = THETA,
    forward: str = "twin",
    measured: int | None = None,
    hidden: Sequence[int] = HIDDEN,
) -> Rule:
    """The rule; a batch is (x, y), rows with classes, and the model a `PhysicalNet`.

    Args:
      optimizer: of the maps; Adam at 5e-4 when None.
      twin_optimizer: of the twins; Adam at 1e-4 when None, the authors'.
      theta: by which differences of goodness are multiplied, > 0.
      forward: "twin" or "system", see the module.
      measured: steps in which the systems are measured and the twins learn; all when None.
      hidden: widths of a twin between its input and its output.
    Returns:
      a Rule; its state is `TwinState`, its metrics "loss", "gap" (mean difference of the sums of
      goodness on the way that is differentiated) and "twin_error". `predict` gives scores
      [n, classes] by the systems themselves. `step` donates its state.
    Raises:
      ConfigError: an option out of range; from `init`, another kind of model, or one without
        systems.
      ValueError: from `init`, a box that gives another shape than it says; from `check`, rows of
        another width, or classes that the network does not have.
    """
    check_theta(theta)
    at_least(0, measured=measured)
    at_least(1, hidden=min(hidden, default=1))
    if forward not in FORWARD:
        raise ConfigError(f"forward={forward!r} is not one of {FORWARD}")
    optimizer = in_float32(optax.adam(5e-4) if optimizer is None else optimizer)
    twin_optimizer = in_float32(optax.adam(1e-4) if twin_optimizer is None else twin_optimizer)
    last = math.inf if measured is None else measured

    def init(model: PyTree, key: Array) -> TwinState:
        check_systems(model)
        check_network(model)
        model = jax.tree.map(jnp.copy, model)  # the step donates it; the caller's stays intact
        twins = twins_of(model, jax.random.fold_in(key, 0), hidden)
        memory = twin_optimizer.init(tree.trained(twins)[0])
        maps = optimizer.init(tree.trained(model)[0])
        return TwinState(model, twins, maps, memory, jnp.int32(0), jnp.copy(key))

    def taught(state: TwinState, batch: PyTree, key: Array) -> tuple[PyTree, PyTree, Array]:
        """The twins after a step of theirs on what the systems answer now."""
        draw, noise = jax.random.split(key)
        x, y = batch
        rows = jnp.concatenate(pairs_of(state.model, x, y, draw))
        pairs = measured_pairs(state.model, rows, noise)
        trained, fixed = tree.trained(state.twins)
        error = lambda trained: twin_error(tree.combine(trained, fixed), pairs)  # noqa: E731
        value, gradient = jax.value_and_grad(error)(trained)
        updates, memory = twin_optimizer.update(gradient, state.memory, trained)
        return tree.combine(optax.apply_updates(trained, updates), fixed), memory, value

    def left(state: TwinState, batch: PyTree, key: Array) -> tuple[PyTree, PyTree, Array]:
        """The twins as they are; nothing is measured."""
        return state.twins, state.memory, jnp.float32(0)

    def step(state: TwinState, batch: PyTree) -> tuple[TwinState, dict[str, Array]]:
        first, second = jax.random.split(jax.random.fold_in(state.key, state.step))
        given = state, batch, first
        if measured is None:
            twins, memory, error = taught(*given)
        else:
            twins, memory, error = jax.lax.cond(state.step < last, taught, left, *given)
        trained, fixed = tree.trained(state.model)
        boxes = surrogates(opaque_boxes(state.model), twins, forward)

        def loss(trained: PyTree) -> tuple[Array, dict[str, Array]]:
            return whole_loss(tree.combine(trained, fixed), batch, second, theta, boxes)

        (value, extra), gradient = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, maps = optimizer.update(gradient, state.optimizer, trained)
        model = tree.combine(optax.apply_updates(trained, updates), fixed)
        after = TwinState(model, twins, maps, memory, state.step + 1, state.key)
        return after, {"loss": value, **extra, "twin_error": error}

    return Rule(
        "digital_twin",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(scores),
        check=lambda state, batch: check_batch(state.model, batch),
    )


def check_systems(model: PyTree) -> None:
    """Raises ConfigError for what is no `PhysicalNet`, or one without systems."""
    if not isinstance(model, PhysicalNet):
        raise ConfigError(f"model is a {type(model).__name__}; a PhysicalNet learns by this rule")
    if all(layer.box is None for layer in model.layers):
        raise ConfigError("model has no physical system; backprop(contrast(), informed=True) does")
