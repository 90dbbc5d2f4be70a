"""`ffnlab train` on sequences of numbers: what is learned and scored, resumed, and refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from ffnlab.cli.inputs.sequences import load_sequences
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, read_training
from ffnlab.data.sequence_maps import SEQUENCE_MAPS
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import load
from ffnlab.parallel import from_table

MODEL = {"kind": "sequence", "length": 2, "inputs": 1, "outputs": 1, "width": 8, "hidden": 32}
DATA = {"kind": "sequences", "sequences": "waves", "rows": 200, "batch": 20}
RUN = {"steps": 30, "log_every": 30, "checkpoint_every": 10, "dtype": "float32"}


def settings(**change):
    optimizer = {"name": "adamw", "rate": 1e-2}
    table = {"model": MODEL, "data": DATA, "optimizer": optimizer, "run": RUN}
    return from_table(table | change, TrainConfig)


def test_a_network_learns_a_map_and_is_scored_on_pairs_held_out(tmp_path):
    record = run(settings(), tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    data = load_sequences(settings().data, settings().model)
    assert (len(data.train.x), len(data.held_out.x)) == (180, 20)
    assert record["data"] == {"sequences": "waves", "train": 180, "held_out": 20}
    x = jnp.asarray(data.held_out.x)
    apart = np.asarray(model(x)) - data.held_out.y
    assert record["held_out_error"] == pytest.approx(float(np.mean(apart**2)), rel=1e-5)
    assert record["held_out_largest"] == pytest.approx(float(np.abs(apart).max()), rel=1e-5)
    assert data.held_out.y == pytest.approx(SEQUENCE_MAPS["waves"](data.held_out.x), abs=1e-6)
    fresh = settings().model.make(key=jax.random.key(1))(x)
    assert record["held_out_error"] < float(np.mean((np.asarray(fresh) - data.held_out.y) ** 2))


def test_a_file_of_pairs_is_learned(tmp_path):
    random = np.random.default_rng(0)
    x = random.standard_normal((100, 2, 1)).astype(np.float32)
    save_file({"x": x, "y": x[:, ::-1].copy()}, tmp_path / "pairs.safetensors")
    named = DATA | {"sequences": str(tmp_path / "pairs.safetensors")}
    record = run(settings(data=named), tmp_path / "run")
    assert record["data"]["train"] == 90 and record["held_out_error"] < 1


def test_the_preset_is_read():
    preset = read_training("sequence_map")
    assert preset.kind == "sequence" and preset.data.sequences == "waves"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DATA | {"rows": 0}}, "rows=0"),
        ({"data": DATA | {"low": 1.0}}, "low=1.0 must lie below high=1.0"),
        ({"data": {"kind": "images"}}, "kind 'sequence' reads sequences of numbers"),
        ({"rule": "counter_current"}, "does not train a model of kind 'sequence'"),
        ({"model": {"kind": "mlp", "sizes": [2, 2]}}, "reads images or records"),
    ],
)
def test_a_file_that_does_not_fit_together(change, message):
    with pytest.raises(ConfigError, match=message):
        settings(**change)


def test_data_that_do_not_fit_the_model(tmp_path):
    x = np.ones((40, 3, 1), np.float32)
    save_file({"x": x, "y": x}, tmp_path / "pairs.safetensors")
    named = DATA | {"sequences": str(tmp_path / "pairs.safetensors")}
    with pytest.raises(ConfigError, match=r"3 places, 1 numbers to 1; the model's .* \[2, 1, 1\]"):
        run(settings(data=named), tmp_path / "run")
    with pytest.raises(ConfigError, match="12 pairs are too few for batch=20"):
        run(settings(data=DATA | {"rows": 12}), tmp_path / "run")
    with pytest.raises(FormatError, match="tides cannot be read"):
        run(settings(data=DATA | {"sequences": "tides"}), tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
