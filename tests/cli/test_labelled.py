"""`ffnlab train` on images and records: kinds of model, rules, stop and resume, what is refused."""

import json
import signal
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, tree
from ffnlab.cli.inputs.labelled import load_labelled
from ffnlab.cli.main import main
from ffnlab.cli.train import run, train
from ffnlab.cli.training import TrainConfig
from ffnlab.data import ArrayBatches, digits
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.formats import load
from ffnlab.formats import safetensors as st
from ffnlab.layers import MLP
from ffnlab.parallel import from_table, read_config, to_table

RUN = {"steps": 6, "log_every": 1, "checkpoint_every": 3, "dtype": "float32"}
CONVNET = {"kind": "convnet", "channels": [1, 4, 6, 8], "classes": 10}
MLP_OF_DIGITS = {"kind": "mlp", "sizes": [64, 12, 10]}
DIGITS = {"kind": "images", "batch": 8}


def settings(model=CONVNET, data=DIGITS, rule="backprop", **run):
    """A run of a few steps."""
    table = {"model": model, "data": data, "run": RUN | run, "rule": rule}
    return from_table(table, TrainConfig)


def toml(table):
    """Tables as the text of a file."""
    parts = []
    for name, inner in table.items():
        parts += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in inner.items())]
    return "\n".join(parts)


def test_a_convnet_learns_digits_by_the_command_line(tmp_path, capsys):
    file, out = tmp_path / "run.toml", tmp_path / "run"
    model = CONVNET | {"channels": [1, 8, 16, 16]}
    tables = {"model": model, "data": DIGITS | {"batch": 32}}
    tables |= {"run": RUN | {"steps": 40, "evaluate_every": 20}}
    tables |= {"optimizer": {"name": "adamw", "rate": 0.05, "warmup": 2}}
    file.write_text(toml(tables))
    arguments = ["train", "--config", str(file), "--out", str(out), "--no-progress"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    record = json.loads((out / "model" / "training.json").read_text())
    assert f"accuracy {record['held_out_accuracy']:.4f} on held-out data" in said
    assert record["held_out_accuracy"] > 0.7 and record["inputs"] == 40 * 32
    assert record["held_out_error"] == 1 - record["held_out_accuracy"]
    assert record["data"] | {"train": 1437, "held_out": 360, "images": "digits"} == record["data"]
    assert record["recipe"]["model"] == model and record["recipe"]["data"]["kind"] == "images"
    model, (_, test) = load(out / "model"), digits()
    assert isinstance(model, models.ConvNet)
    found = np.asarray(model(jnp.asarray(test.x.reshape(-1, 8, 8, 1)))).argmax(-1)
    assert np.mean(found == test.y) == pytest.approx(record["held_out_accuracy"])
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"held_out_error", "held_out_accuracy"} <= rows[-1].keys()
    assert main(["generate", str(out / "model"), "--prompt", "a"]) == 2
    assert "a model of kind 'convnet'; accepted here: 'decoder'" in capsys.readouterr().err


def test_an_mlp_of_records_stopped_and_resumed_to_the_same_bits(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    x = draw.integers(0, 256, (50, 2, 3)).astype(np.uint8)
    tensors = {"pixels": st.entry(x), "digit": st.entry((x[:, 0, 0] > 127).astype(np.int64))}
    st.write_file(tmp_path / "data.safetensors", tensors)
    data = {"kind": "records", "records": str(tmp_path / "data.safetensors"), "shape": [2, 3]}
    data |= {"inputs": "pixels", "label": "digit", "scale": 1 / 255, "batch": 4}
    whole = settings({"kind": "mlp", "sizes": [6, 5, 2]}, data)
    run(whole, tmp_path / "whole")
    usual = ArrayBatches.__call__

    def stopped(batches, position):
        if position == 3:
            signal.raise_signal(signal.SIGTERM)
        return usual(batches, position)

    monkeypatch.setattr(ArrayBatches, "__call__", stopped)
    cut = run(whole, tmp_path / "cut")
    assert not cut["finished"] and 3 <= cut["position"] < 6
    monkeypatch.undo()
    record = run(whole, tmp_path / "cut", resume=True)
    assert record["data"]["train"] == 45 and record["data"]["held_out"] == 5
    a, b = (load(tmp_path / name / "model") for name in ("whole", "cut"))
    assert isinstance(a, MLP) and jax.tree.structure(a) == jax.tree.structure(b)
    for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(one, other)
    st.write_file(tmp_path / "data.safetensors", tensors | {"pixels": st.entry(x + np.uint8(1))})
    with pytest.raises(ConfigError, match="started with another text"):
        run(whole, tmp_path / "cut", resume=True)


HYPERNET = {
    "kind": "hypernet",
    "target": {"kind": "mlp", "sizes": [64, 8, 10]},
    "spec": {"outputs": "chunk_wise", "chunk": 64, "hidden": [8]},
}
BY_DATA = HYPERNET | {
    "target": {"kind": "convnet", "channels": [1, 2, 3, 3], "classes": 10},
    "spec": {"inputs": ["data"], "data": 64, "input_variability": "dynamic", "hidden": [3]},
}
PHYSICAL = {"kind": "physical", "inputs": 64, "classes": 10, "widths": [8], "system": "two_bit"}
NOPROP = {"kind": "noprop", "inputs": 64, "classes": 10, "hidden": 8, "blocks": 2}


@pytest.mark.parametrize(
    ("rule", "model", "figure"),
    [
        ("counter_current", MLP_OF_DIGITS, "held_out_accuracy"),
        ("counter_current", CONVNET, "held_out_accuracy"),
        ("counter_current", {"kind": "autoencoder", "channels": [1, 4]}, "held_out_error"),
        ("noprop", NOPROP, "held_out_accuracy"),
        ("backprop", HYPERNET, "held_out_accuracy"),
        ("backprop", BY_DATA, "held_out_accuracy"),
        ("physical_ff", PHYSICAL, "held_out_accuracy"),
        ("digital_twin", PHYSICAL, "held_out_accuracy"),
    ],
)
def test_every_rule(rule, model, figure, tmp_path):
    record = run(settings(model, rule=rule, steps=2, dtype="bfloat16"), tmp_path / "run")
    assert 0 <= record[figure] and np.isfinite(record[figure])
    found = load(tmp_path / "run" / "model")
    learned, _ = tree.trained(found)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(learned)} == {"bfloat16"}


def test_a_run_on_a_mesh(tmp_path):
    plain = run(settings(MLP_OF_DIGITS), tmp_path / "plain")
    cut = run(settings(MLP_OF_DIGITS, mesh="dp=2,tp=2"), tmp_path / "cut")
    assert cut["held_out_error"] == pytest.approx(plain["held_out_error"], abs=2 / 360)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": {"kind": "unet"}},
            "model.kind='unet' is not one of 'decoder', 'encoder', 'audio', 'vit', 'resnet', "
            "'uvit', 'revcol', 'mlp'",
        ),
        ({"model": {"kind": 3}}, "model.kind=3 is not one of"),
        (
            {"data": {"kind": "audio"}},
            "data.kind='audio' is not one of 'text', 'texts', 'questions', 'images', 'records'",
        ),
        (
            {"model": CONVNET | {"width": 8}},
            "unknown key 'model.width'; accepted: channels, classes",
        ),
        ({"model": {"kind": "mlp", "sizes": [3]}}, r"model: sizes=\[3\] must be two or more"),
        ({"data": {}}, "a model of kind 'convnet' reads images or records: set kind in"),
        (
            {"rule": "noprop"},
            r"rule 'noprop' does not train a model of kind 'convnet'; it takes 'noprop' "
            r"\('backprop', 'counter_current', 'dann', 'tas' would\)",
        ),
        ({"model": {"kind": "autoencoder", "channels": [1, 2]}}, "rule 'backprop' does not train"),
        ({"model": PHYSICAL}, r"'backprop' does not .* \('physical_ff', 'digital_twin' would\)"),
        ({"model": MLP_OF_DIGITS, "rule": "physical_ff"}, "it takes 'physical' "),
        ({"model": {"kind": "graph", "sizes": [3, 2]}}, "kind 'graph' reads a graph: set kind in"),
        (
            {"model": HYPERNET | {"spec": {"tasks": 2}}},
            "kind 'hypernet' has no kind of .data. to be trained on, as tasks=2",
        ),
        (
            {"model": {"kind": "hypernet", "target": {"kind": "autoencoder", "channels": [1, 2]}}},
            "as a target of kind 'autoencoder' is no classifier",
        ),
        (
            {"model": HYPERNET | {"target": {"kind": "noprop"}}},
            "model.target.kind='noprop' is not one of 'mlp', 'convnet'",
        ),
        ({"extension": {"steps": 2}}, "makes rows of text longer"),
        ({"data": DIGITS | {"size": [8]}}, r"size=\[8\] must be a height and a width"),
        ({"data": {"kind": "records", "records": "a", "shape": [0]}}, r"shape=\[0\] must be one"),
    ],
)
def test_a_file_that_does_not_fit_together(change, message):
    table = {"model": CONVNET, "data": DIGITS, "run": RUN} | change
    with pytest.raises(ConfigError, match=message):
        from_table(table, TrainConfig)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (MLP_OF_DIGITS | {"sizes": [63, 10]}, DIGITS, r"inputs of shape \[64\], which a mlp of"),
        (CONVNET | {"channels": [1, 2]}, DIGITS, r"inputs of shape \[8, 8, 1\], which a convnet"),
        (CONVNET | {"classes": 9}, DIGITS, "classes 0 to 9; the model has classes 0 to 8"),
        (CONVNET, DIGITS | {"held_out": "x"}, "digits has test images"),
        (
            CONVNET | {"channels": [3, 4, 6, 8]},
            DIGITS | {"colour": True},
            r"digits has images of size=\[8, 8\] without colour",
        ),
    ],
)
def test_data_that_does_not_fit_the_model(model, data, message):
    with pytest.raises(ConfigError, match=message):
        load_labelled(settings(model, data))


def test_options_for_layers_need_layers(tmp_path):
    with pytest.raises(ConfigError, match="model is a ConvNet; a Decoder or another model with"):
        run(settings(scan=True), tmp_path / "run")


def folder_of_images(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Images of two classes, one dark and one bright."""
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    for i in range(count):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        pixels = np.full((*size, 3), (i % 2) * 200 + i, np.uint8)
        image.fromarray(pixels).save(folder / "ab"[i % 2] / f"{i:02}.png")


def test_folders_of_image_files(tmp_path):
    pytest.importorskip("grain", reason="Grain is not installed")
    folder_of_images(tmp_path / "images", 20, (6, 6))
    model = {"kind": "convnet", "channels": [3, 4, 4], "classes": 2}
    data = {"kind": "images", "images": str(tmp_path / "images"), "size": [4, 4], "colour": True}
    chosen = settings(model, data | {"batch": 3, "threads": 0})
    found = load_labelled(chosen)
    x, y = found.batches(chosen)(0)
    assert x.shape == (3, 4, 4, 3) and x.dtype == np.float32 and y.dtype == np.int32
    np.testing.assert_array_equal(y, (x[:, 0, 0, 0] > 0.5).astype(np.int32))
    (part,) = list(found.held_out)
    assert len(part.x) == 2 and len(found.train) == 18
    # Files in order of their names: a/18.png and b/19.png are every tenth one.
    np.testing.assert_allclose(part.x[:, 0, 0, 0], np.array([18, 219]) / 255, rtol=1e-6)
    folder_of_images(tmp_path / "other", 4, (4, 4))
    apart = load_labelled(settings(model, data | {"held_out": str(tmp_path / "other")}))
    assert len(next(iter(apart.held_out)).x) == 4 and len(apart.train) == 20
    assert apart.identity["held_out"] == 4 and apart.identity["classes"] == "a,b"
    with pytest.raises(FFNLabError, match="classes 1 to 1; the model has classes 0 to 0"):
        few = settings(model | {"classes": 1}, data | {"threads": 0})
        load_labelled(few).batches(few)(0)


def test_idx_files_of_a_folder(tmp_path):
    for name, count in (("train", 12), ("t10k", 4)):
        images = np.arange(count * 4, dtype=np.uint8).reshape(count, 2, 2)
        for kind, array in (("images", images), ("labels", np.arange(count, dtype=np.uint8) % 3)):
            sides = b"".join(n.to_bytes(4, "big") for n in array.shape)
            head = bytes([0, 0, 8, array.ndim])
            (tmp_path / f"{name}-{kind}").write_bytes(head + sides + array.tobytes())
    data = {"kind": "images", "images": str(tmp_path), "size": [2, 2], "batch": 12}
    chosen = settings({"kind": "mlp", "sizes": [4, 3]}, data)
    found = load_labelled(chosen)
    x, y = found.batches(chosen)(0)
    assert sorted(np.round(x[:, 0] * 255).astype(int)) == list(range(0, 48, 4))
    np.testing.assert_array_equal(np.round(x[:, 0] * 255).astype(int) // 4 % 3, y)
    assert len(next(iter(found.held_out)).x) == 4


def test_presets_say_what_they_said():
    """Tables of runs of decoders are those of before, so that the runs go on."""
    preset = read_config("embedded", TrainConfig)
    text = Path(models.__file__).parent.parent / "presets" / "embedded.toml"
    said, table = tomllib.loads(text.read_text()), to_table(preset)
    recorded = Path(models.__file__).parent.parent / "embedded" / "training.json"
    recipe = json.loads(recorded.read_text())["recipe"]
    for name in ("model", "data"):
        assert {k: table[name][k] for k in said[name]} == said[name]
    assert "kind" not in table["model"] | table["data"]
    assert from_table(table, TrainConfig) == preset == from_table(recipe, TrainConfig)


def test_a_dry_run_and_the_keys(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text(toml({"model": CONVNET, "data": DIGITS, "run": RUN}))
    assert train(file, out=tmp_path / "run", dry_run=True) == 0
    said = capsys.readouterr().out
    assert "8 inputs" in said and "digits" in said and not (tmp_path / "run").exists()
    assert main(["train", "--keys"]) == 0
    said = capsys.readouterr().out
    assert 'kind = "convnet"' in said and 'kind = "records"' in said
    assert 'rule = "noprop"' in said and "integration" in said


def test_a_plan(tmp_path):
    from ffnlab.cli.plan import measure

    file = tmp_path / "run.toml"
    file.write_text(toml({"model": CONVNET, "data": DIGITS, "run": RUN}))
    request = {"config": str(file), "mesh": "dp=2", "batch": None, "length": None}
    found = measure(request | {"remat": None, "dtype": "float32"})
    assert found["rows"] == 8 and found["length"] == 0
    assert found["parameters"] == 9 * (4 + 4 * 6 + 6 * 8) + 80
    with pytest.raises(ConfigError, match="model is a ConvNet; a Decoder or another"):
        measure(request | {"remat": "nothing", "dtype": "float32"})
