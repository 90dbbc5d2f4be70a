"""Physical local learning (arXiv 2304.11042, forward-forward for systems nobody looks into).

Every layer is a physical system followed by a trained linear map. It learns alone, from two passes
forward: of inputs with their class written into them, and of the same inputs with a wrong one. The
system is asked and never differentiated, so that no model of it is needed, and one that changes is
learned anew by going on.

    g_l = cos(|z_l|, p_l)
    loss of layer l = mean softplus(-theta (g_l(right) - g_l(wrong)))

A step takes the layers in turn: K steps of the optimizer on what one reads of the batch, then its
outputs, detached, are what the next one is given.

What differs from the authors' code (MomeniAli/PhyLL): a system's outputs are asked for once a
step, and not again by the next layer; wrong classes are drawn by a key; how high a class is written
says `ffnlab.models.physical_net`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, Integer, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, at_least, first_line, is_known
from ffnlab.layers import MLP
from ffnlab.learning.labels import check_labels
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.learning.physical.boxes import opaque
from ffnlab.losses import InformedLoss, Moment
from ffnlab.models.physical_net import (
    Box,
    PhysicalLayer,
    PhysicalNet,
    direction,
    noise_key,
)
from ffnlab.rule import Rule

__all__ = [
    "PhysicalState",
    "contrast",
    "contrastive",
    "layer_losses",
    "opaque_boxes",
    "pairs_of",
    "physical_ff",
]

THETA = 4.0  # the authors', of all systems but the optical one, 5 there


class PhysicalState(NamedTuple):
    """What physical local learning changes.

    Attributes:
      model: the network as learned so far.
      directions: of an MLP, what its layers are judged by, a vector each; () of a `PhysicalNet`,
        which has its own.
      optimizers: optax states, one for each layer.
      step: [] int32, steps taken.
      key: that of the run; step t draws by `fold_in(key, t)`.
    """

    model: PyTree
    directions: tuple[Array, ...]
    optimizers: tuple[PyTree, ...]
    step: Int[Array, ""]
    key: Array


def contrastive(
    right: Float[Array, "*b"], wrong: Float[Array, "*b"], theta: float | Array = THETA
) -> Float[Array, ""]:
    """mean softplus(-theta (right - wrong)), of goodness; log 2 where the two are alike."""
    return jax.nn.softplus(-theta * (right - wrong)).mean()


def other_classes(y: Integer[Array, "n"], classes: int, key: Array) -> Integer[Array, "n"]:
    """A class drawn for each row from all but its own, each as likely."""
    return (y.astype(jnp.int32) + jax.random.randint(key, y.shape, 1, classes)) % classes


def pairs_of(
    net: PhysicalNet, x: Float[Array, "n d"], y: Integer[Array, "n"], key: Array
) -> tuple[Float[Array, "n e"], Float[Array, "n e"]]:
    """Inputs with their classes written into them, and with wrong ones drawn by the key."""
    return net.written(x, y), net.written(x, other_classes(y, net.classes, key))


def opaque_boxes(net: PhysicalNet) -> list[Box | None]:
    """The systems of a network, whose differentiation raises."""
    run = opaque(asked)

    def of_layer(layer: PhysicalLayer) -> Box | None:
        return None if layer.box is None else lambda h, key: run(layer.box, h, key)

    return [of_layer(layer) for layer in net.layers]


def asked(box: PyTree, h: Array, key: Array | None) -> Array:
    """A system's answer."""
    return box(h, key)


def network_of(model: PyTree, directions: Sequence[Array] = ()) -> PhysicalNet:
    """A network that can be judged: a `PhysicalNet` itself, or an MLP with directions beside it.

    An MLP's class is written over its first inputs, and its outputs count the classes; its layers
    are judged as they are, signs included (the authors' digital networks).
    """
    if isinstance(model, PhysicalNet):
        return model
    phis = [model.activation] * (len(model.maps) - 1) + ["identity"]
    layers = [
        PhysicalLayer(linear, p, activation=phi)
        for linear, p, phi in zip(model.maps, directions, phis, strict=True)
    ]
    return PhysicalNet(layers, inputs=model.sizes[0], classes=model.sizes[-1])


def directions_of(model: PyTree, key: Array) -> tuple[Array, ...]:
    """What the layers of an MLP are judged by; a `PhysicalNet` has its own."""
    if isinstance(model, PhysicalNet):
        return ()
    keys = jax.random.split(key, len(model.maps))
    return tuple(direction(width, k) for width, k in zip(model.sizes[1:], keys, strict=True))


def layer_losses(
    net: PhysicalNet,
    x: Float[Array, "n d"],
    y: Integer[Array, "n"],
    key: Array,
    theta: float | Array = THETA,
    boxes: Sequence[Box | None] | None = None,
) -> Float[Array, "layers"]:
    """The losses of all layers of a network as it is.

    Args:
      net: layers that each read a detached input.
      x, y: a batch.
      key: of the wrong classes and of the noise.
      theta: by which differences of goodness are multiplied.
      boxes: stand for the layers' own, `opaque_boxes` for instance.
    """
    draw, noise = jax.random.split(key)
    halves, losses = pairs_of(net, x, y, draw), []
    for i, layer in enumerate(net.layers):
        reads = reads_of(layer, halves, noise_key(noise, i), None if boxes is None else boxes[i])
        losses.append(loss_of(layer, reads, theta))
        halves = stop_gradient(layer(reads))
    return jnp.stack(losses)


def reads_of(
    layer: PhysicalLayer, halves: Sequence[Array] | Array, key: Array, box: Box | None
) -> Float[Array, "2 n reads"]:
    """What a layer's map reads of right and wrong inputs; each has noise of its own."""
    keys = jax.random.split(key)
    found = [layer.read(stop_gradient(h), k, box) for h, k in zip(halves, keys, strict=True)]
    return stop_gradient(jnp.stack(found))


def loss_of(
    layer: PhysicalLayer, reads: Float[Array, "2 n reads"], theta: float | Array
) -> Float[Array, ""]:
    """A layer's loss."""
    right, wrong = layer.goodness(layer(reads))
    return contrastive(right, wrong, theta)


def contrast(theta: float | Array = THETA) -> InformedLoss:
    """The loss of the whole network, for rules that go through it; a simulated one has slopes.

        mean softplus(-theta sum_l (g_l(right) - g_l(wrong)))

    `backprop(contrast(), informed=True)` is what physical local learning does without.

    Args:
      theta: > 0.
    Returns:
      (net, (x, y), moment) -> (mean, {"gap"}), "gap" the mean difference of the sums.
    """
    check_theta(theta)

    def loss(net: PhysicalNet, batch: PyTree, moment: Moment) -> tuple[Array, dict[str, Array]]:
        return whole_loss(net, batch, moment.key, theta)

    return loss


def whole_loss(
    net: PhysicalNet,
    batch: PyTree,
    key: Array,
    theta: float | Array,
    boxes: Sequence[Box | None] | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The loss of `contrast`, with boxes that stand for the layers' own."""
    draw, *keys = jax.random.split(key, 3)
    x, y = batch
    halves = zip(pairs_of(net, x, y, draw), keys, strict=True)
    right, wrong = (net.judged(h, k, boxes).sum(0) for h, k in halves)
    return contrastive(right, wrong, theta), {"gap": jnp.mean(right - wrong)}


def physical_ff(
    optimizer: optax.GradientTransformation | None = None,
    *,
    inner: int = 10,
    theta: float | Array = THETA,
) -> Rule:
    """The rule; a batch is (x, y), rows with classes, and the model a `PhysicalNet` or an MLP.

    An MLP's class is written over its first inputs, and it has as many outputs as classes; what it
    has learned is `predict`, not a call of the model.

    Args:
      optimizer: of each layer's map, with a state of its own; Adam at 5e-4 when None, the authors'
        of acoustic networks.
      inner: K, steps of the optimizer that a layer takes on a batch, >= 1.
      theta: by which differences of goodness are multiplied, > 0.
    Returns:
      a Rule; its state is `PhysicalState`, its metrics "loss" (mean over layers and their steps)
      and "gap" (mean difference of goodness after them). `predict` gives scores [n, classes], its
      noise drawn from the state's key. `step` donates its state.
    Raises:
      ConfigError: inner below 1 or theta not positive and finite; from `init`, another kind of
        model, layers that do not fit together, an MLP of fewer inputs than classes or of one class.
      ValueError: from `init`, a box that gives another shape than it says; from `check`, no rows,
        rows of another width or without a class each, or classes that the network does not have.
    """
    at_least(1, inner=inner)
    check_theta(theta)
    optimizer = in_float32(optax.adam(5e-4) if optimizer is None else optimizer)

    def init(model: PyTree, key: Array) -> PhysicalState:
        check_model(model)
        model = jax.tree.map(jnp.copy, model)  # the step donates it; the caller's stays intact
        directions = directions_of(model, jax.random.fold_in(key, 0))
        net = network_of(model, directions)
        check_network(net)
        memories = tuple(optimizer.init(tree.trained(layer.map)[0]) for layer in net.layers)
        return PhysicalState(model, directions, memories, jnp.int32(0), jnp.copy(key))

    def descended(
        layer: PhysicalLayer, reads: Float[Array, "2 n reads"], memory: PyTree
    ) -> tuple[PyTree, PyTree, Array]:
        """A layer's map after K steps, the optimizer's state, and the mean loss."""
        trained, fixed = tree.trained(layer.map)

        def loss(trained: PyTree) -> Array:
            return loss_of(with_map(layer, tree.combine(trained, fixed)), reads, theta)

        def one(carry: tuple[PyTree, PyTree], _: None) -> tuple[tuple[PyTree, PyTree], Array]:
            trained, memory = carry
            value, gradient = jax.value_and_grad(loss)(trained)
            updates, memory = optimizer.update(gradient, memory, trained)
            return (optax.apply_updates(trained, updates), memory), value

        (trained, memory), losses = jax.lax.scan(one, (trained, memory), length=inner)
        return tree.combine(trained, fixed), memory, losses.mean()

    def step(state: PhysicalState, batch: PyTree) -> tuple[PhysicalState, dict[str, Array]]:
        net = network_of(state.model, state.directions)
        draw, noise = jax.random.split(jax.random.fold_in(state.key, state.step))
        x, y = batch
        halves, boxes = pairs_of(net, x, y, draw), opaque_boxes(net)
        maps, memories, losses, gaps = [], [], [], []
        for i, layer in enumerate(net.layers):
            reads = reads_of(layer, halves, noise_key(noise, i), boxes[i])
            learned, memory, loss = descended(layer, reads, state.optimizers[i])
            halves = with_map(layer, learned)(reads)
            right, wrong = layer.goodness(halves)
            maps, memories, losses = [*maps, learned], [*memories, memory], [*losses, loss]
            gaps.append(jnp.mean(right - wrong))
        model = with_maps(state.model, maps)
        after = PhysicalState(model, state.directions, tuple(memories), state.step + 1, state.key)
        return after, {"loss": jnp.stack(losses).mean(), "gap": jnp.stack(gaps).mean()}

    return Rule(
        "physical_ff",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(scores),
        check=lambda state, batch: check_batch(state.model, batch),
    )


def scores(state: PyTree, x: Float[Array, "n d"]) -> Float[Array, "n classes"]:
    """Scores by the systems themselves, their noise drawn from the state's key."""
    net = network_of(state.model, getattr(state, "directions", ()))
    return net(x, state.key, opaque_boxes(net))


def with_map(layer: PhysicalLayer, linear: PyTree) -> PhysicalLayer:
    """A layer with another map."""
    new = tree.copy(layer)
    new.map = linear
    return new


def with_maps(model: PyTree, maps: Sequence[PyTree]) -> PyTree:
    """A network with other maps."""
    new = tree.copy(model)
    for i, linear in enumerate(maps):
        if isinstance(model, PhysicalNet):
            new.layers[i].map = linear
        else:
            new.maps[i] = linear
    return new


def check_theta(theta: float | Array) -> None:
    """Raises ConfigError for a known theta that is not positive and finite."""
    if is_known(theta) and not 0 < theta < np.inf:
        raise ConfigError(f"theta={theta} must be positive and finite")


def check_model(model: PyTree) -> None:
    """Raises ConfigError for what is neither a `PhysicalNet` nor an MLP."""
    if not isinstance(model, PhysicalNet | MLP):
        raise ConfigError(
            f"model is a {type(model).__name__}; a PhysicalNet or an MLP learns by this rule"
        )


def check_network(net: PhysicalNet) -> None:
    """Traces a network; ValueError where a box gives another shape than it says, ConfigError where
    a layer is given another width than it reads.
    """
    row = jax.ShapeDtypeStruct((1, net.inputs), net.layers[0].map.weight.dtype)
    try:
        jax.eval_shape(lambda net, x, key: net(x, key), net, row, jax.random.key(0))
    except TypeError as error:
        raise ConfigError(
            f"the layers do not read rows of {net.slots} + {net.inputs} one after the other: "
            f"{first_line(error)}"
        ) from None


def check_batch(model: PyTree, batch: PyTree) -> None:
    """Raises ValueError for other than rows of the network's width, with a class of its each."""
    if not isinstance(batch, tuple) or len(batch) != 2:
        raise ValueError(f"batch is a {type(batch).__name__}; (x, y) is accepted, rows and classes")
    x, y = batch
    is_net = isinstance(model, PhysicalNet)
    inputs, classes = (model.inputs, model.classes) if is_net else (model.sizes[0], model.sizes[-1])
    if x.ndim != 2 or x.shape[1] != inputs:
        raise ValueError(f"x has shape {x.shape}; the network takes rows [n, {inputs}]")
    if not len(x) or np.shape(y) != x.shape[:1]:
        raise ValueError(f"x has {len(x)} rows, y shape {np.shape(y)}; a class for each is needed")
    check_labels(y, classes)
