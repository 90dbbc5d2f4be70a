"""Sparse decoding of one gated FFN beside the fastest dense form of the same layer, on the CPU.

One token goes through a SwiGLU of 2048 x 5632 in float32, whose 138 MB lie in memory and not in a
cache. The dense side is written in six ways, fused and transposed ones included, and the fastest
of them is the peer. All take turns, so that what else the machine does falls on all; a ratio is
the median of the turns' ratios. The outputs are compared, else the figures would not be of the
same work.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from rich.table import Table

from ffnlab.errors import FFNLabError, at_least
from ffnlab.layers import ACTIVATIONS, GatedFFN, SparseGatedFFN
from ffnlab.progress import track
from ffnlab.weights import Transposed

__all__ = ["Comparison", "Level", "Settings", "compare", "limit", "ratios"]

# Float32 sums of thousands of products in another order, relative to the largest output.
TOLERANCE = 1e-5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      width, hidden: of the layer.
      sparsities: fractions of hidden channels dropped, each in [0, 1), ascending.
      turns: times that every form runs, after one to warm up.
    """

    width: int = 2048
    hidden: int = 5632
    sparsities: tuple[float, ...] = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    turns: int = 41

    def __post_init__(self) -> None:
        at_least(1, width=self.width, hidden=self.hidden, turns=self.turns)


@dataclasses.dataclass(frozen=True)
class Level:
    """One sparsity.

    Attributes:
      sparsity: fraction of channels dropped.
      seconds: of the sparse layer, median over turns.
      ratio: how many times faster than the fastest dense form it is; median over turns.
    """

    sparsity: float
    seconds: float
    ratio: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All sparsities, and what the two sides are.

    Attributes:
      levels: by ascending sparsity.
      dense: seconds of each dense form, median over turns.
      about: what both sides run on and in which dtype; one line each.
    """

    levels: tuple[Level, ...]
    dense: dict[str, float]
    about: str

    @property
    def peer(self) -> str:
        """Name of the fastest dense form."""
        return min(self.dense, key=self.dense.__getitem__)

    @property
    def crossover(self) -> float:
        """The sparsity above which the sparse layer is faster, between levels by interpolation.

        0 if it is faster at all levels, NaN if it is not at the last.
        """
        slower = [i for i, level in enumerate(self.levels) if level.ratio <= 1]
        if not slower:
            return 0.0
        if slower[-1] + 1 == len(self.levels):
            return float("nan")
        a, b = self.levels[slower[-1] : slower[-1] + 2]
        return a.sparsity + (1 - a.ratio) / (b.ratio - a.ratio) * (b.sparsity - a.sparsity)

    def __rich__(self) -> Table:
        forms = ", ".join(f"{name} {1e3 * s:.2f} ms" for name, s in self.dense.items())
        table = Table(
            title="sparse decoding beside the fastest dense form",
            caption=f"faster from {self.crossover:.0%} on\ndense: {forms}\n{self.about}",
        )
        for name in ("sparsity", "sparse ms", "dense ms", "ratio", "proportional limit"):
            table.add_column(name, justify="right")
        for level in self.levels:
            times = (f"{1e3 * s:.2f}" for s in (level.seconds, self.dense[self.peer]))
            ratios = (f"{level.ratio:.2f}", f"{limit(level.sparsity):.2f}")
            table.add_row(f"{level.sparsity:.0%}", *times, *ratios)
        return table


def limit(sparsity: float) -> float:
    """The ratio if time were proportional to the rows read: the gate projection is read whole.

    >>> round(limit(0.7), 3)
    1.875
    """
    return 3 / (1 + 2 * (1 - sparsity))


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes, sparsities and turns.
      progress: show a bar.
    Returns:
      the figures.
    Raises:
      FFNLabError: the two sides do not compute the same.
    """
    keys = jax.random.split(jax.random.key(0))
    layer = GatedFFN(settings.width, settings.hidden, key=keys[0])
    x = jax.random.normal(keys[1], (1, 1, settings.width))
    peers = {name: bound(form, x, *arrays) for name, (form, arrays) in dense_forms(layer).items()}
    sparse = {k: bound(apply, x, sparse_layer(layer, x, k)) for k in settings.sparsities}
    expected = np.asarray(bound(apply, x, layer)())
    for name, call in peers.items():
        agree(name, call(), expected)
    for k, call in sparse.items():
        agree(f"sparsity {k}", call(), masked(layer, x, k))
    turns = track(range(settings.turns), "bench", enabled=progress)
    seconds = [{n: timed(call) for n, call in (peers | sparse).items()} for _ in turns]
    medians = {name: statistics.median(turn[name] for turn in seconds) for name in seconds[0]}
    peer = min(peers, key=medians.__getitem__)
    levels = tuple(
        Level(k, medians[k], statistics.median(turn[peer] / turn[k] for turn in seconds))
        for k in settings.sparsities
    )
    about = f"both sides: {x.dtype}, jax {jax.__version__}, {jax.devices()[0].platform}; "
    about += f"{settings.width} x {settings.hidden}, batch 1"
    return Comparison(levels, {name: medians[name] for name in peers}, about)


def dense_forms(layer: GatedFFN) -> dict[str, tuple[Callable, tuple[object, ...]]]:
    """Ways to write the layer for one token: name -> (function of x and arrays, the arrays)."""
    gate, up, down = (w.weight.dense() for w in (layer.gate, layer.up, layer.down))
    by_rows = jnp.concatenate([gate.T, up.T])
    return {
        "the layer": (apply, (layer,)),
        "plain": (plain, (gate, up, down)),
        "fused": (fused, (jnp.concatenate([gate, up], axis=1), down)),
        "transposed": (transposed, (gate.T, up.T, down.T)),
        "fused transposed": (fused_transposed, (by_rows, down.T)),
        "half transposed": (half_transposed, (by_rows, down)),
    }


def apply(x: Float[Array, "1 1 d"], layer: GatedFFN | SparseGatedFFN) -> Float[Array, "1 1 d"]:
    """The layer as it is."""
    return layer(x)


def plain(x, gate, up, down):
    """x [1, 1, d] times matrices [in, out]."""
    return (jax.nn.silu(x[0] @ gate) * (x[0] @ up)) @ down


def fused(x, gate_up, down):
    """Gate and up as one matrix [d, 2 h]."""
    gate, up = jnp.split(x[0] @ gate_up, 2, axis=-1)
    return (jax.nn.silu(gate) * up) @ down


def transposed(x, gate, up, down):
    """Matrices [out, in] times a vector."""
    return down @ (jax.nn.silu(gate @ x[0, 0]) * (up @ x[0, 0]))


def fused_transposed(x, gate_up, down):
    """Gate and up as one matrix [2 h, d] times a vector, and down [d, h]."""
    gate, up = jnp.split(gate_up @ x[0, 0], 2)
    return down @ (jax.nn.silu(gate) * up)


def half_transposed(x, gate_up, down):
    """The same with down [h, d]."""
    gate, up = jnp.split(gate_up @ x[0, 0], 2)
    return (jax.nn.silu(gate) * up)[None] @ down


def sparse_layer(layer: GatedFFN, x: Float[Array, "1 1 d"], sparsity: float) -> SparseGatedFFN:
    """The layer with one threshold that drops this fraction of its channels for x."""
    up = layer.up.replace(Transposed(layer.up.weight.transpose()))
    threshold = jnp.full((layer.up.weight.shape[1],), cut(layer, x, sparsity))
    return SparseGatedFFN(layer.gate, up, layer.down, threshold, activation=layer.activation)


def cut(layer: GatedFFN, x: Float[Array, "1 1 d"], sparsity: float) -> float:
    """The magnitude of activated gates up to which they are dropped; -1 drops none."""
    magnitude = np.sort(np.abs(np.asarray(activated(layer, x))), axis=None)
    dropped = int(sparsity * magnitude.size)
    # Half way to the next one, so that a program that rounds otherwise drops the same channels.
    return float(magnitude[dropped - 1 : dropped + 1].mean()) if dropped else -1.0


def masked(layer: GatedFFN, x: Float[Array, "1 1 d"], sparsity: float) -> np.ndarray:
    """What the sparse layer must return, in float64."""
    up, down = (np.asarray(w.weight.dense(), np.float64) for w in (layer.up, layer.down))
    gate = np.asarray(activated(layer, x), np.float64)
    kept = np.where(np.abs(gate) > cut(layer, x, sparsity), gate, 0)
    return (kept * (np.asarray(x, np.float64) @ up)) @ down


@jax.jit
def activated(layer: GatedFFN, x: Float[Array, "1 1 d"]) -> Float[Array, "1 1 h"]:
    """act(gate(x))."""
    return ACTIVATIONS[layer.activation](layer.gate(x))


def bound(form: Callable, x: Array, *operands: object) -> Callable[[], Array]:
    """form(x, *operands) compiled, as a call without arguments that flattens no module."""
    leaves, structure = jax.tree.flatten(operands)
    run = program(form, structure)
    return lambda: run(x, leaves)


@functools.cache
def program(form: Callable, structure: jax.tree_util.PyTreeDef) -> Callable:
    """form(x, *operands) as a compiled function of x and the operands' leaves."""
    return jax.jit(lambda x, leaves: form(x, *structure.unflatten(leaves)))


def timed(call: Callable[[], Array]) -> float:
    """Seconds until the result is there."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def agree(name: str, ours: Array, expected: np.ndarray) -> None:
    """Raises FFNLabError where an output is not the expected one."""
    size = np.abs(expected).max()
    error = float(np.abs(np.asarray(ours).reshape(-1) - expected.reshape(-1)).max() / size)
    if not error <= TOLERANCE:
        raise FFNLabError(f"{name}: the output is off by {error:.1e} of the largest")


def ratios() -> dict[str, float]:
    """How many times faster than the fastest dense form, by sparsity: "0%", "50%", …"""
    return {f"{level.sparsity:.0%}": level.ratio for level in compare().levels}
