"""Step 1 of PMET for several facts at once, beside one alone, per fact.

All facts are rows of one batch, and the loop is compiled once for their number. Both run as many
evaluations, of the same lengths, in turns.
"""

import dataclasses
import statistics
from collections.abc import Callable

import jax
from jaxtyping import Array
from rich.table import Table

from ffnlab.clock import timed
from ffnlab.editing import Fact
from ffnlab.editing.requests import requests
from ffnlab.editing.vectors import Steps, find
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig

__all__ = ["Editing", "Settings", "compare", "ratios"]

PREFIXES = ("The model is one of many. ", "Because it is so. ")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      width: of the model; hidden layers are three times as wide.
      layers: of it; the second one is the last that is edited.
      facts: that go through it together.
      steps: evaluations of the loss.
      turns: of both, after one to warm up.
    """

    width: int = 128
    layers: int = 6
    facts: int = 10
    steps: int = 5
    turns: int = 9

    def __post_init__(self) -> None:
        at_least(2, layers=self.layers, steps=self.steps)
        at_least(1, facts=self.facts, turns=self.turns)
        if self.width < 16 or self.width % 16:
            raise ConfigError(f"width={self.width} must be a multiple of 16")


@dataclasses.dataclass(frozen=True)
class Editing:
    """Times.

    Attributes:
      seconds: by number of facts, medians.
      ratio: of a fact among several over one alone, median over turns.
      about: what they are of; one line.
    """

    seconds: dict[int, float]
    ratio: float
    about: str

    def __rich__(self) -> Table:
        table = Table("facts", "ms", "ms a fact", title="step 1 of PMET", caption=self.about)
        for facts, seconds in self.seconds.items():
            table.add_row(str(facts), f"{1e3 * seconds:.1f}", f"{1e3 * seconds / facts:.1f}")
        table.add_row("", "", f"{self.ratio:.2f} x")
        return table


def compare(settings: Settings = Settings()) -> Editing:
    """Measures both.

    Args:
      settings: sizes and turns.
    """
    s = settings
    calls = {count: call_of(s, count) for count in dict.fromkeys((1, s.facts))}
    for call in calls.values():
        jax.block_until_ready(call())
    turns = [{count: timed(call) for count, call in calls.items()} for _ in range(s.turns)]
    seconds = {count: statistics.median(turn[count] for turn in turns) for count in calls}
    ratio = statistics.median(turn[s.facts] / s.facts / turn[1] for turn in turns)
    about = (
        f"float32, jax {jax.__version__}, {jax.devices()[0].platform}; width {s.width}, "
        f"{s.layers} layers, {s.steps} evaluations, {2 + len(PREFIXES)} texts a fact"
    )
    return Editing(seconds, ratio, about)


def call_of(settings: Settings, count: int) -> Callable[[], Array]:
    """Step 1 of so many facts, as a call that gives how many
    steps each took."""
    s = settings
    config = DecoderConfig(
        256, s.width, 3 * s.width, layers=s.layers, heads=4, kv_heads=2, head_dim=s.width // 4
    )
    model = Decoder(config, key=jax.random.key(0))
    facts = [Fact(f"Subject {i:04}", "{} was born in", " Rome") for i in range(count)]
    rows = requests(facts, Tokenizer.bytes(), model, PREFIXES)
    options = Steps(steps=s.steps)
    return lambda: find(model, rows, layer=1, options=options).steps


def ratios() -> dict[str, float]:
    """Time of a fact among ten over that of one alone."""
    return {"together": compare().ratio}
