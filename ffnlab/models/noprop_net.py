"""The networks of NoProp: denoisers of a class embedding that see the raw input."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import Linear
from ffnlab.layers.stacking import stack_modules
from ffnlab.models.noise import LearnedSchedule, cosine
from ffnlab.weights import Dense

__all__ = ["Denoiser", "NoPropConfig", "NoPropNet", "time_features"]

TIME_FEATURES = 64


@dataclasses.dataclass(frozen=True)
class NoPropConfig:
    """Sizes of a `NoPropNet`.

    Attributes:
      inputs: width of the inputs.
      classes: how many.
      hidden: width of the branches.
      blocks: how many denoisers; 0 for one that takes the time ("continuous" and "flow").
      embedding: width of an embedding of the classes that is learned; 0 for one-hot rows, fixed.
      velocity: denoisers give a velocity instead of logits ("flow").
      schedule: hidden units of a learned noise schedule ("continuous"); 0 for the cosine.
    """

    inputs: int
    classes: int
    hidden: int = 128
    blocks: int = 10
    embedding: int = 0
    velocity: bool = False
    schedule: int = 0

    def __post_init__(self) -> None:
        at_least(1, inputs=self.inputs, classes=self.classes, hidden=self.hidden)
        at_least(0, blocks=self.blocks, embedding=self.embedding, schedule=self.schedule)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "NoPropNet":
        """A network of these sizes, drawn."""
        other = jax.random.fold_in(key, 1)
        net = NoPropNet(
            self.inputs,
            self.classes,
            key=key,
            hidden=self.hidden,
            blocks=self.blocks or None,
            embedding=self.embedding or None,
            velocity=self.velocity,
            schedule=LearnedSchedule(self.schedule, key=other) if self.schedule else None,
        )
        return jax.tree.map(lambda leaf: leaf.astype(dtype), net)


class Denoiser(nnx.Module):
    """Logits of the class, or a velocity, from an input and a noised embedding.

    One that serves all times also takes the time.

        h = relu(concat(relu(x @ wx), relu(z @ wz), features of t) @ w)

    Attributes:
      of_input, of_latent, joint, head: Linear.
    """

    def __init__(self, d_in: int, dim: int, outputs: int, hidden: int, *, key: Array, timed: bool):
        keys = jax.random.split(key, 4)
        wide = 2 * hidden + (TIME_FEATURES if timed else 0)

        def linear(a: int, b: int, k: Array) -> Linear:
            return Linear(a, b, key=k, axes=("embed", "mlp"), bias=True, scale=math.sqrt(2))

        self.of_input = linear(d_in, hidden, keys[0])
        self.of_latent = linear(dim, hidden, keys[1])
        self.joint = linear(wide, hidden, keys[2])
        self.head = linear(hidden, outputs, keys[3])

    def __call__(
        self, x: Float[Array, "n i"], z: Float[Array, "n d"], t: Float[Array, "n"] | None = None
    ) -> Float[Array, "n o"]:
        parts = [jax.nn.relu(self.of_input(x)), jax.nn.relu(self.of_latent(z))]
        if t is not None:
            parts.append(time_features(t))
        return self.head(jax.nn.relu(self.joint(jnp.concatenate(parts, axis=-1))))


def time_features(t: Float[Array, "n"]) -> Float[Array, "n f"]:
    """Sines and cosines of times in [0, 1], 64 in all, at frequencies from 1 to 1,000."""
    rates = jnp.exp(jnp.linspace(0.0, math.log(1e3), TIME_FEATURES // 2))
    angles = t[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class NoPropNet(nnx.Module):
    """Denoisers, the embedding of classes, and the map from the last latent to scores.

    Attributes:
      blocks: Denoiser whose leaves have a leading axis of T blocks, or one that takes the time.
      embed: Param holding a Weight [classes, d]: row y stands for class y.
      out: Linear from d to scores.
      schedule: LearnedSchedule, or None where the noise follows the cosine.
      learned: whether the embedding is trained (static).
    """

    def __init__(
        self,
        d_in: int,
        classes: int,
        *,
        key: Array,
        hidden: int = 128,
        blocks: int | None = 10,
        embedding: Float[np.ndarray, "classes d"] | int | None = None,
        velocity: bool = False,
        schedule: LearnedSchedule | None = None,
    ):
        """Draws the network.

        Args:
          d_in: width of the inputs.
          classes: how many.
          key: of the draw.
          hidden: width of the branches.
          blocks: T, how many denoisers; None for one that takes the time.
          embedding: one-hot when None, fixed; a matrix, fixed (an input per class as prototype);
            or a width d, drawn and learned.
          velocity: denoisers give d numbers, a velocity, instead of logits.
          schedule: of the continuous kind, trained with the rest; the cosine, fixed, when None.
        """
        sizes = {"d_in": d_in, "classes": classes, "hidden": hidden}
        sizes |= {"blocks": 1 if blocks is None else blocks}
        for name, size in sizes.items():
            if size < 1:
                raise ConfigError(f"{name}={size} must be at least 1")
        drawn, *keys = jax.random.split(key, 2 + (blocks or 1))
        self.learned = isinstance(embedding, int)
        table = initial(embedding, classes, drawn)
        dim = table.shape[1]
        outputs, timed = dim if velocity else classes, blocks is None
        made = [Denoiser(d_in, dim, outputs, hidden, key=k, timed=timed) for k in keys[1:]]
        self.blocks = made[0] if blocks is None else stack_modules(made)
        self.schedule = nnx.data(schedule)
        self.embed = nnx.Param(Dense(table), axes=("vocab", "embed"))
        # From zero all scores start alike; noise in the last latent then meets no random map.
        self.out = Linear(dim, classes, key=keys[0], axes=("embed", "mlp"), bias=True, scale=0.0)

    @property
    def table(self) -> Float[Array, "classes d"]:
        """The embedding of the classes."""
        return self.embed.get_value().dense()

    def abar(self, t: Float[Array, "*n"]) -> Float[Array, "*n"]:
        """The level of signal at times from 0 to 1, of the learned schedule or the cosine."""
        return cosine(t) if self.schedule is None else self.schedule(t)

    def guess(self, logits: Float[Array, "*n c"]) -> Float[Array, "*n d"]:
        """The expected embedding: softmax(logits) @ embedding, inside the hull of its rows."""
        return jax.nn.softmax(logits) @ self.table

    def block_of(self, t: int) -> Denoiser:
        """One of the T denoisers, or the one that there is."""
        is_stack = self.blocks.joint.weight.dense().ndim == 3
        return jax.tree.map(lambda leaf: leaf[t], self.blocks) if is_stack else self.blocks

    def of_class(self, y: Int[Array, "n"]) -> Float[Array, "n d"]:
        """The embedding of each class."""
        return jnp.take(self.table, y, axis=0)


def initial(
    embedding: Float[np.ndarray, "classes d"] | int | None, classes: int, key: Array
) -> Float[Array, "classes d"]:
    """The embedding to start from."""
    if embedding is None:
        return jnp.eye(classes)
    if isinstance(embedding, int):
        return jax.random.normal(key, (classes, embedding)) * embedding**-0.5
    table = jnp.asarray(embedding, jnp.float32)
    if table.ndim != 2 or len(table) != classes:
        raise ConfigError(f"embedding of shape {table.shape} needs {classes} rows, one per class")
    return table
