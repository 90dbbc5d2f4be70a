"""Noise in front of every stage of a chain, which makes a network's layers random variables.

What a deterministic layer knows of a continuous input is infinite; with noise it is a number
(arXiv 2305.08013; Goldfeld et al., arXiv 1810.05728). Noise in proportion to an activation adds
nothing where that is 0, as half of a ReLU's are: `relative=False` adds as much everywhere.
"""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Float, Key

from ffnlab.errors import ConfigError

__all__ = ["Noisy"]


class Noisy(nnx.Module):
    """h <- stage(h + sigma |h| z) for the stages of a chain in turn, z ~ N(0, 1) anew for each.

    Attributes:
      model: a network with `stages`, as MLP and ConvNet have; without a key this is all it is.
      sigma: standard deviation of the noise, of each activation or of 1 (static).
      relative: whether it is in proportion to the activation (static).
    """

    def __init__(self, model: nnx.Module, sigma: float = 1e-3, *, relative: bool = True):
        """Wraps a network.

        Raises:
          ConfigError: a model without `stages`, or sigma below 0.
        """
        if not hasattr(model, "stages"):
            raise ConfigError(f"a {type(model).__name__} has no stages; an MLP or a ConvNet has")
        if not sigma >= 0:
            raise ConfigError(f"sigma={sigma} must be >= 0")
        self.model = model
        self.sigma = sigma
        self.relative = relative

    @property
    def stages(self) -> list[Callable[[Array], Array]]:
        """Those of the network, without noise."""
        return self.model.stages

    def __call__(
        self, x: Float[Array, "b *d"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "b *out"]:
        """The network's output, with the noise of a key."""
        stages = self.stages
        keys = [None] * len(stages) if key is None else jax.random.split(key, len(stages))
        for stage, each in zip(stages, keys, strict=True):
            x = stage(x if each is None else self.with_noise(x, each))
        return x

    def with_noise(self, h: Array, key: Array) -> Array:
        """An activation and its noise."""
        noise = self.sigma * jax.random.normal(key, h.shape, h.dtype)
        return h + (h * noise if self.relative else noise)
