"""FFNs of structured matrices beside dense ones, and from how many rows on factors beat their
product.

    FFN        down(gelu(up(x))), many rows: dense, and each form with 63 and 32 % of the parameters
    crossover  x @ up by the factors and by their product (`ffnlab.weights.Merged`), few rows

Forms run in turns; each is compiled as a whole.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from rich.console import Group
from rich.table import Table

from ffnlab.bench.sparse import bound, timed
from ffnlab.errors import ConfigError, at_least
from ffnlab.layers import FFN
from ffnlab.progress import track
from ffnlab.structure.structured_ffn import FORMS, made, paper_options
from ffnlab.weights import Merged, Weight

__all__ = ["Settings", "Structured", "compare", "ratios"]

PERCENTS = (63, 32)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      width: of the stream, divisible by 8; hidden layers are four times as wide.
      tokens: rows of an FFN's call.
      rows: of the calls among which the crossover is sought, rising.
      turns: of all forms, after one to warm up.
    """

    width: int = 768
    tokens: int = 1024
    rows: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, turns=self.turns, width=self.width)
        if self.width % 8:
            raise ConfigError(f"width={self.width} must be divisible by 8")
        if not self.rows or list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ConfigError(f"rows={self.rows} must be rising numbers of 1 or more")


@dataclasses.dataclass(frozen=True)
class Structured:
    """Times.

    Attributes:
      seconds: of FFNs by name, "dense" or "low_rank 63" and so on; medians.
      ratios: the dense FFN's time over that of each other; medians over turns.
      factors: by form (of 32 %) and rows, time of the factors over that of their product.
      crossover: by form, rows from which on the factors were never slower; None where they were at
        the most rows that were tried.
      about: what they are of; one line.
    """

    seconds: Mapping[str, float]
    ratios: Mapping[str, float]
    factors: Mapping[str, Mapping[int, float]]
    crossover: Mapping[str, int | None]
    about: str

    def __rich__(self) -> Group:
        ffns = Table("form", "FFN ms", "dense / it", title="structured FFNs")
        for name, seconds in self.seconds.items():
            over = f"{self.ratios[name]:.2f}" if name in self.ratios else ""
            ffns.add_row(name, f"{1e3 * seconds:.2f}", over)
        title = f"factors / product, {PERCENTS[-1]} %"
        over = Table("rows of a call", *self.factors, title=title, caption=self.about)
        tried = list(next(iter(self.factors.values())))
        for rows in tried:
            over.add_row(str(rows), *(f"{each[rows]:.2f}" for each in self.factors.values()))
        found = (str(self.crossover[form] or f"> {tried[-1]}") for form in self.factors)
        over.add_row("factors win from", *found)
        return Group(ffns, over)


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Structured:
    """Measures FFNs and crossovers.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    """
    s = settings
    calls = ffns(s)
    turns = in_turns(calls, s.turns)
    seconds = {name: statistics.median(turn[name] for turn in turns) for name in calls}
    ratios = {
        name: statistics.median(turn["dense"] / turn[name] for turn in turns)
        for name in calls
        if name != "dense"
    }
    factors: dict[str, dict[int, float]] = {}
    for form in track(FORMS, "bench", enabled=progress):
        w = matrix(form, s.width)
        factors[form] = {rows: over_product(w, rows, s.turns) for rows in s.rows}
    about = (
        f"float32, jax {jax.__version__}, {jax.devices()[0].platform}; width {s.width}, "
        f"{s.tokens} tokens"
    )
    found = {form: crossover_of(each) for form, each in factors.items()}
    return Structured(seconds, ratios, factors, found, about)


def in_turns(calls: Mapping[str, Callable[[], Array]], turns: int) -> list[dict[str, float]]:
    """Seconds of every call, turn by turn."""
    for call in calls.values():
        jax.block_until_ready(call())
    return [{name: timed(call) for name, call in calls.items()} for _ in range(turns)]


def ffns(settings: Settings) -> dict[str, Callable[[], Array]]:
    """Calls of a dense FFN, and of the forms of either size."""
    width = settings.width
    dense = FFN(width, 4 * width, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (settings.tokens, width))
    layers = {"dense": dense}
    for percent in PERCENTS:
        for form in FORMS:
            layers[f"{form} {percent}"] = thin(dense, paper_options(form, width, percent))
    return {name: bound(applied, x, layer) for name, layer in layers.items()}


def applied(x: Float[Array, "n d"], layer: FFN) -> Float[Array, "n d"]:
    """layer(x)."""
    return layer(x)


def thin(ffn: FFN, options: Mapping[str, Any]) -> FFN:
    """An FFN with drawn structured matrices."""
    new = jax.tree.map(lambda leaf: leaf, ffn)
    for name in ("up", "down"):
        old = getattr(ffn, name)
        setattr(new, name, old.replace(drawn(old.weight.dense(), **options)))
    return new


def drawn(
    w: Float[Array, "n m"], *, form: str, rank: int | None = None, blocks: int | None = None
) -> Weight:
    """A structured matrix of drawn factors, for which nothing is decomposed."""
    return made(w, jax.random.key(2), form, "gaussian", rank or 1, blocks or 1)


def matrix(form: str, width: int) -> Weight:
    """The first matrix of an FFN in a form, with 32 % of the parameters."""
    return drawn(jnp.zeros((width, 4 * width)), **paper_options(form, width, PERCENTS[-1]))


def over_product(w: Weight, rows: int, turns: int) -> float:
    """Time of the factors over that of their product, for so many rows; median over turns."""
    x = jax.random.normal(jax.random.key(3), (rows, w.shape[0]))
    pair = {"factors": w, "product": jax.block_until_ready(whole(w))}
    calls = {name: bound(multiplied, x, weight) for name, weight in pair.items()}
    found = in_turns(calls, turns)
    return statistics.median(turn["factors"] / turn["product"] for turn in found)


def whole(w: Weight) -> Weight:
    """The product of a structured matrix."""
    return Merged.of(w, rows=0).product


def multiplied(x: Float[Array, "n d"], w: Weight) -> Float[Array, "n m"]:
    """x @ w."""
    return w.matmul(x)


def crossover_of(over: dict[int, float]) -> int | None:
    """The rows from which on a ratio stays at 1 or below.

    >>> crossover_of({1: 1.4, 2: 0.9, 4: 1.1, 8: 0.8, 16: 1.0}), crossover_of({1: 0.5, 2: 1.2})
    (8, None)
    """
    found = None
    for rows, ratio in reversed(over.items()):
        if ratio > 1:
            break
        found = rows
    return found


def ratios() -> dict[str, float]:
    """Time of the dense FFN over that of each form, at width 768."""
    return dict(compare(Settings(rows=(64,))).ratios)
