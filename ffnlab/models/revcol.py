"""Reversible columns (RevCol, arXiv 2212.11696): copies of a small network of four levels.

    x = norm(stem(image));  c = first(x);  c = column_i(x, c), i = 2 … n;  scores of c's coarsest

Every column sees the image again and what the column before made of it, level by level, and can be
undone (`ffnlab.layers.Column`): training keeps the features of few columns, or of one.

What differs from the authors' code. The first column has no alphas: they would scale zeros. Its
levels are computed again in the backward pass and not undone: without what comes from above it
reads x alone. Maps are drawn as the library's layers draw theirs, not from a normal of .02. The
projection of alphas is the end of an optimizer (`keep_invertible`), not part of the forward pass.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree, Shaped

from ffnlab.errors import ConfigError
from ffnlab.layers import Column, Conv, LayerNorm, Linear, global_avg_pool
from ffnlab.layers.logical import constrain
from ffnlab.layers.reversible import reversible
from ffnlab.layers.stacking import rematerialized, run_stack, stack_modules
from ffnlab.models import stack
from ffnlab.models.image_decoder import ImageDecoder
from ffnlab.models.revcol_config import LEAST, RevColConfig, check_depth, check_image
from ffnlab.models.trunk import compute_dtype
from ffnlab.models.vit_config import as_values

__all__ = ["Outputs", "RevCol", "keep_invertible", "revcol_of"]

EPS = 1e-6
SIZES: dict[str, tuple[tuple[int, ...], tuple[int, ...], int, float]] = {
    "tiny": ((64, 128, 256, 512), (2, 2, 4, 2), 4, 0.1),
    "small": ((64, 128, 256, 512), (2, 2, 4, 2), 8, 0.3),
    "base": ((72, 144, 288, 576), (1, 1, 3, 2), 16, 0.4),
    "large": ((128, 256, 512, 1024), (1, 2, 6, 2), 8, 0.5),
    "xlarge": ((224, 448, 896, 1792), (1, 2, 6, 2), 8, 0.5),
}


class Outputs(NamedTuple):
    """What columns say of images.

    Attributes:
      scores: [b, classes] each, after a quarter of the columns, …, after the last.
      images: logits of pixels [b, h, w, c] each, beside all scores but the last.
    """

    scores: tuple[Float[Array, "b classes"], ...]
    images: tuple[Float[Array, "b h w c"], ...]


class RevCol(nnx.Module):
    """scores = model(images).

    Attributes:
      stem: Conv of patches; stem_norm: LayerNorm.
      first: Column, without one before it.
      layers: nnx.List of Column, or Stacked. In a list they are put on one axis in every call;
        `models.stack` does so once.
      norms, heads: nnx.Lists of LayerNorm and Linear, four with supervision, else one.
      decoders: nnx.List of ImageDecoder, three with supervision.
      config: RevColConfig (static).
      remat: what columns keep where `save_every` is 0, see `ffnlab.models.remat` (static).
    """

    def __init__(self, config: RevColConfig, *, key: Array, dtype: DTypeLike = jnp.float32):
        """Draws random weights.

        Raises:
          ConfigError: rebuilding so many columns is too inexact (`RevColConfig.tolerance`).
        """
        check_depth(config, dtype)
        stem, first, heads, decoders, key = jax.random.split(key, 5)
        widths, spec = config.widths, config.column
        options = {"size": config.patch, "stride": config.patch, "padding": "VALID"}
        self.stem = Conv(config.channels, widths[0], key=stem, bias=True, dtype=dtype, **options)
        self.stem_norm = LayerNorm(widths[0], eps=EPS, dtype=dtype)
        self.first = Column(spec, first=True, key=first, dtype=dtype)
        self.layers: Sequence[nnx.Module] | stack.Stacked = nnx.List(
            columns(config, key=key, dtype=dtype)
        )
        count, out = len(config.ends), widths[-1]
        self.norms = nnx.List([LayerNorm(out, eps=EPS, dtype=dtype) for _ in range(count)])
        axes = ("embed", "classes")
        self.heads = nnx.List(
            [
                Linear(out, config.classes, key=k, axes=axes, bias=True, dtype=dtype)
                for k in jax.random.split(heads, count)
            ]
        )
        deep = (widths[::-1], config.patch)
        shape = deep if config.decoder == "deep" else (widths[-1:], config.side)
        self.decoders = nnx.List(
            [
                ImageDecoder(*shape, config.channels, gamma=config.gamma, key=k, dtype=dtype)
                for k in jax.random.split(decoders, count)[1:]
            ]
        )
        self.config = config
        self.remat: str | None = None

    def __call__(self, images: Shaped[Array | np.ndarray, "b h w c"]) -> Float[Array, "b classes"]:
        """Scores after the last column, float32; arguments and errors as `features`."""
        return self.scores(-1, self.features(images)[-1][-1])

    def outputs(
        self, images: Shaped[Array | np.ndarray, "b h w c"], *, key: Array | None = None
    ) -> Outputs:
        """All scores and images, float32; arguments and errors as `features`."""
        coarsest = [c[-1] for c in self.features(images, key=key)]
        scores = tuple(self.scores(i, c) for i, c in enumerate(coarsest))
        pairs = zip(self.decoders, coarsest[:-1], strict=True)
        dtype = self.compute_dtype
        return Outputs(
            scores, tuple(decode(c.astype(dtype)).astype(jnp.float32) for decode, c in pairs)
        )

    def features(
        self, images: Shaped[Array | np.ndarray, "b h w c"], *, key: Array | None = None
    ) -> list[tuple[Float[Array, "b _ _ _"], ...]]:
        """Features of every level, after each of the columns that scores follow.

        Args:
          images: values in [0, 1], or bytes, of sides that `config.side` divides.
          key: of the blocks that examples skip (`config.drop`); None in inference.
        Returns:
          the levels of a column, the finest first, at least float32: after each quarter of the
          columns with supervision, else after the last alone.
        Raises:
          ConfigError: images of other sides or channels; `remat` beside `save_every`.
        """
        config = self.config
        if images.ndim != 4 or images.shape[-1] != config.channels:
            raise ConfigError(
                f"images {images.shape}; [b, height, width, {config.channels}] is accepted"
            )
        check_image(config, images.shape[1:3])
        if self.remat is not None and config.save_every:
            raise ConfigError(
                f"remat={self.remat!r} and save_every={config.save_every} both say what columns "
                "keep; remat is of save_every=0"
            )
        x = as_values(images, config.preprocess).astype(self.compute_dtype)
        x = constrain(self.stem_norm(self.stem(x)), ("batch", None, None, None))
        keys = None if key is None else jax.random.split(key, config.columns)
        policy = "nothing" if config.save_every else self.remat
        begin = rematerialized(lambda first, x, key: first(x, key=key), policy)
        c = begin(self.first, x, None if keys is None else keys[0])
        return self.quarters(x, c, None if keys is None else keys[1:])

    def quarters(self, x: Array, c: tuple, keys: Array | None) -> list[tuple]:
        """Features after the columns of `config.ends`, c those of the first one."""
        step, *more = self.config.ends
        c, found = self.between(0, step - 1, x, c, keys), []
        groups = list(alike(self.layers, step - 1, self.config.columns - 1))
        if len(groups) == 1 and len(more) > 1:  # one program for all quarters but the first
            columns, part = groups[0]
            given = columns, None if keys is None else keys[part]
            parts = jax.tree.map(lambda leaf: leaf.reshape(-1, step, *leaf.shape[1:]), given)

            def quarter(c: tuple, part: tuple) -> tuple[tuple, tuple]:
                new = self.through(part[0], x, c, part[1])
                return new, new

            _, each = jax.lax.scan(quarter, c, parts)
            return [c, *(jax.tree.map(lambda leaf, i=i: leaf[i], each) for i in range(len(more)))]
        for end in more:
            found.append(c)
            c = self.between(end - step - 1, end - 1, x, c, keys)
        return [*found, c]

    def between(self, start: int, stop: int, x: Array, c: tuple, keys: Array | None) -> tuple:
        """Features after layers start to stop."""
        for columns, part in alike(self.layers, start, stop):
            c = self.through(columns, x, c, None if keys is None else keys[part])
        return c

    def through(self, columns: PyTree, x: Array, c: tuple, keys: Array | None) -> tuple:
        """Features after some columns, which are on one axis."""
        if self.config.save_every:
            return reversible(columns, x, c, save_every=self.config.save_every, keys=keys)
        call = lambda column, c, key: (column(x, c, key=key), None)  # noqa: E731
        return run_stack(columns, c, call, xs=keys, remat=self.remat)[0]

    def scores(self, i: int, c: Float[Array, "b h w d"]) -> Float[Array, "b classes"]:
        """What head i makes of the coarsest level."""
        pooled = global_avg_pool(c).astype(self.compute_dtype)
        return self.heads[i](self.norms[i](pooled)).astype(jnp.float32)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """Dtype of activations within a level, see `trunk.compute_dtype`."""
        return compute_dtype(self.stem.weight.dtype)


def columns(config: RevColConfig, *, key: Array, dtype: DTypeLike) -> list[Column]:
    """All columns but the first, drawn as one: tracing and compiling take as long as of one."""
    n = config.columns - 1
    if not n:
        return []
    make = lambda key: Column(config.column, key=key, dtype=dtype)  # noqa: E731
    drawn = jax.vmap(make)(jax.random.split(key, n))
    return [jax.tree.map(lambda leaf, i=i: leaf[i], drawn) for i in range(n)]


def alike(
    layers: Sequence[nnx.Module] | stack.Stacked, start: int, stop: int
) -> Iterator[tuple[PyTree, slice]]:
    """Layers start to stop, those that have one structure on one axis, and which they are."""
    if isinstance(layers, stack.Stacked) and len(layers.period) == 1:
        part = slice(start, stop)
        if start < stop:
            whole, is_all = layers.period[0], stop - start == layers.repeats
            yield (whole if is_all else jax.tree.map(lambda leaf: leaf[part], whole)), part
        return
    each = stack.in_order(layers)
    while start < stop:
        kind, end = stack.kind_of(each[start]), start + 1
        while end < stop and stack.kind_of(each[end]) == kind:
            end += 1
        yield stack_modules(each[start:end]), slice(start, end)
        start = end


def keep_invertible(least: float = LEAST) -> optax.GradientTransformation:
    """The end of an optimizer's chain after which no |alpha| of a column is below `least`.

    An alpha that a step would make smaller, or zero, becomes `least` with the sign it would have
    had. Of float32 parameters; what is rounded to fewer bits afterwards may be below by a rounding.

    Args:
      least: positive.
    Raises:
      ConfigError: it is not positive; ValueError from `update`, without parameters.

    >>> import optax
    >>> optimizer = optax.chain(optax.adamw(1e-3), keep_invertible())
    """
    if not 0 < least < math.inf:
        raise ConfigError(f"least={least} must be a positive number")

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None) -> tuple:
        if params is None:
            raise ValueError("params=None: a projection needs the parameters")
        return jax.tree_util.tree_map_with_path(functools.partial(held, least), updates, params), (
            state
        )

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def held(least: float, path: tuple, change: Array, value: Array) -> Array:
    """The change of a parameter, that of an alpha cut where it would become too small."""
    if not any(getattr(key, "name", getattr(key, "key", None)) == "alphas" for key in path):
        return change
    new = value + change
    # The change is rounded, and so is the sum with it: a bit more than the least is aimed at.
    eps = jnp.finfo(value.dtype).eps
    aim = jnp.where(new < 0, -1, 1) * (least + eps * (jnp.abs(value) + least))
    return jnp.where(jnp.abs(new) < least, aim - value, change)


def revcol_of(size: str, *, classes: int = 1000, supervision: bool = True) -> RevColConfig:
    """The authors' sizes for ImageNet: "tiny", "small", "base", "large" or "xlarge".

    Raises:
      ConfigError: another size.

    >>> revcol_of("base").columns
    16
    """
    if size not in SIZES:
        raise ConfigError(f"size={size!r} is not one of {list(SIZES)}")
    widths, blocks, columns, drop = SIZES[size]
    return RevColConfig(
        (224, 224),
        widths,
        blocks,
        columns,
        classes,
        drop=drop,
        supervision=supervision,
        decoder="deep" if classes <= 1000 else "flat",
    )
