"""Learning beside torch: a step of an LSTM, and many steps of a small network, by two rules.

The LSTM is `ffnlab.layers.Recurrent` against `torch.nn.LSTM`, which oneDNN runs as one fused layer
where it can. The small network is an MLP whose step costs more to start than to compute: ours runs
in `parallel.train` with `together`, its batches read and checked and its state evaluated between
turns; the peer is a plain loop, over the network as it is or compiled. It learns by
backpropagation; as what a hypernetwork gives in chunks; and layer by layer as physical local
learning teaches a plain network (`learning.physical_ff`), with wrong classes that ours draws and
the peer is given. The peer works in its own process (`learning_peer.py`) in the fastest of its
forms. The two take turns; a ratio is the median of the turns' ratios. Both learn by SGD in float32
from the same weights and batches, and their losses are compared, else the figures would not be of
the same work.
"""

import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable
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
from ffnlab.learning import PhysicalState, backprop, labelled, physical_ff
from ffnlab.learning.physical.rule import layer_losses, network_of, other_classes
from ffnlab.models import Hypernet, HypernetConfig, HypernetSpec, MLPConfig
from ffnlab.parallel import LoopOptions, train
from ffnlab.rule import Rule

__all__ = ["Settings", "compare", "ratios"]

PACKAGES = ("torch",)
RATE = 0.01
GENTLE = 1e-4  # of the hypernetwork: at more, rounding alone parts two runs after 1,500 steps
ROWS, BATCHES = 64, 64  # of the small network
INNER = 2  # steps that a layer takes on a batch when each learns alone
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
      tasks "recurrent" (a step), "small", "hypernetwork" and "forward_forward" (`settings.steps`
        steps).
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
        write_alone(Path(folder), network, batches, settings)
        with Peer(folder, tasks="learning_peer.py", packages=PACKAGES) as peer:
            tasks = {
                "recurrent": recurrent(peer, layer, sequences, settings.turns),
                "small": small(peer, network, batches, settings, progress),
                "hypernetwork": small(
                    peer, net, batches, settings, progress, "hypernetwork", GENTLE
                ),
                "forward_forward": forward_forward(peer, network, batches, settings, progress),
            }
            own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0
            peaks = own, float(peer.ask("peak")["peak"])
            return Comparison("learning beside torch", tasks, about(peer), peaks)


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


def write_alone(folder: Path, network: MLP, batches: Labelled, settings: Settings) -> None:
    """What the peer reads to teach layers alone: directions, and the wrong classes of all steps."""
    key, steps = jax.random.key(0), (settings.turns + 1) * settings.steps
    y = jnp.asarray(batches.y)

    def wrong(at: Array) -> Array:
        draw, _ = jax.random.split(jax.random.fold_in(key, at))
        return other_classes(y[at % BATCHES], settings.sizes[-1], draw)

    directions = physical_ff().init(network, key).directions
    named = {f"p{i}": p for i, p in enumerate(directions)}
    np.savez(folder / "alone.npz", wrong=jax.jit(jax.vmap(wrong))(jnp.arange(steps + 1)), **named)


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


def write_hypernet(folder: Path, net: Any) -> None:
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
    rate: float = RATE,
) -> Task:
    """Lets both sides take turns at steps of backpropagation."""
    rule = backprop(labelled, optax.sgd(rate))
    loss_of = jax.jit(lambda state, batch: labelled(state.model, batch)[0])
    ask = lambda: peer.ask(name, steps=settings.steps, rate=rate)  # noqa: E731
    return scanned(name, ask, rule, loss_of, network, batches, settings, progress)


def forward_forward(
    peer: Any, network: MLP, batches: Labelled, settings: Settings, progress: bool
) -> Task:
    """Lets both sides take turns at steps in which layers learn alone."""
    rule = physical_ff(optax.sgd(RATE), inner=INNER)

    def loss_of(state: PhysicalState, batch: Any) -> Array:
        net = network_of(state.model, state.directions)
        key = jax.random.fold_in(state.key, state.step)
        x, y = batch
        return layer_losses(net, x, y, key).mean()

    ask = lambda: peer.ask(  # noqa: E731
        "forward_forward", steps=settings.steps, rate=RATE, inner=INNER
    )
    given = jax.jit(loss_of), network, batches, settings, progress
    return scanned("forward_forward", ask, rule, *given)


def scanned(
    name: str,
    ask: Callable[[], dict[str, Any]],
    rule: Rule,
    loss_of: Callable[[PyTree, Labelled], Array],
    network: MLP | Hypernet,
    batches: Labelled,
    settings: Settings,
    progress: bool,
) -> Task:
    """Lets the peer take its turns where our run evaluates."""
    steps = settings.steps
    batch_at = lambda position: Labelled(*(part[position % BATCHES] for part in batches))  # noqa: E731
    rows: list[tuple] = []
    begun = time.perf_counter()

    def turn(state: PyTree) -> dict[str, float]:
        nonlocal begun
        jax.block_until_ready(state)
        spent = time.perf_counter() - begun
        loss = float(loss_of(state, batch_at((len(rows) + 1) * steps)))
        rows.append((spent, loss, ask()))
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
