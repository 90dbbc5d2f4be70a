"""FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models (2024).

Attention and FFN sublayers are removed one at a time, each time the one without which the model's
output on a small calibration set stays closest to the original model's. Scores are taken anew in
every round and always against the original model; no weight changes. The order of removal is the
result: every smaller model is a prefix of it.

n: blocks.   N: removable units, 2 n for a whole model.   x: protected fraction (`protect`).
Gates: f32 [n, 2], multipliers of every block's attention and FFN branch; 0 removes a sublayer.

What differs from the authors' code, and why:
- They hold the original model's logits for the whole calibration set, which for 10 x 256 tokens and
  a vocabulary of 128,000 are 1.3 GB. Here each chunk's are computed again in every round and thrown
  away: only one chunk's logits (times the candidates evaluated together) are ever held, and a
  round over m candidates costs m + 1 forward passes instead of m.
- Gates are an argument of one compiled function, so the search compiles once; and on an
  accelerator candidates are evaluated several at a time, as `memory` allows.
- A protected prefix that leaves no candidate is an error here before the search; there it ends in
  an exception midway.
- Distances are written so as to be exact near 0 (`finercut_core.py`).
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import models
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import LayerInputs
from ffnlab.models import Decoder
from ffnlab.models.calibration import check_tokens
from ffnlab.pruning.finercut_core import DISTANCES, Distance
from ffnlab.pruning.finercut_search import (
    Search,
    Units,
    candidates,
    decide,
    eligible,
    goal,
    grouped,
    removal_order,
    removed,
    start,
)
from ffnlab.transform import Transform

__all__ = ["Search", "finercut", "removal_order", "sublayers"]


def finercut(
    *,
    remove: int | Literal["all"] | None = None,
    rate: float | None = None,
    distance: str = "js",
    protect: float | None = 0.0,
    units: Units = "both",
    one_shot: bool = False,
    memory: int | None = None,
) -> Transform[Decoder, Search]:
    """Greedy removal of sublayers by their effect on the output.

    u* = argmin over candidates u of mean dist(Y, logits(model - removed - u)), one u* per pass

    Removing K of N units takes K passes and about K N - K (K - 1) / 2 + K forward passes over the
    calibration set. Give it chunks of equal shape; a second shape compiles a second time. The
    authors calibrate on 10 x 256 tokens of text, all positions scored.

    Args:
      remove: number of units to remove, 0 .. N, or "all" for a full ranking. Exactly one of
        `remove` and `rate` is given.
      rate: fraction of the units, in [0, 1]; floor(N rate) are removed.
      distance: "js" (the authors' default), "js_textbook", "kl", "norm" or "angular" between the
        logits, or "perplexity", which ignores the original model. "norm" and "perplexity" have one
        term per sample: a chunk may hold any number of samples, but whole ones.
      protect: x in [0, 1): blocks 0 .. floor(N x / 2) are no candidates until floor(N x) + 1 units
        are gone; the authors use 0.4 for large models. As in their code, x = 0 still protects block
        0 in the first pass, and whole blocks are never protected. None: no protection at all.
      units: "both" kinds of sublayer, "attention", "ffn", or "block": both sublayers of a block
        as one unit.
      one_shot: rank all candidates by the first pass (protected ones by a second, after the
        others): the baseline without a search.
      memory: bytes for the logits and activations of the candidates evaluated together; at least
        one candidate is. Default: a quarter of an accelerator's memory; 0 on a CPU, where groups
        of six were measured to take three times as long as one after another.
    Returns:
      a transform whose batches are tokens int [b, t] and whose stats are a `Search`. `rewrite`
      takes the sublayers out, unstacking a stacked model.
    Raises:
      ConfigError: an option out of range; at `init`, more units asked for than there are.

    Source: arXiv 2405.18218; search loop and defaults from the authors' repository.

    >>> finercut(rate=0.25, protect=0.4).name
    'finercut'
    """
    check_options(remove, rate, distance, protect, units, memory)
    metric = DISTANCES[distance]
    chunk_sums = summing(metric)

    def init(model: Decoder) -> Search:
        present = sublayers(models.unstack(model))
        goal(candidates(present, units, protect), remove, rate, one_shot=one_shot)
        return start(present)

    def observe(stats: Search, model: Decoder, batch: Int[Array | np.ndarray, "b t"]) -> Search:
        tokens = check_tokens(batch, model.config.vocab, least=2 if distance == "perplexity" else 1)
        pool = candidates(stats.present, units, protect)
        open_drops = pool.drops[eligible(pool, removed(pool, stats), one_shot=one_shot)]
        gates, active = grouped(
            (stats.step < 0) & ~open_drops,
            size=together(model, tokens.shape, memory),
            capacity=max(1, len(pool.drops)),
        )
        sums, is_sane = chunk_sums(model, tokens, gates, active)
        totals = np.asarray(sums, np.float64).reshape(-1)[: len(open_drops)]
        check_finite(bool(is_sane), totals, open_drops)
        spread = np.einsum("c,cnk->nk", totals, open_drops)  # each cell belongs to one candidate
        samples, length = tokens.shape
        count = metric.terms(samples, length, model.config.vocab)
        return stats._replace(sums=stats.sums + spread, count=np.asarray(stats.count + count))

    def advance(model: Decoder, stats: Search) -> tuple[Search, bool]:
        pool = candidates(stats.present, units, protect)
        wanted = goal(pool, remove, rate, one_shot=one_shot)
        gone = removed(pool, stats)
        if gone.sum() < wanted:
            stats = decide(pool, eligible(pool, gone, one_shot=one_shot), stats, wanted, one_shot)
        return stats, bool(removed(pool, stats).sum() >= wanted)

    def rewrite(model: Decoder, stats: Search) -> Decoder:
        if not np.array_equal(sublayers(model), stats.present):
            raise ConfigError(
                "stats are of a model with other sublayers; rewrite the model that was calibrated"
            )
        pool = candidates(stats.present, units, protect)
        wanted, found = goal(pool, remove, rate, one_shot=one_shot), int(stats.step.max()) + 1
        if found < wanted:
            raise ConfigError(f"stats order {found} removals of {wanted}; calibrate until done")
        return models.remove(model, removal_order(stats, wanted))

    return Transform(
        name="finercut",
        init=init,
        observe=None if remove == 0 else observe,
        advance=advance,
        rewrite=rewrite,
    )


def summing(metric: Distance) -> Callable:
    """The compiled function that every pass calls on each chunk; one per search.

    Args:
      metric: what is summed.
    Returns:
      (model, tokens [b, t], gates [m, c, n, 2], active []) -> (summed distance of each candidate in
      the first `active` groups [m, c], whether the original model's logits are finite []).
    """

    @jax.jit
    def chunk_sums(
        model: Decoder,
        tokens: Int[Array, "b t"],
        gates: Float[Array, "m c n 2"],
        active: Int[Array, ""],
    ) -> tuple[Float[Array, "m c"], Bool[Array, ""]]:
        """Summed distance of each candidate in the first `active` groups; is the original sane?"""
        original = model(tokens, inputs=LayerInputs(gates=jnp.ones_like(gates[0, 0])))

        def one(gate: Float[Array, "n 2"]) -> Float[Array, ""]:
            return metric.total(original, model(tokens, inputs=LayerInputs(gates=gate)), tokens)

        def group(i: Int[Array, ""], sums: Float[Array, "m c"]) -> Float[Array, "m c"]:
            return sums.at[i].set(jax.vmap(one)(gates[i]))

        sums = jnp.zeros(gates.shape[:2], jnp.float32)
        return jax.lax.fori_loop(0, active, group, sums), jnp.isfinite(original).all()

    return chunk_sums


def sublayers(model: Decoder) -> Bool[np.ndarray, "n 2"]:
    """Which blocks still have their attention and their FFN, [n, 2]; stacked or not."""
    blocks = [[block.attn is not None, block.ffn is not None] for block in model.blocks()]
    return np.tile(np.array(blocks, bool), (model.config.layers // len(blocks), 1))


def check_options(
    remove: object, rate: object, distance: str, protect: float | None, units: str, memory: object
) -> None:
    """Refuses options that make no sense for any model."""
    if (remove is None) == (rate is None):
        raise ConfigError(f"remove={remove!r} and rate={rate!r}: give exactly one of them")
    is_count = isinstance(remove, int) and not isinstance(remove, bool) and remove >= 0
    if remove is not None and remove != "all" and not is_count:
        raise ConfigError(f"remove={remove!r}; it is a number of units >= 0, or 'all'")
    if rate is not None and not 0.0 <= rate <= 1.0:
        raise ConfigError(f"rate={rate!r} is outside [0, 1]: it is the fraction of units removed")
    if distance not in DISTANCES:
        raise ConfigError(f"distance={distance!r} is unknown; there are {', '.join(DISTANCES)}")
    if units not in ("both", "attention", "ffn", "block"):
        raise ConfigError(f"units={units!r}; there are both, attention, ffn, block")
    if protect is not None and not 0.0 <= protect < 1.0:
        raise ConfigError(f"protect={protect!r} is outside [0, 1); None protects nothing")
    if protect and units == "block":
        raise ConfigError(f"protect={protect!r} with units='block': whole blocks are not protected")
    if memory is not None and not memory >= 0:
        raise ConfigError(f"memory={memory!r} bytes; it is at least 0")


def check_finite(
    is_sane: bool, totals: Float[np.ndarray, "c"], drops: Bool[np.ndarray, "c n 2"]
) -> None:
    """Ends a search whose scores would be meaningless."""
    if not is_sane:
        raise NumericalError(
            "the original model's logits are not finite on this batch; check its weights and dtype"
        )
    bad = np.flatnonzero(~np.isfinite(totals))
    if len(bad):
        unit = int(drops[bad[0]].reshape(-1).argmax())
        kind = "ffn" if unit % 2 else "attention"
        raise NumericalError(
            f"the distance is not finite for {len(bad)} candidates, the first without {kind} of "
            f"block {unit // 2}; protect the blocks that keep activations in range, or use float32"
        )


def together(model: Decoder, shape: tuple[int, int], memory: int | None) -> int:
    """How many candidates to evaluate together, >= 1; their memory is estimated from above."""
    config, positions = model.config, shape[0] * shape[1]
    # Logits with the distance's temporaries, one sublayer's activations, attention scores twice.
    floats = 4 * config.vocab + 6 * config.width + 3 * config.hidden + 2 * config.heads * shape[1]
    if memory is None:
        # Not what is free just now: the number must not change between passes.
        found = jax.local_devices()[0].memory_stats() or {}
        memory = found.get("bytes_limit", 0) // 4
    return max(1, memory // (4 * positions * floats))
