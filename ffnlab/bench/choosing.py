"""Decoding where each token runs one of two FFNs, and an oracle over all patterns of choices.

A random decoder of width 512 with FFNs of 1408 channels gets small ones of 88 beside them
(`ffnlab.routing.duo`). Routers that send every token to the small ones, or to the big ones, decode
in turns: what is not chosen must not be run. Blocks are in a list: a scan over a stack copies the
weights of every layer, chosen or not (.97 instead of .62). The oracle is that of twelve layers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array
from rich.table import Table

from ffnlab import transform, tree
from ffnlab.clock import compiled, in_turns, timed
from ffnlab.errors import at_least
from ffnlab.layers import ByChoice, Linear
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.routing import BIG, duo, pattern_losses
from ffnlab.text.generate import generate
from ffnlab.weights import Dense

__all__ = ["Choosing", "Settings", "compare", "ratios"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      width, hidden, layers: of the decoder, and of its big FFNs.
      tokens: decoded at each turn.
      turns: of both sides, after one to warm up.
      oracle_layers: of the model whose patterns are tried, of width 64.
    """

    width: int = 512
    hidden: int = 1408
    layers: int = 8
    tokens: int = 64
    turns: int = 7
    oracle_layers: int = 12

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, turns=self.turns, oracle_layers=self.oracle_layers)


@dataclasses.dataclass(frozen=True)
class Choosing:
    """Times.

    Attributes:
      seconds: "small" and "big", of a token, and "oracle", of four sequences of 64 tokens; medians.
      ratio: small over big, median over turns.
      about: what they are of; one line.
    """

    seconds: Mapping[str, float]
    ratio: float
    about: str

    def __rich__(self) -> Table:
        table = Table("what", "time", title="a choice of two FFNs", caption=self.about)
        table.add_row("a token by small FFNs", f"{1e3 * self.seconds['small']:.2f} ms")
        table.add_row("a token by big FFNs", f"{1e3 * self.seconds['big']:.2f} ms")
        table.add_row("small / big", f"{self.ratio:.2f}")
        table.add_row("the oracle", f"{self.seconds['oracle']:.1f} s")
        return table


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Choosing:
    """Measures both.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    """
    s = settings
    sides = {name: decoder(s, BIG + (name == "small")) for name in ("small", "big")}
    calls = {name: decoding(model, s.tokens) for name, model in sides.items()}
    times = in_turns(calls, s.turns, label="bench" if progress else None)
    seconds = {name: times.of(name).median / s.tokens for name in calls}
    ratio = times.over("small", "big").median
    model, rows = to_try(s.oracle_layers)
    oracle = compiled(tried, rows, model)
    jax.block_until_ready(oracle())
    device = jax.devices()[0].platform
    about = (
        f"float32, jax {jax.__version__}, {device}; width {s.width}, FFNs of {s.hidden} and "
        f"{s.hidden // 16}; the oracle of {2**s.oracle_layers} patterns"
    )
    return Choosing({**seconds, "oracle": timed(oracle)}, ratio, about)


def decoder(settings: Settings, choice: int) -> Decoder:
    """A random duo whose routers make one choice."""
    s = settings
    config = DecoderConfig(
        vocab=256, width=s.width, hidden=s.hidden, layers=s.layers, heads=8, kv_heads=8, head_dim=64
    )
    model, _ = transform.apply(duo(ratio=16), Decoder(config, key=jax.random.key(0)))
    router = Linear(s.width, 2, key=jax.random.key(1), axes=("embed", "router"), bias=True)
    router = router.replace(
        Dense(jnp.zeros((s.width, 2))), jnp.where(jnp.arange(2) == choice, 1.0, 0.0)
    )

    def routed(layer: object) -> nnx.Module:
        assert isinstance(layer, ByChoice)
        return ByChoice(list(layer.branches), router=router)

    return tree.map_at(model, tree.of_type(ByChoice), routed)


def decoding(model: Decoder, tokens: int) -> Callable[[], Any]:
    """Greedy decoding of so many tokens of one row, as a call without arguments."""
    return lambda: generate(model, [[1]], max_tokens=tokens)


def tried(rows: Array, model: Decoder) -> Array:
    """Losses of all patterns."""
    return pattern_losses(model, rows)


def to_try(layers: int) -> tuple[Decoder, Array]:
    """A random duo of width 64 and four sequences of 64 tokens, each with one more."""
    config = DecoderConfig(
        vocab=256, width=64, hidden=256, layers=layers, heads=4, kv_heads=4, head_dim=16
    )
    model, _ = transform.apply(duo(ratio=16), Decoder(config, key=jax.random.key(0)))
    return model, jax.random.randint(jax.random.key(1), (4, 65), 0, 256)


def ratios() -> dict[str, float]:
    """Time of a token by small FFNs over one by big ones, "decode"; seconds of an oracle."""
    found = compare()
    return {"decode": found.ratio, "oracle": found.seconds["oracle"]}
