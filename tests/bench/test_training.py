"""Tests of `ffnlab bench train` with a peer that is ourselves, and once with torch; none timed."""

import jax
import jax.numpy as jnp
import optax
import pytest
import rich

from ffnlab import models
from ffnlab.bench import peer, training
from ffnlab.bench.training import Settings, compare
from ffnlab.errors import FFNLabError, MissingExtraError
from ffnlab.learning import backprop

SMALL = Settings(batch=2, length=8, turns=2)


@pytest.fixture
def directory(fixtures):
    """A tiny model."""
    return fixtures / "models" / "llama2"


@pytest.fixture
def fake(monkeypatch):
    """Puts ourselves in the place of the peer; its losses may be changed on the way."""

    def install(change=lambda loss: loss):
        class Fake:
            about = {"versions": {"fake": "1.0"}}

            def __init__(self, directory):
                self.model, self.state = models.load(directory, extras=False), None

            def ask(self, do, rows, rate, decay):
                assert do == "train"
                rule = backprop(optimizer=optax.adamw(rate, weight_decay=decay))
                if self.state is None:
                    self.state = rule.init(self.model, jax.random.key(0))
                self.state, metrics = rule.step(self.state, jnp.array(rows, jnp.int32))
                loss = change(float(metrics["loss"]))
                return {"seconds": 0.5, "form": "our own", "loss": loss, "peak": 2**20}

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(training, "Peer", Fake)

    return install


def test_both_sides_take_the_same_steps(directory, fake, capsys):
    fake()
    found = compare(directory, SMALL)
    assert found.tokens == 16 and found.theirs == 0.5 and 0 < found.ours
    assert found.ratio > 0 and found.difference < 1e-6 and found.peaks[1] == 2**20 < found.peaks[0]
    rich.print(found)
    assert "our own; fake 1.0" in " ".join(capsys.readouterr().out.split())


def test_other_work_is_refused(directory, fake):
    fake(lambda loss: loss * 1.02)
    with pytest.raises(FFNLabError, match="losses differ by 0.0"):
        compare(directory, SMALL)
    fake(lambda loss: float("nan"))
    with pytest.raises(FFNLabError, match="do not compute the same"):
        compare(directory, SMALL)


@pytest.mark.parity
def test_with_torch(directory):
    try:
        peer.peer_python()
    except MissingExtraError as error:
        pytest.skip(str(error))
    found = compare(directory, SMALL)
    assert found.difference < 1e-4 and found.theirs > 0
