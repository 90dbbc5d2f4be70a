"""FFNs of which some hidden channels have no nonlinearity: as they train, and folded (RePaViT).

Channels [0, A) of the hidden layer are active, the rest idle. With batch norms about it everything
idle is linear, and collapses with the residual into one square matrix (arXiv 2505.21847).
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import ACTIVATIONS, check_activation
from ffnlab.layers.batch_norm import BatchNorm
from ffnlab.layers.linear import Linear

__all__ = ["FoldedFFN", "IdleFFN"]


class IdleFFN(nnx.Module):
    """y = down(norm([act(h[:A]), h[A:]])),  h = up(x).

    Attributes:
      up: Linear [width, hidden]; down: [hidden, width].
      norm: BatchNorm of the hidden channels, active and idle.
      active: how many are active (A), the first (static).
      activation: name of the nonlinearity (static).
    """

    def __init__(
        self, up: Linear, down: Linear, *, active: int, norm: BatchNorm, activation: str = "gelu"
    ):
        """An FFN of ready parts.

        Raises:
          ConfigError: active outside 0..hidden, or parts of other sizes.
        """
        check_activation(activation)
        hidden = up.weight.shape[1]
        if not 0 <= active <= hidden:
            raise ConfigError(f"active={active} must lie in 0..{hidden}, the hidden channels")
        if norm.mean.shape[-1:] != (hidden,) or down.weight.shape[0] != hidden:
            raise ConfigError(
                f"up gives {hidden} channels, the norm has {norm.mean.shape[-1]} and down takes "
                f"{down.weight.shape[0]}"
            )
        self.up, self.norm, self.down = up, norm, down
        self.active, self.activation = active, activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        h = self.up(x)
        first, rest = h[..., : self.active], h[..., self.active :]
        first = ACTIVATIONS[self.activation](first)
        return self.down(self.norm(jnp.concatenate([first, rest], axis=-1)))


class FoldedFFN(nnx.Module):
    """y = down(act(up(x))) + straight(x), the residual of its slot within `straight`.

    Attributes:
      up: Linear [width, active] with a bias, down: [active, width] without; None where nothing is
        active.
      straight: Linear [width, width] with a bias.
      activation: name of the nonlinearity (static).
    """

    def __init__(
        self, up: Linear | None, down: Linear | None, straight: Linear, *, activation: str = "gelu"
    ):
        """An FFN of ready parts."""
        check_activation(activation)
        self.up, self.down = nnx.data(up), nnx.data(down)
        self.straight, self.activation = straight, activation

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        y = self.straight(x)
        if self.up is None or self.down is None:
            return y
        return y + self.down(ACTIVATIONS[self.activation](self.up(x)))
