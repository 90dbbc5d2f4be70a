"""The one table of nonlinearities, by the names that configurations and layers give.

A layer keeps the name, a static string, and looks the function up when it is called. What has a
parameter is a layer of its own (`PARAMETRIC`), which an MLP has one of behind each hidden map.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError

__all__ = ["ACTIVATIONS", "PARAMETRIC", "PReLU", "SReLU", "check_activation"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "abs": jnp.abs,
    "elu": jax.nn.elu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "identity": lambda x: x,
    "leaky_relu": jax.nn.leaky_relu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}


def check_activation(name: str) -> None:
    """Raises ConfigError unless `name` is a known activation."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"activation={name!r} is not one of {sorted(ACTIVATIONS)}")


def names(channels: int, axis: str) -> tuple[str | None]:
    """The name of a dimension of slopes; a slope that all share is whole on every device."""
    return (axis if channels > 1 else None,)


class PReLU(nnx.Module):
    """y = x where x >= 0 and slope * x elsewhere (parametric ReLU, arXiv 1502.01852, eq. 1).

    Attributes:
      slope: Param holding [channels], or [1] where all channels share one.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        slope: float = 0.25,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
    ):
        """Sets every slope to `slope`; the default is that of the paper and of torch."""
        self.slope = nnx.Param(jnp.full((channels,), slope, dtype), axes=names(channels, axis))

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        return jnp.where(x >= 0, x, self.slope.get_value().astype(x.dtype) * x)


class SReLU(nnx.Module):
    """y = min(a, max(0, x)) + b (max(a, x) - a): a ReLU of another slope b from a on, both learned.

    The S-shaped rectifier of arXiv 1512.07030, its part below 0 fixed at 0.

    Attributes:
      end: Param holding a, [channels], or [1] where all channels share one.
      slope: Param holding b, alike.
    """

    def __init__(
        self,
        channels: int = 1,
        *,
        end: float = 5.0,
        slope: float = 1.0,
        axis: str = "embed",
        dtype: DTypeLike = jnp.float32,
    ):
        """Sets a and b; by default it is a ReLU as long as it has not learned."""
        axes = names(channels, axis)
        self.end = nnx.Param(jnp.full((channels,), end, dtype), axes=axes)
        self.slope = nnx.Param(jnp.full((channels,), slope, dtype), axes=axes)

    def __call__(self, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
        end, slope = (each.get_value().astype(x.dtype) for each in (self.end, self.slope))
        return jnp.minimum(end, jnp.maximum(0, x)) + slope * (jnp.maximum(end, x) - end)


PARAMETRIC: Mapping[str, Callable[..., nnx.Module]] = MappingProxyType(
    {"prelu": PReLU, "srelu": SReLU}
)
