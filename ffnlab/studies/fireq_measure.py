"""What the FireQ study measures: errors on drawn tensors, and losses of quantized models."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import models, tree, weights
from ffnlab.layers import Attention, Rope
from ffnlab.layers.attention.rope import rotate, tables
from ffnlab.models import Decoder
from ffnlab.quantization import fireq, nearest
from ffnlab.quantization import fireq_core as core
from ffnlab.quantization.scaling import scale_keys
from ffnlab.transform import Transform, apply
from ffnlab.weights import kv
from pallas_kernels import w4a8

GROUP = 128
SPREADS = (2e-5, 6e-5, 2e-4, 6e-4, 2e-3, 6e-3, 2e-2)
NOTHING = {"weights": False, "activations": None, "kv": None, "query": None}
UNSCALED = {"channel": False, "pre_rope": False, "post_rope": False}


class Underflow(NamedTuple):
    """Relative error of INT4 weights drawn from N(0, spread^2), with e4m3 scales.

    Attributes:
      spread: standard deviation of the weights.
      plain: error without a per-tensor scale, scaled: with the searched one.
      divisor: the scale that was found.
    """

    spread: float
    plain: float
    scaled: float
    divisor: float


class Rounding(NamedTuple):
    """What rounding q * s to e4m3, as a table of products does, adds.

    Attributes:
      promote, table: relative weight error without and with it.
      gap: largest difference between our product and the formula in float64, relative.
    """

    promote: float
    table: float
    gap: float


@functools.partial(jax.jit, static_argnames="tensor_scale")
def weight_error(w: Float[Array, "in out"], *, tensor_scale: bool) -> tuple[Array, Array]:
    """Relative error of the quantized w, and the per-tensor scale."""
    quantized = core.quantize(w, group=GROUP, tensor_scale=tensor_scale)
    error = jnp.linalg.norm(core.dequantize(quantized, group=GROUP) - w) / jnp.linalg.norm(w)
    return error, quantized.divisor


def underflow(key: Array) -> list[Underflow]:
    """Weight errors over `SPREADS`, smallest first."""
    w, found = jax.random.normal(key, (1024, 256)), []
    for spread in SPREADS:
        plain, _ = weight_error(spread * w, tensor_scale=False)
        scaled, divisor = weight_error(spread * w, tensor_scale=True)
        found.append(Underflow(spread, float(plain), float(scaled), float(divisor)))
    return found


def rounding(key: Array) -> Rounding:
    """Both treatments of the scales on Gaussian weights, and the product against its formula."""
    w_key, x_key = jax.random.split(key)
    w = 0.02 * jax.random.normal(w_key, (1024, 256))
    x = jax.random.normal(x_key, (32, 1024))
    codes, scales, divisor = core.quantize(w, group=GROUP)
    packed = w4a8.pack_nibbles(codes)
    x8, sx = (np.asarray(a, np.float64) for a in weights.quantize_e4m3(x))
    errors, gap = {}, 0.0
    for treatment in ("promote", "table"):
        dense = w4a8.dequantize(packed, scales, group=GROUP, treatment=treatment)
        errors[treatment] = float(jnp.linalg.norm(dense - w) / jnp.linalg.norm(w))
        y = w4a8.matmul(x, packed, scales, divisor=divisor, group=GROUP, treatment=treatment)
        exact = sx * (x8 @ np.asarray(dense, np.float64))
        gap = max(gap, float(np.abs(y - exact).max() / np.abs(exact).max()))
    return Rounding(errors["promote"], errors["table"], gap)


def score_errors(seed: int, *, offsets: bool, draws: int = 4) -> dict[str, float]:
    """Squared error of attention scores over INT4 keys, relative, by which RoPE scales are on.

    Keys are N(0, 1), D = 64, 512 positions; three channels are outliers.

    Args:
      seed: of the draws.
      offsets: outliers are channels with an offset of 8 to 12; else channels 8 to 12 times as wide.
      draws: independent tensors, averaged.
    Returns:
      mean error for "none", "pre", "post" (top 8) and "both".
    """
    found = [_score_errors(key, offsets) for key in jax.random.split(jax.random.key(seed), draws)]
    return {name: float(np.mean([f[name] for f in found])) for name in found[0]}


@jax.jit
def _score_errors(key: Array, offsets: Bool[Array, ""] | bool) -> dict[str, Array]:
    d, t = 64, 512
    where, size, sign, k_key, q_key = jax.random.split(key, 5)
    outlier = jax.random.permutation(where, jnp.arange(d) < 3)
    strength = jax.random.uniform(size, (d,), minval=8.0, maxval=12.0)
    k = jax.random.normal(k_key, (1, t, 1, d))
    offset = jnp.where(outlier, strength * jax.random.rademacher(sign, (d,), jnp.float32), 0)
    k = jnp.where(offsets, k + offset, k * jnp.where(outlier, strength, 1))
    q = jax.random.normal(q_key, (1, t, 1, d))
    angles = tables(Rope(), d, jnp.arange(t)[None])
    absmax = jnp.max(jnp.abs(rotate(k, *angles)), axis=(0, 1))
    untouched = core.largest_pairs(absmax, 8)
    one, norms, post = jnp.ones((1, d)), core.pair_norms(k), core.post_rope_scale(absmax)
    scales = {
        "none": (one, one),
        "pre": (core.pre_rope_scale(norms), one),
        "post": (one, post),
        "both": (core.pre_rope_scale(norms, untouched=untouched), post),
    }
    product = functools.partial(jnp.einsum, "bthd,bshd->bts")
    exact = product(rotate(q, *angles), rotate(k, *angles))

    def error(before: Array, after: Array) -> Array:
        keys = kv.fake("int4", rotate(k * before, *angles) * after)
        scores = product(rotate(q / before, *angles) / after, keys)
        return jnp.sum((scores - exact) ** 2) / jnp.sum(exact**2)

    return {name: error(*pair) for name, pair in scales.items()}


def variants(top_k: int, *, quick: bool) -> dict[str, Transform]:
    """The quantized models that are compared, by name.

    Args:
      top_k: channels of the post-RoPE scale.
      quick: leave out the switches one by one.
    """
    found = {
        "INT4 weights, nearest": nearest(),
        "W4A8KV4, no scaling": fireq(tensor_scale=False, scales="float32", **UNSCALED),
        "FireQ": fireq(top_k=top_k),
        "FireQ, bf16 scales": fireq(top_k=top_k, scales="bfloat16"),
    }
    if not quick:
        found |= {
            "INT8 weights, nearest": nearest(format="int8"),
            "FP8 weights, nearest": nearest(format="float8"),
            "FireQ without channel-wise": fireq(top_k=top_k, channel=False),
            "FireQ without per-tensor": fireq(top_k=top_k, tensor_scale=False),
            "FireQ without pre-RoPE": fireq(top_k=top_k, pre_rope=False),
            "FireQ without post-RoPE": fireq(top_k=top_k, post_rope=False),
        }
    return found


def cache_variants(top_k: int) -> dict[str, Transform]:
    """INT4 keys and values, FP8 queries and nothing else, by which RoPE scales are on."""
    only = NOTHING | {"kv": "int4", "query": "e4m3", "channel": False, "top_k": top_k}
    return {
        "none": fireq(**only, pre_rope=False, post_rope=False),
        "pre": fireq(**only, post_rope=False),
        "post": fireq(**only, pre_rope=False),
        "both": fireq(**only),
    }


class Loss(NamedTuple):
    """A model's loss on held-out rows.

    Attributes:
      nats: [rows] mean negative log-likelihood per token of each row.
      nbytes: of the model as stored.
    """

    nats: Float[np.ndarray, "rows"]
    nbytes: int


def compare(
    model: Decoder,
    transforms: Mapping[str, Transform],
    calibration: Int[np.ndarray, "b t"],
    rows: Int[np.ndarray, "n u"],
) -> dict[str, Loss]:
    """Losses of a stacked model and of what each transform makes of it; "dense" comes first."""
    found = {"dense": loss(model, rows)}
    for name, transform in transforms.items():
        found[name] = loss(apply(transform, model, [calibration], progress=False)[0], rows)
    return found


def loss(model: Decoder, rows: Int[np.ndarray, "n u"]) -> Loss:
    """Scores every token of the rows but the first, sixteen rows at a time."""
    prepared = weights.prepare(model)
    parts = [row_nats(prepared, part) for part in np.split(rows, range(16, len(rows), 16))]
    return Loss(
        np.concatenate([np.asarray(part, np.float64) for part in parts]), tree.nbytes(model)
    )


@jax.jit
def row_nats(model: Decoder, rows: Int[Array | np.ndarray, "b u"]) -> Float[Array, "b"]:
    """Mean negative log-likelihood of each row's tokens after the first."""
    logits, targets = model(rows[:, :-1]), rows[:, 1:, None]
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets, axis=-1), axis=(1, 2))


def plant_outliers(model: Decoder, factor: float, seed: int) -> Decoder:
    """The same function with outliers in its keys: two RoPE pairs per head times `factor`.

    Queries are divided by it. A power of two changes no bit of any weight's mantissa.
    """
    model, random = models.unstack(model), np.random.default_rng(seed)

    def plant(attention: Attention) -> Attention:
        kv_heads, half = attention.spec.kv_heads, attention.spec.head_dim // 2
        pairs = random.permuted(np.tile(np.arange(half) < 2, (kv_heads, 1)), axis=1)
        scale = np.where(np.concatenate([pairs, pairs], axis=1), factor, 1.0)
        return scale_keys(attention, jnp.asarray(scale, jnp.float32))

    return models.stack(tree.map_at(model, tree.of_type(Attention), plant))


def scaling_gap(model: Decoder, tokens: Int[np.ndarray, "b t"], top_k: int) -> float:
    """Largest change of a logit by all scalings without any rounding, relative, in float32."""
    wide = jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, model
    )
    scaled, _ = apply(fireq(**NOTHING, top_k=top_k), wide, [tokens], progress=False)
    logits = jax.jit(lambda model: model(jnp.asarray(tokens)))
    before = logits(wide)
    return float(jnp.abs(logits(scaled) - before).max() / jnp.abs(before).max())
