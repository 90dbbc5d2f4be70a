"""What turns inputs of a hypernetwork into pieces of weights: a trunk, and a last map or heads.

    h = trunk(u),  u [K, E] one row for each call;   pieces = h @ W + b  [K, S]

The last map is drawn so that the target begins as one that was drawn by itself (Chang, Flokas and
Lipson, Principled weight initialization for hypernetworks, ICLR 2020: hyperfan-in): with v_i the
variance wanted of the number at place i, over the pieces where there are several,

    W_ij ~ N(0, v_i / (H E[h^2])),   b = 0

where E[h^2] is measured, over all tasks and over drawn data and noise.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ffnlab.layers import MLP, Attention, AttentionSpec, Context, Conv, Linear, Recurrent
from ffnlab.layers.activations import ACTIVATIONS
from ffnlab.layers.recurrent import uniform
from ffnlab.layers.stacking import stack_modules
from ffnlab.models.hypernet.spec import HypernetSpec
from ffnlab.weights import Dense

__all__ = ["draw_heads", "draw_trunk", "pieces_from", "run_trunk", "wanted_variances"]

TAPS = 3  # pieces that a convolution sees
AXES = ("embed", "mlp")
LAST = ("embed", "weights")  # numbers of weights divide by nothing: no layout cuts them


def draw_trunk(spec: HypernetSpec, *, key: Array) -> nnx.Module | None:
    """The trunk; None where there is nothing before the last map or the heads."""
    widths = (spec.width, *spec.hidden)
    if spec.architecture == "linear":
        return None
    if spec.architecture == "mlp":
        widths = widths[:-1] if spec.outputs == "multi_head" else widths
        plain = spec.init == "uniform"
        return MLP(widths, key=key, init=torch_draw if plain else None) if widths[1:] else None
    if spec.architecture == "rnn":
        layers = len(spec.hidden)
        return Recurrent(spec.width, spec.hidden[0], key=key, cell=spec.cell, layers=layers)
    keys = iter(jax.random.split(key, 2 * len(widths)))
    if spec.architecture == "cnn":
        pairs = zip(widths, widths[1:], strict=False)
        return nnx.List([Conv(a, b, key=next(keys), size=(TAPS,), bias=True) for a, b in pairs])
    width = spec.hidden[0]
    attention = AttentionSpec(spec.heads, spec.heads, width // spec.heads, None, causal=False)
    parts: list[nnx.Module] = [Linear(spec.width, width, key=next(keys), axes=AXES, bias=True)]
    for _ in spec.hidden:
        parts.append(Attention(attention, width, key=next(keys)))
        parts.append(Linear(width, width, key=next(keys), axes=AXES, bias=True))
    return nnx.List(parts)


def torch_draw(key: Array, shape: Sequence[int], dtype: DTypeLike) -> Array:
    """U(-1, 1) / sqrt(rows), as torch draws maps."""
    return uniform(key, tuple(shape), dtype, bound=shape[0] ** -0.5)


def run_trunk(spec: HypernetSpec, trunk: Any, u: Float[Array, "K E"]) -> Float[Array, "K H"]:
    """The trunk on all calls, in order; "rnn" reads them from the first on."""
    phi = ACTIVATIONS[spec.activation]
    if trunk is None:
        return u
    if spec.architecture == "mlp":
        for linear in trunk.maps:
            u = phi(linear(u))
        return u
    if spec.architecture == "rnn":
        return trunk(u[None])[0][0]
    if spec.architecture == "cnn":
        for conv in trunk:
            u = phi(conv(u[None])[0])
        return u
    first, *blocks = trunk
    h, everything = first(u)[None], Context({}, {None: None})
    for attention, linear in zip(blocks[::2], blocks[1::2], strict=True):
        h = h + attention(h, everything)[0]
        h = h + phi(linear(h))
    return h[0]


def wanted_variances(
    source: np.ndarray, variances: Float[np.ndarray, "P"]
) -> Float[np.ndarray, "K S"]:
    """The variance wanted of each number that comes; NaN of what is cut."""
    return np.where(source >= 0, np.append(variances, np.nan)[source], np.nan)


def draw_heads(
    spec: HypernetSpec,
    h: Float[Array, "n K H"],
    wanted: Float[np.ndarray, "pieces S"],
    *,
    key: Array,
) -> nnx.Module:
    """The last map, or the heads as one stack.

    Args:
      spec: of the hypernetwork.
      h: what the trunk gives, for examples of inputs.
      wanted: variances, see `wanted_variances`.
      key: of the draw.
    """
    width, size = h.shape[-1], wanted.shape[1]
    if spec.outputs != "multi_head":
        return last_map(spec, h, mean_over(wanted), key=key)
    made = []
    for k, row in zip(jax.random.split(key, spec.heads), wanted, strict=True):
        if spec.architecture == "linear":
            made.append(last_map(spec, h, mean_over(row[None]), key=k))
            continue
        inner = spec.hidden[-1] // spec.heads
        init = torch_draw if spec.init == "uniform" else None
        head = MLP((width, inner, size), key=k, activation=spec.activation, init=init)
        between = head.stages[0](h)
        head.maps[1] = last_map(spec, between, mean_over(row[None]), key=jax.random.fold_in(k, 1))
        made.append(head)
    return stack_modules(made)


def mean_over(wanted: Float[np.ndarray, "K S"]) -> Float[np.ndarray, "S"]:
    """The mean variance of a place, over the pieces that have it; 0 where none has."""
    there = ~np.isnan(wanted)
    return np.where(there, wanted, 0).sum(0) / np.maximum(there.sum(0), 1)


def last_map(
    spec: HypernetSpec, h: Float[Array, "n K H"], wanted: Float[np.ndarray, "S"], *, key: Array
) -> Linear:
    """A map of which the number at place i has variance wanted[i]."""
    width, size = h.shape[-1], len(wanted)
    if spec.init == "uniform":
        return Linear(width, size, key=key, axes=LAST, bias=True, init=torch_draw)
    mean_square = jnp.mean(h**2) if h.size else 1.0
    spread = jnp.sqrt(wanted.astype(np.float32) / jnp.maximum(width * mean_square, 1e-12))
    w = jax.random.normal(key, (width, size)) * spread
    return Linear.of(Dense(w), jnp.zeros(size), axes=LAST)


def pieces_from(
    spec: HypernetSpec, heads: nnx.Module, h: Float[Array, "K H"]
) -> Float[Array, "pieces S"]:
    """The pieces of what the trunk gave."""
    if spec.outputs != "multi_head":
        return heads(h)
    return jax.vmap(lambda head: head(h[0]))(heads)


def table(rows: int, width: int, *, key: Array) -> Float[Array, "rows width"]:
    """Embeddings of mean square 1; orthogonal where there are no more of them than numbers."""
    draw = jax.nn.initializers.normal(1.0)
    if rows <= width:
        draw = jax.nn.initializers.orthogonal(scale=width**0.5)
    return draw(key, (rows, width), jnp.float32)
