"""Graphs beside torch: the sparse product, its gradient, and training steps.

The steps are of one GCN layer, and of a whole forecast on a globe (`bench.forecast`).

The peer, in its own process (`graphs_peer.py`), takes the fastest of its forms: torch's CSR product
with either width of indices and its gradient by autograd; the same as two products by hand, with a
transpose that is stored, which is what ours does; PyTorch Geometric's `GCNConv` over edges, over a
CSR matrix, or compiled. The two take turns, so that what
else the machine does falls on both; a ratio is the median of the turns' ratios. Both compute in
float32, and products, gradients and losses are compared, else the figures would not be of the same
work. The layer narrows, so that ours takes the product behind the linear map as the peer's does.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

from ffnlab.bench.forecast import CONFIG, forecast_step
from ffnlab.bench.peer import Peer
from ffnlab.bench.turns import Comparison, Task, about
from ffnlab.clock import timed
from ffnlab.errors import FFNLabError, at_least
from ffnlab.graph import Graph, aggregate, symmetric_norm, with_self_loops
from ffnlab.layers import GCN
from ffnlab.learning import backprop
from ffnlab.models import OneForecastConfig
from ffnlab.progress import track
from ffnlab.weights import Dense

__all__ = ["Settings", "compare", "ratios"]

PACKAGES = ("torch", "torch_geometric")
RATE = 0.1
TOLERANCE = 1e-5  # float32 sums of dozens of products in another order, relative to the largest
LOSS_TOLERANCE = 1e-3  # relative, of every step


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      sizes: (nodes, edges) of the products; the layer has those of the first, and self loops.
      width: channels of the products, and out of the layer.
      inputs: channels into the layer, more than out.
      turns: times that both sides do each task, after one to warm up.
      forecast: of the network whose training step is measured (`bench.forecast`).
    """

    sizes: tuple[tuple[int, int], ...] = ((3_000, 30_000), (100_000, 1_000_000))
    width: int = 64
    inputs: int = 128
    turns: int = 15
    forecast: OneForecastConfig = CONFIG

    def __post_init__(self) -> None:
        at_least(1, width=self.width, turns=self.turns)
        at_least(self.width + 1, inputs=self.inputs)


class Case(NamedTuple):
    """What both sides work on.

    Attributes:
      graph, values: edges and their weights.
      x: [n, in].
      gradient: of the product, [n, in].
      labels: [n], classes of the layer.
      w: of the layer, [in, out].
    """

    graph: Graph
    values: Array
    x: Array
    gradient: Array
    labels: Array
    w: Array


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both sides.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    Returns:
      tasks "forward, 3000", "backward, 3000" (forward and backward), "two_products, 3000" (that by
      hand), …, "train", "forecast".
    Raises:
      MissingExtraError: torch or torch_geometric is nowhere to be found.
      FFNLabError: the two sides do not compute the same.
    """
    cases = {str(nodes): drawn(settings, nodes, edges) for nodes, edges in settings.sizes}
    layer = drawn(settings, *settings.sizes[0], is_layer=True)
    with tempfile.TemporaryDirectory() as folder:
        for name, case in (cases | {"layer": layer}).items():
            write(Path(folder) / f"{name}.npz", case)
        with Peer(folder, tasks="graphs_peer.py", packages=PACKAGES) as peer:
            todo: list[tuple[str, str, Callable]] = [
                (do, name, lambda c=case, run=run: products(run, c))
                for name, case in cases.items()
                for do, run in DOINGS.items()
            ]
            tasks = {
                f"{do}, {name}": measure(peer, do, name, ours, settings.turns, Path(folder))
                for do, name, ours in track(todo, "bench", enabled=progress)
            }
            tasks["train"] = trained(peer, layer, settings.turns)
            said = about(peer)
    tasks["forecast"] = forecast_step(settings.forecast, turns=settings.turns)
    return Comparison("graphs beside torch", tasks, said)


def drawn(settings: Settings, nodes: int, edges: int, *, is_layer: bool = False) -> Case:
    """A random graph and numbers for it."""
    random = np.random.default_rng(0)
    graph = Graph.make(*random.integers(0, nodes, (2, edges)), nodes=nodes)
    graph = with_self_loops(graph) if is_layer else graph
    values = symmetric_norm(graph) if is_layer else random.random(graph.num_edges, np.float32)
    width = settings.inputs if is_layer else settings.width
    x, gradient = random.standard_normal((2, nodes, width), np.float32)
    labels = random.integers(0, settings.width, nodes).astype(np.int32)
    w = random.standard_normal((width, settings.width), np.float32) / width**0.5
    return Case(graph, *map(jnp.asarray, (values, x, gradient, labels, w)))


def write(file: Path, case: Case) -> None:
    """The file of a case, as `graphs_peer.py` reads it."""
    graph, there = case.graph, case.graph.transpose()
    np.savez(
        file,
        senders=graph.senders,
        receivers=graph.receivers,
        starts=graph.starts,
        values=case.values,
        transposed_senders=there.senders,
        transposed_starts=there.starts,
        transposed_values=case.values[graph.by_sender],
        **{name: getattr(case, name) for name in ("x", "gradient", "labels", "w")},
    )


@jax.jit
def forward(graph: Graph, values: Array, x: Array, gradient: Array) -> tuple[Array, ...]:
    """(A x,)."""
    return (aggregate(graph, values, x),)


@jax.jit
def backward(graph: Graph, values: Array, x: Array, gradient: Array) -> tuple[Array, ...]:
    """(A x, A' gradient)."""
    y, pull = jax.vjp(lambda x: aggregate(graph, values, x), x)
    return y, *pull(gradient)


DOINGS = {"forward": forward, "backward": backward, "two_products": backward}


def products(run: Callable, case: Case) -> tuple[Array, ...]:
    """A product of a case, finished."""
    return jax.block_until_ready(run(case.graph, case.values, case.x, case.gradient))


def measure(peer: Any, do: str, case: str, ours: Callable, turns: int, folder: Path) -> Task:
    """Lets both sides take turns at a product."""
    file = folder / "result.npz"
    answer = peer.ask(do, case=case, result=str(file))  # the peer chooses its form
    with np.load(file, allow_pickle=False) as saved:
        pairs = zip(ours(), (saved[name] for name in saved.files), strict=True)
        difference = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
    if not difference <= TOLERANCE:
        raise FFNLabError(f"{do}, {case}: the two sides differ by {difference:.1e} of the largest")
    seconds = []
    for _ in range(turns):
        seconds.append((timed(ours), peer.ask(do, case=case, result="")["seconds"]))
    return Task.of(seconds, difference, answer["form"])


def trained(peer: Any, case: Case, turns: int) -> Task:
    """Lets both sides take turns at steps of a layer; their losses must stay together."""
    rule = backprop(loss, optax.sgd(RATE))
    layer = GCN(*case.w.shape, key=jax.random.key(0))
    layer.linear = layer.linear.replace(Dense(case.w))
    state = rule.init(layer, jax.random.key(0))
    seconds, differences = [], []
    for _ in range(turns + 1):
        start = time.perf_counter()
        state, metrics = rule.step(state, case)
        own = float(metrics["loss"])
        spent = time.perf_counter() - start
        answer = peer.ask("train", case="layer", rate=RATE)
        seconds.append((spent, answer["seconds"]))
        differences.append(abs(own / answer["loss"] - 1))
    if not max(differences) <= LOSS_TOLERANCE:
        raise FFNLabError(f"train: the two sides' losses differ by {max(differences):.1e}")
    return Task.of(seconds[1:], max(differences), answer["form"])


def loss(layer: PyTree, case: Case) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the nodes' classes."""
    y = layer(case.x, case.graph, case.values)
    return optax.softmax_cross_entropy_with_integer_labels(y, case.labels).mean(), {}


def ratios() -> dict[str, float]:
    """How many times faster ours is, by task."""
    return compare().ratios()
