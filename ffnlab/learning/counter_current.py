"""Counter-current learning (arXiv 2409.19841): two networks run against each other.

F maps an input to scores, B maps a class back towards the input, and layer by layer their
activations are pulled together. Every layer reads a detached input, so no error crosses a layer,
nothing is stored for a backward pass through depth, and no weight is shared.

    a_0 = x,  a_l = phi(W_l sg(a_{l-1}))         F, scores a_L without phi
    c_L = t,  c_{l-1} = phi(V_l sg(c_l))         B, c_0 without phi
    loss = sum over l < L of pair(a_l, c_l)  +  cross-entropy(a_L, y)

B reads all C one-hot classes once per step, so that c_l is a table of class codes. Pair l changes
W_l and V_{l+1} only; cross-entropy changes W_L only.

What differs from the authors' code (IandRover/CCL-NeurIPS24): their warm-up multiplies the loss by
the position in the epoch, here it is a schedule of the optimizer; the threshold of their sample
filter is what they hard-code, .1.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, PyTree

from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.learning.labels import check_labels
from ffnlab.rule import Rule
from ffnlab.weights import Weight

__all__ = [
    "CounterCurrentState",
    "PairLoss",
    "centralize",
    "counter_current",
    "local_losses",
    "mirrored",
]

REFERENCE_WIDTH = 256  # the width at which the authors' dot-product loss has weight `scale`
CONFIDENT = 0.1


@runtime_checkable
class Staged(Protocol):
    """A network as a chain: each stage maps the activation before it to its own."""

    @property
    def sizes(self) -> Sequence[int]:
        """Widths from input to output."""
        ...

    @property
    def stages(self) -> Sequence[Callable[[Array], Array]]:
        """The stages in order of computation; differentiable in their parameters."""
        ...


class CounterCurrentState(NamedTuple):
    """What counter-current learning changes.

    Attributes:
      model: F.
      mirror: B.
      optimizers: optax states of F and of B.
      step: [] int32, steps taken.
    """

    model: PyTree
    mirror: PyTree
    optimizers: tuple[PyTree, PyTree]
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True)
class PairLoss:
    """How the activations of a layer are compared with its class codes.

    With A [n, d] of the batch, C [C, d] of the classes and Y the one-hot classes of the batch:

        "dot":     256 / d * scale * mean (A C' - Y)^2                             (MLPs)
        "cosine":  scale * mean (A C' - Y)^2 + contrast * [mean (A A' - I)^2 + mean (C C' - I)^2],
                   rows of A and C divided by their norms                          (conv networks)

    Attributes:
      kind: "dot" or "cosine".
      scale: > 0; the authors take .5 for "dot" and 1 for "cosine".
      contrast: of "cosine", >= 0.
      skip_confident: leave out inputs whose class has a probability above .9 already.
      rows: what B reads: "classes", each class once, or "batch", the class of each input; then Y
        tells which inputs share a class.
    """

    kind: str = "dot"
    scale: float = 0.5
    contrast: float = 0.5
    skip_confident: bool = False
    rows: str = "classes"

    def __post_init__(self) -> None:
        for name, accepted in (("kind", ("dot", "cosine")), ("rows", ("classes", "batch"))):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        if not self.scale > 0 or not self.contrast >= 0:
            raise ConfigError(
                f"scale={self.scale} must be positive and contrast={self.contrast} not negative"
            )

    def __call__(
        self, a: Float[Array, "n *d"], c: Float[Array, "m *e"], same: Float[Array, "n m"]
    ) -> Float[Array, ""]:
        """The loss of one pair.

        Args:
          a: activations of the batch.
          c: class codes, in the shape of an activation.
          same: 1 where input and code are of one class, else 0.
        Raises:
          ValueError: an activation and a code have other shapes.
        """
        if a.shape[1:] != c.shape[1:]:
            shapes = f"{a.shape[1:]} meet codes of shape {c.shape[1:]}"
            raise ValueError(f"activations of shape {shapes}; the mirror must fit the network")
        a, c = a.reshape(len(a), -1), c.reshape(len(c), -1)
        if self.kind == "dot":
            return REFERENCE_WIDTH / a.shape[1] * self.scale * squared(a @ c.T, same)
        a, c = unit_rows(a), unit_rows(c)
        apart = squared(a @ a.T, jnp.eye(len(a))) + squared(c @ c.T, jnp.eye(len(c)))
        return self.scale * squared(a @ c.T, same) + self.contrast * apart


def squared(a: Array, b: Array) -> Float[Array, ""]:
    """The mean squared difference."""
    return jnp.mean(jnp.square(a - b))


def unit_rows(x: Float[Array, "n d"]) -> Float[Array, "n d"]:
    """Rows divided by their norm, zero rows left zero."""
    square = jnp.sum(x * x, axis=1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)  # a gradient at zero too
    return x / (norm + 1e-8)


def flow(network: Staged, start: Array) -> list[Array]:
    """All activations, the start included; each stage reads a detached input."""
    values = [start]
    for stage in network.stages:
        values.append(stage(stop_gradient(values[-1])))
    return values


def local_losses(
    model: Staged,
    mirror: Staged,
    x: Float[Array, "n *d"],
    y: Int[Array, "n"],
    pair: PairLoss = PairLoss(),
) -> tuple[list[Float[Array, ""]], Float[Array, "n c"]]:
    """The losses of all layers, from pair 0 (the input) to the cross-entropy of the scores.

    Args:
      model: F, L stages from x to scores.
      mirror: B, L stages from a class to the shape of x.
      x: inputs.
      y: their classes.
      pair: how a layer is compared.
    Returns:
      (L + 1 scalars whose sum is minimized, scores [n, classes]).
    Raises:
      ValueError: no inputs, other numbers of stages, or shapes that do not meet.
    """
    if not len(x):
        raise ValueError("x has no rows; at least one is needed")
    up, down = model.stages, mirror.stages
    if len(up) != len(down):
        raise ValueError(
            f"the networks have {len(up)} and {len(down)} stages; equal numbers needed"
        )
    activations = flow(model, x)
    scores = activations[-1]
    labels = jax.nn.one_hot(y, scores.shape[1], dtype=scores.dtype)
    read = labels if pair.rows == "batch" else jnp.eye(scores.shape[1], dtype=scores.dtype)
    codes = flow(mirror, read)[::-1]
    same, used = labels @ read.T, jnp.ones(len(y), scores.dtype)
    if pair.skip_confident:
        sure = jnp.sum(stop_gradient(jax.nn.softmax(scores)) * labels, axis=1)
        used = (sure <= 1 - CONFIDENT).astype(scores.dtype)
    losses = [
        pair(a * used.reshape(-1, *[1] * (a.ndim - 1)), c, same)
        for a, c in zip(activations[:-1], codes[:-1], strict=True)
    ]
    losses.append(optax.softmax_cross_entropy_with_integer_labels(scores, y).mean())
    return losses, scores


def mirrored(model: MLP, key: Array) -> MLP:
    """B for an MLP: its sizes in reverse, maps drawn from U(-1, 1) / sqrt(inputs), no biases."""
    mirror = MLP(model.sizes[::-1], key=key, activation=model.activation, bias=False)
    for linear, k in zip(mirror.maps, jax.random.split(key, len(mirror.maps)), strict=True):
        linear.w = linear.replace(uniform(linear.weight, k)).w
    return mirror


def uniform(weight: Weight, key: Array) -> Weight:
    """A weight of the same kind drawn from U(-1, 1) / sqrt(inputs): torch's default."""
    bound = weight.shape[0] ** -0.5
    draw = lambda w: jax.random.uniform(key, w.shape, w.dtype, -bound, bound)  # noqa: E731
    return jax.tree.map(draw, weight)


def centralize() -> optax.GradientTransformation:
    """Subtracts from the gradient of each output's weights their mean (arXiv 2004.01461).

    Outputs are on the last axis here; `optax.centralize` takes them to be on the first.
    """

    def centre(g: Array) -> Array:
        axes = tuple(range(g.ndim - 1))
        return g - g.mean(axes, keepdims=True) if axes else g

    return optax.stateless(lambda updates, params: jax.tree.map(centre, updates))


def sgd() -> optax.GradientTransformation:
    """The authors' optimizer for MLPs: rate 1, gradients clipped to norm 1 over all layers."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))


def moved(
    optimizer: optax.GradientTransformation, gradient: PyTree, memory: PyTree, network: PyTree
) -> tuple[PyTree, PyTree]:
    """A network after a step of its optimizer, and the optimizer's new state."""
    updates, memory = optimizer.update(gradient, memory, network)
    return optax.apply_updates(network, updates), memory


def counter_current(
    pair: PairLoss = PairLoss(),
    optimizer: optax.GradientTransformation | None = None,
    mirror_optimizer: optax.GradientTransformation | None = None,
    *,
    mirror: Callable[[PyTree, Array], PyTree] = mirrored,
) -> Rule:
    """The rule: each layer learns from the one that meets it.

    A batch is (x, y), inputs with classes in [0, classes). The clipping of an optimizer is over a
    whole network, as in the authors' code; for one per layer, use `optax.multi_transform`.

    Args:
      pair: how activations and codes are compared.
      optimizer: of F; when None, SGD at rate 1 with gradients clipped to norm 1.
      mirror_optimizer: of B; the same kind as F's when None, with a state of its own.
      mirror: (F, key) -> B, both with `stages`.
    Returns:
      a Rule; its state is `CounterCurrentState`, its metrics "loss" (the sum), "top" (the
      cross-entropy) and "accuracy". `step` donates its state.
    """
    up = sgd() if optimizer is None else optimizer
    down = up if mirror_optimizer is None else mirror_optimizer

    def init(model: PyTree, key: Array) -> CounterCurrentState:
        # The step donates both; the caller's stay intact.
        model, other = jax.tree.map(jnp.copy, (model, mirror(model, key)))
        return CounterCurrentState(model, other, (up.init(model), down.init(other)), jnp.int32(0))

    def step(
        state: CounterCurrentState, batch: tuple[Array, Array]
    ) -> tuple[CounterCurrentState, dict[str, Array]]:
        x, y = batch

        def total(networks: tuple[PyTree, PyTree]) -> tuple[Array, tuple]:
            losses, scores = local_losses(*networks, x, y, pair)
            return sum(losses), (losses[-1], jnp.mean(scores.argmax(-1) == y))

        both = (state.model, state.mirror)
        (loss, (top, right)), gradients = jax.value_and_grad(total, has_aux=True)(both)
        model, memory = moved(up, gradients[0], state.optimizers[0], state.model)
        other, memories = moved(down, gradients[1], state.optimizers[1], state.mirror)
        metrics = {"loss": loss, "top": top, "accuracy": right}
        return CounterCurrentState(model, other, (memory, memories), state.step + 1), metrics

    jitted = jax.jit(step, donate_argnums=0)

    def checked(
        state: CounterCurrentState, batch: PyTree
    ) -> tuple[CounterCurrentState, dict[str, Array]]:
        check_labels(batch[1], state.model.sizes[-1])
        return jitted(state, batch)

    return Rule("counter-current", init, checked, jax.jit(lambda state, x: state.model(x)))
