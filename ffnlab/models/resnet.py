"""Residual networks of images (arXiv 1512.03385): a stem, stages of blocks, the mean, scores.

Blocks are the basic ones of CIFAR's networks, whose shortcuts learn nothing, or the bottlenecks of
ImageNet's, whose spatial step is an operation chosen by name (`ffnlab.layers.Spatial`). Every
convolution may have a number of channels of its own, as searches find them.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ffnlab.errors import ConfigError
from ffnlab.layers import Linear, Residual, Spatial, global_avg_pool, max_pool
from ffnlab.layers.residual import OPS, SHORTCUTS, ConvNorm
from ffnlab.models.trunk import compute_dtype
from ffnlab.models.vit_config import ImageInput, as_values
from ffnlab.storage.structure import later

__all__ = ["ResNet", "ResNetConfig", "resnet50", "resnet_cifar"]

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
      shortcut: what changes the sizes of the sum: "padded", "projected" or "pooled"
        (`ffnlab.layers.Residual.of_sizes`); "" for "padded" of basic blocks and "projected" of
        bottlenecks.
      sizes: channels after the stem and after every convolution of every block, where these differ
        from what `widths`, `expansion` and `stem_width` say, which are not looked at then; ()
        where they do not.
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
    shortcut: str = later("")
    sizes: tuple[int, ...] = later(())

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
        known = ("block", BLOCKS), ("op", OPS), ("stem", STEMS), ("shortcut", ("", *SHORTCUTS))
        for name, accepted in known:
            if getattr(self, name) not in accepted:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {accepted}")
        if self.block == "basic" and self.op != "conv":
            raise ConfigError(f"op={self.op!r} is of bottlenecks; a basic block has op='conv'")
        if self.preprocess.mean and len(self.preprocess.mean) != self.channels:
            raise ConfigError(
                f"preprocess.mean={list(self.preprocess.mean)} for channels={self.channels}"
            )
        self._check_sizes()

    def _check_sizes(self) -> None:
        count = 1 + sum(self.blocks) * self.convolutions
        if self.sizes and (len(self.sizes) != count or min(self.sizes) < 1):
            raise ConfigError(
                f"sizes={list(self.sizes)} has {len(self.sizes)} entries; {count} positive numbers "
                "are accepted: one of the stem and of each convolution of "
                f"blocks={list(self.blocks)}"
            )
        if self.sizes == self.usual_sizes:
            object.__setattr__(self, "sizes", ())  # the same said shorter

    @property
    def convolutions(self) -> int:
        """Of a block, without its shortcut."""
        return 2 if self.block == "basic" else 3

    @property
    def usual_sizes(self) -> tuple[int, ...]:
        """Channels after the stem and after every convolution, as `widths` say."""
        found = [self.stem_width or self.widths[0]]
        for count, d in zip(self.blocks, self.widths, strict=True):
            found += [d, d, self.expansion * d][: self.convolutions] * count
        return tuple(found)


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
        size, stride = (7, 2) if config.stem == "large" else (3, 1)
        plan = planned(config)
        width, *_ = plan[0][0]
        self.stem = ConvNorm(
            config.channels, width, key=stem_key, size=size, stride=stride, dtype=dtype
        )
        usual = "padded" if config.block == "basic" else "projected"
        more = {"op": config.op, "shortcut": config.shortcut or usual, "dtype": dtype}
        keys = jax.random.split(key, len(plan))
        made = [
            Residual.of_sizes(sizes, key=k, stride=stride, **more)
            for (sizes, stride), k in zip(plan, keys, strict=True)
        ]
        *_, width = plan[-1][0]
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


def planned(config: ResNetConfig) -> list[tuple[tuple[int, ...], int]]:
    """Of every block the channels, of its input and after each convolution, and the stride."""
    sizes, n = config.sizes or config.usual_sizes, config.convolutions
    first = [
        bool(stage) and not i for stage, count in enumerate(config.blocks) for i in range(count)
    ]
    return [(sizes[n * i : n * i + n + 1], 2 if halves else 1) for i, halves in enumerate(first)]


def resnet_cifar(
    depth: int, *, block: str = "basic", classes: int = 10, shortcut: str = ""
) -> ResNetConfig:
    """The sizes of the ResNets for images of 32 x 32 (arXiv 1512.03385, section 4.2).

    Args:
      depth: convolutions and the head: 6 n + 2 of basic blocks (20, 32, 44, 56, 110), 9 n + 2 of
        bottlenecks (164, 1001).
      block, classes, shortcut: see `ResNetConfig`.
    Raises:
      ConfigError: another depth.

    >>> resnet_cifar(20).blocks, resnet_cifar(164, block="bottleneck").blocks
    ((3, 3, 3), (18, 18, 18))
    """
    each = 6 if block == "basic" else 9
    n, rest = divmod(depth - 2, each)
    if n < 1 or rest:
        raise ConfigError(f"depth={depth} of {block} blocks must be {each} n + 2, n at least 1")
    return ResNetConfig((n,) * 3, (16, 32, 64), classes, block=block, shortcut=shortcut)


def sizes_of(model: ResNet) -> tuple[int, ...] | None:
    """Channels after the stem and after every convolution of the blocks, as `ResNetConfig` has
    them; None where a shortcut has a map of channels of its own, which no configuration says."""
    found = [model.stem.conv.weight.shape[1]]
    for block in model.residuals:
        if block.sources is not None:
            return None
        if isinstance(block.spatial, Spatial):
            inner = block.reduce.conv.weight.shape[1]
            after = inner if block.spatial.conv is None else block.spatial.conv.conv.weight.shape[1]
            found += [inner, after]
        else:
            found.append(block.spatial.conv.weight.shape[1])
        found.append(block.expand.conv.weight.shape[1])
    return tuple(found)


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
