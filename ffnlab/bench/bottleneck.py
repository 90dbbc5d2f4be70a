"""Bottlenecks of a residual network whose spatial steps differ, on the machine at hand.

Channels 256 -> 64 -> 256 on 8 grids of 28 x 28, as in the first stage of ResNet-50 at half its
grid: with a 3 x 3 convolution, with a depthwise one, and with a maximum of 3 x 3, which learns
nothing (arXiv 2202.02777). All take turns; a ratio is the median of the turns' ratios.
"""

import dataclasses
import statistics
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from rich.table import Table

from ffnlab.bench.sparse import bound, timed
from ffnlab.errors import at_least
from ffnlab.layers import Residual
from ffnlab.models.cost import multiply_adds
from ffnlab.progress import track

__all__ = ["Comparison", "Settings", "compare", "ratios"]

WORKS = ("forward", "gradient")
OPS = ("conv", "depthwise", "max")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      images: of a call.
      side: of their grids.
      width: channels inside; four times as many outside.
      turns: times that every op runs, after one to warm up.
    """

    images: int = 8
    side: int = 28
    width: int = 64
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, images=self.images, side=self.side, width=self.width, turns=self.turns)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Times of all ops.

    Attributes:
      seconds: median over turns, by work ("forward", "gradient") and op.
      ratios: max over conv, median over turns, by work.
      multiply_adds: of a forward pass, by op.
      about: what they run on; one line.
    """

    seconds: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, float]
    multiply_adds: Mapping[str, int]
    about: str

    def __rich__(self) -> Table:
        table = Table(title="a bottleneck by its spatial step", caption=self.about)
        for name in ("work", *(f"{op} ms" for op in OPS), "max / conv"):
            table.add_column(name, justify="right")
        for work, found in self.seconds.items():
            times = (f"{1e3 * found[op]:.1f}" for op in OPS)
            table.add_row(work, *times, f"{self.ratios[work]:.2f}")
        counts = [self.multiply_adds[op] for op in OPS]
        table.add_row(
            "multiply-adds, M", *(f"{n / 1e6:.1f}" for n in counts), f"{counts[2] / counts[0]:.2f}"
        )
        return table


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures all ops.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    """
    calls = {(work, op): call for work in WORKS for op, call in sides(settings, work).items()}
    for call in calls.values():
        jax.block_until_ready(call())
    turns = track(range(settings.turns), "bench", enabled=progress)
    seconds = [{name: timed(call) for name, call in calls.items()} for _ in turns]
    medians = {
        work: {op: statistics.median(turn[work, op] for turn in seconds) for op in OPS}
        for work in WORKS
    }
    found = {
        work: statistics.median(turn[work, "max"] / turn[work, "conv"] for turn in seconds)
        for work in WORKS
    }
    counted = {op: multiply_adds(call) for op, call in sides(settings, "forward").items()}
    s, device = settings, jax.devices()[0].platform
    about = f"float32, jax {jax.__version__}, {device}; {s.images} x {s.side} x {s.side}, "
    return Comparison(medians, found, counted, about + f"{4 * s.width} -> {s.width} channels")


def sides(settings: Settings, work: str) -> dict[str, Callable[[], PyTree]]:
    """What is timed of one work, by op, as calls without arguments."""
    s, outer = settings, 4 * settings.width
    x = jax.random.normal(jax.random.key(0), (s.images, s.side, s.side, outer))
    form = forward if work == "forward" else gradient
    blocks = {op: Residual.bottleneck(outer, s.width, key=jax.random.key(1), op=op) for op in OPS}
    return {op: bound(form, x, block) for op, block in blocks.items()}


def forward(x: Float[Array, "n h w c"], block: Residual) -> Float[Array, "n h w c"]:
    """The block as it is."""
    return block(x)


def gradient(x: Float[Array, "n h w c"], block: Residual) -> PyTree:
    """Of the sum of squares of the output, for input and parameters."""
    return jax.grad(lambda x, block: jnp.sum(block(x) ** 2), (0, 1))(x, block)


def ratios() -> dict[str, float]:
    """Time of the maximum's bottleneck over the convolution's: "forward", "gradient"."""
    return dict(compare().ratios)
