"""The configuration of reversible columns, and how exact rebuilt activations are."""

import dataclasses
import math

import jax.numpy as jnp
from jax.typing import DTypeLike

from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import ColumnSpec
from ffnlab.models.vit_config import ImageInput

__all__ = ["LEAST", "RevColConfig", "rebuilt_columns", "rounding"]

DECODERS = ("deep", "flat")
PARTS = 4  # columns are supervised after each quarter of them
LEAST = 1e-3  # of |alpha|, by which rebuilding divides
# Of `rounding`: above what drawn models of up to 16 columns gave, scales of .1 to 1.
FACTOR, EXPONENT = 16.0, 1.25


@dataclasses.dataclass(frozen=True)
class RevColConfig:
    """Sizes and switches of reversible columns.

    Attributes:
      image: height and width that commands show it; it takes all multiples of `side`.
      widths: channels of each level, the finest first.
      blocks: of each level.
      columns: how many.
      classes: how many scores.
      channels: of a pixel.
      patch: pixels of a place of the finest level, along a side.
      size: side of the depthwise convolutions, odd.
      expansion: channels of FFNs for each of a level.
      gamma: scale of what a block adds, at first.
      alpha: scale of the column before, at first.
      drop: probability that a training example skips the last block of a column.
      supervision: scores after each quarter of the columns, and images after all but the last.
      decoder: of images: "deep" (level by level) or "flat" (one map, the authors' of more than
        1000 classes).
      save_every: columns after which features are kept, those between being rebuilt in the
        backward pass; 1 as the authors have it, `columns` for all. 0 is plain autodiff.
      tolerance: relative error of gradients that rebuilding may bring a drawn float32 model
        (`rounding`).
      preprocess: from image files to values. Where features are rebuilt, a mean keeps flat parts of
        an image from being zeros, whose norms make features of rounding.
    """

    image: tuple[int, ...]
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    columns: int
    classes: int
    channels: int = 3
    patch: int = 4
    size: int = 3
    expansion: int = 4
    gamma: float = 1e-6
    alpha: float = 0.5
    drop: float = 0.0
    supervision: bool = False
    decoder: str = "deep"
    save_every: int = 1
    tolerance: float = 1e-4
    preprocess: ImageInput = ImageInput()

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or len(self.widths) != len(self.blocks):
            raise ConfigError(
                f"widths={list(self.widths)}, blocks={list(self.blocks)}: one of each for every "
                "level is accepted, of two levels or more"
            )
        least = {"widths": min(self.widths), "blocks": min(self.blocks), "columns": self.columns}
        least |= {name: getattr(self, name) for name in ("classes", "channels", "patch")}
        at_least(1, **least, expansion=self.expansion)
        at_least(0, save_every=self.save_every)
        if self.size < 1 or self.size % 2 == 0:
            raise ConfigError(f"size={self.size} must be odd")
        if not LEAST <= abs(self.alpha) < math.inf:
            raise ConfigError(
                f"alpha={self.alpha}: rebuilding divides by it; at least {LEAST} or at most "
                f"-{LEAST}, a finite number, is accepted"
            )
        if not math.isfinite(self.gamma):
            raise ConfigError(f"gamma={self.gamma} must be a finite number")
        if not 0 <= self.drop < 1 or not self.tolerance > 0:
            raise ConfigError(
                f"drop={self.drop} must lie in [0, 1), tolerance={self.tolerance} above 0"
            )
        if self.decoder not in DECODERS:
            raise ConfigError(f"decoder={self.decoder!r} is not one of {DECODERS}")
        if self.supervision and self.columns % PARTS:
            raise ConfigError(
                f"columns={self.columns}: supervision is after each quarter of them; multiples of "
                f"{PARTS} are accepted"
            )
        check_image(self, self.image)
        if self.preprocess.mean and len(self.preprocess.mean) != self.channels:
            raise ConfigError(
                f"preprocess.mean={list(self.preprocess.mean)} for channels={self.channels}"
            )

    @property
    def side(self) -> int:
        """Pixels of a place of the coarsest level, along a side."""
        return self.patch * 2 ** (len(self.widths) - 1)

    @property
    def column(self) -> ColumnSpec:
        """Sizes of a column."""
        return ColumnSpec(
            self.widths,
            self.blocks,
            self.size,
            self.expansion,
            self.gamma,
            self.alpha,
            self.drop,
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """Columns after which there are scores."""
        if not self.supervision:
            return (self.columns,)
        return tuple(self.columns // PARTS * (i + 1) for i in range(PARTS))


def check_image(config: RevColConfig, size: tuple[int, ...]) -> None:
    """Raises ConfigError for a height or a width that the levels do not divide."""
    if len(size) != 2 or min(size) < 1 or any(n % config.side for n in size):
        raise ConfigError(
            f"image={list(size)}: levels halve the grid of {config.patch} x {config.patch} pixels; "
            f"a height and a width that are multiples of {config.side} are accepted"
        )


def rebuilt_columns(config: RevColConfig) -> int:
    """The most columns that are rebuilt one after the other from features that were kept."""
    starts = (1, *config.ends[:-1])  # the first column is not rebuilt
    longest = max(end - start for start, end in zip(starts, config.ends, strict=True))
    return min(config.save_every, longest)


def rounding(columns: int, alpha: float, dtype: DTypeLike = jnp.float32) -> float:
    """What rounding does to gradients where so many columns are rebuilt in a drawn model.

        16 eps max(1, 1 / |alpha|)^(1.25 columns)

    of their norm, an estimate: undoing a column divides what rounding changed by alpha, and its
    levels, which read each other, change it further. Images are taken to have no zeros: where a
    norm is given next to nothing it makes features of what rounding left, and no estimate holds
    (`ffnlab.structure.gradient_error` measures).

    Args:
      columns: rebuilt one after the other.
      alpha: scale of the column before.
      dtype: of the features that are rebuilt.

    >>> rounding(4, 0.5) < 1e-4 < rounding(8, 0.5), rounding(16, 1.0) < 1e-4
    (True, True)
    """
    eps = float(jnp.finfo(jnp.promote_types(dtype, jnp.float32)).eps)
    return FACTOR * eps * max(1.0, 1 / abs(alpha)) ** (EXPONENT * columns) if columns else 0.0


def check_depth(config: RevColConfig, dtype: DTypeLike) -> None:
    """Raises ConfigError where rebuilding would bring more error than is accepted."""
    found = rounding(rebuilt_columns(config), config.alpha, dtype)
    if found > config.tolerance:
        raise ConfigError(
            f"save_every={config.save_every} with alpha={config.alpha}: "
            f"{rebuilt_columns(config)} columns are rebuilt one after the other, which puts "
            f"gradients off by about {found:.0e} of their norm; a smaller save_every is accepted "
            f"(1 keeps errors local), or tolerance={found:.0e} to have it so"
        )
