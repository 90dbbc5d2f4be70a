"""Networks of fixed physical systems and trained linear maps (arXiv 2304.11042).

A layer hands its input to a system that nobody looks into, and a map reads what comes out, beside
the input itself where the layer has a skip. There are no scores at the top: a class is written into
the input, and every layer says how well that fits.

    z_l = phi(w_l [G_l(h); h] + b_l),   h_{l+1} = z_l,   g_l = cos(|z_l|, p_l)
    score of class c = sum_l g_l, with c written into x

What differs from the authors' code (MomeniAli/PhyLL): a class is written as high as the largest
value of its own row, so that a row has the same score whatever rows are beside it; they take that
of the whole batch, as `level="batch"` does. Networks without systems, which the authors call
digital, are those of `system="none"`; they read z itself instead of |z|.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import Linear, TanhChain, Transmission, TwoBit
from ffnlab.layers.activations import ACTIVATIONS, check_activation
from ffnlab.layers.physical import check_noise, root
from ffnlab.layers.stacking import Statistic

__all__ = ["PhysicalConfig", "PhysicalLayer", "PhysicalNet", "direction", "goodness"]

Box = Callable[[Array, Array | None], Array]
EPS = 1e-6  # the least length that a cosine divides by
LEVELS = ("row", "batch")

# (inputs, width of the layer, key, noise) -> a system.
SYSTEMS: Mapping[str, Callable[[int, int, Array, float], nnx.Module | None]] = MappingProxyType(
    {
        "none": lambda d, width, key, noise: None,
        "tanh_chain": lambda d, width, key, noise: TanhChain(d, key=key, noise=noise),
        "transmission": lambda d, width, key, noise: Transmission(d, width, key=key, noise=noise),
        "two_bit": lambda d, width, key, noise: TwoBit(d, width, key=key, noise=noise),
    }
)


@dataclasses.dataclass(frozen=True)
class PhysicalConfig:
    """Sizes and systems of a `PhysicalNet`.

    Attributes:
      inputs: width of the inputs.
      classes: how many, at least two.
      widths: of the layers.
      system: of all layers: "transmission", "tanh_chain", "two_bit", or "none" for a plain network.
      skip: maps read the input of their system too.
      slots: inputs before the others that a class is written into, at least `classes`; 0 to write
        it over the first inputs.
      noise: standard deviation of the systems' noise, whose outputs are of order 1.
      activation: after each map, a key of `layers.ACTIVATIONS`.
      level: how high a class is written: the largest magnitude in its "row", or in the "batch".
    """

    inputs: int
    classes: int
    widths: tuple[int, ...] = (128, 128)
    system: str = "transmission"
    skip: bool = False
    slots: int = 0
    noise: float = 0.0
    activation: str = "identity"
    level: str = "row"

    def __post_init__(self) -> None:
        at_least(1, inputs=self.inputs, widths=min(self.widths, default=0))
        if self.system not in SYSTEMS:
            raise ConfigError(f"system={self.system!r} is not one of {sorted(SYSTEMS)}")
        if self.system == "none" and (self.skip or self.noise):
            raise ConfigError("system='none' has nothing to skip and no noise")
        check_noise(self.noise)
        check_activation(self.activation)
        check_label(self.inputs, self.classes, self.slots, self.level)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "PhysicalNet":
        """A network of these sizes, its systems drawn too."""
        layers, sizes = [], (self.slots + self.inputs, *self.widths)
        for i, (d, width) in enumerate(itertools.pairwise(sizes)):
            of_box, of_map, of_direction = jax.random.split(jax.random.fold_in(key, i), 3)
            box = SYSTEMS[self.system](d, width, of_box, self.noise)
            reads = d if box is None else box.outputs + (d if self.skip else 0)
            linear = Linear(reads, width, key=of_map, axes=("embed", "mlp"), bias=True)
            common = {"skip": self.skip, "activation": self.activation}
            layers.append(PhysicalLayer(linear, direction(width, of_direction), box, **common))
        names = ("inputs", "classes", "slots", "level")
        net = PhysicalNet(layers, **{name: getattr(self, name) for name in names})
        return jax.tree.map(lambda leaf: leaf.astype(dtype), net)


class PhysicalLayer(nnx.Module):
    """A system, the map that reads it, and the direction by which its output is judged.

    Attributes:
      box: the system, a module (x, key or None) -> y with `outputs`; None for a plain layer.
      map: Linear, all that learns.
      p: Statistic holding [out], of length 1.
      skip: whether the map reads [box(h); h] instead of box(h) (static).
      activation: name of phi (static).
    """

    def __init__(
        self,
        linear: Linear,
        p: Float[Array, "out"],
        box: nnx.Module | None = None,
        *,
        skip: bool = False,
        activation: str = "identity",
    ):
        """Puts a layer together.

        Raises:
          ConfigError: p is not as wide as the map's output, a box is wider than what the map reads,
            skip without a box, an unknown activation.
        """
        reads, width = linear.weight.shape
        if p.shape != (width,):
            raise ConfigError(f"p has shape {p.shape}; the map gives [{width}]")
        outputs = 0 if box is None else box.outputs
        if skip and not 0 < outputs < reads or box is not None and not skip and outputs != reads:
            what = "no box" if box is None else f"a box of {outputs} outputs"
            raise ConfigError(f"{what} with skip={skip} does not fit a map of {reads} inputs")
        check_activation(activation)
        self.box = nnx.data(box)
        self.map = linear
        self.p = Statistic(p, axes=("mlp",))
        self.skip = skip
        self.activation = activation

    def read(
        self, h: Float[Array, "*b in"], key: Array | None = None, box: Box | None = None
    ) -> Float[Array, "*b reads"]:
        """What the map reads: the output of the box, and the input where there is a skip.

        Args:
          h: the layer's input.
          key: of the box's noise; none without one.
          box: stands for the layer's own.
        Raises:
          ValueError: the box gives another shape.
        """
        if self.box is None:
            return h
        y = (self.box if box is None else box)(h, key)
        wanted = (*h.shape[:-1], self.box.outputs)
        if y.shape != wanted:
            raise ValueError(f"a black box gives shape {y.shape} of {h.shape}; it says {wanted}")
        return jnp.concatenate([y, h], axis=-1) if self.skip else y

    def __call__(self, read: Float[Array, "*b reads"]) -> Float[Array, "*b out"]:
        """The layer's output, of what `read` gives."""
        return ACTIVATIONS[self.activation](self.map(read))

    def goodness(self, z: Float[Array, "*b out"]) -> Float[Array, "*b"]:
        """How well an output fits: cos(|z|, p), of z itself behind no box."""
        return goodness(z if self.box is None else jnp.abs(z), self.p.get_value())


class PhysicalNet(nnx.Module):
    """Layers of physical systems; what it is called with are rows, what it gives scores of classes.

    Attributes:
      layers: nnx.List of PhysicalLayer.
      inputs: width of the rows (static).
      classes: how many (static).
      slots: inputs before the others that a class is written into; 0 where it is written over the
        first ones (static).
      level: how high, see `PhysicalConfig` (static).
    """

    def __init__(
        self,
        layers: Sequence[PhysicalLayer],
        *,
        inputs: int,
        classes: int,
        slots: int = 0,
        level: str = "row",
    ):
        """Puts a network together; the first layer is given rows of slots + inputs.

        Raises:
          ConfigError: no layers, or as `PhysicalConfig`.
        """
        at_least(1, layers=len(layers))
        check_label(inputs, classes, slots, level)
        self.layers = nnx.List(layers)
        self.inputs = inputs
        self.classes = classes
        self.slots = slots
        self.level = level

    def redrawn(self, key: Array) -> "PhysicalNet":
        """The network with other specimens of its systems: what it meets when they are replaced.

        Args:
          key: of the draw; the system of layer l draws by `fold_in(key, l)`.
        Raises:
          ConfigError: a system that cannot be drawn, a `BlackBox` for instance.
        """
        new = jax.tree.map(lambda leaf: leaf, self)
        for i, layer in enumerate(new.layers):
            if layer.box is not None and not hasattr(layer.box, "redrawn"):
                raise ConfigError(f"layers[{i}].box is a {type(layer.box).__name__}, not drawn")
            if layer.box is not None:
                layer.box = layer.box.redrawn(jax.random.fold_in(key, i))
        return new

    def written(self, x: Float[Array, "n d"], y: Int[Array, "n"]) -> Float[Array, "n e"]:
        """Inputs with classes written into them; where all are zero, a class is as low.

        Args:
          x: rows.
          y: a class each.
        Returns:
          [n, slots + d], or [n, d] where there are no slots.
        """
        high = jnp.abs(x).max(-1, keepdims=True) if self.level == "row" else jnp.abs(x).max()
        mark = jax.nn.one_hot(y, self.slots or self.classes, dtype=x.dtype) * high
        return jnp.concatenate([mark, x if self.slots else x[:, self.classes :]], axis=-1)

    def judged(
        self,
        h: Float[Array, "n e"],
        key: Array | None = None,
        boxes: Sequence[Box | None] | None = None,
    ) -> Float[Array, "layers n"]:
        """The goodness of every layer.

        Args:
          h: rows with a class written into them.
          key: of the noise; layer l draws by `fold_in(key, l)`.
          boxes: stand for the layers' own.
        """
        found = []
        for i, layer in enumerate(self.layers):
            box = None if boxes is None else boxes[i]
            h = layer(layer.read(h, noise_key(key, i), box))
            found.append(layer.goodness(h))
        return jnp.stack(found)

    def __call__(
        self,
        x: Float[Array, "n d"],
        key: Array | None = None,
        boxes: Sequence[Box | None] | None = None,
    ) -> Float[Array, "n classes"]:
        """Scores of classes; all classes meet the same noise, else they could not be compared."""

        def of_class(c: Int[Array, ""]) -> Float[Array, "n"]:
            return self.judged(self.written(x, jnp.full(len(x), c)), key, boxes).sum(0)

        return jax.vmap(of_class, out_axes=1)(jnp.arange(self.classes))


def check_label(inputs: int, classes: int, slots: int, level: str) -> None:
    """Raises ConfigError where a class cannot be written, or there is no wrong one."""
    at_least(0, inputs=inputs, classes=classes, slots=slots)
    if classes < 2:
        raise ConfigError(f"classes={classes} must be at least 2: of one there is no wrong class")
    if slots and slots < classes:
        raise ConfigError(f"slots={slots} must be 0 or at least classes={classes}")
    if not slots and inputs < classes:
        raise ConfigError(f"inputs={inputs} are too few to write {classes} classes over; use slots")
    if level not in LEVELS:
        raise ConfigError(f"level={level!r} is not one of {LEVELS}")


def noise_key(key: Array | None, layer: int) -> Array | None:
    """The key of one layer's noise."""
    return None if key is None else jax.random.fold_in(key, layer)


def direction(width: int, key: Array) -> Float[Array, "width"]:
    """A direction drawn at random, of length 1."""
    p = jax.random.normal(key, (width,))
    return p / jnp.linalg.norm(p)


def goodness(z: Float[Array, "*b d"], p: Float[Array, "d"]) -> Float[Array, "*b"]:
    """cos(z, p) in float32, lengths not below 1e-6; 0, with a slope of 0, where z is zero."""
    z, p = (part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in (z, p))
    square = jnp.sum(z * z, axis=-1)
    inner = jnp.where(square > 0, jnp.sum(z * p, axis=-1), 0)
    return inner / (jnp.maximum(root(square), EPS) * jnp.maximum(jnp.linalg.norm(p), EPS))
