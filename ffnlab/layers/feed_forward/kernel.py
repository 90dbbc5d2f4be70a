"""FFNs whose first map and nonlinearity are a product of random features (SNNK)."""

from flax import nnx
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.linear import Linear
from ffnlab.layers.random_features import Features

__all__ = ["KernelAdapter", "KernelFFN"]


class KernelFFN(nnx.Module):
    """y = down(psi(phi(x)) * up(x)); without `up` down(psi(phi(x))), bundled down(phi(x)).

    Attributes:
      phi: random features of the input; not trained.
      psi: Linear [features, hidden], or None where it is one matrix with `down`.
      up: Linear [width, hidden] of a gated FFN, or None.
      down: Linear [hidden or features, width].
    """

    def __init__(
        self, phi: Features, down: Linear, *, psi: Linear | None = None, up: Linear | None = None
    ):
        """An FFN of ready parts.

        Raises:
          ConfigError: parts whose sizes differ, or `up` without `psi`.
        """
        if up is not None and psi is None:
            raise ConfigError("up: a gated FFN cannot be one matrix; give psi too")
        hidden = phi.count if psi is None else psi.weight.shape[1]
        if psi is not None and psi.weight.shape[0] != phi.count:
            raise ConfigError(f"psi takes {psi.weight.shape[0]} of {phi.count} features")
        if down.weight.shape[0] != hidden or (up is not None and up.weight.shape[1] != hidden):
            raise ConfigError(
                f"down takes {down.weight.shape[0]} channels, up gives "
                f"{None if up is None else up.weight.shape[1]}; both must be of {hidden}"
            )
        self.phi, self.down = phi, down
        self.psi, self.up = nnx.data(psi), nnx.data(up)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        h = self.phi(x)
        h = h if self.psi is None else self.psi(h)
        return self.down(h if self.up is None else h * self.up(x))


class KernelAdapter(nnx.Module):
    """y = scale * psi(phi(x)): nothing at first, beside a residual.

    Attributes:
      phi: random features of the input; not trained.
      psi: Linear [features, width].
      scale: Param [width], zero at first.
    """

    def __init__(self, phi: Features, psi: Linear, scale: Float[Array, "d"]):
        """An adapter of ready parts."""
        if psi.weight.shape != (phi.count, *scale.shape):
            raise ConfigError(
                f"psi {psi.weight.shape} must take {phi.count} features to {scale.shape} channels"
            )
        self.phi, self.psi = phi, psi
        self.scale = nnx.Param(scale, axes=("embed",))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return self.scale.get_value().astype(x.dtype) * self.psi(self.phi(x))
