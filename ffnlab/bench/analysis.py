"""Probes' inner loops beside other ways to the same numbers.

    states       entropy of joint states, by rows as bytes; NumPy's `unique(axis=0)`
    neighbours   information of two numbers; scikit-learn's `mutual_info_regression`
    interpreter  building the affine map of a network at an input and applying it; the Jacobian
                 of `jax.jacobian` at the same input, applied
    bounds       intervals of a network over boxes; torch, a loop over layers (`analysis_peer.py`)

Both sides take turns; a ratio is the median of the turns' ratios. States, interpreters (of a
network that is linear by parts) and bounds are the same on both sides, and held to it; the two
estimates of information are told beside what is known.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from ffnlab.analysis import (
    entropy,
    interpret,
    interval_bounds,
    joint_states,
    nearest_information,
)
from ffnlab.bench.peer import Peer
from ffnlab.bench.turns import Comparison, Task, about
from ffnlab.clock import in_turns, timed
from ffnlab.data import gaussian_pairs
from ffnlab.errors import FFNLabError, MissingExtraError, at_least
from ffnlab.layers import MLP

__all__ = ["Settings", "compare", "ratios"]

PACKAGES = ("torch",)
TOLERANCE = 1e-4  # float32 sums in another order, relative to the largest
HIDDEN, CLASSES = 256, 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      rows: of joint states.
      widths: units of a state.
      pairs: of which information is estimated.
      known: nats that they share.
      inputs: of networks that are interpreted.
      boxes: that a network of 784-256-256-10 is bounded over at once.
      turns: times that both sides do each task, after one to warm up.
    """

    rows: int = 4096
    widths: tuple[int, ...] = (12, 100)
    pairs: int = 5000
    known: float = 1.0
    inputs: tuple[int, ...] = (192, 3072)
    boxes: int = 64
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(1, rows=self.rows, boxes=self.boxes, turns=self.turns)
        at_least(10, pairs=self.pairs)


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes and turns.
      progress: taken as by the other benches; all of this takes seconds.
    Returns:
      tasks "states, 12", "states, 100", "neighbours", "interpreter, 192", "interpreter, 3072",
      "bounds".
    Raises:
      MissingExtraError: scikit-learn is not installed, or torch is nowhere to be found.
      FFNLabError: the two sides do not compute the same.
    """
    del progress
    turns = settings.turns
    tasks = {f"states, {width}": states(settings.rows, width, turns) for width in settings.widths}
    tasks["neighbours"] = neighbours(settings.pairs, settings.known, turns)
    tasks |= {f"interpreter, {width}": interpreter(width, turns) for width in settings.inputs}
    with tempfile.TemporaryDirectory() as folder:
        net, low, high = boxes_of(settings.boxes)
        weights: dict[str, Any] = {f"w{i}": m.weight.dense() for i, m in enumerate(net.maps)}
        weights |= {f"b{i}": m.bias for i, m in enumerate(net.maps)}
        np.savez(Path(folder) / "bounds.npz", low=low, high=high, **weights)
        with Peer(folder, tasks="analysis_peer.py", packages=PACKAGES) as peer:
            tasks["bounds"] = bounds(peer, net, low, high, turns, Path(folder) / "result.npz")
            return Comparison("probes beside other ways", tasks, about(peer))


def both(
    ours: Callable[[], Any], theirs: Callable[[], Any], turns: int
) -> list[tuple[float, float]]:
    """Seconds of both, each turn."""
    found = in_turns({"ours": ours, "theirs": theirs}, turns).seconds
    return list(zip(found["ours"].tolist(), found["theirs"].tolist(), strict=True))


def held(task: str, ours: Any, theirs: Any) -> float:
    """The largest difference, of the largest; raises FFNLabError where it is no rounding."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference <= TOLERANCE:
        raise FFNLabError(f"{task}: the two sides differ by {difference:.1e} of the largest")
    return difference


def states(rows: int, width: int, turns: int) -> Task:
    """Entropy of rows of codes of a layer of tanh units, 30 cells each."""
    random = np.random.default_rng(0)
    net = np.tanh(random.standard_normal((rows, 4)) @ random.standard_normal((4, width)))
    codes = np.digitize(net, np.linspace(-1, 1, 30))

    def by_unique() -> float:
        counts = np.unique(codes, axis=0, return_counts=True)[1]
        p = counts / counts.sum()
        return float(-(p * np.log(p)).sum())

    by_bytes = lambda: entropy(joint_states(codes))  # noqa: E731
    difference = held(f"states, {width}", by_bytes(), by_unique())
    return Task.of(both(by_bytes, by_unique, turns), difference, "numpy.unique(axis=0)")


def neighbours(pairs: int, known: float, turns: int) -> Task:
    """Information of two numbers; `difference` is of the two estimates, relative to what is known.

    Raises:
      MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.feature_selection import mutual_info_regression
    except ImportError:
        raise MissingExtraError(
            "scikit-learn is not installed; it comes with the extra 'run' "
            "(pip install 'ffnlab[run]')",
            name="sklearn",
        ) from None
    x, y = gaussian_pairs(pairs, known, width=1)
    ours = lambda: nearest_information(x, y).value  # noqa: E731
    options: dict[str, Any] = {"n_jobs": -1, "random_state": 0}
    theirs = lambda: float(mutual_info_regression(x, y[:, 0], **options)[0])  # noqa: E731
    found = ours(), theirs()
    off = ", ".join(
        f"{name} {value - known:+.3f}" for name, value in zip(("ours", "its"), found, strict=True)
    )
    form = f"mutual_info_regression; nats off the known: {off}"
    difference = abs(found[0] - found[1]) / max(known, 1e-9)
    return Task.of(both(ours, theirs, turns), difference, form)


@jax.jit
def interpreted(net: MLP, x: Array, z: Array) -> Array:
    """F z + r."""
    return interpret(net, x)(z)


@jax.jit
def by_jacobian(net: MLP, x: Array, z: Array) -> Array:
    """f(x) + J (z - x): the same of a network that is linear by parts."""
    return net(x) + jax.jacobian(net)(x) @ (z - x)


def interpreter(width: int, turns: int) -> Task:
    """A ReLU network of one hidden layer, at an input and applied to another."""
    net = MLP((width, HIDDEN, CLASSES), key=jax.random.key(0))
    x, z = jax.random.normal(jax.random.key(1), (2, width))
    sides = [
        lambda fn=fn: jax.block_until_ready(fn(net, x, z)) for fn in (interpreted, by_jacobian)
    ]
    difference = held(f"interpreter, {width}", sides[0](), sides[1]())
    bytes_of = [
        fn.lower(net, x, z).compile().memory_analysis() for fn in (interpreted, by_jacobian)
    ]
    kept = [getattr(each, "temp_size_in_bytes", 0) / 1024 for each in bytes_of]
    form = f"jax.jacobian; temporaries {kept[0]:,.0f} KiB, its {kept[1]:,.0f}"
    return Task.of(both(sides[0], sides[1], turns), difference, form)


def boxes_of(count: int) -> tuple[MLP, Array, Array]:
    """A network, and boxes around as many inputs."""
    net = MLP((784, HIDDEN, HIDDEN, CLASSES), key=jax.random.key(0))
    x = jax.random.uniform(jax.random.key(1), (count, 784))
    return net, x - 0.02, x + 0.02


@jax.jit
def bounded(net: MLP, low: Array, high: Array) -> tuple[Array, Array]:
    """Both ends of the logits over every box."""
    found = interval_bounds(net, low, high)
    return found.low, found.high


def bounds(peer: Any, net: MLP, low: Array, high: Array, turns: int, result: Path) -> Task:
    """Intervals of logits over boxes."""
    ours = lambda: jax.block_until_ready(bounded(net, low, high))  # noqa: E731
    answer = peer.ask("bounds", result=str(result))  # the peer chooses its form
    with np.load(result, allow_pickle=False) as saved:
        pairs = zip(ours(), (saved["low"], saved["high"]), strict=True)
        difference = max(held("bounds", a, b) for a, b in pairs)
    seconds = []
    for _ in range(turns + 1):
        seconds.append((timed(ours), peer.ask("bounds", result="")["seconds"]))
    return Task.of(seconds[1:], difference, answer["form"])


def ratios() -> dict[str, float]:
    """How many times faster ours is, by task."""
    return compare().ratios()
