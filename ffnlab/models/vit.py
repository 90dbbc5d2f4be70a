"""A vision transformer: patches, tokens and positions, blocks, and a head (arXiv 2010.11929).

    h = [class token, distillation token, patches] + positions;  blocks;  norm;  head

One class covers ViT, DeiT (arXiv 2012.12877) and transformers whose grid is pooled between stages
(PiT, arXiv 2103.16302). All tokens see each other. Patches are row by row.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from ffnlab.errors import ConfigError
from ffnlab.layers import (
    ACTIVATIONS,
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Context,
    Conv,
    EnsembleScale,
    LayerInputs,
    LayerNorm,
    LayerOutputs,
    Linear,
)
from ffnlab.layers.logical import constrain
from ffnlab.models import trunk
from ffnlab.models.stack import Stacked, period_of
from ffnlab.models.vit_config import ViTConfig, as_values
from ffnlab.weights import Dense

__all__ = ["ViT", "abstract", "interpolated", "resized"]

SPREAD = 0.02  # standard deviation of drawn tokens and positions


class ViT(nnx.Module):
    """scores = model(images).

    Attributes:
      patches: Conv [patch * patch * channels, width].
      class_token, distillation_token: Param [width], or None.
      positions: Param holding a weight [tokens + patches, width].
      layers: nnx.List of Block, or Stacked.
      pools: nnx.List of the Conv between stages, depthwise, [9, 2 d] each.
      norm: final LayerNorm.
      pooler: Linear [width, width], or None.
      head, distilled_head: Linear [width, classes], or None.
      ensemble: EnsembleScale, of a model whose heads read its paths with weights
        (`ffnlab.pruning.path_ensemble`); None of others.
      config: ViTConfig (static).
      remat: what blocks keep for a backward pass, see `ffnlab.models.remat` (static).
    """

    # Set only where there is one, as older files know none.
    ensemble: EnsembleScale | None = None

    def __init__(self, config: ViTConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights; residual outputs are scaled down by sqrt(2 * layers)."""
        *keys, trunk_key, pools_key = jax.random.split(key, 9)
        width, out = config.width, config.out_width
        self.patches = Conv(
            config.channels,
            width,
            key=keys[0],
            size=config.patch,
            stride=config.step,
            padding="VALID",
            bias=True,
            dtype=dtype,
        )
        token = lambda key: nnx.Param(drawn(key, (width,), dtype), axes=("embed",))  # noqa: E731
        self.class_token = nnx.data(token(keys[1]) if config.pool == "token" else None)
        self.distillation_token = nnx.data(token(keys[2]) if config.distillation else None)
        places = config.tokens + math.prod(config.grid)
        table = Dense(drawn(keys[3], (places, width), dtype))
        self.positions = nnx.Param(table, axes=("position", "embed"))
        blocks = zip(stage_of(config), jax.random.split(trunk_key, config.layers), strict=True)
        self.layers: Sequence[nnx.Module] | Stacked = nnx.List(
            [make_block(config, stage, key=k, dtype=dtype) for stage, k in blocks]
        )
        between = jax.random.split(pools_key, len(config.depths))[1:]
        self.pools = nnx.List(
            [make_pool(width * 2**i, key=k, dtype=dtype) for i, k in enumerate(between)]
        )
        self.norm = LayerNorm(out, eps=config.eps, dtype=dtype)
        square, bias = ("embed", "embed"), {"bias": True, "dtype": dtype}
        self.pooler = nnx.data(
            Linear(out, out, key=keys[4], axes=square, **bias) if config.pooler else None
        )
        heads = [config.classes is not None, config.distillation == "head"]
        self.head, self.distilled_head = (
            nnx.data(
                Linear(out, config.classes, key=k, axes=("embed", "classes"), **bias)
                if there
                else None
            )
            for there, k in zip(heads, keys[5:7], strict=True)
        )
        self.config = config
        self.remat: str | None = None

    def __call__(
        self, images: Shaped[Array | np.ndarray, "b h w c"], *, inputs: LayerInputs | None = None
    ) -> Float[Array, "b *s"]:
        """Scores [b, classes], or hidden states [b, t, d] of a model without classes, float32.

        Arguments and errors as `run`.
        """
        return self.output(self.run(images, inputs=inputs)[0])

    def hidden(
        self, images: Shaped[Array | np.ndarray, "b h w c"], *, inputs: LayerInputs | None = None
    ) -> Float[Array, "b t d"]:
        """The hidden states that heads read; arguments and errors as `run`."""
        return self.run(images, inputs=inputs)[0]

    def run(
        self,
        images: Shaped[Array | np.ndarray, "b h w c"],
        *,
        inputs: LayerInputs | None = None,
        branches: bool = False,
    ) -> tuple[Float[Array, "b t d"], LayerOutputs]:
        """The hidden states that heads read, and what the layers report.

        Args:
          images: of the size of the config, values in [0, 1], or bytes.
          inputs: what each layer is given of its own, leaves [layers, ...].
          branches: also return what each sublayer added to the stream, of a model of one stage.
        Returns:
          (h [b, t, d], outputs with a leading axis of layers); tokens first, then patches.
        Raises:
          ConfigError: images of another size or other channels; branches or an ensemble of several
            stages.
        """
        h = self.embed_images(images)
        context = Context({}, {spec.window: None for spec in trunk.specs(self.layers)})
        given, found = LayerInputs() if inputs is None else inputs, []
        for i, (layers, part) in enumerate(self._stages()):
            own = jax.tree.map(lambda leaf, part=part: leaf[part], given)
            h = self._pooled(i, h) if i else h
            h, _, outputs = trunk.run(
                layers,
                h,
                context,
                inputs=own,
                remat=self.remat,
                branches=branches,
                ensemble=self.ensemble,
            )
            found.append(outputs)
        return self.norm(h), found[0] if len(found) == 1 else one_after_other(found)

    def _stages(self) -> Iterator[tuple[trunk.Layers, slice]]:
        """The layers of each stage, and which of all they are."""
        depths, layers = self.config.depths, self.layers
        if len(depths) == 1:
            yield layers, slice(None)
            return
        start = 0
        for depth in depths:
            part = slice(start, start + depth)
            own = period_of(layers)[part]  # stages differ in width: a stack of them has one period
            yield (Stacked(own, 1) if isinstance(layers, Stacked) else own), part
            start += depth

    def _pooled(self, stage: int, h: Float[Array, "b t d"]) -> Float[Array, "b u e"]:
        """The patches of a stage, from those of the one before."""
        grid = grids(self.config)[stage - 1]
        y = self.pools[stage - 1](h.reshape(len(h), *grid, h.shape[-1]))
        return y.reshape(len(y), -1, y.shape[-1])

    def output(self, h: Float[Array, "b t d"]) -> Float[Array, "b *s"]:
        """What the heads make of hidden states, float32; the states where there is no head."""
        if self.head is None:
            return h.astype(jnp.float32)
        scores = self.head(self.pooled(h))
        if self.distilled_head is not None:
            scores = (scores + self.distilled_head(h[:, 1])) / 2
        return scores.astype(jnp.float32)

    def pooled(self, h: Float[Array, "b t d"]) -> Float[Array, "b d"]:
        """What stands for the whole image: the class token (through the pooler where there is
        one), or the mean of all patches."""
        if self.config.pool == "mean":
            return h.mean(1, dtype=jnp.float32).astype(h.dtype)
        first = h[:, 0]
        if self.pooler is None:
            return first
        return ACTIVATIONS[self.config.pooler or "identity"](self.pooler(first))

    def embed_images(self, images: Shaped[Array | np.ndarray, "b h w c"]) -> Float[Array, "b t d"]:
        """The beginning of the residual stream, in the compute dtype."""
        config, dtype = self.config, self.compute_dtype
        wanted = (*config.image, config.channels)
        if images.ndim != 4 or images.shape[1:] != wanted:
            raise ConfigError(
                f"images {images.shape}; [b, {', '.join(map(str, wanted))}] is accepted "
                "(models.resized makes a model for another size)"
            )
        h = self.patches(as_values(images, config.preprocess).astype(dtype))
        h = h.reshape(len(h), -1, h.shape[-1])
        tokens = [
            jnp.broadcast_to(token.get_value().astype(dtype), (len(h), 1, h.shape[-1]))
            for token in (self.class_token, self.distillation_token)
            if token is not None
        ]
        h = jnp.concatenate([*tokens, h], axis=1) if tokens else h
        h = h + self.positions.get_value().dense().astype(dtype)
        return constrain(h, ("batch", "length", "embed"))

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations, see `trunk.compute_dtype`."""
        return trunk.compute_dtype(self.patches.weight.dtype)

    def blocks(self) -> list[Block]:
        """The blocks in order; of a stacked model, those of one period."""
        return period_of(self.layers)


def one_after_other(found: Sequence[LayerOutputs]) -> LayerOutputs:
    """What stages report, as that of all layers.

    Raises:
      ConfigError: branches, whose sizes differ from stage to stage.
    """
    if any(outputs.branches is not None for outputs in found):
        raise ConfigError("branches=True: sizes differ from stage to stage, they cannot be stacked")
    names = dict.fromkeys(name for outputs in found for name in outputs.reports)
    reports = {
        name: jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves),
            *(outputs.reports[name] for outputs in found if name in outputs.reports),
        )
        for name in names
    }
    return LayerOutputs(reports)


def drawn(key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Float[Array, "..."]:
    """A normal draw of deviation `SPREAD`, cut at two of them."""
    return (SPREAD * jax.random.truncated_normal(key, -2.0, 2.0, shape)).astype(dtype)


def stage_of(config: ViTConfig) -> list[int]:
    """The stage of every block."""
    return [stage for stage, depth in enumerate(config.depths) for _ in range(depth)]


def grids(config: ViTConfig) -> list[tuple[int, int]]:
    """Rows and columns of patches, of every stage: halved each time, rounded up."""
    found = [config.grid]
    for _ in config.depths[1:]:
        rows, columns = found[-1]
        found.append((-(-rows // 2), -(-columns // 2)))
    return found


def make_pool(width: int, *, key: Array, dtype: DTypeLike = jnp.float32) -> Conv:
    """From stage to stage: 3 x 3 of every channel by itself, into two, of every other patch."""
    return Conv(
        width, 2 * width, key=key, stride=2, padding=1, groups=width, bias=True, dtype=dtype
    )


def make_block(
    config: ViTConfig, stage: int = 0, *, key: Array, dtype: DTypeLike = jnp.float32
) -> Block:
    """A block of random weights."""
    attn_key, ffn_key = jax.random.split(key)
    times, scale = 2**stage, (2 * config.layers) ** -0.5
    width, heads = config.width * times, config.heads * times
    spec = AttentionSpec(heads, heads, config.head_dim, rope=None, causal=False)
    common = {"out_scale": scale, "dtype": dtype}
    attn = Attention(spec, width, key=attn_key, qkv_bias=config.qkv_bias, o_bias=True, **common)
    ffn = FFN(width, config.hidden * times, key=ffn_key, activation=config.activation, **common)
    norm = functools.partial(LayerNorm, width, eps=config.eps, dtype=dtype)
    return Block(norm(), attn, norm(), ffn)


def abstract(config: ViTConfig) -> ViT:
    """A model without arrays, float32: of one stage one block is traced, however many it has."""
    outer = config if config.stages else dataclasses.replace(config, layers=1)
    model = jax.eval_shape(lambda key: ViT(outer, key=key), jax.random.key(0))
    if not config.stages:
        block = model.layers[0]
        copies = [jax.tree.map(lambda leaf: leaf, block) for _ in range(config.layers)]
        model.layers = nnx.List(copies)
    model.config = config
    return model


def interpolated(grid: Float[Array, "h w d"], size: tuple[int, int]) -> Float[Array, "_ _ d"]:
    """A grid of positions on another grid: bicubic, as torch does it (a = -3/4, edges repeated).

    Args:
      grid: [h, w, d].
      size: rows and columns of the result.
    Source:
      `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, by which ViT, DeiT and
      PiT take images of another size.

    >>> interpolated(jnp.ones((2, 3, 4)), (5, 5)).shape
    (5, 5, 4)
    """
    down, across = (cubic(n, m) for n, m in zip(grid.shape[:2], size, strict=True))
    return jnp.einsum("yh,xw,hwd->yxd", down, across, grid.astype(jnp.float32)).astype(grid.dtype)


def cubic(n: int, m: int) -> Float[np.ndarray, "m n"]:
    """The matrix of cubic convolution from n samples to m, a = -3/4."""
    a, weights = -0.75, np.zeros((m, n))
    for i in range(m):
        at = (i + 0.5) * n / m - 0.5
        first = math.floor(at) - 1
        for j in range(first, first + 4):
            x = abs(at - j)
            if x <= 1:
                weight = (a + 2) * x**3 - (a + 3) * x**2 + 1
            else:
                weight = a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(j, 0), n - 1)] += weight
    return weights.astype(np.float32)


def resized(model: ViT, image: tuple[int, int]) -> ViT:
    """The same model for images of another size: positions of patches are interpolated.

    Args:
      model: any; it is not changed.
      image: height and width, which patches divide.
    Raises:
      ConfigError: they do not.
    """
    old = model.config
    config = dataclasses.replace(old, image=tuple(image))
    table = model.positions.get_value().dense()
    patches = table[old.tokens :].reshape(*old.grid, -1)
    moved = interpolated(patches, config.grid).reshape(-1, table.shape[1])
    new = jax.tree.map(lambda leaf: leaf, model)
    table = jnp.concatenate([table[: old.tokens], moved])
    new.positions = nnx.Param(Dense(table), axes=model.positions.axes)
    new.config = config
    return new
