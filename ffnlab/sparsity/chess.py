"""CHESS: Optimizing LLM Inference via Channel-Wise Thresholding and Selective Sparsification
(2024).

In a gated FFN the channels whose activated gate is small are dropped, so that their rows of the up
and down projections need not be read. Each channel has its own threshold: the cut is made on
importance, the gate weighted by the typical size of the channel's up activation. In attention the
inputs of the query and output projections can be cut too, by one threshold per layer and site.

Symbols are in `chess_core.py`; k there is `sparsity` here.

What differs from the authors' code, and why:
- Two versions exist: 2024 ("sq": squares, kept where |a| > t) and 2025 ("abs": magnitudes, kept
  where |a| >= t). Both are here; "sq" is the default because it minimises the squared error. CATS
  is kept where |a| >= t, as its own authors and the code of 2025 do.
- Their unit of averaging is a chunk of four windows (2024) or a document (2025); here it is the
  batch, whatever it holds. `pooling="all"` takes one quantile over all tokens instead.
- Quantiles are found by counting, without a sort. The values are the same.
- A sparsity of 0 leaves the model as it is.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Shaped

from ffnlab import models, tree
from ffnlab.errors import ConfigError, NumericalError, SelectionError
from ffnlab.layers import FFN
from ffnlab.models.calibration import Given, Layered, given
from ffnlab.sparsity import chess_core as core
from ffnlab.sparsity.chess_core import Importance
from ffnlab.sparsity.sites import FFNS, SITES, activations, sparsified
from ffnlab.transform import Transform

__all__ = ["ChessStats", "Pooling", "cats", "chess"]

Pooling = Literal["batch", "all"]
Values = Mapping[str, Shaped[Array | np.ndarray, "..."]]
Ranks = Mapping[str, Int[Array | np.generic, ""]]


class ChessStats(NamedTuple):
    """What calibration has seen and decided, by the path of each FFN and projection.

    Attributes:
      moments: mean of up^2 or |up| per batch, summed in pass 1 and averaged after it, [h] per FFN.
      cuts: quantiles of importance (of |gate| for CATS) summed over batches, [] per FFN; with
        pooling "all" histograms, [65536] int32.
      sites: the same of the inputs of sparsified projections.
      thresholds: the decision for each FFN, [h], and each projection, []; zero until it is made.
      batches: [] int32, batches of the current pass.
      passes: [] int32, passes completed.
    """

    moments: Mapping[str, Float[Array | np.ndarray, "h"]]
    cuts: Values
    sites: Values
    thresholds: Mapping[str, ArrayLike]
    batches: Int[Array | np.ndarray, ""]
    passes: Int[Array | np.ndarray, ""]


def chess(
    *,
    sparsity: float = 0.5,
    importance: Importance = "sq",
    attention: bool = False,
    pooling: Pooling = "batch",
) -> Transform[Layered, ChessStats]:
    """Channel-wise thresholds for every gated FFN, and selective sparsification of attention.

    A batch is what the model takes, without padding: tokens, [b, t] int32, or a mapping by names
    (`ffnlab.models.calibration.given`). Pass 1 measures the up activations and the attention sites,
    pass 2 the quantile of importance. The authors calibrate on 128k (2024) and 64k (2025) tokens.

    Args:
      sparsity: fraction of activations to drop, in [0, 1); the authors use 0.5.
      importance: "sq" (2024) or "abs" (2025).
      attention: also cut the inputs of the query and output projections (the paper's "w/").
      pooling: "batch" averages the quantiles of the batches, as the authors do; "all" takes the
        quantile of all tokens from a histogram, to a relative error of 1 / 512.
    Returns:
      a transform of models with blocks, stacked or not. FFNs become `SparseGatedFFN`, the weights
      of the cut projections `SparseInput`; where they are already, they get new thresholds.
    Raises:
      ConfigError: an option out of range; at a batch, fewer than 1 / sparsity activations.
      SelectionError: at `init`, no gated FFN (or with `attention` no attention) in the model.
      NumericalError: at the end of a pass, activations that were not finite.
    Source:
      CHESS (arXiv 2409.01366), channel-wise thresholding and selective sparsification.

    >>> chess(sparsity=0.3).name
    'chess'
    """
    if importance not in ("sq", "abs"):
        raise ConfigError(f"importance={importance!r} is not one of 'sq', 'abs'")
    return _transform("chess", Options(sparsity, importance, attention, pooling))


def cats(
    *, sparsity: float = 0.5, attention: bool = False, pooling: Pooling = "batch"
) -> Transform[Layered, ChessStats]:
    """The baseline: one threshold per layer, the `sparsity` quantile of |act(W_gate x)|.

    Args:
      sparsity: fraction of activations to drop, in [0, 1).
      attention: as in `chess`.
      pooling: as in `chess`.
    Raises:
      ConfigError, SelectionError, NumericalError: as in `chess`.
    Source:
      CATS (arXiv 2404.08763), as the authors of CHESS compare with it.

    >>> cats().name
    'cats'
    """
    return _transform("cats", Options(sparsity, None, attention, pooling))


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `chess`; importance None is CATS."""

    sparsity: float
    importance: Importance | None
    attention: bool
    pooling: Pooling

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity={self.sparsity!r} is outside [0, 1)")
        if self.pooling not in ("batch", "all"):
            raise ConfigError(f"pooling={self.pooling!r} is not one of 'batch', 'all'")

    @property
    def passes(self) -> int:
        """Passes over the calibration data."""
        return 1 if self.importance is None else 2

    @property
    def strict(self) -> bool:
        """Whether a magnitude equal to its threshold is dropped."""
        return self.importance == "sq"


def _transform(name: str, options: Options) -> Transform[Layered, ChessStats]:
    def observe(stats: ChessStats, model: Layered, batch: Any) -> ChessStats:
        batch = given(batch, model)
        if batch.valid is not None and not np.all(batch.valid):
            raise ConfigError("a batch has padding; quantiles are of all tokens: leave it out")
        if options.pooling == "all":
            ranks = {}
        else:
            count = math.prod(batch.first.shape[:2])
            sizes = {path: count * n for path, n in widths(stats, model).items()}
            ranks = {p: np.int32(core.rank(size, options.sparsity)) for p, size in sizes.items()}
        if stats.passes == 1:
            return second_pass(stats, model, batch, ranks, options.importance)
        return first_pass(stats, model, batch, ranks, options.importance, options.attention)

    def advance(model: Layered, stats: ChessStats) -> tuple[ChessStats, bool]:
        return (stats, True) if options.sparsity == 0 else decide(options, stats)

    def rewrite(model: Layered, stats: ChessStats) -> Layered:
        if options.sparsity == 0:
            return tree.copy(model)
        if stats.passes < options.passes:
            raise ConfigError(
                f"{name} made {int(stats.passes)} of {options.passes} passes; calibrate until done"
            )
        return sparsified(model, stats.thresholds, strict=options.strict)

    return Transform(
        name=name,
        init=lambda model: start(options, model),
        observe=observe if options.sparsity else None,
        advance=advance,
        rewrite=rewrite,
    )


@functools.partial(jax.jit, static_argnums=(4, 5))
def first_pass(
    stats: ChessStats,
    model: Layered,
    batch: Given,
    ranks: Ranks,
    importance: Importance | None,
    attention: bool,
) -> ChessStats:
    """Stats after one batch more of the first pass; one program serves all sparsities."""
    ffns, inputs = activations(models.unstack(model), batch, attention)
    moments, cuts = dict(stats.moments), dict(stats.cuts)
    for path, (gate, up) in ffns.items():
        if importance is None:
            cuts[path] = add(cuts[path], jnp.abs(gate), ranks.get(path))
        else:
            moments[path] = moments[path] + core.statistic(up, importance)
    sites = {
        path: add(stats.sites[path], jnp.abs(x), ranks.get(path)) for path, x in inputs.items()
    }
    return stats._replace(moments=moments, cuts=cuts, sites=sites, batches=stats.batches + 1)


@functools.partial(jax.jit, static_argnums=4)
def second_pass(
    stats: ChessStats,
    model: Layered,
    batch: Given,
    ranks: Ranks,
    importance: Importance,
) -> ChessStats:
    """Stats after one batch more of the second pass, which looks at the FFNs alone."""
    ffns, _ = activations(models.unstack(model), batch, False)
    cuts = {}
    for path, (gate, _) in ffns.items():
        scores = core.scores(gate, stats.moments[path], importance)
        cuts[path] = add(stats.cuts[path], scores, ranks.get(path))
    return stats._replace(cuts=cuts, batches=stats.batches + 1)


def start(options: Options, model: Layered) -> ChessStats:
    """Stats before anything was observed; SelectionError where there is nothing to sparsify."""
    model = models.unstack(model)
    ungated = [path for path, node in tree.walk(model) if isinstance(node, FFN)]
    if ungated and not any(FFNS(path, node) for path, node in tree.walk(model)):
        raise SelectionError(
            f"{ungated[0]} is an FFN without a gate: nothing says which of its channels to drop; "
            "models whose FFNs are GatedFFN are accepted"
        )
    ffns = tree.select(model, FFNS)
    zero = np.float32(0) if options.pooling == "batch" else np.zeros(core.BINS, np.int32)
    channels = {path: np.zeros(f.gate.weight.shape[1], np.float32) for path, f in ffns.items()}
    sites = tree.select(model, SITES) if options.attention else {}
    return ChessStats(
        moments=channels,
        cuts=dict.fromkeys(ffns, zero),
        sites=dict.fromkeys(sites, zero),
        thresholds={**channels, **dict.fromkeys(sites, np.float32(0))},
        batches=np.int32(0),
        passes=np.int32(0),
    )


def widths(stats: ChessStats, model: Layered) -> dict[str, int]:
    """How many activations a token has at each place."""
    config = model.config
    wide = {"q": config.width, "o": config.heads * config.head_dim}
    channels = {path: moments.size for path, moments in stats.moments.items()}
    return channels | {path: wide[path.rpartition(".")[2]] for path in stats.sites}


def add(total: Array, x: Float[Array, "..."], rank: Int[Array | np.generic, ""] | None) -> Array:
    """One batch more in `cuts` or `sites`: its order statistic, or without a rank all of it."""
    return total + (core.histogram(x) if rank is None else core.order_statistic(x, rank))


def decide(options: Options, stats: ChessStats) -> tuple[ChessStats, bool]:
    """What follows from a pass: averages, and thresholds as soon as they are known."""
    n, kind = np.float32(stats.batches), options.importance
    done = int(stats.passes) + 1 == options.passes
    moments, decided = dict(stats.moments), dict(stats.thresholds)

    def cut(total: Array) -> np.float32:
        if options.pooling == "all":
            return np.float32(core.histogram_quantile(total, options.sparsity))
        return np.float32(np.asarray(total) / n)

    if stats.passes == 0:
        moments = {path: np.asarray(total) / n for path, total in moments.items()}
        for path, total in stats.sites.items():
            decided[path] = cut(total) if options.strict else core.inclusive(cut(total))
    if done:
        for path, total in stats.cuts.items():
            t = cut(total)
            decided[path] = (
                np.full_like(moments[path], t)
                if kind is None
                else core.thresholds(t, moments[path], kind)
            )
    bad = [path for path, values in decided.items() if np.isnan(values).any()]
    if bad:
        raise NumericalError(f"activations were not finite in {bad[:5]}; check the model's weights")
    passes = np.int32(stats.passes + 1)
    stats = stats._replace(moments=moments, thresholds=decided, batches=np.int32(0), passes=passes)
    return stats, done
