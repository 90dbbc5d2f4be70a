"""The embedded model at half the multiply-adds of its FFNs, in three ways: widths that were
searched, whole FFNs removed by FinerCut, and widths drawn from those that cost as much.

Every way takes as many steps of gradient descent on the same text, those of the search included,
each at the best of as many rates on validation text.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int, PyTree

from ffnlab.data import TextBatches, Zipped
from ffnlab.learning import backprop
from ffnlab.losses import next_token
from ffnlab.models import Decoder, narrow, remove, removed
from ffnlab.models.stack import period_of
from ffnlab.models.units import units
from ffnlab.parallel import LoopOptions, train
from ffnlab.pruning import TASOptions, finercut, tas
from ffnlab.pruning.search import Space, Variable, drawn_alike, macs
from ffnlab.pruning.tas.core import width_choices
from ffnlab.rule import Rule
from ffnlab.transform import calibrate

__all__ = ["Half", "Pace", "Texts", "at_half", "hidden_of"]

SEARCHED, REMOVED, RANDOM = "searched", "FinerCut", "random"


class Texts(NamedTuple):
    """Bytes, or token ids.

    Attributes:
      train: to learn from.
      validation: to choose rates on.
      held_out: to report.
    """

    train: bytes | Int[np.ndarray, "n"]
    validation: bytes | Int[np.ndarray, "n"]
    held_out: bytes | Int[np.ndarray, "n"]


class Pace(NamedTuple):
    """How long, and on how much.

    Attributes:
      search, tune: steps of the search, and of training what it found; the others take both.
      batch, length: rows of a step, and predictions in a row.
      rates: of AdamW, that every way tries.
      scored: rows that are scored.
    """

    search: int = 300
    tune: int = 150
    batch: int = 4
    length: int = 128
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3, 3e-3)
    scored: int = 96


class Half(NamedTuple):
    """A model of about half the multiply-adds.

    Attributes:
      model: itself.
      share: multiply-adds of its FFNs over those of the whole model's.
      bits: of a held-out byte.
      rate: that was chosen.
      tried: bits of a validation byte at every rate.
    """

    model: Decoder
    share: float
    bits: float
    rate: float
    tried: tuple[float, ...]


def at_half(model: Decoder, texts: Texts, pace: Pace, *, seed: int) -> dict[str, Half]:
    """The model whole and in the three ways; keys "whole" and the names of the ways.

    Args:
      model: with FFNs in all its layers, in a list.
      texts, pace: what is read, and how long.
      seed: of rows, draws and the random widths.
    """
    example = jax.ShapeDtypeStruct((1, pace.length), jnp.int32)
    all_ffns = [unit.number for unit in units(model) if unit.slot == "ffn"]
    total = macs(model, example)
    ffns = total - macs(remove(model, all_ffns), example)
    part = lambda net: 1 - (total - macs(net, example)) / ffns  # noqa: E731
    bits = functools.partial(scored, texts.held_out, pace, seed)
    found = {"whole": Half(model, 1.0, bits(model), 0.0, ())}
    options = TASOptions(
        target=1 - 0.5 * ffns / total,
        slack=0.05 * ffns / total,
        strength=20.0,
        rate=0.05,
        depth=False,
    )
    cut = lambda text: TextBatches(text, pace.batch, pace.length, seed, "the training text")  # noqa: E731
    middle = len(texts.train) // 2
    rows = cut(texts.train)
    halves = Zipped(cut(texts.train[:middle]), cut(texts.train[middle:]))

    def searched(rate: float) -> Decoder:
        optimizer = falling(rate, pace.search)
        rule = tas(next_token, optimizer, example=example, steps=pace.search, options=options)
        state = trained(rule, model, halves, pace.search, seed)
        return tuned(rule.finished(state), rate, pace.tune)

    def tuned(start: Decoder, rate: float, steps: int) -> Decoder:
        rule = backprop(next_token, falling(rate, steps))
        return trained(rule, start, rows, steps, seed).model

    whole = pace.search + pace.tune
    best = functools.partial(chosen, texts=texts, pace=pace, seed=seed, share=part, bits=bits)
    found[SEARCHED] = best(searched)
    window = rows(0)[:, :-1]
    drop = finercut(remove=len(all_ffns) // 2, units="ffn")
    fewer = drop.rewrite(model, calibrate(drop, model, [window], progress=False))
    found[REMOVED] = best(lambda rate: tuned(fewer, rate, whole))
    drawn = random_widths(model, sum(hidden_of(found[SEARCHED].model)), seed)
    found[RANDOM] = best(lambda rate: tuned(drawn, rate, whole))
    return found


def hidden_of(model: Decoder) -> list[int]:
    """Hidden channels of every layer, 0 where the FFN is removed."""
    gone = set(removed(model))
    ffns = [unit for unit in units(model) if unit.slot == "ffn"]
    blocks = period_of(model.layers)
    size = lambda layer: blocks[layer].ffn.down.weight.shape[0]  # noqa: E731
    return [0 if unit.number in gone else size(unit.layer) for unit in ffns]


def random_widths(model: Decoder, channels: int, seed: int) -> Decoder:
    """The model with as many hidden channels in all, spread over its layers at random."""
    names = [f"layers[{i}].ffn" for i in range(len(model.layers))]
    choices = [width_choices(size) for size in hidden_of(model)]
    space = Space(tuple(Variable(n, c) for n, c in zip(names, choices, strict=True)))
    cost = lambda config: sum(value for (value,) in config.values())  # noqa: E731
    config = drawn_alike(space, cost, channels, np.random.default_rng(seed))
    return narrow(model, {name: range(value) for name, (value,) in config.items()})


def falling(rate: float, steps: int) -> optax.GradientTransformation:
    """AdamW whose rate falls to 0 by a cosine, on gradients clipped to norm 1."""
    cosine = optax.cosine_decay_schedule(rate, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(cosine, weight_decay=0.1))


def trained(rule: Rule, model: PyTree, batches: Callable, steps: int, seed: int) -> PyTree:
    """The state after so many steps.

    Raises:
      KeyboardInterrupt: a signal stopped it; what it learned so far is no result.
    """
    options = LoopOptions(log_every=0, progress=False)
    outcome = train(rule, model, batches, steps, key=jax.random.key(seed), options=options)
    if not outcome.finished:
        raise KeyboardInterrupt(f"stopped at step {outcome.position} of {steps}")
    return outcome.state


def scored(text: bytes | Int[np.ndarray, "n"], pace: Pace, seed: int, model: Decoder) -> float:
    """Bits of a token of some rows of a text, eight rows at a time."""
    rows = TextBatches(text, pace.scored, pace.length, seed, "the text to score")(0)
    cost = jax.jit(lambda model, rows: next_token(model, rows)[1]["bits"])
    parts = np.split(rows, range(8, len(rows), 8))
    found = [(float(cost(model, jnp.asarray(part))), len(part)) for part in parts]
    return float(np.average([bits for bits, _ in found], weights=[n for _, n in found]))


def chosen(
    make: Callable[[float], Decoder],
    *,
    texts: Texts,
    pace: Pace,
    seed: int,
    share: Callable[[Decoder], float],
    bits: Callable[[Decoder], float],
) -> Half:
    """A way at the rate that validation text chooses."""
    made = [make(rate) for rate in pace.rates]
    tried = [scored(texts.validation, pace, seed, net) for net in made]
    at = int(np.argmin(tried))
    return Half(made[at], share(made[at]), bits(made[at]), pace.rates[at], tuple(tried))
