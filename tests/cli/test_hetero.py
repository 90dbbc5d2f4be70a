"""`ffnlab train` on graphs of several kinds: rows that are learned and scored, and refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.cli.inputs.hetero import load_hetero
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, read_training
from ffnlab.data import academic
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.parallel import from_table

GROUPS = [[1, 4], [2, 32], [1, 4], [2, 32], [1, 4], [2, 32], *[[1, 3]] * 3]
MODEL = {"kind": "groups", "groups": GROUPS, "classes": 3, "hidden": 8, "drop": 0.2}
DATA = {"kind": "hetero", "rounds": 1, "width": 4, "with_input": True, "labels": True, "batch": 60}
RUN = {"steps": 6, "log_every": 6, "checkpoint_every": 3, "dtype": "float32"}


def settings(**change):
    optimizer = {"name": "adamw", "rate": 1e-2}
    return from_table(
        {"model": MODEL, "data": DATA, "optimizer": optimizer, "run": RUN} | change, TrainConfig
    )


def test_nodes_are_learned_in_batches_and_scored_by_part(tmp_path):
    record = run(settings(), tmp_path / "run")
    data, nodes = load_hetero(settings().data, settings().model), academic(0)
    assert {name: len(part.y) for name, part in data.parts.items()} == {
        "train": 360,
        "held_out": 120,
        "test": 120,
    }
    assert record["data"]["graph"] == "academic" and len(record["data"]["sha256"]) == 64
    model = load(tmp_path / "run" / "model")
    assert model.config.groups == tuple(map(tuple, GROUPS))
    for name, mask in (("held_out", nodes.valid), ("test", nodes.test)):
        part = data.parts[name]
        assert np.array_equal(part.y, nodes.y[mask]) and part.x.dtype == np.float16
        right = np.mean(np.asarray(model(jnp.asarray(part.x))).argmax(-1) == part.y)
        assert record[f"{name}_accuracy"] == pytest.approx(right)
    assert record["held_out_error"] == pytest.approx(1 - record["held_out_accuracy"])


def test_the_preset_is_of_the_groups_that_its_data_give():
    preset = read_training("rphgnn_academic")
    data = load_hetero(preset.data, preset.model)
    assert data.parts["train"].x.shape == (360, preset.model.width)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": DATA | {"graph": "dblp"}}, "graph='dblp' is not one of"),
        ({"data": DATA | {"rounds": 0}}, "rounds=0"),
        ({"data": DATA | {"squash": "max"}}, "squash='max' is not one of"),
        ({"data": DATA | {"draw": -1}}, "seed=-1"),
        ({"data": {"kind": "graph"}}, "reads images, records or a graph of several kinds"),
        ({"model": {"kind": "mlp", "sizes": [2, 2]}}, "reads images or records"),
        ({"rule": "counter_current"}, "does not train a model of kind 'groups'"),
    ],
)
def test_a_file_that_does_not_fit_together(change, message):
    with pytest.raises(ConfigError, match=message):
        settings(**change)


def test_data_that_do_not_fit_the_model():
    of = settings()
    for data, model, message in (
        (DATA | {"rounds": 2}, MODEL, r"\[data\] gives groups \(\(2, 4\), \(3, 32\)"),
        (DATA, MODEL | {"classes": 2}, "and 3 classes"),
        (DATA | {"batch": 361}, MODEL, "batch=361: there are 360 nodes"),
    ):
        of = settings(data=data, model=model)
        with pytest.raises(ConfigError, match=message):
            load_hetero(of.data, of.model)
