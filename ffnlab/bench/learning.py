"""Learning beside torch: a step of an LSTM, and many steps of a small network.

The LSTM is `ffnlab.layers.Recurrent` against `torch.nn.LSTM`, which oneDNN runs as one fused layer
where it can. The small network is an MLP whose step costs more to start than to compute: ours runs
in `parallel.train` with `together`, its batches read and checked and its state evaluated between
turns; the peer is a plain loop, over the network as it is or compiled. The peer works in its own
process (`learning_peer.py`) in the fastest of its forms. The two take turns; a ratio is the median
of the turns' ratios. Both learn by SGD in float32 from the same weights and batches, and their
losses are compared, else the figures would not be of the same work.

A hypernetwork learns as the small network does, whose weights it gives in chunks.
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.bench.peer import Peer
from ffnlab.bench.turns import Comparison, Task, about
from ffnlab.data import Labelled
from ffnlab.errors import FFNLabError, at_least
from ffnlab.layers import MLP, Recurrent
from ffnlab.learning import backprop, labelled
from ffnlab.models import Hypernet, HypernetConfig, HypernetSpec, MLPConfig
from ffnlab.parallel import LoopOptions, train

__all__ = ["Settings", "compare", "ratios"]

PACKAGES = ("torch",)
RATE = 0.01
GENTLE = 1e-4  # of the hypernetwork: at more, rounding alone parts two runs after 1,500 steps
ROWS, BATCHES = 64, 64  # of the small network
TOLERANCE = 1e-3  # of losses, relative: float32, after as many steps as there are


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      batch, length, inputs, hidden: of the LSTM's batch, [batch, length, inputs], and its state.
      sizes: widths of the small network, which has 64 rows in a batch.
      together: steps in one compiled loop.
      steps: of the small network in a turn.
      turns: that both sides take at each task, after one to warm up.
    """

    batch: int = 32
    length: int = 64
    inputs: int = 128
    hidden: int = 256
    sizes: tuple[int, int, int] = (64, 32, 10)
    together: int = 100
    steps: int = 500
    turns: int = 15

    def __post_init__(self) -> None:
        numbers = dataclasses.asdict(self)
        at_least(1, **{name: each for name, each in numbers.items() if name != "sizes"})


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    Returns:
      tasks "recurrent" (a step), "small" and "hypernetwork" (`settings.steps` steps).
    Raises:
      MissingExtraError: torch is nowhere to be found.
      FFNLabError: the two sides do not compute the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        layer, sequences = drawn_recurrent(settings)
        network, batches = drawn_small(settings)
        write(Path(folder), layer, sequences, network, batches)
        net = drawn_hypernet(settings)
        write_hypernet(Path(folder), net)
        with Peer(folder, tasks="learning_peer.py", packages=PACKAGES) as peer:
            tasks = {
                "recurrent": recurrent(peer, layer, sequences, settings.turns),
                "small": small(peer, network, batches, settings, progress),
                "hypernetwork": small(
                    peer, net, batches, settings, progress, "hypernetwork", GENTLE
                ),
            }
            return Comparison("learning beside torch", tasks, about(peer))


def drawn_recurrent(settings: Settings) -> tuple[Recurrent, tuple[Array, Array]]:
    """An LSTM, and a batch of inputs [b, t, in] and targets [b, t, hidden] for it."""
    layer = Recurrent(settings.inputs, settings.hidden, key=jax.random.key(0))
    shape, keys = (settings.batch, settings.length), jax.random.split(jax.random.key(1))
    x = jax.random.normal(keys[0], (*shape, settings.inputs))
    return layer, (x, jax.random.uniform(keys[1], (*shape, settings.hidden), minval=-1))


def drawn_small(settings: Settings) -> tuple[MLP, Labelled]:
    """A small network, and batches for it: inputs [n, b, in] and classes [n, b]."""
    random, (inputs, _, classes) = np.random.default_rng(0), settings.sizes
    x = random.standard_normal((BATCHES, ROWS, inputs), np.float32)
    y = random.integers(0, classes, (BATCHES, ROWS)).astype(np.int32)
    return MLP(settings.sizes, key=jax.random.key(0)), Labelled(x, y)


def write(
    folder: Path,
    layer: Recurrent,
    sequences: tuple[Array, Array],
    network: MLP,
    batches: Labelled,
) -> None:
    """What `learning_peer.py` reads."""
    x, target = sequences
    maps = {"input": layer.input[0], "hidden": layer.hidden[0]}
    weights: dict[str, Any] = {f"w_{name}": linear.weight.dense() for name, linear in maps.items()}
    weights |= {"b": layer.input[0].bias}
    np.savez(folder / "recurrent.npz", x=x, target=target, **weights)
    small: dict[str, Any] = {
        f"w{i}": linear.weight.dense() for i, linear in enumerate(network.maps)
    }
    small |= {f"b{i}": linear.bias for i, linear in enumerate(network.maps)}
    np.savez(folder / "small.npz", x=batches.x, labels=batches.y, **small)


def squares(layer: PyTree, batch: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
    """Mean squared error of a layer's outputs."""
    y, _ = layer(batch[0])
    return jnp.mean((y - batch[1]) ** 2), {}


def recurrent(peer: Any, layer: Recurrent, batch: tuple[Array, Array], turns: int) -> Task:
    """Lets both sides take turns at steps of SGD of the LSTM."""
    rule = backprop(squares, optax.sgd(RATE))
    state = rule.init(layer, jax.random.key(0))
    rows = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        state, metrics = rule.step(state, batch)
        loss = float(metrics["loss"])
        rows.append((time.perf_counter() - start, loss, peer.ask("recurrent", rate=RATE)))
    return task_of("recurrent", rows)


def drawn_hypernet(settings: Settings) -> Hypernet:
    """A hypernetwork of one task that gives the small network's weights in chunks."""
    config = HypernetConfig(MLPConfig(settings.sizes), HypernetSpec(outputs="chunk_wise"))
    return config.make(key=jax.random.key(0))


def write_hypernet(folder: Path, net: Hypernet) -> None:
    """What `learning_peer.py` reads of the hypernetwork; its batches are the small network's."""
    found = {"task": net.tasks.weight.dense(), "pieces": net.pieces.weight.dense()}
    for i, linear in enumerate((net.trunk.maps[0], net.heads)):
        found |= {f"w{i}": linear.weight.dense(), f"b{i}": linear.bias}
    np.savez(folder / "hypernetwork.npz", **found)


def small(
    peer: Any,
    network: MLP | Hypernet,
    batches: Labelled,
    settings: Settings,
    progress: bool,
    name: str = "small",
    rate: float | None = None,
) -> Task:
    """Lets the peer take its turns where our run evaluates."""
    rate = RATE if rate is None else rate
    rule, steps = backprop(labelled, optax.sgd(rate)), settings.steps
    loss_of = jax.jit(lambda model, batch: labelled(model, batch)[0])
    batch_at = lambda position: Labelled(*(part[position % BATCHES] for part in batches))  # noqa: E731
    rows: list[tuple] = []
    begun = time.perf_counter()

    def turn(state: PyTree) -> dict[str, float]:
        nonlocal begun
        jax.block_until_ready(state)
        spent = time.perf_counter() - begun
        loss = float(loss_of(rule.model(state), batch_at((len(rows) + 1) * steps)))
        rows.append((spent, loss, peer.ask(name, steps=steps, rate=rate)))
        begun = time.perf_counter()
        return {}

    options = LoopOptions(log_every=steps, evaluate_every=steps, progress=progress)
    whole, key = (settings.turns + 1) * steps, jax.random.key(0)
    common = {"evaluate": turn, "options": options, "together": settings.together}
    train(rule, network, batch_at, whole, key=key, **common)
    return task_of(name, rows)


def task_of(name: str, rows: list[tuple]) -> Task:
    """The figures of (our seconds, our loss, the peer's answer) by turn, but for the first."""
    far = max(abs(loss / answer["loss"] - 1) for _, loss, answer in rows)
    if not far <= TOLERANCE:
        raise FFNLabError(f"{name}: the two sides' losses differ by {far:.1e}")
    turns = [(spent, answer["seconds"]) for spent, _, answer in rows[1:]]
    return Task.of(turns, far, rows[-1][2]["form"])


def ratios() -> dict[str, float]:
    """How many times faster ours is, by task."""
    return compare().ratios()
