"""A region in more detail, told what a global forecast says of it and of what surrounds it.

The neural nested grid of OneForecast (2025): a second network of the same kind forecasts a region
at a higher resolution. Beside the region's own fields it is given the global forecast of the same
moment as its output, cut to the region, and once more cut with a margin around it, from where the
weather enters; both are resized to the region's grid (bilinear, corners not aligned).

    x = [regional fields, resized(forecast[rows, columns]), resized(forecast[with margin])]

On the way ahead the region's forecast and the global one are each fed back to their own network.
The global network is frozen: its forecasts are computed once, and the other learns from rows.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError, at_least
from ffnlab.graphs.oneforecast import rollout
from ffnlab.models.globe import Globe
from ffnlab.models.oneforecast import OneForecast

__all__ = ["Nest", "nested_inputs", "nested_rollout"]


@dataclasses.dataclass(frozen=True)
class Nest:
    """Where a region lies in a global grid.

    Attributes:
      rows, columns: of the global grid, first and one past the last.
      margin: rows and columns around the region in the second cut; 0 gives the same cut twice.
      channels: fields of the global forecast that the region is told.
    """

    rows: tuple[int, int]
    columns: tuple[int, int]
    margin: int
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        at_least(0, margin=self.margin)
        for name in ("rows", "columns"):
            first, last = getattr(self, name)
            if not 0 <= first < last:
                raise ConfigError(f"{name}={(first, last)} must be ascending, from 0 on")
        if not self.channels or min(self.channels) < 0:
            raise ConfigError(f"channels={self.channels} must be one or more, 0 or above")

    def check(self, grid: tuple[int, ...], fields: int) -> None:
        """Raises ConfigError unless the region with its margin lies in a grid of so many fields."""
        for name, size in zip(("rows", "columns"), grid, strict=True):
            first, last = getattr(self, name)
            if first < self.margin or last + self.margin > size:
                raise ConfigError(
                    f"{name}={(first, last)} with margin={self.margin} reach beyond the grid's "
                    f"0..{size}"
                )
        if max(self.channels) >= fields:
            raise ConfigError(f"channels={self.channels}: the forecast has {fields} fields")


def nested_inputs(
    nest: Nest, region: Float[Array, "h w c"], forecast: Float[Array, "H W C"]
) -> Float[Array, "h w n"]:
    """What the regional network is given.

    Args:
      nest: where the region lies.
      region: its fields of this moment.
      forecast: the global one of the next moment.
    Returns:
      n = c + 2 len(nest.channels) fields: the region's own, then the forecast's cut to the region,
      then cut with the margin.
    Raises:
      ConfigError: the region lies beyond the grid, or the forecast has too few fields.
    """
    nest.check(forecast.shape[:2], forecast.shape[2])
    told = forecast[..., jnp.array(nest.channels)]
    return jnp.concatenate([region, *(cut(nest, told, m, region) for m in (0, nest.margin))], -1)


def cut(nest: Nest, fields: Array, margin: int, like: Array) -> Float[Array, "h w c"]:
    """Fields of the region and a margin around it, resized to the grid of `like`."""
    (top, bottom), (left, right) = nest.rows, nest.columns
    part = fields[top - margin : bottom + margin, left - margin : right + margin]
    shape = (*like.shape[:2], fields.shape[-1])
    return jax.image.resize(part, shape, "linear", antialias=False).astype(like.dtype)


def nested_rollout(
    nest: Nest,
    regional: tuple[OneForecast, Globe],
    world: tuple[OneForecast, Globe],
    region: Float[Array, "h w c"],
    x: Float[Array, "H W C"],
    steps: int,
) -> Float[Array, "s h w c"]:
    """Forecasts of a region, one step ahead, two, …

    Args:
      nest: where the region lies.
      regional: the network of the region and its globe.
      world: the global network and its globe.
      region, x: fields of the first moment, of the region and of the world.
      steps: how many, at least 1.
    Raises:
      ConfigError: the network gives other fields than the region has, or as `nested_inputs` and
        `rollout`.
    """
    (small, near), (model, globe) = regional, world
    if small.config.outputs != region.shape[-1]:
        raise ConfigError(
            f"the regional network gives {small.config.outputs} fields; region has "
            f"{region.shape[-1]}"
        )
    told = jax.lax.stop_gradient(rollout(model, x, globe, steps))

    def one(region: Array, forecast: Array) -> tuple[Array, Array]:
        found = small(nested_inputs(nest, region, forecast), near)
        return found, found

    return jax.lax.scan(one, region, told)[1]
