"""What the CHESS study measures: a drawn FFN, losses of a real model, speed of decoding."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ffnlab import weights
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.sparsity import cats, chess, realised_sparsity, sparsified
from ffnlab.sparsity import chess_core as core
from ffnlab.studies.fireq_measure import loss
from ffnlab.text import generate
from ffnlab.transform import Transform, apply, calibrate

__all__ = ["RULES", "Errors", "Point", "Speed", "decode_speeds", "drawn_errors", "sweep"]

Rule = Callable[..., Transform]
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "CATS": cats,
        "ABS": lambda **options: chess(importance="abs", **options),
        "SQ": lambda **options: chess(importance="sq", **options),
    }
)


class Errors(NamedTuple):
    """Squared error of a drawn FFN's output at 50 % sparsity, relative to the output.

    Attributes:
      spread: standard deviation of the logarithm of the up channels' scales.
      cats, abs, sq: error with the thresholds of each rule.
      oracle: error when the smallest |gate * up| are dropped, which needs up itself.
    """

    spread: float
    cats: float
    abs: float
    sq: float
    oracle: float


def drawn_errors(key: Array, spread: float) -> Errors:
    """Errors of a SwiGLU of 64 x 256 drawn at random, on 2048 tokens it was not calibrated on.

    Args:
      key: of the draw.
      spread: up channel i is scaled by exp(spread * N(0, 1)).
    """
    found = drawn(key, spread)
    limits = {"cats": found.cut} | {
        kind: core.thresholds(np.float32(cut), s, kind) for kind, (s, cut) in found.channels.items()
    }
    return Errors(spread, **{k: float(e) for k, e in output_errors(found, limits).items()})


class Drawn(NamedTuple):
    """A drawn FFN and what calibration finds in it.

    Attributes:
      gate, up: activations of the test tokens, [2048, 256].
      down: the down projection, [256, 64].
      cut: median |gate| of the calibration tokens.
      channels: importance -> (statistic [256], median importance) of the calibration tokens.
    """

    gate: Float[Array, "t h"]
    up: Float[Array, "t h"]
    down: Float[Array, "h d"]
    cut: Float[Array, ""]
    channels: dict[core.Importance, tuple[Array, Array]]


@jax.jit
def drawn(key: Array, spread: float | Float[Array, ""]) -> Drawn:
    """Draws the FFN and its tokens, and calibrates."""
    d, h, t = 64, 256, 2048
    keys = jax.random.split(key, 6)
    w_gate, w_up = (jax.random.normal(k, (d, h)) / np.sqrt(d) for k in keys[:2])
    w_up = w_up * jnp.exp(spread * jax.random.normal(keys[2], (h,)))

    def activations(k: Array) -> tuple[Array, Array]:
        x = jax.random.normal(k, (t, d))
        return jax.nn.silu(x @ w_gate), x @ w_up

    (gate, up), test, channels = activations(keys[3]), activations(keys[4]), {}
    for kind in ("abs", "sq"):
        s = core.statistic(up, kind)
        channels[kind] = s, core.quantile(core.scores(gate, s, kind), 0.5)
    cut = core.quantile(jnp.abs(gate), 0.5)
    return Drawn(*test, jax.random.normal(keys[5], (h, d)), cut, channels)


@jax.jit
def output_errors(found: Drawn, limits: dict[str, Array | np.ndarray]) -> dict[str, Array]:
    """Relative squared error of the output for each rule's thresholds, and for the oracle."""
    gate, product = found.gate, found.gate * found.up
    masks = {k: core.keep_mask(gate, t, strict=k == "sq") for k, t in limits.items()}
    masks["oracle"] = jnp.abs(product) > core.quantile(jnp.abs(product), 0.5)
    size = jnp.sum((product @ found.down) ** 2)
    return {
        name: jnp.sum((jnp.where(mask, 0, product) @ found.down) ** 2) / size
        for name, mask in masks.items()
    }


class Point(NamedTuple):
    """One model sparsified by one rule.

    Attributes:
      rule: a key of `RULES`.
      sparsity: target fraction of zeros.
      ffn: [rows] nats per token of each held-out row with the FFNs sparsified.
      both: the same with the attention sites too, or None.
      zeros: path -> fraction of zeros on held-out tokens with the FFNs sparsified, by FFN.
      site_zeros: the same of the attention sites, with all of them sparsified; may be empty.
      spread: standard deviation of the logarithm of the up channels' scales, mean over layers; NaN
        for CATS, which does not measure them.
    """

    rule: str
    sparsity: float
    ffn: Float[np.ndarray, "rows"]
    both: Float[np.ndarray, "rows"] | None
    zeros: dict[str, float]
    site_zeros: dict[str, float]
    spread: float

    @property
    def deviation(self) -> float:
        """Largest distance of an FFN's fraction of zeros from the target."""
        return max(abs(value - self.sparsity) for value in self.zeros.values())


def sweep(
    model: Decoder,
    calibration: Sequence[Int[np.ndarray, "b t"]],
    rows: Int[np.ndarray, "n u"],
    *,
    sparsities: Sequence[float],
    attention: Sequence[str],
    sites: bool,
) -> list[Point]:
    """Sparsifies a model by every rule at every sparsity and scores the results.

    Args:
      model: a stacked decoder.
      calibration: batches of tokens.
      rows: held-out tokens; each but the first of a row is scored.
      sparsities: targets, each in (0, 1).
      attention: rules whose models are also scored with the attention sites sparsified.
      sites: also measure the zeros of those sites.
    """
    return [
        measured(model, calibration, rows, rule, k, attention=rule in attention, sites=sites)
        for rule in RULES
        for k in sparsities
    ]


def measured(
    model: Decoder,
    calibration: Sequence[Int[np.ndarray, "b t"]],
    rows: Int[np.ndarray, "n u"],
    rule: str,
    sparsity: float,
    *,
    attention: bool,
    sites: bool,
) -> Point:
    """One point of the sweep."""
    transform = RULES[rule](sparsity=sparsity, attention=attention)
    stats = calibrate(transform, model, calibration, progress=False)
    channels = {path: t for path, t in stats.thresholds.items() if np.ndim(t)}
    tokens = [rows[:16, :-1]]
    ffn, both, site_zeros = sparsified(model, channels, strict=rule == "SQ"), None, {}
    if attention:
        new = transform.rewrite(model, stats)
        both = loss(new, rows).nats
        found = realised_sparsity(new, tokens).zeros if sites else {}
        site_zeros = {path: value for path, value in found.items() if path not in channels}
    return Point(
        rule,
        sparsity,
        ffn=loss(ffn, rows).nats,
        both=both,
        zeros=realised_sparsity(ffn, tokens).zeros,
        site_zeros=site_zeros,
        spread=float("nan") if rule == "CATS" else spread_of(stats.moments, rule),
    )


def spread_of(moments: Mapping[str, Array | np.ndarray], rule: str) -> float:
    """Standard deviation over channels of log of the scale of up, mean over layers."""
    power = 0.5 if rule == "SQ" else 1.0  # of a mean square, of a mean magnitude
    return float(np.mean([power * np.log(m).std() for m in moments.values()]))


class Speed(NamedTuple):
    """Greedy decoding of a whole model beside the dense one.

    Attributes:
      sparsity: target, of the FFNs and of both attention sites.
      zeros: mean fraction of zeros in the FFNs over the tokens decoded.
      dense, sparse: seconds per token, median over turns.
      ratio: how many times faster the sparse model is; median over turns.
    """

    sparsity: float
    zeros: float
    dense: float
    sparse: float
    ratio: float


def decode_speeds(
    config: DecoderConfig, sparsities: Sequence[float], *, tokens: int, turns: int, seed: int
) -> list[Speed]:
    """Decodes one text with a random model, dense and sparsified, in turns.

    Args:
      config: of the model, in float32.
      sparsities: targets, each in (0, 1).
      tokens: decoded per turn, after a prompt of 8.
      turns: times that each model decodes, after once to compile.
      seed: of the model and of the 128 random tokens it is calibrated on.
    """
    dense = Decoder(config, key=jax.random.key(seed))
    seen = np.random.default_rng(seed).integers(0, config.vocab, (1, 128)).astype(np.int32)
    found = {
        k: apply(chess(sparsity=k, attention=True), dense, [seen], progress=False)[0]
        for k in sparsities
    }
    ready = {0.0: weights.prepare(dense)} | {k: weights.prepare(new) for k, new in found.items()}
    prompt = [seen[0, :8].tolist()]

    def decode(model: Decoder) -> tuple[float, Int[np.ndarray, "1 n"]]:
        start = time.perf_counter()
        result = generate(model, prompt, max_tokens=tokens)
        return (time.perf_counter() - start) / tokens, result.tokens

    written = {k: decode(model)[1] for k, model in ready.items()}
    seconds = [{k: decode(model)[0] for k, model in ready.items()} for _ in range(turns)]
    medians = {k: statistics.median(turn[k] for turn in seconds) for k in ready}
    return [
        Speed(
            k,
            realised_sparsity(found[k], [written[k]]).ffn,
            medians[0.0],
            medians[k],
            statistics.median(turn[0.0] / turn[k] for turn in seconds),
        )
        for k in sparsities
    ]
