"""FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models (2024).

Attention and FFN sublayers are removed one at a time, each time the one without which the model's
output on a small calibration set stays closest to the original model's. Scores are taken anew in
every round and always against the original model; no weight changes. The order of removal is the
result: every smaller model is a prefix of it.

n: blocks.   s: sublayers of a block, attention and FFN in most.   N: removable units, s n for a
whole model.   x: protected fraction (`protect`).
Gates: f32 [n, s], multipliers of every sublayer's branch; 0 removes it.

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
- Theirs are decoders of text, here any models with blocks. Padding does not count; of an encoder
  that points at spans, the distributions are those over the tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import models
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import LayerInputs
from ffnlab.models import Decoder
from ffnlab.models.calibration import Given, Layered, given
from ffnlab.models.units import present as sublayers_of
from ffnlab.models.units import removable
from ffnlab.models.units import slots as slots_of
from ffnlab.pruning.finercut_core import DISTANCES, Distance
from ffnlab.pruning.finercut_search import (
    Candidates,
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

__all__ = ["Search", "finercut", "removal_order"]

NEVER = -1e30  # logit of a token that is padding


def finercut(
    *,
    remove: int | Literal["all"] | None = None,
    rate: float | None = None,
    distance: str = "js",
    protect: float | None = 0.0,
    units: Units = "both",
    one_shot: bool = False,
    memory: int | None = None,
) -> Transform[Layered, Search]:
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
        outputs, or "perplexity", which ignores the original model, of a model that predicts the
        next token. "norm" and "perplexity" have one term per sample: a chunk may hold any number of
        samples, but whole ones.
      protect: x in [0, 1): blocks 0 .. floor(N x / 2) are no candidates until floor(N x) + 1 units
        are gone; the authors use 0.4 for large models. As in their code, x = 0 still protects block
        0 in the first pass, and whole blocks are never protected. None: no protection at all.
      units: "both" kinds of sublayer, "attention", "ffn", or "block": all sublayers of a block
        as one unit.
      one_shot: rank all candidates by the first pass (protected ones by a second, after the
        others): the baseline without a search.
      memory: bytes for the logits and activations of the candidates evaluated together; at least
        one candidate is. Default: a quarter of an accelerator's memory; 0 on a CPU, where groups
        of six were measured to take three times as long as one after another.
    Returns:
      a transform of models with blocks, whose batches are what the model takes (an array, such as
      tokens int [b, t], or a mapping by names: `ffnlab.models.calibration.given`) and whose stats
      are a `Search`. `rewrite` takes the sublayers out, unstacking a stacked model.
    Raises:
      ConfigError: an option out of range; at `init`, more units asked for than there are, or
        "perplexity" of a model that is no Decoder.

    Source: arXiv 2405.18218; search loop and defaults from the authors' repository.

    >>> finercut(rate=0.25, protect=0.4).name
    'finercut'
    """
    check_options(remove, rate, distance, protect, units, memory)
    metric = DISTANCES[distance]
    chunk_sums = summing(metric)

    def pool_of(model: Layered, present: Bool[np.ndarray, "n s"]) -> Candidates:
        return candidates(present & removable(model), units, protect, slots_of(model))

    def init(model: Layered) -> Search:
        present = sublayers_of(model)
        if distance == "perplexity" and not isinstance(model, Decoder):
            kind = type(model).__name__
            raise ConfigError(
                f"distance='perplexity' is of next tokens; the model is of type {kind}"
            )
        goal(pool_of(model, present), remove, rate, one_shot=one_shot)
        return start(present)

    def observe(stats: Search, model: Layered, batch: Any) -> Search:
        batch = given(batch, model, least=2 if distance == "perplexity" else 1)
        pool = pool_of(model, stats.present)
        open_drops = pool.drops[eligible(pool, removed(pool, stats), one_shot=one_shot)]
        gates, active = grouped(
            (stats.step < 0) & ~open_drops,
            size=together(model, batch.first.shape[:2], memory),
            capacity=max(1, len(pool.drops)),
        )
        sums, is_sane, *counts = chunk_sums(model, batch, gates, active)
        totals = np.asarray(sums, np.float64).reshape(-1)[: len(open_drops)]
        check_finite(bool(is_sane), totals, open_drops, slots_of(model))
        spread = np.einsum("c,cnk->nk", totals, open_drops)  # each cell belongs to one candidate
        count = metric.terms(len(batch.first), *map(int, counts))
        return stats._replace(sums=stats.sums + spread, count=np.asarray(stats.count + count))

    def advance(model: Layered, stats: Search) -> tuple[Search, bool]:
        pool = pool_of(model, stats.present)
        wanted = goal(pool, remove, rate, one_shot=one_shot)
        gone = removed(pool, stats)
        if gone.sum() < wanted:
            stats = decide(pool, eligible(pool, gone, one_shot=one_shot), stats, wanted, one_shot)
        return stats, bool(removed(pool, stats).sum() >= wanted)

    def rewrite(model: Layered, stats: Search) -> Layered:
        if not np.array_equal(sublayers_of(model), stats.present):
            raise ConfigError(
                "stats are of a model with other sublayers; rewrite the model that was calibrated"
            )
        pool = pool_of(model, stats.present)
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
      (model, batch, gates [m, c, n, s], active []) -> (summed distance of each candidate in the
      first `active` groups [m, c], whether the original model's outputs are finite [], number of
      positions that count [], outputs of each []).
    """

    @jax.jit
    def chunk_sums(
        model: Layered,
        batch: Given,
        gates: Float[Array, "m c n s"],
        active: Int[Array, ""],
    ) -> tuple[Float[Array, "m c"], Bool[Array, ""], Int[Array, ""], Int[Array, ""]]:
        """Summed distance of each candidate in the first `active` groups; is the original sane?"""

        def output(gate: Float[Array, "n s"]) -> Float[Array, "b *t v"]:
            return compared(model, batch, batch.run(model, inputs=LayerInputs(gates=gate)))

        original = output(jnp.ones_like(gates[0, 0]))
        by_token = not is_span(model) and original.shape[1:-1] == batch.first.shape[1:2]
        valid = batch.valid if by_token else None

        def one(gate: Float[Array, "n s"]) -> Float[Array, ""]:
            return metric.total(original, output(gate), batch.tokens, valid)

        def group(i: Int[Array, ""], sums: Float[Array, "m c"]) -> Float[Array, "m c"]:
            return sums.at[i].set(jax.vmap(one)(gates[i]))

        sums = jnp.zeros(gates.shape[:2], jnp.float32)
        positions = math.prod(original.shape[:-1]) if valid is None else jnp.sum(valid)
        counts = jnp.int32(positions), jnp.int32(original.shape[-1])
        is_sane = jnp.isfinite(original).all()
        return jax.lax.fori_loop(0, active, group, sums), is_sane, *counts

    return chunk_sums


def compared(model: Layered, batch: Given, output: Array) -> Float[Array, "b *t v"]:
    """What is compared of a model's output: itself, but of spans [b, t, 2] the logits [b, 2, t] of
    every token being the first, and the last."""
    if not is_span(model):
        return output
    output = jnp.moveaxis(output, -1, 1)
    return output if batch.valid is None else jnp.where(batch.valid[:, None], output, NEVER)


def is_span(model: Layered) -> bool:
    """Whether a model points at the first and the last token of a span."""
    return getattr(model.config, "head", None) == "span"


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
    is_sane: bool,
    totals: Float[np.ndarray, "c"],
    drops: Bool[np.ndarray, "c n s"],
    slots: Sequence[str],
) -> None:
    """Ends a search whose scores would be meaningless."""
    if not is_sane:
        raise NumericalError(
            "the original model's logits are not finite on this batch; check its weights and dtype"
        )
    bad = np.flatnonzero(~np.isfinite(totals))
    if len(bad):
        block, slot = divmod(int(drops[bad[0]].reshape(-1).argmax()), len(slots))
        kind = "attention" if slots[slot] == "attn" else slots[slot]
        raise NumericalError(
            f"the distance is not finite for {len(bad)} candidates, the first without {kind} of "
            f"block {block}; protect the blocks that keep activations in range, or use float32"
        )


def together(model: Layered, shape: tuple[int, ...], memory: int | None) -> int:
    """How many candidates to evaluate together, >= 1; their memory is estimated from above."""
    config, positions = model.config, math.prod(shape)
    outputs = getattr(config, "vocab", config.width)
    # Outputs with the distance's temporaries, one sublayer's activations, attention scores twice.
    floats = 4 * outputs + 6 * config.width + 3 * config.hidden + 2 * config.heads * shape[-1]
    if memory is None:
        # Not what is free just now: the number must not change between passes.
        found = jax.local_devices()[0].memory_stats() or {}
        memory = found.get("bytes_limit", 0) // 4
    return max(1, memory // (4 * positions * floats))
