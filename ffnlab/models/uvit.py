"""A U-ViT: a transformer over patches and a time, whose first half is given to its second.

    h = [class, time, patches] + positions;   s_i = block_i(... h)  for the first N blocks
    middle block;   h = block(fusion_j [h; kappa_j s_(N-1-j)])  for the last N;   norm, head, conv

(arXiv 2209.12152; scaled skips of arXiv 2310.13545, `ffnlab.layers.long_skips`.) It predicts the
noise in an image, see `ffnlab.losses.denoising`.

What differs from the authors' code: maps of blocks are drawn as the library's others are.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Shaped

from ffnlab.errors import ConfigError
from ffnlab.layers import (
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Context,
    Conv,
    Embedding,
    LayerInputs,
    LayerNorm,
    LayerOutputs,
    Linear,
    SkipScaling,
    scale_skips,
)
from ffnlab.layers.activations import check_activation
from ffnlab.layers.logical import constrain
from ffnlab.layers.stacking import run_stack, stack_modules
from ffnlab.models import trunk
from ffnlab.models.stack import Stacked, in_order, kind_of, period_of
from ffnlab.models.vit import drawn
from ffnlab.weights import Dense

__all__ = ["UViT", "UViTConfig", "sinusoids"]

T = TypeVar("T")
Through = Callable[[Block, Array, LayerInputs], tuple[Array, LayerOutputs]]
PERIOD = 1e4  # longest period of the features of time, over 2 pi


@dataclasses.dataclass(frozen=True)
class UViTConfig:
    """Sizes and switches of a U-ViT.

    Attributes:
      image: height and width, which patches divide.
      patch: side of the patches.
      width: size of the residual stream (d).
      hidden: FFN channels (h).
      depth: blocks beside the one in the middle, an even number.
      heads: of attention; they divide the width.
      channels: of a pixel.
      classes: how many it may be told of; None for a model that is told of none.
      scaling: of the long skips, one of `ffnlab.layers.long_skips.SCALINGS`.
      kappa: of the scaling "constant", in (0, 1].
      eps: of the layer norms.
      activation: of the FFNs.
      qkv_bias: queries, keys and values have biases.
    """

    image: tuple[int, ...]
    patch: int
    width: int
    hidden: int
    depth: int
    heads: int
    channels: int = 3
    classes: int | None = None
    scaling: str = "original"
    kappa: float = 0.5
    eps: float = 1e-5
    activation: str = "gelu"
    qkv_bias: bool = False

    def __post_init__(self) -> None:
        names = ["patch", "width", "hidden", "depth", "heads", "channels"]
        for name in names + ["classes"] * (self.classes is not None):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name}={value!r} must be a positive integer")
        if self.depth % 2:
            raise ConfigError(
                f"depth={self.depth} must be even: half of the blocks stand on either side"
            )
        if len(self.image) != 2 or any(n < 1 or n % self.patch for n in self.image):
            raise ConfigError(f"image={list(self.image)} must be multiples of patch={self.patch}")
        if self.width % self.heads:
            raise ConfigError(f"width={self.width} must be a multiple of heads={self.heads}")
        check_activation(self.activation)
        jax.eval_shape(lambda: make_scaling(self, jax.random.key(0), jnp.float32))

    @property
    def layers(self) -> int:
        """Blocks in all."""
        return self.depth + 1

    @property
    def tokens(self) -> int:
        """Tokens before the patches."""
        return 1 + (self.classes is not None)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.image[0] // self.patch, self.image[1] // self.patch


class UViT(nnx.Module):
    """noise = model(images, times).

    Attributes:
      patches: Conv [patch * patch * channels, width].
      label_embed: Embedding [classes, width], or None.
      positions: Param holding a weight [tokens + patches, width].
      layers: nnx.List of depth + 1 Block, or Stacked.
      fusions: nnx.List of Linear [2 width, width], of the blocks behind the middle.
      scaling: SkipScaling of the long skips.
      norm: final LayerNorm.
      head: Linear [width, patch * patch * channels].
      smooth: Conv of 3 x 3 over the image.
      config: UViTConfig (static).
      remat: what blocks keep for a backward pass, see `ffnlab.models.remat` (static).
    """

    def __init__(self, config: UViTConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights; residual outputs are scaled down by sqrt(2 * layers)."""
        keys = jax.random.split(key, 8)
        width, n = config.width, config.depth // 2
        bias = {"bias": True, "dtype": dtype}
        self.patches = Conv(
            config.channels,
            width,
            key=keys[0],
            size=config.patch,
            stride=config.patch,
            padding="VALID",
            **bias,
        )
        self.label_embed = nnx.data(
            None
            if config.classes is None
            else Embedding(
                config.classes, width, key=keys[1], axes=("classes", "embed"), dtype=dtype
            )
        )
        table = drawn(keys[2], (config.tokens + math.prod(config.grid), width), dtype)
        self.positions = nnx.Param(Dense(table), axes=("position", "embed"))
        self.layers: Sequence[nnx.Module] | Stacked = nnx.List(
            [make_block(config, key=k, dtype=dtype) for k in jax.random.split(keys[3], 2 * n + 1)]
        )
        self.fusions = nnx.List(
            [
                Linear(2 * width, width, key=k, axes=("embed", "embed"), **bias)
                for k in jax.random.split(keys[4], n)
            ]
        )
        self.scaling = make_scaling(config, keys[5], dtype)
        self.norm = LayerNorm(width, eps=config.eps, dtype=dtype)
        entries = config.patch**2 * config.channels
        self.head = Linear(width, entries, key=keys[6], axes=("embed", "mlp"), **bias)
        self.smooth = Conv(config.channels, config.channels, key=keys[7], **bias)
        self.config = config
        self.remat: str | None = None

    def __call__(
        self,
        images: Shaped[Array | np.ndarray, "b h w c"],
        times: Float[Array, "b"] | None = None,
        *,
        labels: Int[Array, "b"] | None = None,
        inputs: LayerInputs | None = None,
    ) -> Float[Array, "b h w c"]:
        """What is predicted of noised images, float32; arguments and errors as `run`."""
        return self.output(self.run(images, times, labels=labels, inputs=inputs)[0])

    def run(
        self,
        images: Shaped[Array | np.ndarray, "b h w c"],
        times: Float[Array, "b"] | None = None,
        *,
        labels: Int[Array, "b"] | None = None,
        inputs: LayerInputs | None = None,
        branches: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerOutputs]:
        """The hidden states that the head reads, and what the layers report.

        Blocks that are stacked run in two loops, which compile as quickly at any depth; others one
        by one.

        Args:
          images: noised, of the size of the config.
          times: of the noise, as the model was trained with (999 times those in 0..1); 0 when None.
          labels: classes, of a model that is told of them.
          inputs: what each layer is given of its own, leaves [layers, ...].
          branches: also return what each sublayer added to the stream.
        Returns:
          (h [b, t, d], outputs with a leading axis of layers); tokens first, then patches.
        Raises:
          ConfigError: images of another size, labels of a model without, none of one with, or
            inputs of another number of layers.
        """
        h, given = self._start(images, times, labels), LayerInputs() if inputs is None else inputs
        layers = self.layers
        repeats = layers.repeats if isinstance(layers, Stacked) else 1
        trunk.check_inputs(given, period_of(layers), repeats)
        context = Context({}, {spec.window: None for spec in trunk.specs(layers)})

        def through(block: Block, h: Array, own: LayerInputs) -> tuple[Array, LayerOutputs]:
            options = {"inputs": own, "remat": self.remat, "branches": branches}
            h, _, outputs = trunk.run([block], h, context, **options)
            return h, outputs

        h, outputs = (self._scanned if self._is_even() else self._in_turn)(h, given, through)
        return self.norm(h), outputs

    def _is_even(self) -> bool:
        """Whether all blocks are stacked as one, and all fusions could be."""
        is_one = isinstance(self.layers, Stacked) and len(self.layers.period) == 1
        return is_one and all(kind_of(f) == kind_of(self.fusions[0]) for f in self.fusions)

    def _in_turn(
        self, h: Float[Array, "b t d"], given: LayerInputs, through: Through
    ) -> tuple[Float[Array, "b t d"], LayerOutputs]:
        """The stream behind the last block, and what blocks report; every block by itself."""
        blocks, n = in_order(self.layers), self.config.depth // 2
        found: list[LayerOutputs] = []

        def block(i: int, h: Array) -> Array:
            h, outputs = through(blocks[i], h, rows(given, i, i + 1))
            found.append(outputs)
            return h

        skips = []
        for i in range(n):
            h = block(i, h)
            skips.append(h)
        h = block(n, h)
        for j, skip in enumerate(self.scaling(skips[::-1])):
            h = block(n + 1 + j, self.fusions[j](jnp.concatenate([h, skip], axis=-1)))
        return h, trunk.gathered(found)

    def _scanned(
        self, h: Float[Array, "b t d"], given: LayerInputs, through: Through
    ) -> tuple[Float[Array, "b t d"], LayerOutputs]:
        """As `_in_turn`, either half of the blocks as a loop."""

        def first(block: Block, h: Array, own: LayerInputs) -> tuple[Array, tuple]:
            h, outputs = through(block, h, jax.tree.map(lambda leaf: leaf[None], own))
            return h, (h, jax.tree.map(lambda leaf: leaf[0], outputs))

        def second(modules: tuple, h: Array, xs: tuple) -> tuple[Array, LayerOutputs]:
            (block, fusion), (skip, own) = modules, xs
            h, (_, outputs) = first(block, fusion(jnp.concatenate([h, skip], axis=-1)), own)
            return h, outputs

        n, whole = self.config.depth // 2, (self.layers.period[0], given)
        (down, own), (middle, own_middle), (up, own_up) = (
            rows(whole, *ends) for ends in ((0, n), (n, n + 1), (n + 1, 2 * n + 1))
        )
        h, (skips, a) = run_stack(down, h, first, xs=own)
        h, (_, b) = run_stack(middle, h, first, xs=own_middle)
        skips = jnp.stack(self.scaling(list(skips[::-1])))
        fusions = stack_modules(list(self.fusions))
        h, c = run_stack((up, fusions), h, second, xs=(skips, own_up))
        return h, jax.tree.map(lambda *parts: jnp.concatenate(parts), a, b, c)

    def output(self, h: Float[Array, "b t d"]) -> Float[Array, "b h w c"]:
        """The image that hidden states say, float32."""
        (rows, columns), p = self.config.grid, self.config.patch
        y = self.head(h[:, self.config.tokens :])
        y = y.reshape(len(h), rows, columns, p, p, -1).swapaxes(2, 3)
        y = y.reshape(len(h), rows * p, columns * p, -1)
        return self.smooth(y).astype(jnp.float32)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations, see `trunk.compute_dtype`."""
        return trunk.compute_dtype(self.patches.weight.dtype)

    def blocks(self) -> list[Block]:
        """The blocks in order; of a stacked model, those of one period."""
        return period_of(self.layers)

    def _start(self, images: Array, times: Array | None, labels: Array | None) -> Array:
        """The beginning of the residual stream, in the compute dtype."""
        config, dtype = self.config, self.compute_dtype
        if images.ndim != 4 or images.shape[1:] != (*config.image, config.channels):
            wanted = ", ".join(map(str, (*config.image, config.channels)))
            raise ConfigError(f"images {images.shape}; [b, {wanted}] is accepted")
        if (labels is None) != (self.label_embed is None):
            raise ConfigError(
                f"labels={labels is not None} of a model with classes={config.classes}"
            )
        h = self.patches(jnp.asarray(images).astype(dtype))
        h = h.reshape(len(h), -1, h.shape[-1])
        times = jnp.zeros(len(h)) if times is None else times
        first = [sinusoids(times, config.width).astype(dtype)]
        if self.label_embed is not None:
            first.insert(0, self.label_embed(labels).astype(dtype))
        h = jnp.concatenate([*(token[:, None] for token in first), h], axis=1)
        h = h + self.positions.get_value().dense().astype(dtype)
        return constrain(h, ("batch", "length", "embed"))


def rows(tree: T, start: int, stop: int) -> T:
    """Some rows of all leaves."""
    return jax.tree.map(lambda leaf: leaf[start:stop], tree)


def sinusoids(times: Float[Array, "b"], width: int) -> Float[Array, "b d"]:
    """Cosines, then sines, of times at width // 2 frequencies from 1 to 1 / 10,000; an odd width
    ends with a zero.

    >>> sinusoids(jnp.zeros(1), 5).tolist()
    [[1.0, 1.0, 0.0, 0.0, 0.0]]
    """
    half = width // 2
    angles = times[:, None].astype(jnp.float32) * PERIOD ** (-jnp.arange(half) / half)
    found = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    return jnp.pad(found, ((0, 0), (0, width % 2)))


def make_scaling(config: UViTConfig, key: Array, dtype: DTypeLike) -> SkipScaling:
    """How a model's long skips are scaled, drawn where that is learned."""
    tokens = config.tokens + math.prod(config.grid)
    sizes = (tokens,) * (config.depth // 2)
    return scale_skips(config.scaling, kappa=config.kappa, sizes=sizes, key=key, dtype=dtype)


def make_block(config: UViTConfig, *, key: Array, dtype: DTypeLike = jnp.float32) -> Block:
    """A block of random weights."""
    attn_key, ffn_key = jax.random.split(key)
    width, heads = config.width, config.heads
    common = {"out_scale": (2 * config.layers) ** -0.5, "dtype": dtype}
    spec = AttentionSpec(heads, heads, width // heads, rope=None, causal=False)
    attn = Attention(spec, width, key=attn_key, qkv_bias=config.qkv_bias, o_bias=True, **common)
    ffn = FFN(width, config.hidden, key=ffn_key, activation=config.activation, **common)
    norm = functools.partial(LayerNorm, width, eps=config.eps, dtype=dtype)
    return Block(norm(), attn, norm(), ffn)
