"""The configuration of a vision transformer: sizes, and how image files become what it takes."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from ffnlab.errors import ConfigError
from ffnlab.layers.activations import check_activation

__all__ = ["ImageInput", "ViTConfig", "as_values"]

POOLS = ("token", "mean")
DISTILLATIONS = (None, "token", "head")
RESAMPLES = ("bilinear", "bicubic")


@dataclasses.dataclass(frozen=True)
class ImageInput:
    """From an image file to what a network takes.

    Attributes:
      mean, std: values in [0, 1] become (value - mean) / std, by channel; () for as they are.
      resize: height and width that files are resized to, before the middle of the model's size is
        cut out; () where that is the size itself.
      resample: "bilinear" or "bicubic", of the resizing.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    resize: tuple[int, ...] = ()
    resample: str = "bilinear"

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or any(not s > 0 for s in self.std):
            raise ConfigError(
                f"mean={list(self.mean)}, std={list(self.std)}: a number of each for every "
                "channel, std above 0, or none is accepted"
            )
        if len(self.resize) not in (0, 2) or min(self.resize, default=1) < 1:
            raise ConfigError(f"resize={list(self.resize)} must be a height and a width, or ()")
        if self.resample not in RESAMPLES:
            raise ConfigError(f"resample={self.resample!r} is not one of {RESAMPLES}")


def as_values(
    images: Shaped[Array | np.ndarray, "b h w c"], how: ImageInput
) -> Float[Array, "b h w c"]:
    """What a network computes with: bytes over 255, less the mean, over the deviation."""
    x = jnp.asarray(images)
    x = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
    if not how.mean:
        return x
    mean, std = jnp.asarray(how.mean), jnp.asarray(how.std)
    return (x.astype(jnp.float32) - mean) / std


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Sizes and switches of a vision transformer.

    Attributes:
      image: height and width of an image.
      patch: side of the patches; they and the stride fit into the image.
      width: size of the residual stream (d), in the first stage where there are several.
      hidden: FFN channels (h), likewise.
      layers: number of blocks.
      heads: of attention; they divide the width.
      channels: of a pixel.
      stride: from patch to patch; 0 for patches side by side.
      classes: how many scores; None for a model that gives hidden states.
      pool: what the head reads: "token" (a class token before the patches) or "mean" (the mean of
        all patches; there is no class token).
      distillation: None, "token" (a second token, which no head reads) or "head" (with a head of
        its own; scores are the mean of both heads').
      pooler: activation of a map of the class token, of models without classes; None for no map.
      stages: blocks of each stage, between which the grid is halved and width, hidden channels and
        heads are doubled (PiT); () for one stage.
      eps: of the layer norms.
      activation: of the FFNs, a name in `layers.ACTIVATIONS`.
      qkv_bias: queries, keys and values have biases.
      labels: names of the classes, or None.
      preprocess: from image files to values.
      family: the `model_type` of its Hugging Face config, "vit" or "deit".
    """

    image: tuple[int, ...]
    patch: int
    width: int
    hidden: int
    layers: int
    heads: int
    channels: int = 3
    stride: int = 0
    classes: int | None = None
    pool: str = "token"
    distillation: str | None = None
    pooler: str | None = None
    stages: tuple[int, ...] = ()
    eps: float = 1e-6
    activation: str = "gelu"
    qkv_bias: bool = True
    labels: tuple[str, ...] | None = None
    preprocess: ImageInput = ImageInput()
    family: str = "vit"

    def __post_init__(self) -> None:
        self._check_sizes()
        accepted = {"pool": POOLS, "distillation": DISTILLATIONS}
        for name, values in accepted.items():
            if getattr(self, name) not in values:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not one of {values}")
        if self.pool == "mean" and (self.distillation or self.pooler):
            raise ConfigError(
                f"pool='mean' has no class token; distillation={self.distillation!r} and "
                f"pooler={self.pooler!r} need one"
            )
        if self.pooler is not None:
            check_activation(self.pooler)
            if self.classes is not None:
                raise ConfigError(
                    f"pooler={self.pooler!r}: a model with classes has none, use pooler=None"
                )
        if self.distillation == "head" and self.classes is None:
            raise ConfigError("distillation='head' needs classes")
        if self.labels is not None and len(self.labels) != self.classes:
            raise ConfigError(f"labels has {len(self.labels)} names for classes={self.classes}")
        if self.preprocess.mean and len(self.preprocess.mean) != self.channels:
            raise ConfigError(
                f"preprocess.mean={list(self.preprocess.mean)} for channels={self.channels}"
            )
        check_activation(self.activation)

    def _check_sizes(self) -> None:
        sizes = ["patch", "width", "hidden", "layers", "heads", "channels"]
        for name in sizes + ["classes"] * (self.classes is not None):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if len(self.image) != 2 or self.stride < 0:
            raise ConfigError(
                f"image={list(self.image)} must be a height and a width, stride={self.stride} >= 0"
            )
        if any(n < self.patch or (n - self.patch) % self.step for n in self.image):
            raise ConfigError(
                f"patch={self.patch} every {self.step} pixels does not divide image="
                f"{list(self.image)}; sides of patch + k * stride are accepted"
            )
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} must be a multiple of heads={self.heads}")
        if self.stages and (min(self.stages) < 1 or sum(self.stages) != self.layers):
            raise ConfigError(
                f"stages={list(self.stages)} must be positive and add up to layers={self.layers}"
            )
        if len(self.stages) > 1 and self.pool != "mean":
            raise ConfigError("stages halve the grid of patches: they need pool='mean'")

    @property
    def step(self) -> int:
        """Pixels from patch to patch."""
        return self.stride or self.patch

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, of the first stage."""
        height, width = ((n - self.patch) // self.step + 1 for n in self.image)
        return height, width

    @property
    def head_dim(self) -> int:
        """Channels of a head, in every stage."""
        return self.width // self.heads

    @property
    def tokens(self) -> int:
        """Tokens before the patches."""
        return (self.pool == "token") + (self.distillation is not None)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each stage."""
        return self.stages or (self.layers,)

    @property
    def out_width(self) -> int:
        """Size of the residual stream that the heads read."""
        return self.width * 2 ** (len(self.depths) - 1)
