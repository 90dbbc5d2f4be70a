"""Encoders and graph networks by the command line: trained, planned, scored, compressed."""

import json

import jax
import numpy as np
import pytest

from ffnlab import models, transform
from ffnlab.cli.changes import table_at
from ffnlab.cli.inputs.corpus import load_hidden
from ffnlab.cli.inputs.data_kinds import DataConfig, GraphConfig, TextsConfig
from ffnlab.cli.inputs.nodes import load_nodes
from ffnlab.cli.inputs.texts import load_texts
from ffnlab.cli.main import main
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, fresh
from ffnlab.compress import read_report
from ffnlab.data import block_model
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer, load
from ffnlab.graph import symmetric_norm
from ffnlab.graphs import virgo
from ffnlab.models import Encoder, EncoderConfig, GraphNetwork, GraphNetworkConfig
from ffnlab.parallel import from_table

SIZES = {"vocab": 257, "width": 8, "hidden": 16, "layers": 1, "heads": 2, "head_dim": 4}
SIZES |= {"max_positions": 16, "types": 1}
ENCODER = {"kind": "encoder", **SIZES}
CLASSES = ENCODER | {"head": "classes", "classes": 2, "pooler": "tanh"}
RUN = {"steps": 3, "log_every": 1, "checkpoint_every": 3, "dtype": "float32"}


def settings(model, data, **more):
    """A run of a few steps."""
    return from_table({"model": model, "data": data, "run": RUN} | more, TrainConfig)


@pytest.fixture
def sentences(tmp_path):
    """Texts of two classes, told apart by their first letter, as JSON lines."""
    rows = [{"text": f"{'ab'[i % 2]}{i:03}", "label": "no yes".split()[i % 2]} for i in range(60)]
    (tmp_path / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(tmp_path / "texts.jsonl")


@pytest.fixture
def words(tmp_path):
    """A text."""
    (tmp_path / "words.txt").write_text("".join(f"a bad cab {i % 7}.\n" for i in range(80)))
    return str(tmp_path / "words.txt")


def test_classes_of_texts_are_learned_saved_and_scored(tmp_path, sentences, capsys):
    chosen = settings(
        CLASSES,
        {"kind": "texts", "texts": sentences, "length": 8, "batch": 16},
        run=RUN | {"steps": 60, "log_every": 20, "checkpoint_every": 60},
        optimizer={"rate": 3e-2, "warmup": 2},
    )
    record = run(chosen, tmp_path / "run")
    assert record["held_out_accuracy"] == 1.0 and record["inputs"] == 60 * 16
    assert record["data"]["classes"] == "no,yes" and record["data"]["train"] == 54
    folder = tmp_path / "run" / "model"
    assert (folder / "config.json").exists(), "a BERT: transformers reads it"
    assert isinstance(load(folder), Encoder) and Tokenizer.load(folder).size == 256
    assert main(["eval", str(folder), "--texts", sentences]) == 0
    said = capsys.readouterr().out
    assert "accuracy 1.0000 (6 texts)" in said
    assert main(["eval", str(folder), "--texts", sentences, "--window", "4"]) == 2
    assert "others are scored whole" in capsys.readouterr().err
    assert main(["eval", str(folder), "--text", sentences]) == 2
    assert "2 classes of texts apart: give --texts" in capsys.readouterr().err


def test_an_encoder_is_given_a_head_of_classes_and_adapters(tmp_path, sentences):
    """A masked model goes on as a classifier, of which adapters and head learn."""
    base = Encoder(EncoderConfig(**SIZES, head="masked"), key=jax.random.key(0))
    models.save(base, tmp_path / "base", format="ffnlab")
    table = {
        "start": str(tmp_path / "base"),
        "model": table_at(str(tmp_path / "base")),
        "data": {"kind": "texts", "texts": sentences, "length": 8, "batch": 16},
        "transform": [{"name": "snnk-adapter"}, {"name": "classifier", "classes": 2}],
        "trainable": "adapter",
        "run": RUN | {"scan": True},
    }
    record = run(from_table(table, TrainConfig), tmp_path / "run")
    assert record["inputs"] == 3 * 16
    found = load(tmp_path / "run" / "model")
    assert found.config.head == "classes" and found.config.classes == 2
    few = from_table(table | {"transform": [{"name": "classifier", "classes": 1}]}, TrainConfig)
    with pytest.raises(ConfigError, match="classes 0 to 1; the model has 1"):
        run(few, tmp_path / "few")
    none = from_table(
        {k: v for k, v in table.items() if k not in ("transform", "trainable")}, TrainConfig
    )
    with pytest.raises(ConfigError, match="the model has None"):
        run(none, tmp_path / "none")


@pytest.mark.slow
def test_hidden_tokens_are_learned_compressed_and_scored_alike(tmp_path, words, capsys):
    data = {"text": [words], "length": 12, "batch": 4}
    record = run(settings(ENCODER | {"head": "masked", "layers": 2}, data), tmp_path / "run")
    folder = tmp_path / "run" / "model"
    assert record["tokens"] == 3 * 4 * 12 and 0 <= record["held_out_found"] <= 1
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        "[calibration]\ntokens = 48\nwindow = 12\nbatch = 2\n"
        "[evaluation]\ntokens = 0\nwindow = 12\n"
        '[[stage]]\ntransform = "finercut"\nremove = 1\n'
        '[[stage]]\ntransform = "nearest"\ngroup = 4\n'
    )
    out = tmp_path / "out"
    arguments = [str(folder), "--text", words, "--recipe", str(recipe), "--out", str(out)]
    assert main(["compress", *arguments]) == 0
    said = capsys.readouterr()
    assert "hidden token" in said.out and "encode" in said.out
    assert "warning" not in said.err, "the tenth that training held out"
    report = read_report(out / "report.json")
    assert [row.stage for row in report.rows] == ["original", "finercut", "nearest"]
    assert report.axis == "bits_per_token" and report.exports[0].format == "compressed-tensors"
    assert report.rows[0].scores["bits_per_token"] == pytest.approx(record["held_out_bits"])
    for place, row in ((folder, report.rows[0]), (out / "model", report.rows[2])):
        assert main(["eval", str(place), "--text", words, "--held-out", "--window", "12"]) == 0
        bits = row.scores["bits_per_token"]
        assert f"bits per hidden token {bits:.4f}" in capsys.readouterr().out
    assert main(["eval", str(folder), "--text", words, "--window", "12"]) == 0
    assert "trained on 1 of the 1 documents" in capsys.readouterr().err


def test_a_model_that_no_family_can_say_is_trained_and_compressed(tmp_path, words, capsys):
    model = ENCODER | {"positions": "rotary", "norm": "before", "gated": True}
    config = from_table({k: v for k, v in model.items() if k != "kind"}, EncoderConfig)
    folder, out = tmp_path / "net", tmp_path / "out"
    models.save(Encoder(config, key=jax.random.key(0)), folder, format="ffnlab")
    Tokenizer.bytes().save(folder)
    assert main(["eval", str(folder), "--text", words]) == 2
    assert "head=None, which gives no figure on plain text" in capsys.readouterr().err
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[evaluation]\ntokens = 64\nwindow = 12\n[[stage]]\ntransform = "nearest"\n')
    arguments = [str(folder), "--text", words, "--recipe", str(recipe), "--out", str(out)]
    assert main(["compress", *arguments]) == 0
    report = read_report(out / "report.json")
    assert report.exports[0].format == "ffnlab" and (out / "model" / "tokenizer.json").exists()
    first, last = (row.scores["cosine"] for row in report.rows)
    assert first == pytest.approx(1, abs=1e-6) and 0.9 < last < 1 - 1e-6


@pytest.fixture
def nodes(tmp_path):
    """A graph of two classes in the format of cora.npz."""
    found = block_model(nodes=40, classes=2, width=3, train=12, valid=12, inside=0.4)
    kept = found.graph.senders < found.graph.receivers
    ends = [np.asarray(e)[kept] for e in (found.graph.senders, found.graph.receivers)]
    members = {
        "num_nodes": np.int64(40),
        "num_feat": np.int64(3),
        "feat_indptr": np.arange(0, 123, 3, dtype=np.int32),
        "feat_indices": np.tile(np.arange(3, dtype=np.int32), 40),
        "feat_data": found.x.ravel(),
        "labels": found.y.astype(np.int16),
        "edges": np.stack(ends, 1).astype(np.int32),
    }
    for name, part in (("train", found.train), ("val", found.valid), ("test", found.test)):
        members[f"{name}_idx"] = np.flatnonzero(part).astype(np.int32)
    np.savez(tmp_path / "nodes.npz", **members)
    return str(tmp_path / "nodes.npz")


def test_a_graph_network_learns_classes_of_nodes(tmp_path, nodes):
    chosen = settings(
        {"kind": "graph", "sizes": [3, 8, 2]},
        {"kind": "graph", "graph": nodes},
        run=RUN | {"steps": 40, "log_every": 20},
        optimizer={"rate": 3e-2, "warmup": 2},
    )
    record = run(chosen, tmp_path / "run")
    model = load(tmp_path / "run" / "model")
    assert isinstance(model, GraphNetwork)
    data = load_nodes(GraphConfig(nodes), GraphNetworkConfig((3, 8, 2)))
    loops = np.asarray(data.graph.senders == data.graph.receivers)
    assert loops.sum() == 40, "what gcn layers expect"
    out = model(jax.numpy.asarray(data.x), data.graph, symmetric_norm(data.graph))
    right = np.asarray(out).argmax(-1) == data.y
    assert record["held_out_accuracy"] == pytest.approx(right[data.valid].mean())
    assert record["test_accuracy"] == pytest.approx(right[data.test].mean())
    assert record["held_out_accuracy"] > 0.8
    assert {k: record["data"][k] for k in ("train", "held_out", "test")} == {
        "train": 12,
        "held_out": 12,
        "test": 16,
    }


def test_a_deep_graph_network_is_scanned(tmp_path, nodes):
    """It learns the same, up to the order of sums, and is saved as it ran."""
    records, outputs = [], []
    data = load_nodes(GraphConfig(nodes), GraphNetworkConfig((3, 2)))
    for scan in (False, True):
        chosen = settings(
            {"kind": "graph", "sizes": [3, 6, 6, 6, 6, 2]},
            {"kind": "graph", "graph": nodes},
            run=RUN | {"steps": 4, "scan": scan},
        )
        records.append(run(chosen, tmp_path / str(scan)))
        model = load(tmp_path / str(scan) / "model")
        assert len(model.layers) == (3 if scan else 5)
        outputs.append(np.asarray(model(jax.numpy.asarray(data.x), data.graph)))
    assert records[0]["held_out_accuracy"] == records[1]["held_out_accuracy"]
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)


def test_a_graph_network_starts_from_what_its_graph_does(tmp_path, nodes):
    sizes = (3, 6, 6, 2)
    chosen = settings(
        {"kind": "graph", "sizes": list(sizes)},
        {"kind": "graph", "graph": nodes},
        transform=[{"name": "virgo", "start": "virgofor", "seed": 3}],
    )
    data = load_nodes(GraphConfig(nodes), GraphNetworkConfig(sizes))
    batch = {"x": jax.numpy.asarray(data.x), "graph": data.graph}
    model = GraphNetworkConfig(sizes).make(key=jax.random.key(9))
    want, _ = transform.apply(virgo(start="virgofor", seed=3), model, [batch], progress=False)
    found = fresh(chosen, jax.random.key(0))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    shapes = jax.eval_shape(lambda key: fresh(chosen, key), jax.random.key(0))
    leaves = (jax.tree.leaves(each) for each in (shapes, found))
    assert all(a.shape == b.shape for a, b in zip(*leaves, strict=True))
    assert run(chosen, tmp_path / "run")["finished"]
    other = settings(
        ENCODER | {"head": "masked"}, {}, transform=[{"name": "virgo", "start": "virgofor"}]
    )
    with pytest.raises(ConfigError, match="'virgo' calibrates on data"):
        fresh(other, jax.random.key(0))


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (CLASSES, {"kind": "texts", "batch": 4, "length": 8}),
        ({"kind": "graph", "sizes": [3, 2]}, {"kind": "graph"}),
    ],
)
def test_plans(tmp_path, nodes, model, data):
    from ffnlab.cli.plan import measure
    from tests.cli.test_labelled import toml

    data = data | ({"graph": nodes} if data.get("kind") == "graph" else {})
    (tmp_path / "run.toml").write_text(toml({"model": model, "data": data, "run": RUN}))
    request = {"config": str(tmp_path / "run.toml"), "mesh": "dp=2", "batch": None, "length": None}
    found = measure(request | {"remat": None, "dtype": "float32"})
    assert found["rows"] == (1 if "graph" in data else 4) and found["state"]["model"] > 0


@pytest.mark.parametrize(
    ("model", "data", "more", "message"),
    [
        (CLASSES, {}, {}, "a model of kind 'encoder' reads texts with classes: set kind in"),
        (ENCODER | {"head": "masked"}, {"kind": "images"}, {}, "reads text: set kind in"),
        (ENCODER, {}, {}, "head=None has no kind of .data. to be trained on; 'masked' and 'cl"),
        (ENCODER | {"head": "span"}, {}, {}, "reads questions: set kind in"),
        (ENCODER | {"head": "masked"}, {"packed": True}, {}, "packed: a encoder has no rows"),
        ({"kind": "graph", "sizes": [3, 2]}, {}, {}, "reads a graph: set kind in"),
        (
            {"kind": "graph", "sizes": [3, 2]},
            {"kind": "graph"},
            {"run": RUN | {"microbatches": 2}},
            "microbatches=2: a graph is one batch",
        ),
        (
            {"kind": "graph", "sizes": [3, 2]},
            {"kind": "graph"},
            {"run": RUN | {"remat": "nothing"}},
            "remat='nothing': a graph is one batch",
        ),
        (
            {"kind": "graph", "sizes": [3, 2], "form": "layerwise"},
            {"kind": "graph"},
            {"rule": "forward_gnn", "run": RUN | {"scan": True}},
            "scan=True: a graph is one batch",
        ),
        (CLASSES, {"kind": "texts"}, {"rule": "noprop"}, "does not train a model of kind 'encod"),
        (CLASSES, {"kind": "texts", "held_out": "a"}, {}, "one in ten of 'polarity' is held out"),
        (CLASSES, {"kind": "texts", "length": 0}, {}, "length=0 must be at least 1"),
    ],
)
def test_a_file_that_does_not_fit_together(model, data, more, message):
    with pytest.raises(ConfigError, match=message):
        settings(model, data, **more)


def test_data_that_does_not_fit_the_model(sentences, words, nodes):
    def config(**changes):
        table = {k: v for k, v in (CLASSES | changes).items() if k != "kind"}
        return from_table(table, EncoderConfig)

    texts = TextsConfig(sentences, length=8)
    for model, message in (
        (config(classes=1), "classes 0 to 1; the model has 1"),
        (config(vocab=60), "the model has ids 0..59"),
        (config(max_positions=7), "length=8 is more than max_positions=7"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_texts(texts, model)
    masked = EncoderConfig(**SIZES | {"vocab": 256}, head="masked")
    for length, message in ((8, "no token for the mask"), (17, "length=17 is more than max_pos")):
        with pytest.raises(ConfigError, match=message):
            load_hidden(DataConfig((words,), length=length), masked)
    for sizes in ((4, 2), (3, 1)):
        with pytest.raises(ConfigError, match="have 3 features and 2 classes"):
            load_nodes(GraphConfig(nodes), GraphNetworkConfig(sizes))
