"""Counter-current learning (arXiv 2409.19841): two networks run against each other.

F maps an input to scores, B maps a class back towards the input, and layer by layer their
activations are pulled together. Every layer reads a detached input, so no error crosses a layer,
nothing is stored for a backward pass through depth, and no weight is shared.

    a_0 = x,  a_l = phi(W_l sg(a_{l-1}))         F, scores a_L without phi
    c_L = t,  c_{l-1} = phi(V_l sg(c_l))         B, c_0 without phi
    loss = sum over l < L of pair(a_l, c_l)  +  cross-entropy(a_L, y)

B reads all C one-hot classes once per step, so that c_l is a table of class codes. Pair l changes
W_l and V_{l+1} only; cross-entropy changes W_L only.

An autoencoder is the same with t = x, its own target: a_L and c_0 are images, B goes from the
output's side to the input's, and `MapLoss` compares all L + 1 pairs of maps.

What differs from the authors' code (IandRover/CCL-NeurIPS24): their warm-up multiplies the loss by
the position in the epoch, here it is a schedule of the optimizer; the threshold of their sample
filter is what they hard-code, .1.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int, PyTree

from ffnlab import tree
from ffnlab.layers import MLP
from ffnlab.learning.counter_current.losses import Agreement, MapLoss, PairLoss
from ffnlab.learning.optimizers.masters import in_float32
from ffnlab.rule import Rule
from ffnlab.weights import Weight

__all__ = [
    "CounterCurrentState",
    "MapLoss",
    "PairLoss",
    "centralize",
    "counter_current",
    "local_losses",
    "mirrored",
]

CLASSES = PairLoss()


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
    y: Array,
    pair: Agreement = CLASSES,
) -> tuple[list[Float[Array, ""]], Float[Array, "n *c"]]:
    """The losses of all layers, from pair 0 (the input) to that of the output.

    Args:
      model: F, L stages from x to scores, or to an image.
      mirror: B, L stages from a class, or from an image, to the shape of x.
      x: inputs.
      y: their classes [n], or the images that F is to give.
      pair: how a layer is compared.
    Returns:
      (L + 1 scalars whose sum is minimized, F's output).
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
    output = activations[-1]
    codes = flow(mirror, pair.read(output, y))[::-1]
    return pair.losses(activations, codes, y), output


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
    optimizer: optax.GradientTransformation, gradient: PyTree, memory: PyTree, trained: PyTree
) -> tuple[PyTree, PyTree]:
    """What is trained of a network after a step of its optimizer, and the optimizer's new state."""
    updates, memory = optimizer.update(gradient, memory, trained)
    return optax.apply_updates(trained, updates), memory


def counter_current(
    pair: Agreement = CLASSES,
    optimizer: optax.GradientTransformation | None = None,
    mirror_optimizer: optax.GradientTransformation | None = None,
    *,
    mirror: Callable[[PyTree, Array], PyTree] = mirrored,
) -> Rule:
    """The rule: each layer learns from the one that meets it.

    For classes a batch is (x, y), inputs with classes in [0, classes); for an autoencoder it is x
    alone. The clipping of an optimizer is over a whole network, as in the authors' code; for one
    per layer, use `optax.multi_transform`.

    Args:
      pair: what layers are compared by: `PairLoss` for classes, `MapLoss` for an autoencoder.
      optimizer: of F; when None, SGD at rate 1 with gradients clipped to norm 1.
      mirror_optimizer: of B; the same kind as F's when None, with a state of its own.
      mirror: (F, key) -> B, both with `stages`.
    Returns:
      a Rule; its state is `CounterCurrentState`, its metrics "loss" (the sum), "top" (that of the
      output) and "accuracy", or "error" of an autoencoder. `step` donates its state; `check` is
      that of `pair`.
    """
    up = in_float32(sgd() if optimizer is None else optimizer)
    down = up if mirror_optimizer is None else in_float32(mirror_optimizer)

    def init(model: PyTree, key: Array) -> CounterCurrentState:
        # The step donates both; the caller's stay intact.
        model, other = jax.tree.map(jnp.copy, (model, mirror(model, key)))
        memories = up.init(tree.trained(model)[0]), down.init(tree.trained(other)[0])
        return CounterCurrentState(model, other, memories, jnp.int32(0))

    def step(
        state: CounterCurrentState, batch: PyTree
    ) -> tuple[CounterCurrentState, dict[str, Array]]:
        x, y = pair.targets(batch)
        trained, fixed = zip(tree.trained(state.model), tree.trained(state.mirror), strict=True)

        def total(trained: tuple[PyTree, PyTree]) -> tuple[Array, dict[str, Array]]:
            model, other = map(tree.combine, trained, fixed)
            losses, output = local_losses(model, other, x, y, pair)
            return sum(losses), {"top": losses[-1], **pair.measures(output, y)}

        (loss, metrics), gradients = jax.value_and_grad(total, has_aux=True)(trained)
        found = map(moved, (up, down), gradients, state.optimizers, trained)
        trained, memories = zip(*found, strict=True)
        model, other = map(tree.combine, trained, fixed)
        after = CounterCurrentState(model, other, memories, state.step + 1)
        return after, {"loss": loss, **metrics}

    return Rule(
        "counter-current",
        init,
        jax.jit(step, donate_argnums=0),
        jax.jit(lambda state, x: state.model(x)),
        check=lambda state, batch: pair.check(batch, state.model.sizes[-1]),
    )
