"""The plain feed-forward network: linear maps with a nonlinearity between them."""

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import ACTIVATIONS, PARAMETRIC
from ffnlab.layers.linear import Linear

__all__ = ["MLP", "check_mlp"]


def check_mlp(sizes: Sequence[int], activation: str) -> None:
    """Raises ConfigError unless there are two or more positive widths and a known nonlinearity."""
    if len(sizes) < 2 or min(sizes) < 1:
        raise ConfigError(f"sizes={list(sizes)} must be two or more positive widths")
    known = sorted({*ACTIVATIONS, *PARAMETRIC})
    if activation not in known:
        raise ConfigError(f"activation={activation!r} is not one of {known}")


class MLP(nnx.Module):
    """h <- phi(h @ w_l + b_l), without phi after the last map.

    Attributes:
      maps: nnx.List of Linear.
      activation: name of phi, a key of `ACTIVATIONS` or `PARAMETRIC` (static).
      units: of the latter one behind each map but the last; else None.
    """

    # Set only where there are some, as older files know none.
    units: nnx.List | None = None

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        key: Array,
        activation: str = "relu",
        bias: bool = True,
        std: float | None = None,
        init: Initializer | None = None,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the maps from N(0, std^2), biases zero.

        Args:
          sizes: widths from input to output, at least two.
          key: of the draw.
          activation: name of the nonlinearity.
          bias: whether maps have one.
          std: of every entry; sqrt(2 / inputs) when None (He et al., arXiv 1502.01852).
          init: draws every map [in, out] instead, one of `jax.nn.initializers` for instance.
          dtype: of the parameters.
        Raises:
          ConfigError: as `check_mlp`, or std beside init.
        """
        check_mlp(sizes, activation)
        if init is not None and std is not None:
            raise ConfigError(f"std={std} and init both say how maps are drawn; give one of them")
        scale_of = lambda a: math.sqrt(2) if std is None else std * math.sqrt(a)  # noqa: E731
        keys = jax.random.split(key, len(sizes) - 1)
        self.maps = nnx.List(
            [
                Linear(
                    a,
                    b,
                    key=k,
                    axes=("embed", "mlp"),
                    bias=bias,
                    scale=scale_of(a) if init is None else 1.0,
                    init=init,
                    dtype=dtype,
                )
                for (a, b), k in zip(itertools.pairwise(sizes), keys, strict=True)
            ]
        )
        self.activation = activation
        if activation in PARAMETRIC:
            make = PARAMETRIC[activation]
            self.units = nnx.List([make(axis="mlp", dtype=dtype) for _ in sizes[2:]])

    @property
    def sizes(self) -> list[int]:
        """Widths from input to output."""
        return [self.maps[0].weight.shape[0], *(linear.weight.shape[1] for linear in self.maps)]

    @property
    def stages(self) -> list[Callable[[Array], Array]]:
        """The network as a chain: a map with its nonlinearity each, the last without."""
        *inner, last = self.maps
        units = self.units
        phis = [ACTIVATIONS[self.activation]] * len(inner) if units is None else list(units)
        pairs = zip(inner, phis, strict=True)
        return [*(functools.partial(activated, linear, phi) for linear, phi in pairs), last]

    def __call__(self, x: Float[Array, "*b in"]) -> Float[Array, "*b out"]:
        for stage in self.stages:
            x = stage(x)
        return x


def activated(linear: Linear, phi: Callable[[Array], Array], x: Array) -> Array:
    """phi(linear(x))."""
    return phi(linear(x))
