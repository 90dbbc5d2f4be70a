"""Forward learning of a graph network by the command line: trained, resumed, scored, planned."""

import json

import jax
import numpy as np
import pytest

from ffnlab.cli.inputs.forward import forward_data
from ffnlab.cli.inputs.nodes import load_nodes, read_nodes
from ffnlab.cli.main import main
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, read_training
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.learning import forward_gnn_answers
from ffnlab.parallel import from_table
from ffnlab.testing import equal

BLOCKS = {
    "kind": "block_model",
    "nodes": 30,
    "classes": 3,
    "width": 5,
    "inside": 0.3,
    "train": 15,
    "held_out": 6,
}
MODEL = {"kind": "graph", "sizes": [5, 8, 8], "form": "layerwise"}
RUN = {"steps": 12, "log_every": 4, "evaluate_every": 4, "dtype": "float32"}
OPTIMIZER = {"rate": 1e-2, "warmup": 0, "schedule": "constant"}
RULE = {"every": 2, "patience": 2, "limit": 6}


def settings(**changes):
    table = {"model": MODEL, "data": BLOCKS, "run": RUN, "optimizer": OPTIMIZER}
    table |= {"rule": "forward_gnn", "rule_options": RULE}
    return from_table(table | changes, TrainConfig)


def test_a_network_is_trained_scored_and_resumed(tmp_path):
    of = settings()
    record = run(of, tmp_path / "whole")
    model, data = load(tmp_path / "whole" / "model"), forward_data(of)
    assert model.config.form == "layerwise"
    said = forward_gnn_answers(data.batch, data.options)(model, data.batch.inputs)
    right = np.asarray(said).argmax(-1) == data.nodes.y
    assert record["held_out_accuracy"] == pytest.approx(right[data.nodes.valid].mean())
    assert record["test_accuracy"] == pytest.approx(right[data.nodes.test].mean())
    assert {k: record["data"][k] for k in ("graph", "train", "held_out", "test")} == {
        "graph": "block_model",
        "train": 15,
        "held_out": 6,
        "test": 9,
    }
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows[-1]["layer"] >= 1 and rows[-1]["test_accuracy"] == record["test_accuracy"]

    short = settings(run=RUN | {"steps": 5})
    assert run(short, tmp_path / "cut")["finished"]
    with pytest.raises(ConfigError):
        run(of, tmp_path / "cut")
    run(of, tmp_path / "cut", resume=True)
    assert equal(load(tmp_path / "cut" / "model"), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "model"),
    [
        ({"objective": "label_appending"}, {"sizes": [8, 8], "layer": "sage"}),
        ({"objective": "virtual_nodes"}, {"layer": "gat", "heads": 2}),
        ({"top_down": "input"}, {"sizes": [5, 8, 8, 3], "form": "top_down"}),
        ({"top_down": "loss"}, {}),
    ],
)
def test_every_way_is_trained_and_scored(tmp_path, options, model):
    of = settings(model=MODEL | model, rule_options=RULE | options)
    record = run(of, tmp_path)
    assert 0 <= record["held_out_accuracy"] <= 1 and 0 <= record["test_accuracy"] <= 1


def test_a_graph_that_is_drawn_is_learned_by_backpropagation_too(tmp_path):
    model = {"kind": "graph", "sizes": [5, 8, 3]}
    record = run(settings(rule="backprop", rule_options={}, model=model), tmp_path)
    assert record["data"]["graph"] == "block_model" and record["test_accuracy"] > 1 / 3


def test_a_run_is_announced_and_planned(tmp_path, capsys):
    from ffnlab.cli.plan import measure
    from tests.cli.test_labelled import toml

    table = {"model": MODEL, "data": BLOCKS, "run": RUN, "rule_options": RULE}
    (tmp_path / "run.toml").write_text('rule = "forward_gnn"\n' + toml(table))
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--dry-run"]) == 0
    assert "block_model" in capsys.readouterr().out
    request = {"config": str(tmp_path / "run.toml"), "mesh": "tp=2", "batch": None, "length": None}
    found = measure(request | {"remat": None, "dtype": "float32"})
    assert found["state"]["model"] > 0 and found["state"]["held"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule_options": {"objective": "links"}}, "objective = 'links'; expected 'single"),
        ({"rule_options": {"patience": -1}}, "patience=-1"),
        ({"rule_options": {"shape": 1}}, "unknown option 'shape'"),
        ({"model": MODEL | {"sizes": [4, 8]}}, "the first must be 5"),
        ({"model": MODEL | {"form": "scores"}}, "form='scores': with top_down='none'"),
        ({"rule": "backprop", "rule_options": {}}, "form='layerwise': such a network gives no"),
        ({"data": BLOCKS | {"classes": 1}}, "two classes or more"),
        ({"run": RUN | {"microbatches": 2}}, "microbatches=2: a graph is one batch"),
    ],
)
def test_files_that_do_not_fit_together_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run(settings(**changes), tmp_path)
    assert not (tmp_path / "model").exists()


def test_a_model_that_reads_no_graph_is_not_trained_so():
    with pytest.raises(ConfigError, match="does not train a model of kind 'mlp'"):
        settings(model={"kind": "mlp", "sizes": [5, 3]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": 25, "held_out": 6}, "train=25 and held_out=6 are more than nodes=30"),
        ({"held_out": 0}, "held_out=0"),
        ({"inside": 2.0}, "inside=2.0 must lie in"),
    ],
)
def test_a_graph_that_cannot_be_drawn_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        read_nodes(settings(data=BLOCKS | changes).data)


def test_the_presets_fit_their_data(data, monkeypatch):
    monkeypatch.setenv("FFNLAB_DATA", str(data))
    nodes = load_nodes(read_training("gcn_cora").data, read_training("gcn_cora").model)
    assert nodes.x.shape == (2708, 1433)
    of = read_training("forward_gnn_blocks")
    found = forward_data(of)
    assert found.batch.inputs.x.shape == (604, 32) and jax.tree.leaves(found.question)
