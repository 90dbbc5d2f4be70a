"""A step of meta-training beside a step of the network that it corrects.

Both read the same rows: the metanetwork's step reads the net as a graph, corrects it, has its loss
on the rows and its penalty, and changes the metanetwork; the net's own step changes the net. What
is above one is what the graph costs. Of an MLP for digits and of a ResNet-20 for CIFAR; steps take
turns, and a ratio is the median of the turns' ratios.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.table import Table

from ffnlab.clock import in_turns
from ffnlab.errors import at_least
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.models import MetaNetworkConfig, ResNet, ResNetConfig
from ffnlab.pruning import lesson, meta_loss
from ffnlab.rule import Rule

__all__ = ["Comparison", "Settings", "compare", "ratios"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      rows: of the MLP's step.
      images: of the ResNet's.
      layers, width: of the metanetworks.
      sizes: of the MLP.
      blocks: of each stage of the ResNet.
      turns: times that every step runs, after one to warm up.
    """

    rows: int = 1024
    images: int = 64
    layers: int = 3
    width: int = 16
    sizes: tuple[int, ...] = (64, 48, 48, 10)
    blocks: int = 3
    turns: int = 15

    def __post_init__(self) -> None:
        counts = {"rows": self.rows, "images": self.images, "blocks": self.blocks}
        at_least(1, layers=self.layers, width=self.width, turns=self.turns, **counts)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Times of both steps.

    Attributes:
      seconds: medians over turns, by net: (meta-training, the net itself).
      ratios: the former over the latter, median over turns, by net.
      edges: of the graphs, by net.
      about: what they run on; one line.
    """

    seconds: Mapping[str, tuple[float, float]]
    ratios: Mapping[str, float]
    edges: Mapping[str, int]
    about: str

    def __rich__(self) -> Table:
        table = Table(title="meta-training beside training", caption=self.about)
        for name in ("net", "edges", "meta step ms", "net's step ms", "ratio"):
            table.add_column(name, justify="right")
        for name, times in self.seconds.items():
            cells = (f"{1e3 * seconds:.1f}" for seconds in times)
            table.add_row(name, f"{self.edges[name]:,}", *cells, f"{self.ratios[name]:.2f}")
        return table


class Running:
    """A rule that goes on by a step on the same batch at every call."""

    def __init__(self, rule: Rule, model: Any, batch: Any):
        """Begins with a model."""
        self.rule, self.batch = rule, batch
        self.state = rule.init(model, jax.random.key(0))

    def __call__(self) -> Any:
        """The metrics of a step, the state being there too."""
        self.state, metrics = self.rule.step(self.state, self.batch)
        return metrics, self.state


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Comparison:
    """Measures both nets.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    """
    seconds, found = {}, {}
    pairs = {name: steps(settings, *case) for name, case in cases(settings).items()}
    for name, (ours, own) in pairs.items():
        label = "bench" if progress else None
        times = in_turns({"meta": ours, "own": own}, settings.turns, label=label)
        seconds[name] = times.of("meta").median, times.of("own").median
        found[name] = times.over("meta", "own").median
    edges = {name: first.batch.graph.num_edges for name, (first, _) in pairs.items()}
    s, device = settings, jax.devices()[0].platform
    about = (
        f"float32, jax {jax.__version__}, {device}; {s.rows} rows, {s.images} images of 32 x 32; "
        f"{s.layers} rounds of width {s.width}"
    )
    return Comparison(seconds, found, edges, about)


def cases(settings: Settings) -> dict[str, tuple]:
    """By net: it, its rows, and numbers of a node and of an edge."""
    s, keys = settings, jax.random.split(jax.random.key(0), 4)
    rows = jax.random.normal(keys[0], (s.rows, s.sizes[0]))
    images = jax.random.uniform(keys[1], (s.images, 32, 32, 3))
    mlp = MLP(s.sizes, key=keys[2])
    resnet = ResNet(ResNetConfig((s.blocks,) * 3, (16, 32, 64), s.sizes[-1]), key=keys[3])
    return {"mlp": (mlp, rows, (1, 1)), "resnet": (resnet, images, (8, 9))}


def steps(
    settings: Settings, net: Any, x: jax.Array, numbers: tuple[int, int]
) -> tuple[Running, Callable[[], Any]]:
    """The metanetwork's step and the net's own."""
    y = jnp.arange(len(x)) % settings.sizes[-1]
    config = MetaNetworkConfig(*numbers, layers=settings.layers, width=settings.width)
    network = config.make(key=jax.random.key(1))
    ours = Running(backprop(meta_loss(reg=1e-3), optax.adamw(1e-4)), network, lesson(net, (x, y)))
    return ours, Running(backprop(labelled, optax.adamw(1e-4)), net, (x, y))


def ratios() -> dict[str, float]:
    """Time of the metanetwork's step over the net's own: "mlp", "resnet"."""
    return dict(compare().ratios)
