"""Scalings of a block that leave its function as it is.

Each moves a factor per channel from one matrix (or norm) to the one that reads it. They are exact
in real arithmetic; the arrays keep their dtypes, so a bfloat16 block rounds once. A weight that is
not dense is read through `dense()`.
"""

from typing import TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.layers import (
    Attention,
    GatedFFN,
    GroupedNorm,
    LayerNorm,
    RMSNorm,
    SparseGatedFFN,
)
from ffnlab.layers.linear import Map
from ffnlab.quantization.fireq_core import channel_scale
from ffnlab.weights import Dense, SparseInput, Transposed, Weight

M = TypeVar("M", bound=nnx.Module)
L = TypeVar("L", bound=Map)
Gated = GatedFFN | SparseGatedFFN
Norm = RMSNorm | LayerNorm
N = TypeVar("N", bound=RMSNorm | LayerNorm | GroupedNorm)


def changed(module: M, **parts: object) -> M:
    """A copy of a module with other parts; the arrays are shared."""
    new = jax.tree.map(lambda leaf: leaf, module)
    for name, part in parts.items():
        setattr(new, name, nnx.data(part) if isinstance(part, nnx.Param) else part)
    return new


def scaled_linear(
    linear: L,
    *,
    rows: Float[Array, " in"] | None = None,
    columns: Float[Array, " out"] | None = None,
) -> L:
    """w[i, j] becomes rows[i] w[i, j] columns[j], and the bias b[j] columns[j]; of a grouped map,
    those of every group."""
    weight, bias = scaled_weight(linear.weight, rows, columns), linear.bias
    if bias is not None and columns is not None:
        bias = (bias.astype(jnp.float32) * columns).astype(bias.dtype)
    return linear.replace(weight, bias)


def scaled_weight(weight: Weight, rows: Array | None, columns: Array | None) -> Weight:
    """A dense weight (in the storage order of the old one) with rows and columns scaled."""
    if isinstance(weight, SparseInput):
        return SparseInput(scaled_weight(weight.w, rows, columns), weight.threshold)
    if isinstance(weight, Transposed):
        return Transposed(scaled_weight(weight.w, columns, rows))
    w = weight.dense()
    wide = w.astype(jnp.float32)
    wide = wide if rows is None else wide * rows[:, None]
    wide = wide if columns is None else wide * columns
    return Dense(wide.astype(w.dtype), getattr(weight, "act", None))


def scaled_norm(norm: N, gain: Float[Array, " d"]) -> N:
    """The norm whose output is gain times as large, each of a grouped one; knows norms that store
    scale - offset."""
    if isinstance(norm, GroupedNorm):
        return changed(norm, norms=scaled_norm(cast(Norm, norm.norms), gain))
    scale, offset = norm.scale.get_value(), getattr(norm, "offset", 0.0)
    wide = (offset + scale.astype(jnp.float32)) * gain - offset
    parts = {"scale": nnx.Param(wide.astype(scale.dtype), axes=norm.scale.axes)}
    if isinstance(norm, LayerNorm) and norm.bias is not None:
        bias = norm.bias.get_value()
        wide = bias.astype(jnp.float32) * gain
        parts["bias"] = nnx.Param(wide.astype(bias.dtype), axes=norm.bias.axes)
    return changed(norm, **parts)


def thresholds_input(*linears: Map) -> bool:
    """Whether one of them drops small inputs: a scaled input would be cut elsewhere."""
    return any(isinstance(linear.weight, SparseInput) for linear in linears)


def scale_ffn_input(norm: N, ffn: Gated, constant: float, kind: str) -> tuple[N, Gated]:
    """Moves lam of the rows of gate and up, side by side, into the norm that feeds them.

    lam = channel_scale([up, gate]);  up, gate become lam * up, lam * gate;  norm becomes norm / lam
    """
    both = jnp.concatenate([ffn.up.weight.dense(), ffn.gate.weight.dense()], axis=1)
    lam = channel_scale(both, constant, kind=kind)
    up, gate = scaled_linear(ffn.up, rows=lam), scaled_linear(ffn.gate, rows=lam)
    return scaled_norm(norm, 1 / lam), changed(ffn, up=up, gate=gate)


def scale_ffn_output(ffn: Gated, constant: float, kind: str) -> Gated:
    """Moves lam of the rows of down into the columns of up; the gate's non-linearity is untouched.

    lam = channel_scale(down);  down becomes lam * down;  up becomes up / lam
    """
    lam = channel_scale(ffn.down.weight.dense(), constant, kind=kind)
    up, down = scaled_linear(ffn.up, columns=1 / lam), scaled_linear(ffn.down, rows=lam)
    return changed(ffn, up=up, down=down)


def scale_values(attention: Attention, factor: float) -> Attention:
    """W_v becomes factor * W_v and W_o becomes W_o / factor; a threshold on o's input follows."""
    v = scaled_linear(attention.v, columns=jnp.full(attention.v.weight.shape[1], factor))
    o = scaled_linear(attention.o, rows=jnp.full(attention.o.weight.shape[0], 1 / factor))
    if isinstance(o.weight, SparseInput):
        o = o.replace(SparseInput(o.weight.w, o.weight.threshold * abs(factor)))
    return changed(attention, v=v, o=o)


def scale_keys(attention: Attention, scale: Float[Array, "kv D"]) -> Attention:
    """Keys before RoPE times `scale`, queries of the same group divided by it.

    Folded into the projections; where queries and keys are normalized per head, into those norms,
    whose gain all heads share: then all rows of `scale` must be equal.
    """
    spec, k_norm, q_norm = attention.spec, attention.k_norm, attention.q_norm
    if k_norm is not None and q_norm is not None:
        k_norm, q_norm = scaled_norm(k_norm, scale[0]), scaled_norm(q_norm, 1 / scale[0])
        return changed(attention, k_norm=k_norm, q_norm=q_norm)
    queries = jnp.repeat(1 / scale, spec.heads // spec.kv_heads, axis=0).reshape(-1)
    k = scaled_linear(attention.k, columns=scale.reshape(-1))
    return changed(attention, k=k, q=scaled_linear(attention.q, columns=queries))
