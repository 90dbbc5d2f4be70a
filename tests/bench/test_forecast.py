"""Tests of a forecast's step in `ffnlab bench graphs`: a peer of plain JAX, and once torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.bench import forecast, peer
from ffnlab.bench.forecast import forecast_step
from ffnlab.errors import FFNLabError, MissingExtraError
from ffnlab.graphs import globe_of, relative_distance
from ffnlab.models import OneForecastConfig

TINY = OneForecastConfig((2, 3), 2, 2, 0, width=4, blocks=3, heads=2)


class Fake:
    """Takes the same steps with `jax.grad` alone."""

    spoil = 1.0

    def __init__(self, directory, *, tasks, packages):
        assert tasks == "forecast_peer.py" and packages == ("torch",)
        assert Path(peer.__file__).with_name(tasks).is_file()
        with np.load(Path(directory) / "forecast.npz", allow_pickle=False) as saved:
            found = dict(saved)
        assert found["p.layers.period[0].score.maps[1].w"].shape == (3, 16, 2)
        assert found["up_edges"].shape == (len(found["up_senders"]), 4)
        self.x, self.y = jnp.asarray(found["x"]), jnp.asarray(found["y"])
        self.model, self.globe = TINY.make(key=jax.random.key(0)), globe_of(TINY)

    def ask(self, do, rate):
        assert do == "train"

        def loss(model):
            return relative_distance(model(self.x, self.globe), self.y).mean()

        value, gradient = jax.jit(jax.value_and_grad(loss))(self.model)
        self.model = jax.tree.map(lambda p, g: p - rate * g, self.model, gradient)
        return {"seconds": 0.5, "form": "plain", "loss": self.spoil * float(value)}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.mark.slow
def test_both_sides_take_the_same_steps(monkeypatch):
    monkeypatch.setattr(forecast, "Peer", Fake)
    task = forecast_step(TINY, turns=2)
    assert task.ours > 0 and task.theirs == 0.5 and task.form == "plain"
    assert task.difference < 1e-4
    monkeypatch.setattr(forecast, "Peer", type("Spoiled", (Fake,), {"spoil": 1.01}))
    with pytest.raises(FFNLabError, match="forecast: the two sides' losses differ by"):
        forecast_step(TINY, turns=1)


@pytest.mark.parity
def test_with_torch():
    try:
        peer.peer_python(("torch",))
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert forecast_step(TINY, turns=2).form
