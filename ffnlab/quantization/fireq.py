"""FireQ: Fast INT4-FP8 Kernel and RoPE-aware Quantization for LLM Inference Acceleration (2025).

Weights and KV cache become INT4, activations and queries FP8 (e4m3), after training. Scalings that
leave the function as it is make that accurate: channel-wise ones between matrices, and for queries
and keys one before RoPE (folded into the projections) and one after it (online). The arithmetic is
in `fireq_core.py`, the exact scalings in `scaling.py`, what a block gets in `fireq_blocks.py`.

What differs from the authors' code, and why:
- Statistics come from one pass over the unchanged model. Theirs divides the norms by lam before it
  pushes calibration data through the still unscaled block, so later blocks see distorted inputs.
- With norms on queries and keys (Qwen 3, Gemma 3) a scale of the projections would be undone; the
  pre-RoPE scale goes into those norms, one for all heads. Theirs covers Llama only.
- Keys are measured without a post-RoPE scale that the model has already; it is replaced.
- A matrix whose input is cut by a threshold (CHESS) keeps its input unscaled, as the threshold is
  one number for all channels; between values and outputs the scale is one number too, and the
  threshold follows it.
- Theirs covers decoders. Here any model with blocks is taken, and of the scalings those that leave
  its function as it is: none into a norm that stands after the sum, none between the matrices of an
  FFN without a gate, none of keys that are not rotated. Padding is not looked at.
- Optional parts that are off in their experiments (AWQ-like search, clipping, Hadamard rotation,
  scales of the QKV input and of O) are left out.
"""

import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ffnlab import models, tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import Attention, Block, Context
from ffnlab.layers.attention.rope import rotate, rotated
from ffnlab.models.calibration import Given, Layered, given
from ffnlab.quantization import fireq_core as core
from ffnlab.quantization.fireq_blocks import scaled_block
from ffnlab.quantization.fireq_options import ChannelKind, FireQStats, Options, Scales
from ffnlab.quantization.nearest import to_int4
from ffnlab.quantization.targets import (
    check_finite,
    inside_blocks,
    is_traced,
    linears,
    replace_weights,
)
from ffnlab.transform import Transform
from ffnlab.tree import Predicate
from ffnlab.weights import Dense, Weight

__all__ = ["FireQStats", "fireq"]


def fireq(
    *,
    weights: bool = True,
    activations: Literal["e4m3"] | None = "e4m3",
    kv: Literal["int4", "float8"] | None = "int4",
    query: Literal["e4m3"] | None = "e4m3",
    group: int | None = 128,
    scales: Scales = "e4m3",
    tensor_scale: bool = True,
    channel: bool = True,
    c_up: float = 0.0096,
    c_down: float = 0.015,
    channel_kind: ChannelKind = "absmean",
    v_scale: float = 0.9,
    pre_rope: bool = True,
    post_rope: bool = True,
    alpha: float = 8.0,
    beta: float = 8.0,
    top_k: int = 8,
    select: Predicate = inside_blocks,
) -> Transform[Layered, FireQStats]:
    """The transform that quantizes a model with FireQ; every part has a switch.

    Defaults are the authors' values for Llama 3 8B. Embeddings, head and norms stay as they are. A
    batch is what the model takes: tokens, [b, t] int32, or a mapping by names
    (`ffnlab.models.calibration.given`). Without `pre_rope` and `post_rope` nothing is calibrated.

    Args:
      weights: store the selected matrices as INT4.
      activations: round the input of the selected matrices to e4m3 per token, or not (None).
      kv: how keys and values are rounded and cached; None leaves them.
      query: round queries to e4m3 per token and head, or not (None).
      group: rows that share a weight scale, even; None for whole columns. A matrix of fewer rows is
        one group; one whose rows are no multiple is padded.
      scales: dtype of the weight scales.
      tensor_scale: search the per-tensor scale c.
      channel: scale channels between matrices (c_up, c_down, v_scale).
      c_up: mean |w| that each input channel of gate and up gets, > 0.
      c_down: the same for down, > 0.
      channel_kind: "absmean"; "absmax" aims at the largest |w|; "constant" scales all alike.
      v_scale: factor on values that the output projection undoes, > 0.
      pre_rope: scale pairs of key channels to norms of at most alpha.
      post_rope: scale the top_k largest channels of rotated keys and their partners to beta.
      alpha: > 0.
      beta: > 0.
      top_k: channels per KV head, 0 <= 2 top_k <= head_dim.
      select: which `Linear`s to quantize. A scaling is applied where all matrices that it touches
        are selected, `kv` and `query` where k and v are.
    Returns:
      a Transform of models with blocks, stacked or not. Its rewrite raises NumericalError where a
      selected matrix or the calibration holds NaN or infinity, and ConfigError without calibration.
    Raises:
      ConfigError: an option out of range.
    Source:
      FireQ (arXiv 2505.20839); values from the official quant_model_i4_f8.sh and its quantizer.

    >>> fireq(kv=None, pre_rope=False, post_rope=False).observe is None
    True
    """
    options = Options(**locals())  # exactly the arguments above
    return Transform(
        name="fireq",
        init=functools.partial(init, options),
        observe=observe if options.calibrates else None,
        rewrite=functools.partial(rewrite, options),
    )


def init(options: Options, model: Layered) -> FireQStats:
    """Empty statistics; checks that the model has what the options need.

    Raises:
      SelectionError: nothing is selected.
      ConfigError: more post-RoPE channels than a head has.
    """
    model = models.unstack(model)
    tree.select(model, linears(options.select))
    zeros = {}
    for path, attention in rotating(model).items():
        spec = attention.spec
        if options.post_rope and 2 * options.top_k > spec.head_dim:
            raise ConfigError(
                f"top_k={options.top_k} channels and their RoPE partners do not fit "
                f"head_dim={spec.head_dim} of {path}; use top_k={spec.head_dim // 2} or less"
            )
        zeros[path] = jnp.zeros((spec.kv_heads, spec.head_dim), jnp.float32)
    return FireQStats(zeros, dict(zeros), jnp.int32(0))


def rotating(model: Layered) -> dict[str, Attention]:
    """The attention layers of an unstacked model that rotate their keys, by path; perhaps none."""
    found = {path: node for path, node in tree.walk(model) if isinstance(node, Attention)}
    return {path: node for path, node in found.items() if node.spec.rope is not None}


def observe(stats: FireQStats, model: Layered, batch: Any) -> FireQStats:
    """Raises the maxima by one batch.

    Raises:
      ConfigError: the batch is nothing that the model takes.
    """
    return raised(stats, model, given(batch, model))


@jax.jit
def raised(stats: FireQStats, model: Layered, batch: Given) -> FireQStats:
    """`observe` without its checks."""
    model = models.unstack(model)
    layers = rotating(model)
    tokens = stats.tokens + math.prod(batch.first.shape[:2])
    if not layers:
        return stats._replace(tokens=tokens)
    wanted = tree.where(lambda path, _: path in layers)
    _, seen = tree.capture(model, wanted, *batch.args, **batch.options)
    valid, norms, absmax = batch.valid, {}, {}
    for path, attention in layers.items():
        pair = keys(attention, *seen[path].input[:2])
        if valid is not None:
            pair = tuple(jnp.where(valid[:, :, None, None], x, 0) for x in pair)
        before, after = pair
        turning = rotated(attention.spec.rope, attention.spec.head_dim)
        norms[path] = jnp.maximum(stats.norms[path], core.pair_norms(before, rotated=turning))
        largest = jnp.max(jnp.abs(after.astype(jnp.float32)), axis=(0, 1))
        absmax[path] = jnp.maximum(stats.absmax[path], largest)
    return FireQStats(norms, absmax, tokens)


def keys(
    attention: Attention, x: Float[Array, "b t d"], context: Context
) -> tuple[Float[Array, "b t kv D"], Float[Array, "b t kv D"]]:
    """Keys before RoPE (after their norm) and after it, without any post-RoPE scale."""
    spec = attention.spec
    before = attention.unrotated(x, context.tokens)
    cos, sin = context.angles[spec.rope]  # type: ignore[index]  # only of those that rotate
    return before, rotate(before, cos, sin)


def rewrite(options: Options, model: Layered, stats: FireQStats) -> Layered:
    """The quantized model; see `fireq`."""
    was_stacked = isinstance(model.layers, models.Stacked)
    model = models.unstack(model)
    chosen = tree.select(model, linears(options.select))
    check_finite(chosen)
    if options.calibrates:
        check_calibrated(stats)
    blocks = {}
    for path, block in tree.walk(model):
        if isinstance(block, Block):
            inside = f"{path}."
            names = frozenset(p.removeprefix(inside) for p in chosen if p.startswith(inside))
            where = f"{path}.attn"
            maxima = (stats.norms[where], stats.absmax[where]) if where in stats.norms else None
            blocks[path] = scaled_block(options, block, names, maxima)
    model = tree.replace(model, blocks) if blocks else model
    model = replace_weights(model, options.select, functools.partial(stored, options))
    return models.stack(model) if was_stacked else model


def check_calibrated(stats: FireQStats) -> None:
    """Raises ConfigError without observed tokens, NumericalError where keys were no numbers."""
    if is_traced(stats) or not stats.norms:
        return
    if int(stats.tokens) == 0:
        raise ConfigError(
            "pre_rope and post_rope need calibration, but no batch was observed: use "
            "transform.apply(fireq(...), model, batches), or fireq(pre_rope=False, post_rope=False)"
        )
    arrays = {"norms": stats.norms, "absmax": stats.absmax}
    finite = jax.device_get(jax.tree.map(lambda x: jnp.isfinite(x).all(), arrays))
    bad = sorted({path for part in finite.values() for path, ok in part.items() if not ok})
    if bad:
        raise NumericalError(
            f"the keys of {', '.join(bad[:5])} were NaN or infinite during calibration; "
            "check the model's outputs on the calibration text"
        )


def stored(options: Options, weight: Weight) -> Weight:
    """A weight in the format that the options ask for."""
    if not options.weights:
        return weight if options.activations is None else Dense(weight.dense(), options.activations)
    return to_int4(
        weight,
        group=options.group,
        scales=options.scales,
        tensor_scale=options.tensor_scale,
        act=options.activations,
    )
