"""A training step of `models.OneForecast` beside a plain form in torch, part of `bench graphs`.

The peer (`forecast_peer.py`) is given our weights, edges and fields and takes steps of SGD in the
fastest of its forms: nodes multiplied before they are brought to edges, as the authors' faster form
does, messages added up by `index_add_`, eager or compiled. The two take turns, and the losses of
all steps are compared, else the figures would not be of the same work.
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
from flax import nnx

from ffnlab import tree
from ffnlab.bench.peer import Peer
from ffnlab.bench.turns import Task
from ffnlab.errors import FFNLabError
from ffnlab.graphs import ForecastBatch, forecast_loss, globe_of
from ffnlab.learning import backprop
from ffnlab.models import OneForecast, OneForecastConfig
from ffnlab.weights import is_weight

__all__ = ["CONFIG", "forecast_step"]

BOXES = (0.0, 30.0, 105.0, 160.0, 10.0, 30.0, -95.0, -35.0)
CONFIG = OneForecastConfig((12, 24), 3, 3, 2, BOXES, 32, 4)  # the study's
RATE = 1e-3
LOSS_TOLERANCE = 1e-3  # relative, of every step


def forecast_step(
    config: OneForecastConfig = CONFIG, *, turns: int = 15, packages: tuple[str, ...] = ("torch",)
) -> Task:
    """Lets both sides take turns at steps of a network.

    Args:
      config: of the network.
      turns: times that both sides take a step, after one to warm up.
      packages: that the peer needs.
    Raises:
      MissingExtraError: torch is nowhere to be found.
      FFNLabError: the losses of the two sides do not stay together.
    """
    model, globe = config.make(key=jax.random.key(0)), globe_of(config)
    random = np.random.default_rng(0)
    x, y = (random.standard_normal((*config.grid, n), np.float32)
            for n in (config.inputs, config.outputs))  # fmt: skip
    batch = ForecastBatch(jnp.asarray(x)[None], jnp.asarray(y)[None, None], globe)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "forecast.npz", allow_pickle=False, **described(model, batch))
        with Peer(folder, tasks="forecast_peer.py", packages=packages) as peer:
            return in_turns(peer, model, batch, turns)


def in_turns(peer: Any, model: OneForecast, batch: ForecastBatch, turns: int) -> Task:
    """The steps themselves."""
    rule = backprop(forecast_loss(balance=False), optax.sgd(RATE), informed=True)
    state = rule.init(model, jax.random.key(0))
    seconds, differences, answer = [], [], {"form": ""}
    for _ in range(turns + 1):
        start = time.perf_counter()
        state, metrics = rule.step(state, batch)
        own = float(metrics["loss"])
        spent = time.perf_counter() - start
        answer = peer.ask("train", rate=RATE)
        seconds.append((spent, answer["seconds"]))
        differences.append(abs(own / answer["loss"] - 1))
    if not max(differences) <= LOSS_TOLERANCE:
        raise FFNLabError(f"forecast: the two sides' losses differ by {max(differences):.1e}")
    return Task.of(seconds[1:], max(differences), answer["form"])


def described(model: OneForecast, batch: ForecastBatch) -> dict[str, np.ndarray]:
    """Parameters by their paths, edges, features, and fields, as `forecast_peer.py` reads them."""
    found = {"x": np.asarray(batch.x[0]), "y": np.asarray(batch.y[0, 0])}
    found["heads"] = np.array(model.config.heads)
    globe = batch.globe
    for name in ("up", "mesh", "down"):
        graph = getattr(globe, name)
        found[f"{name}_senders"], found[f"{name}_receivers"] = graph.senders, graph.receivers
    for field in dataclasses.fields(globe):
        if field.name.endswith("edges") or field.name == "nodes":
            found[field.name] = getattr(globe, field.name)
    for path, node in tree.walk(model):
        if isinstance(node, nnx.Param):
            value = node.get_value()
            found[f"p.{path}"] = value.dense() if is_weight(value) else value
    return {name: np.asarray(array) for name, array in found.items()}
