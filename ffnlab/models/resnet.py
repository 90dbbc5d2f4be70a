"""Residual networks of images (arXiv 1512.03385): a stem, stages of blocks, the mean, scores.

Blocks are the basic ones of CIFAR's networks, whose shortcuts learn nothing, or the bottlenecks of
ImageNet's, whose spatial step is an operation chosen by name (`ffnlab.layers.Spatial`).
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ffnlab.errors import ConfigError
from ffnlab.layers import Linear, Residual, global_avg_pool, max_pool
from ffnlab.layers.residual import OPS, ConvNorm
from ffnlab.models.trunk import compute_dtype
from ffnlab.models.vit_config import ImageInput, as_values

__all__ = ["ResNet", "ResNetConfig", "resnet50"]

BLOCKS = ("basic", "bottleneck")
STEMS = ("small", "large")


@dataclasses.dataclass(frozen=True)
class ResNetConfig:
    """Sizes and switches of a residual network.

    Attributes:
      blocks: of each stage.
      widths: channels of each stage's blocks, inside where these are bottlenecks.
      classes: how many scores.
      channels: of a pixel.
      image: height and width that commands show it; it takes any.
      block: "basic" or "bottleneck".
      op: spatial step of bottlenecks: "conv", "depthwise", "max", "average", "identity", or
        "hybrid" ("max", but where the grid is halved a mean and "conv").
      expansion: channels that a bottleneck gives for each inside.
      stem: "small" (3 x 3) or "large" (7 x 7 of stride 2, then max pooling of stride 2).
      stem_width: channels after it; 0 for those of the first stage.
      preprocess: from image files to values.
    """

    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    classes: int
    channels: int = 3
    image: tuple[int, ...] = (32, 32)
    block: str = "basic"
    op: str = "conv"
    expansion: int = 4
    stem: str = "small"
    stem_width: int = 0
    preprocess: ImageInput = ImageInput()

    def __post_init__(self) -> None:
        if not self.blocks or len(self.blocks) != len(self.widths):
            raise ConfigError(
                f"blocks={list(self.blocks)}, widths={list(self.widths)}: one of each for every "
                "stage is accepted"
            )
        sizes = {"blocks": min(self.blocks), "widths": min(self.widths), "classes": self.classes}
        sizes |= {"channels": self.channels, "expansion": self.expansion}
        for name, value in sizes.items():
            if value < 1:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be at least 1")
        if len(self.image) != 2 or min(self.image) < 1 or self.stem_width < 0:
            raise ConfigError(
                f"image={list(self.image)} must be a height and a width, stem_width="
                f"{self.stem_width} at least 0"
            )
        for name, accepted in (("block", BLOCKS), ("op", OPS), ("stem", STEMS)):
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        if self.block == "basic" and self.op != "conv":
            raise ConfigError(f"op={self.op!r} is of bottlenecks; a basic block has op='conv'")
        if self.preprocess.mean and len(self.preprocess.mean) != self.channels:
            raise ConfigError(
                f"preprocess.mean={list(self.preprocess.mean)} for channels={self.channels}"
            )


class ResNet(nnx.Module):
    """scores = model(images).

    Attributes:
      stem: ConvNorm.
      residuals: nnx.List of Residual, stage after stage; the first of each stage but the first
        halves the grid.
      head: Linear [width, classes].
      config: ResNetConfig (static).
    """

    def __init__(self, config: ResNetConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights."""
        stem_key, head_key, key = jax.random.split(key, 3)
        width = config.stem_width or config.widths[0]
        size, stride = (7, 2) if config.stem == "large" else (3, 1)
        self.stem = ConvNorm(
            config.channels, width, key=stem_key, size=size, stride=stride, dtype=dtype
        )
        made = []
        plan = strides(config)
        for (d, stride), k in zip(plan, jax.random.split(key, len(plan)), strict=True):
            common = {"key": k, "stride": stride, "dtype": dtype}
            if config.block == "basic":
                made.append(Residual.basic(width, d, **common))
                width = d
            else:
                more = {"op": config.op, "expansion": config.expansion}
                made.append(Residual.bottleneck(width, d, **more, **common))
                width = config.expansion * d
        self.residuals = nnx.List(made)
        axes = ("embed", "classes")
        self.head = Linear(width, config.classes, key=head_key, axes=axes, bias=True, dtype=dtype)
        self.config = config

    def __call__(self, images: Shaped[Array | np.ndarray, "b h w c"]) -> Float[Array, "b classes"]:
        """Scores, float32.

        Args:
          images: of any size, values in [0, 1], or bytes.
        Raises:
          ConfigError: images of other channels.
        """
        return self.head(global_avg_pool(self.features(images))).astype(jnp.float32)

    def features(self, images: Shaped[Array | np.ndarray, "b h w c"]) -> Float[Array, "b _ _ d"]:
        """What the last block gives, in the compute dtype; arguments and errors as a call."""
        config = self.config
        if images.ndim != 4 or images.shape[-1] != config.channels:
            raise ConfigError(
                f"images {images.shape}; [b, height, width, {config.channels}] is accepted"
            )
        dtype = compute_dtype(self.stem.conv.weight.dtype)
        x = jax.nn.relu(self.stem(as_values(images, config.preprocess).astype(dtype)))
        x = max_pool(x, 3, stride=2, padding=1) if config.stem == "large" else x
        for block in self.residuals:
            x = block(x)
        return x


def strides(config: ResNetConfig) -> list[tuple[int, int]]:
    """Width and stride of every block."""
    return [
        (width, 2 if stage and not i else 1)
        for stage, (count, width) in enumerate(zip(config.blocks, config.widths, strict=True))
        for i in range(count)
    ]


def resnet50(op: str = "conv", *, classes: int = 1000) -> ResNetConfig:
    """The sizes of ResNet-50 for ImageNet, its bottlenecks of any op.

    >>> resnet50().blocks, resnet50("max").op
    ((3, 4, 6, 3), 'max')
    """
    return ResNetConfig(
        blocks=(3, 4, 6, 3),
        widths=(64, 128, 256, 512),
        classes=classes,
        image=(224, 224),
        block="bottleneck",
        op=op,
        stem="large",
        stem_width=64,
    )
