"""A small convolutional classifier, its mirror image and an autoencoder, as chains of stages."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.errors import ConfigError
from ffnlab.layers import Conv, Linear

__all__ = ["AutoencoderConfig", "ConvAutoencoder", "ConvMirror", "ConvNet", "ConvNetConfig"]

Stage = Callable[[Array], Array]


def check_channels(channels: Sequence[int], classes: int = 1) -> None:
    """Raises ConfigError unless there are two or more positive widths, and classes."""
    if len(channels) < 2 or min(channels) < 1 or classes < 1:
        raise ConfigError(
            f"channels={list(channels)} must be two or more, each at least 1; classes={classes}, "
            "at least 1"
        )


@dataclasses.dataclass(frozen=True)
class ConvNetConfig:
    """Sizes of a `ConvNet`; an image has sides of 2 ** (len(channels) - 1) pixels.

    Attributes:
      channels: of the image and after each convolution, two or more.
      classes: how many scores.
    """

    channels: tuple[int, ...]
    classes: int

    def __post_init__(self) -> None:
        check_channels(self.channels, self.classes)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "ConvNet":
        """A network of these sizes, drawn."""
        return ConvNet(self.channels, self.classes, key=key, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of a `ConvAutoencoder`; sides of an image are multiples of 2 ** (len(channels) - 1).

    Attributes:
      channels: of the image and after each pooling, two or more.
    """

    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        check_channels(self.channels)

    def make(self, *, key: Array, dtype: DTypeLike = jnp.float32) -> "ConvAutoencoder":
        """A network of these sizes, drawn."""
        return ConvAutoencoder(self.channels, key=key, dtype=dtype)


class ConvNet(nnx.Module):
    """3x3 convolutions with ELU, each followed by 2x2 max pooling, then one linear map to scores.

    Sides of an image are halved by each convolution and must be 2 ** convolutions.

    Attributes:
      convs: nnx.List of Conv.
      head: Linear.
    """

    def __init__(
        self,
        channels: Sequence[int],
        classes: int,
        *,
        key: Array,
        dtype: DTypeLike = jnp.float32,
    ):
        """Draws the convolutions as `Conv` does, the linear map as `Linear`, without biases.

        Args:
          channels: of the image and after each convolution, at least two.
          classes: how many scores.
          key: of the draw.
          dtype: of the parameters.
        """
        check_channels(channels, classes)
        *keys, last = jax.random.split(key, len(channels))
        pairs = zip(itertools.pairwise(channels), keys, strict=True)
        self.convs = nnx.List([Conv(a, b, key=k, dtype=dtype) for (a, b), k in pairs])
        axes = ("embed", "mlp")
        self.head = Linear(channels[-1], classes, key=last, axes=axes, dtype=dtype)

    @property
    def sizes(self) -> list[int]:
        """Channels of the image and after each convolution, then the number of scores."""
        after = (conv.channels[1] for conv in self.convs)
        return [self.convs[0].channels[0], *after, self.head.weight.shape[1]]

    @property
    def stages(self) -> list[Stage]:
        """Convolution, ELU and pooling each; the last of them flattened; then the scores."""
        *inner, last = (functools.partial(convolved, conv) for conv in self.convs)
        return [*inner, lambda x: last(x).reshape(len(x), -1), self.head]

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n classes"]:
        for stage in self.stages:
            x = stage(x)
        return x


class ConvMirror(nnx.Module):
    """The way back through a `ConvNet`: nearest upsampling for pooling, a convolution each.

    Attributes:
      head: Linear from classes to features.
      convs: nnx.List of Conv, deepest first.
    """

    def __init__(self, model: ConvNet, key: Array):
        """Draws maps of the model's sizes in reverse."""
        *channels, classes = model.sizes
        first, *keys = jax.random.split(key, len(channels))
        self.head = Linear(classes, channels[-1], key=first, axes=("embed", "mlp"))
        pairs = zip(itertools.pairwise(channels[::-1]), keys, strict=True)
        self.convs = nnx.List([Conv(a, b, key=k) for (a, b), k in pairs])

    @property
    def sizes(self) -> list[int]:
        """The number of classes, then channels down to those of the image."""
        return [*self.head.weight.shape, *(conv.weight.shape[1] for conv in self.convs)]

    @property
    def stages(self) -> list[Stage]:
        """A map with ELU; then upsampling, convolution and ELU each, the last without ELU."""
        *inner, last = (functools.partial(upsampled, conv) for conv in self.convs)
        middle = [lambda x, s=stage: jax.nn.elu(s(x)) for stage in inner]
        return [lambda x: jax.nn.elu(self.head(x)), *middle, last]


class ConvAutoencoder(nnx.Module):
    """An image to a small map of it and back: pooling convolutions, then upsampling ones.

    Sides of an image must be multiples of 2 ** poolings. Read from its output, a network of this
    kind has the shapes of one in the other direction, so that its mirror is one more of its kind.

    Attributes:
      down: nnx.List of Conv, each followed by ELU and 2x2 max pooling.
      up: nnx.List of Conv, each after nearest upsampling, with ELU but for the last.
    """

    def __init__(self, channels: Sequence[int], *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws the convolutions as `Conv` does.

        Args:
          channels: of the image and after each pooling, at least two.
          key: of the draw.
          dtype: of the parameters.
        """
        check_channels(channels)
        around = [*channels, *channels[-2::-1]]
        keys = jax.random.split(key, len(around) - 1)
        pairs = zip(itertools.pairwise(around), keys, strict=True)
        convs = [Conv(a, b, key=k, dtype=dtype) for (a, b), k in pairs]
        self.down = nnx.List(convs[: len(convs) // 2])
        self.up = nnx.List(convs[len(convs) // 2 :])

    @property
    def sizes(self) -> list[int]:
        """Channels of the image and after each convolution, those of an image last."""
        after = [conv.weight.shape[1] for conv in (*self.down, *self.up)]
        return [after[-1], *after]

    @property
    def stages(self) -> list[Stage]:
        """Convolution, ELU and pooling each; then upsampling, convolution and ELU each."""
        down = [functools.partial(convolved, conv) for conv in self.down]
        *inner, last = (functools.partial(upsampled, conv) for conv in self.up)
        return [*down, *(lambda x, s=stage: jax.nn.elu(s(x)) for stage in inner), last]

    def mirror(self, key: Array) -> "ConvAutoencoder":
        """A network of the same sizes, drawn anew: it reads the output's side."""
        return ConvAutoencoder(self.sizes[: len(self.down) + 1], key=key)

    def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h w c"]:
        for stage in self.stages:
            x = stage(x)
        return x


def convolved(conv: Conv, x: Array) -> Array:
    """Convolution, ELU, 2x2 max pooling."""
    n, h, w, _ = x.shape
    if h % 2 or w % 2:
        raise ValueError(
            f"image of {h} x {w} cannot be halved; sides must be even at every pooling"
        )
    y = jax.nn.elu(conv(x)).reshape(n, h // 2, 2, w // 2, 2, -1)
    return y.max(axis=(2, 4))


def upsampled(conv: Conv, x: Array) -> Array:
    """Nearest upsampling by two, then convolution; features become an image of one pixel."""
    x = x[:, None, None] if x.ndim == 2 else x
    return conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
