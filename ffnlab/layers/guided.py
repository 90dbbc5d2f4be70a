"""A linear map with a dense companion that guides it at first (self-guided training, arXiv
2406.16450)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Linear
from ffnlab.layers.stacking import Statistic
from ffnlab.weights import Dense, Weight

__all__ = ["Guided"]


class Guided(nnx.Module):
    """y = alpha x W + (1 - alpha) x V + bias;   x V + bias where the guide W does not run.

    It runs while alpha > 0, or as told: a loss that saves work tells a step's layers whether they
    run (`ffnlab.structure.self_guided`). What does not run is not computed, but under `jax.vmap`.

    Attributes:
      linear: the Linear that stays, of weight V.
      guide: Linear [in, out] of weight W, without a bias.
      alpha: Statistic [] float32, the guide's share, in [0, 1].
      running: [] bool, whether the guide runs; None, as in a model that is saved, where alpha says.
    """

    def __init__(self, linear: Linear, guide: Weight | None = None, *, alpha: float = 1.0):
        """A guided map.

        Args:
          linear: what is guided.
          guide: W; what `linear` stands for when None, so that the function stays.
          alpha: the guide's share.
        Raises:
          ConfigError: alpha outside [0, 1], or a guide of another shape.
        """
        if not 0 <= alpha <= 1:
            raise ConfigError(f"alpha={alpha} must lie in 0..1")
        guide = Dense(linear.weight.dense()) if guide is None else guide
        if tuple(guide.shape) != tuple(linear.weight.shape):
            raise ConfigError(f"guide is {guide.shape}, the map {linear.weight.shape}")
        self.linear = linear
        self.guide = Linear.of(guide, axes=linear.w.axes)
        self.alpha = Statistic(jnp.float32(alpha), axes=())
        self.running: Bool[Array, "*n"] | None = nnx.data(None)

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        alpha = self.alpha.get_value()
        runs = alpha > 0 if self.running is None else self.running
        y = self.linear(x)
        return jax.lax.cond(runs, self.mixed, lambda x, y: y, x, y)

    def mixed(self, x: Float[Array, "*b in"], y: Float[Array, "*b out"]) -> Float[Array, "*b out"]:
        """y, the output without a guide, with the guide's share of x W in it."""
        alpha = self.alpha.get_value().astype(y.dtype)
        guide = self.guide(x)
        if self.linear.b is not None:
            guide = guide + self.linear.bias.astype(y.dtype)
        return alpha * guide + (1 - alpha) * y

    def runs(self, share: float | None) -> dict[str, float]:
        """How often a token runs the guide: by its share, always where none is given
        (`ffnlab.models.account`)."""
        return {"guide": 1.0 if share is None else share}

    def told(self, alpha: Float[Array, "*n"], runs: Bool[Array, "*n"] | None) -> "Guided":
        """This layer with another share, and whether its guide runs; None where the share says."""
        new = jax.tree.map(lambda leaf: leaf, self)
        new.alpha = self.alpha.replace(alpha)
        new.running = nnx.data(runs)
        return new
