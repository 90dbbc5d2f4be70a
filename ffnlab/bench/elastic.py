"""A step of elastic training, for each network in it, over a plain step of the largest network.

    ratio = seconds of a step / networks of the step / seconds of a plain step

Both steps are of backpropagation with Adam on the same batch. An elastic one computes every network
at the width of the largest, with masks (`ffnlab.pruning.elastic`): what it costs beyond as many
plain steps are the masks, and what it saves is all but one update.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree
from rich.table import Table

from ffnlab.clock import Call, in_turns
from ffnlab.errors import at_least
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.models import ViT, ViTConfig, groups, remove
from ffnlab.pruning import elastic
from ffnlab.rule import Rule

__all__ = ["Elastic", "Settings", "compare", "ratios"]

BLOCKS, SIDE, CLASSES = 4, 16, 10


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
      width: of the stream of FFN blocks, which have four times as many channels; the hidden layers
        of an MLP have twice as many.
      rows: of a batch.
      drawn: networks of a step beside the largest and the smallest.
      turns: of both steps, after one to warm up.
    """

    width: int = 256
    rows: int = 256
    drawn: int = 2
    turns: int = 15

    def __post_init__(self) -> None:
        at_least(4, width=self.width)
        at_least(1, rows=self.rows, turns=self.turns)


@dataclasses.dataclass(frozen=True)
class Elastic:
    """Times.

    Attributes:
      seconds: by model, of a "plain" and of an "elastic" step, medians.
      ratios: by model, the elastic step by the network over the plain one, medians over turns.
      about: what they are of; one line.
    """

    seconds: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, float]
    about: str

    def __rich__(self) -> Table:
        names = ("model", "plain ms", "elastic ms", "a network / plain")
        table = Table(*names, title="steps of elastic training", caption=self.about)
        for name, times in self.seconds.items():
            cells = (f"{1e3 * times[form]:.2f}" for form in ("plain", "elastic"))
            table.add_row(name, *cells, f"{self.ratios[name]:.2f}")
        return table


def compare(settings: Settings = Settings(), *, progress: bool = False) -> Elastic:
    """Measures both models.

    Args:
      settings: sizes and turns.
      progress: show a bar.
    Raises:
      ConfigError: sizes out of range.
    """
    s, seconds, ratios = settings, {}, {}
    networks = s.drawn + 2
    for name, (model, depths) in models(s).items():
        calls = steps(s, model, depths)
        times = in_turns(calls, s.turns, label="bench" if progress else None)
        seconds[name] = {form: times.of(form).median for form in calls}
        ratios[name] = times.over("elastic", "plain").median / networks
    about = (
        f"float32, jax {jax.__version__}, {jax.devices()[0].platform}; {s.rows} rows, {networks} "
        f"networks a step"
    )
    return Elastic(seconds, ratios, about)


def models(settings: Settings) -> dict[str, tuple[PyTree, tuple[int, ...]]]:
    """The networks, and the depths that theirs may have."""
    width, key = settings.width, jax.random.key(0)
    config = ViTConfig(
        (SIDE, SIDE), SIDE, width, 4 * width, BLOCKS, 1, channels=1, classes=CLASSES, pool="mean"
    )
    ffns = remove(ViT(config, key=key), range(0, 2 * BLOCKS, 2))
    mlp = MLP((SIDE**2, 2 * width, 2 * width, CLASSES), key=key)
    return {"FFN blocks": (ffns, tuple(range(1, BLOCKS + 1))), "MLP": (mlp, ())}


def steps(settings: Settings, model: PyTree, depths: tuple[int, ...]) -> dict[str, Call]:
    """A plain and an elastic step, each as a call that goes on from the one before."""
    s, key = settings, jax.random.key(1)
    shape = (s.rows, SIDE**2) if isinstance(model, MLP) else (s.rows, SIDE, SIDE, 1)
    batch = jax.random.uniform(key, shape), jnp.arange(s.rows) % CLASSES
    widths = {g.name: tuple(g.size // n for n in (4, 2, 1)) for g in groups(model)}
    loss = elastic(labelled, widths, depths=depths, drawn=s.drawn)
    return {
        "plain": stepping(backprop(labelled, optax.adam(1e-3)), model, batch),
        "elastic": stepping(backprop(loss, optax.adam(1e-3), informed=True), model, batch),
    }


def stepping(rule: Rule, model: PyTree, batch: PyTree) -> Call:
    """Steps of a rule on one batch."""
    state = rule.init(model, jax.random.key(2))

    def call() -> PyTree:
        nonlocal state
        state, metrics = rule.step(state, batch)
        return metrics

    return call


def ratios() -> dict[str, float]:
    """Time of an elastic step by the network, over a plain step: by model."""
    return dict(compare().ratios)
