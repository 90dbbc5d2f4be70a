"""FireQ's scalings and formats applied to one block, as the options and the selection allow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab.layers import Attention, Block
from ffnlab.layers.attention.rope import rotated
from ffnlab.quantization import fireq_core as core
from ffnlab.quantization import scaling
from ffnlab.quantization.fireq_options import Options

Maxima = tuple[Float[Array, "kv D"], Float[Array, "kv D"]]


@functools.partial(jax.jit, static_argnames=("options", "names"))
def scaled_block(
    options: Options, block: Block, names: frozenset[str], maxima: Maxima | None
) -> Block:
    """A block that computes the same, with its matrices ready to be quantized.

    Args:
      options: of `fireq`.
      block: any block, also with sublayers removed.
      names: of the selected Linears inside it ("attn.q", "ffn.up", ...). A scaling is applied
        where all matrices that it touches are selected.
      maxima: of its keys, `norms` and `absmax` of FireQStats; None where none are rotated.
    """
    parts: dict[str, object] = {}
    if options.channel and isinstance(block.ffn, scaling.Gated):
        join = block.joins[block.slots.index("ffn")]
        is_read_alone = join.norm == "before" and isinstance(block.ffn_norm, scaling.Norm)
        norm = block.ffn_norm if is_read_alone else None
        norm, ffn = scaled_ffn(options, norm, block.ffn, names)
        parts = {"ffn": ffn} if norm is None else {"ffn_norm": norm, "ffn": ffn}
    if isinstance(block.attn, Attention):
        parts["attn"] = scaled_attention(options, block.attn, names, maxima)
    return scaling.changed(block, **parts)


def scaled_ffn(
    options: Options, norm: scaling.Norm | None, ffn: scaling.Gated, names: frozenset[str]
) -> tuple[scaling.Norm | None, scaling.Gated]:
    """The FFN and the norm that it alone reads (None: there is none) after the channel scalings."""
    kind, inputs = options.channel_kind, {"ffn.gate", "ffn.up"} <= names
    is_free = inputs and not scaling.thresholds_input(ffn.gate, ffn.up)
    if is_free and norm is not None and norm.scale is not None:
        norm, ffn = scaling.scale_ffn_input(norm, ffn, options.c_up, kind)
    if {"ffn.up", "ffn.down"} <= names and not scaling.thresholds_input(ffn.down):
        ffn = scaling.scale_ffn_output(ffn, options.c_down, kind)
    return norm, ffn


def scaled_attention(
    options: Options, attention: Attention, names: frozenset[str], maxima: Maxima | None
) -> Attention:
    """An attention layer with the V/O and RoPE scales and the formats of queries, keys, values."""
    if options.channel and {"attn.v", "attn.o"} <= names:
        attention = scaling.scale_values(attention, options.v_scale)
    if maxima is not None and {"attn.q", "attn.k"} <= names:
        attention = rope_scaled(options, attention, maxima)
    if {"attn.k", "attn.v"} <= names:
        formats = {"kv_format": options.kv, "query_format": options.query}
        formats = {name: value for name, value in formats.items() if value is not None}
        spec = dataclasses.replace(attention.spec, **formats)
        attention = scaling.changed(attention, spec=spec)
    return attention


def rope_scaled(options: Options, attention: Attention, maxima: Maxima) -> Attention:
    """An attention layer with those scales of queries and keys that are switched on."""
    (norms, absmax), untouched = maxima, None
    turning = rotated(attention.spec.rope, attention.spec.head_dim)
    if options.post_rope:
        top_k = options.top_k
        untouched = core.largest_pairs(absmax, top_k, rotated=turning)
        scale = core.post_rope_scale(absmax, beta=options.beta, top_k=top_k, rotated=turning)
        param = nnx.Param(scale, axes=("kv_heads", "head_dim"))
        attention = scaling.changed(attention, post_scale=param)
    if options.pre_rope:
        if attention.k_norm is not None:  # one gain for all heads, so one scale
            norms = jnp.broadcast_to(norms.max(axis=0), norms.shape)
            if untouched is not None:
                untouched = jnp.broadcast_to(untouched.any(axis=0), untouched.shape)
        scale = core.pre_rope_scale(norms, alpha=options.alpha, untouched=untouched)
        attention = scaling.scale_keys(attention, scale)
    return attention
