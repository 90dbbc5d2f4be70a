"""CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification
(2024).

In a gated FFN the channels whose activated gate is small are dropped, so that their rows of the up
and down projections need not be read. Each channel has its own threshold: the cut is made on
importance, the gate weighted by the typical size of the channel's up activation. In attention the
inputs of the query and output projections can be cut too, by one threshold per layer and site.

Symbols are in `chess_core.py`; k there is `sparsity` here.

What differs from the authors' code, and why:
- Two versions exist: 2024 ("sq": squares, kept where |a| > t) and 2025 ("abs": magnitudes, kept
  where |a| >= t). Both are here; "sq" is the default because it minimises the squared error.
- A quantile is taken per batch and averaged over batches (2024: over chunks of four windows, 2025:
per
  document). Tokens of a batch weigh alike in the moments.
- Quantiles are exact order statistics found by counting, without a sort.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ffnlab import models, tree
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import ACTIVATIONS, GatedFFN, Linear, SparseGatedFFN
from ffnlab.models import Decoder
from ffnlab.sparsity import chess_core as core
from ffnlab.sparsity.chess_core import Importance
from ffnlab.transform import Transform
from ffnlab.weights import SparseInput, Transposed, Weight

__all__ = ["ChessStats", "cats", "chess"]

SITES = ("q", "o")  # keys and values keep their dense input: they are small and enter the cache


class ChessStats(NamedTuple):
    """What calibration has seen, by the path of each layer.

    Attributes:
      moments: sum over tokens of up^2 or |up|, [h] per FFN.
      cuts: sum over batches of the quantile of importance (of |gate| for CATS), [] per FFN.
      sites: sum over batches of the quantile of |input|, [] per sparsified projection.
      tokens: [] int32, tokens in `moments`.
      batches: [2] int32, batches in pass 1 and in pass 2.
      passes: [] int32, passes completed.
    """

    moments: dict[str, Float[Array, "h"]]
    cuts: dict[str, Float[Array, ""]]
    sites: dict[str, Float[Array, ""]]
    tokens: Int[Array, ""]
    batches: Int[Array, "2"]
    passes: Int[Array, ""]


def chess(
    *, sparsity: float = 0.5, importance: Importance = "sq", attention: bool = False
) -> Transform[Decoder, ChessStats]:
    """Channel-wise thresholds for every gated FFN, and selective sparsification of attention.

    A batch is tokens, [b, t] int32. Pass 1 measures the up activations, pass 2 the quantile of
    importance.

    Args:
      sparsity: fraction of activations to drop, in [0, 1); the authors use 0.5.
      importance: "sq" (2024) or "abs" (2025).
      attention: also cut the inputs of the query and output projections (the paper's "w/").
    Returns:
      a transform of decoders, stacked or not. FFNs become `SparseGatedFFN`, the weights of the cut
      projections `SparseInput`.
    Raises:
      ConfigError: an option out of range.
    Source:
      CHESS (arXiv 2409.01366), channel-wise thresholding and selective sparsification.

    >>> chess(sparsity=0.3).name
    'chess'
    """
    if importance not in ("sq", "abs"):
        raise ConfigError(f"importance={importance!r} is not one of 'sq', 'abs'")
    return _transform("chess", sparsity, importance, attention)


def cats(*, sparsity: float = 0.5, attention: bool = False) -> Transform[Decoder, ChessStats]:
    """The baseline: one threshold per layer, the `sparsity` quantile of |act(W_gate x)|.

    Args:
      sparsity: fraction of activations to drop, in [0, 1).
      attention: as in `chess`.
    Raises:
      ConfigError: an option out of range.
    Source:
      CATS (arXiv 2404.08763), as the authors of CHESS compare with it.
    """
    return _transform("cats", sparsity, None, attention)


def _transform(
    name: Literal["chess", "cats"], sparsity: float, kind: Importance | None, attention: bool
) -> Transform[Decoder, ChessStats]:
    if not 0.0 <= sparsity < 1.0:
        raise ConfigError(f"sparsity={sparsity!r} is outside [0, 1)")

    @functools.partial(jax.jit, static_argnames="second")
    def measured(
        stats: ChessStats, model: Decoder, batch: Int[Array, "b t"], second: bool
    ) -> ChessStats:
        seen = _activations(models.unstack(model), batch, attention)
        if second:
            cuts = {
                path: stats.cuts[path]
                + core.quantile(
                    core.importance(gate, stats.moments[path] / stats.tokens, kind), sparsity
                )
                for path, (gate, _) in seen.ffns.items()
            }
            return stats._replace(cuts=cuts, batches=stats.batches.at[1].add(1))
        moments, cuts = dict(stats.moments), dict(stats.cuts)
        for path, (gate, up) in seen.ffns.items():
            if kind is None:
                cuts[path] += core.quantile(jnp.abs(gate.astype(jnp.float32)), sparsity)
            else:
                moments[path] += core.up_moment(up, kind)
        sites = {
            path: stats.sites[path] + core.quantile(jnp.abs(x.astype(jnp.float32)), sparsity)
            for path, x in seen.inputs.items()
        }
        return stats._replace(
            moments=moments,
            cuts=cuts,
            sites=sites,
            tokens=stats.tokens + batch.size,
            batches=stats.batches.at[0].add(1),
        )

    def observe(stats: ChessStats, model: Decoder, batch: Int[Array, "b t"]) -> ChessStats:
        return measured(stats, model, batch, second=int(stats.passes) == 1)

    def advance(model: Decoder, stats: ChessStats) -> tuple[ChessStats, bool]:
        stats = stats._replace(passes=stats.passes + 1)
        return stats, kind is None or int(stats.passes) == 2

    return Transform(
        name=name,
        init=functools.partial(_init, attention),
        observe=observe,
        advance=advance,
        rewrite=functools.partial(_rewrite, kind, attention),
    )


def _init(attention: bool, model: Decoder) -> ChessStats:
    model = models.unstack(model)
    ffns = tree.select(model, tree.of_type(GatedFFN))
    zero = jnp.float32(0)
    return ChessStats(
        moments={path: jnp.zeros(ffn.gate.weight.shape[1]) for path, ffn in ffns.items()},
        cuts=dict.fromkeys(ffns, zero),
        sites=dict.fromkeys(_sites(model), zero) if attention else {},
        tokens=jnp.int32(0),
        batches=jnp.zeros(2, jnp.int32),
        passes=jnp.int32(0),
    )


def _sites(model: Decoder) -> dict[str, Linear]:
    pattern = tree.of_type(Linear) & (tree.at("layers[*].attn.q") | tree.at("layers[*].attn.o"))
    return tree.select(model, pattern)


class _Seen(NamedTuple):
    """Activated gates and up activations of the FFNs, and inputs of the attention sites."""

    ffns: dict[str, tuple[Array, Array]]
    inputs: dict[str, Array]


def _activations(model: Decoder, batch: Int[Array, "b t"], attention: bool) -> _Seen:
    ffns = tree.select(model, tree.of_type(GatedFFN))
    sites = _sites(model) if attention else {}
    parts = {f"{path}.{part}" for path in ffns for part in ("gate", "up")}
    wanted = tree.where(lambda path, _: path in parts or path in sites)
    _, seen = tree.capture(model, wanted, batch)
    pairs = {}
    for path, ffn in ffns.items():
        gate = ACTIVATIONS[ffn.activation](seen[f"{path}.gate"].output)
        pairs[path] = (gate, seen[f"{path}.up"].output)
    return _Seen(pairs, {path: seen[path].input[0] for path in sites})


def _rewrite(
    kind: Importance | None, attention: bool, model: Decoder, stats: ChessStats
) -> Decoder:
    was_stacked = isinstance(model.layers, models.Stacked)
    model = models.unstack(model)
    first, second = (int(n) for n in stats.batches)
    if first == 0 or (kind is not None and second == 0):
        raise ConfigError("the thresholds are not calibrated; use transform.apply or calibrate")

    def sparse(path: str, ffn: GatedFFN) -> SparseGatedFFN:
        cut = stats.cuts[path] / (first if kind is None else second)
        if kind is None:
            threshold = jnp.full(ffn.gate.weight.shape[1], cut)
        else:
            threshold = core.thresholds(cut, stats.moments[path] / stats.tokens, kind)
        if jnp.isnan(threshold).any():
            raise NumericalError(f"{path}: the activations were not finite during calibration")
        up = ffn.up.replace(by_channel(ffn.up.weight))
        return SparseGatedFFN(
            ffn.gate,
            up,
            ffn.down,
            threshold,
            activation=ffn.activation,
            strict=kind == "sq",
        )

    model = tree.map_at_path(model, tree.of_type(GatedFFN), sparse)
    if attention:
        cut_input = lambda path, linear: linear.replace(  # noqa: E731
            SparseInput(linear.weight, stats.sites[path] / first)
        )
        sites = _sites(model)
        model = tree.map_at_path(model, tree.where(lambda path, _: path in sites), cut_input)
    return models.stack(model) if was_stacked else model


def by_channel(weight: Weight) -> Weight:
    """The weight stored one contiguous row per output channel, where its format has a transpose."""
    if isinstance(weight, Transposed) or type(weight).transpose is Weight.transpose:
        return weight
    return Transposed(weight.transpose())
