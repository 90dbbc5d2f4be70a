"""A mixture of experts beside the dense FFN of equal active size, on the machine at hand.

4096 tokens of width 256 go through 8 experts of 512 channels, two each, and through a gated FFN of
1024, which is as many multiplications. Beside both stand the mixture's products alone, each as one
plain product of as many rows: what no way of routing could go below. All take turns, so that what
else the machine does falls on all; a ratio is the median of the turns' ratios.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree
from rich.table import Table

from ffnlab.clock import compiled, in_turns
from ffnlab.errors import at_least
from ffnlab.layers import GatedFFN, MoE, MoESpec

__all__ = ["Comparison", "Settings", "compare", "ratios"]

WORKS = ("forward", "gradient")
SIDES = ("routed", "dense", "products")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      tokens: rows of a call.
      width, hidden: of an expert.
      experts, k: of the mixture.
      turns: times that every side runs, after one to warm up.
    """

    tokens: int = 4096
    width: int = 256
    hidden: int = 512
    experts: int = 8
    k: int = 2
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, tokens=self.tokens, width=self.width, hidden=self.hidden, turns=self.turns)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Times of all sides.

    Attributes:
      seconds: median over turns, by work ("forward", "gradient") and side ("routed", "dense",
        "products").
      ratios: routed over dense, median over turns, by work.
      about: what they run on; one line.
    """

    seconds: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, float]
    about: str

    def __rich__(self) -> Table:
        title = "a mixture of experts beside the dense FFN of equal active size"
        table = Table(title=title, caption=self.about)
        for name in ("work", "routed ms", "dense ms", "its products alone ms", "routed / dense"):
            table.add_column(name, justify="right")
        for work, found in self.seconds.items():
            times = (f"{1e3 * found[side]:.1f}" for side in SIDES)
            table.add_row(work, *times, f"{self.ratios[work]:.2f}")
        return table


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures all sides.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    Raises:
      ConfigError: sizes out of range.
    """
    calls = {(work, side): call for work in WORKS for side, call in sides(settings, work).items()}
    times = in_turns(calls, settings.turns, label="bench" if progress else None)
    medians = {work: {side: times.of((work, side)).median for side in SIDES} for work in WORKS}
    found = {work: times.over((work, "routed"), (work, "dense")).median for work in WORKS}
    s, device = settings, jax.devices()[0].platform
    about = (
        f"float32, jax {jax.__version__}, {device}; {s.tokens} tokens x {s.width} x {s.hidden}, "
    )
    return Comparison(medians, found, about + f"{s.experts} experts, {s.k} each")


def sides(settings: Settings, work: str) -> dict[str, Callable[[], PyTree]]:
    """What is timed of one work, by side, as calls without arguments."""
    s, keys = settings, jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (1, s.tokens, s.width))
    routed = MoE(s.width, MoESpec(s.experts, s.k, s.hidden), key=keys[1])
    dense = GatedFFN(s.width, s.k * s.hidden, key=keys[2])
    rows = jax.random.normal(keys[3], (s.k * s.tokens, s.width))
    inner = jax.random.normal(keys[3], (s.k * s.tokens, s.hidden))
    one = GatedFFN(s.width, s.hidden, key=keys[2])
    matrices = [m.weight.dense() for m in (one.gate, one.up, one.down)]
    if work == "forward":
        forms = {"routed": mixture, "dense": layer, "products": products}
    else:
        forms = {"routed": mixture_gradient, "dense": layer_gradient, "products": all_products}
    return {
        "routed": compiled(forms["routed"], x, routed),
        "dense": compiled(forms["dense"], x, dense),
        "products": compiled(forms["products"], rows, inner, matrices),
    }


def mixture(x: Float[Array, "1 t d"], moe: MoE) -> Float[Array, "1 t d"]:
    """The mixture as it is."""
    return moe(x)[0]


def layer(x: Float[Array, "1 t d"], ffn: GatedFFN) -> Float[Array, "1 t d"]:
    """The dense layer as it is."""
    return ffn(x)


def mixture_gradient(x: Float[Array, "1 t d"], moe: MoE) -> PyTree:
    """Of the mixture's input and parameters."""
    return gradient(mixture, x, moe)


def layer_gradient(x: Float[Array, "1 t d"], ffn: GatedFFN) -> PyTree:
    """Of the dense layer's input and parameters."""
    return gradient(layer, x, ffn)


def gradient(call: Callable, x: Array, module: nnx.Module) -> PyTree:
    """Of the sum of squares of the output."""
    return jax.grad(lambda x, module: jnp.sum(call(x, module) ** 2), (0, 1))(x, module)


def products(rows: Array, inner: Array, matrices: list[Array]) -> list[Array]:
    """The three products of a forward pass, of as many rows as tokens have experts."""
    gate, up, down = matrices
    return [rows @ gate, rows @ up, inner @ down]


def all_products(rows: Array, inner: Array, matrices: list[Array]) -> list[Array]:
    """Those, and for each the two of its gradient."""
    gate, up, down = matrices
    back = [inner @ gate.T, inner @ up.T, rows @ down.T]
    return [
        *products(rows, inner, matrices),
        *back,
        rows.T @ inner,
        rows.T @ (2 * inner),
        inner.T @ rows,
    ]


def ratios() -> dict[str, float]:
    """Time of the mixture over that of the dense layer: "forward", "gradient"."""
    return dict(compare().ratios)
