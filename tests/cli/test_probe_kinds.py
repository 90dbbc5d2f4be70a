"""`ffnlab probe` of models that are no decoders: what they are shown, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.analysis import (
    compiled_cost,
    gradient_alignment,
    lossy_information,
    principal,
    weight_norms,
)
from ffnlab.cli.inputs.examples import examples, image_shape
from ffnlab.cli.inputs.nodes import node_batch
from ffnlab.cli.inputs.reading import by_name
from ffnlab.cli.main import main
from ffnlab.compress.text import calibration, file_text
from ffnlab.data import Labelled, cora, digits
from ffnlab.errors import ConfigError
from ffnlab.formats import KINDS, Tokenizer
from ffnlab.formats import safetensors as st
from ffnlab.graph import with_self_loops
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.losses import masked
from ffnlab.recipes import Calibration
from ffnlab.transform import calibrate
from tests.compress.conftest import WORDS
from tests.data.test_graphs import SMALL

ENCODER = models.EncoderConfig(
    256, 16, 24, 1, 4, 4, max_positions=32, head="classes", classes=3, pooler="tanh"
)
CONFIGS = {
    "encoder": ENCODER,
    "audio": models.AudioEncoderConfig(4, 8, 8, 1, 2, max_positions=3),
    "vit": models.ViTConfig((8, 8), 4, 8, 8, 1, 2, channels=1, classes=10, pool="mean"),
    "resnet": models.ResNetConfig((1, 1), (2, 3), 10, channels=1, image=(8, 8)),
    "uvit": models.UViTConfig((8, 8), 4, 8, 8, 2, 2, channels=1),
    "revcol": models.RevColConfig((8, 8), (3, 4), (1, 1), 3, 10, channels=1, patch=2),
    "mlp": models.MLPConfig((64, 5, 10)),
    "convnet": models.ConvNetConfig((1, 2, 3, 4), 10),
    "autoencoder": models.AutoencoderConfig((1, 3)),
    "graph": models.GraphNetworkConfig((3, 4, 2)),
    "groups": models.GroupNetworkConfig(((2, 16), (1, 32)), 10, hidden=4),
    "noprop": models.NoPropConfig(64, 10, hidden=4, blocks=3),
    "hypernet": models.HypernetConfig(
        models.MLPConfig((64, 5, 10)), models.HypernetSpec(hidden=(4,), embedding=2)
    ),
    "physical": models.PhysicalConfig(64, 10, (4, 5)),
    "sequence": models.SequenceConfig(3, 2, 1, 8, 5),
    "meta": models.MetaNetworkConfig(nodes=1, edges=1),
    "icgnn": models.ICGNNConfig(nodes=2, outputs=2, edges=2),
    "s_mamba": models.SMambaConfig(6, 3, 8, 5, states=2),
    "oneforecast": models.OneForecastConfig((2, 3), 2, 1, level=0, width=4, blocks=3),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a model of each kind and a text."""
    folder = tmp_path_factory.mktemp("kinds")
    for name, config in CONFIGS.items():
        model = KINDS[name].make(config, key=jax.random.key(0), dtype=jnp.float32)
        models.save(model, folder / name, format="ffnlab")
    Tokenizer.bytes().save(folder / "encoder")
    (folder / "text.txt").write_bytes(WORDS)
    return folder


def probed(saved, tmp_path, name, kind, *options):
    """The report of a run."""
    out = tmp_path / "out"
    assert main(["probe", name, str(saved / kind), *options, "--out", str(out)]) == 0
    return json.loads((out / "report.json").read_text())


def as_read(report):
    """A report as its file has it."""
    return json.loads(json.dumps(report.as_json()))


def test_every_kind_is_here():
    assert {*CONFIGS, "decoder"} == set(KINDS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_alone_is_looked_at_whatever_it_reads(saved, tmp_path, kind):
    found = probed(saved, tmp_path, "weight_norms", kind)
    assert found["about"].pop("model") == str(saved / kind)
    assert found.pop("about") == {"probe": "weight_norms", "options": {}}
    assert found == as_read(weight_norms()(models.load(saved / kind)))


@pytest.mark.parametrize(
    "kind",
    [
        *("mlp", "convnet", "resnet"),
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("vit", "revcol")),
    ],
)
def test_a_classifier_is_shown_pairs_evenly_spaced(saved, tmp_path, kind):
    options = ["--images", "digits", "--samples", "26", "--batch", "6"]
    found = probed(saved, tmp_path, "gradient_alignment", kind, *options)
    train, held_out = digits()
    about = found.pop("about")["data"]
    assert about["images"] == "digits" and len(about["train_sha256"]) == 64
    assert (about["rows"], about["train"], about["held_out"]) == (24, len(train.x), len(held_out.x))
    chosen = np.arange(24) * len(train.x) // 24
    shape = (64,) if kind == "mlp" else (8, 8, 1)
    x, y = train.x[chosen].reshape(24, *shape), train.y[chosen]
    batches = [Labelled(x[i::4], y[i::4]) for i in range(4)]
    expected = gradient_alignment(backprop(labelled), labelled)(models.load(saved / kind), batches)
    assert found["figures"] == pytest.approx(as_read(expected)["figures"], abs=1e-5)


def test_layers_are_compressed_by_moments_of_what_is_shown(saved, tmp_path):
    given = ["components=2", "neighbours=1", "jitter=0.05", "select=maps[*]"]
    options = ["--images", "digits", "--samples", "240", "--batch", "80", "--option", *given]
    found = probed(saved, tmp_path, "lossy_information", "mlp", *options)
    train, _ = digits()
    chosen = np.arange(240) * len(train.x) // 240
    batches = [Labelled(train.x[chosen][i::3], train.y[chosen][i::3]) for i in range(3)]
    model = models.load(saved / "mlp")
    fitted = calibrate(principal(batches[0].x, select="maps[*]"), model, batches)
    probe = lossy_information(fitted, components=2, neighbours=1, jitter=0.05, select="maps[*]")
    assert found["figures"] == pytest.approx(probe(model, batches).figures(), abs=1e-4)
    assert len(found["figures"]) == 4


def test_an_autoencoder_is_shown_inputs_alone(saved, tmp_path):
    options = ["--images", "digits", "--size", "8", "8", "--samples", "8"]
    found = probed(saved, tmp_path, "compiled_cost", "autoencoder", *options)
    x = np.zeros((8, 8, 8, 1), np.float32)
    expected = compiled_cost()(models.load(saved / "autoencoder"), [x])
    assert found["figures"] == as_read(expected)["figures"]


def test_noprop_is_counted_as_one_denoiser_and_the_readout(saved, tmp_path):
    options = ["--images", "digits", "--samples", "8"]
    found = probed(saved, tmp_path, "compiled_cost", "noprop", *options)
    h, d, classes = 4, 10, 10
    denoiser = (64 + d) * h + 2 * h * h + h * classes
    assert found["figures"]["multiply_adds_per_row"] == denoiser + d * classes


def test_records_of_a_file(saved, tmp_path, key):
    x = np.random.default_rng(0).integers(0, 9, (20, 2, 32)).astype(np.uint8)
    tensors = {"image": st.entry(x), "label": st.entry(np.arange(20, dtype=np.int64) % 10)}
    st.write_file(tmp_path / "data.safetensors", tensors)
    data = ["--records", str(tmp_path / "data.safetensors")]
    found = probed(saved, tmp_path, "compiled_cost", "mlp", *data)
    about = found["about"]["data"]
    assert (about["rows"], about["train"], about["records"]) == (16, 18, data[1])
    assert found["rows"][0]["rows"] == 16
    read = examples(models.load(saved / "mlp"), data[1], are_records=True)
    np.testing.assert_array_equal(read.train.x[0], x[0].ravel())
    assert read.item == "row" and len(read.held_out.x) == 2
    with pytest.raises(ConfigError, match=r"this mlp does not take inputs of shape \[2, 32\]"):
        examples(MLP((63, 10), key=key), data[1], are_records=True)
    with pytest.raises(ConfigError, match="classes 9 to 9; the model has classes 0 to 8"):
        examples(MLP((64, 9), key=key), data[1], are_records=True)


def test_an_encoder_is_shown_text(saved, tmp_path):
    text = str(saved / "text.txt")
    options = ["--text", text, "--tokens", "130", "--window", "16"]
    found = probed(saved, tmp_path, "compiled_cost", "encoder", *options)
    words = file_text([text])
    batches = calibration(words, Tokenizer.bytes(), Calibration(130, 16, 4), ENCODER.vocab)
    assert found["about"]["text"] == words.as_json() | {"rows": 8, "window": 16}
    expected = compiled_cost()(models.load(saved / "encoder"), batches)
    assert found["figures"] == as_read(expected)["figures"]


def test_a_network_on_graphs_is_shown_a_graph(saved, tmp_path):
    np.savez(tmp_path / "small.npz", **SMALL)
    options = ["--graph", str(tmp_path / "small.npz")]
    model, nodes = models.load(saved / "graph"), cora(tmp_path / "small.npz")
    batch = node_batch(nodes._replace(graph=with_self_loops(nodes.graph)))
    loss = by_name(masked)
    found = probed(saved, tmp_path, "gradient_alignment", "graph", *options)
    about = found["about"]["data"]
    assert (about["graph"], about["train"], about["held_out"]) == (options[1], 1, 2)
    expected = gradient_alignment(backprop(loss), loss)(model, [batch])
    assert found["figures"] == pytest.approx(as_read(expected)["figures"], abs=1e-5)
    found = probed(saved, tmp_path, "compiled_cost", "graph", *options)
    expected = compiled_cost(lambda model, batch: model(**batch[0]))(model, [batch])
    assert found["figures"] == as_read(expected)["figures"]


IMAGES = ["--images", "digits"]
EXCLUDE = "--text, --images, --records and --graph exclude each other"


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("mlp", [], "'mlp' reads rows: give --images or --records"),
        ("autoencoder", [], "'autoencoder' reads images: give --images or --records"),
        ("encoder", IMAGES, "'encoder' reads tokens: give --text, not --images"),
        ("graph", IMAGES, "'graph' reads graphs: give --graph, not --images"),
        ("graph", [], "'graph' reads graphs: give --graph"),
        ("graph", ["--graph", "nowhere.npz"], "nowhere.npz"),
        ("audio", IMAGES, "'audio' reads frames, which no option gives"),
        ("s_mamba", IMAGES, "'s_mamba' reads series, which no option gives"),
        ("oneforecast", IMAGES, "'oneforecast' reads fields, which no option gives"),
        ("mlp", ["--graph", "cora"], "'mlp' reads rows: give --images or --records, not --graph"),
        ("mlp", [*IMAGES, "--records", "x"], EXCLUDE),
        ("mlp", [*IMAGES, "--text", "x"], EXCLUDE),
        ("graph", ["--graph", "x", "--text", "x"], EXCLUDE),
        ("mlp", ["--size", "8", "8"], "size=[8, 8] must be height and width of --images"),
        ("mlp", [*IMAGES, "--size", "8"], "size=[8] must be height and width of --images"),
        ("mlp", [*IMAGES, "--size", "4", "4"], "size=[4, 4] is 16 pixels; the model takes rows"),
        ("mlp", [*IMAGES, "--samples", "3"], "samples=3 of 1437 rows: no batch of 4"),
        ("mlp", [*IMAGES, "--batch", "0"], "batch=0 must be at least 1"),
        ("convnet", [*IMAGES, "--size", "9", "9"], "convnet does not take inputs of shape [9, 9"),
        ("autoencoder", IMAGES, "digits has images of size=[8, 8]"),
        ("encoder", ["--window", "33"], "window=33 is longer than the model's context of 32"),
        ("mlp", ["--images", "nowhere"], "nowhere"),
        ("mlp", ["--records", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_what_a_model_does_not_read_is_said_and_nothing_written(
    saved, tmp_path, capsys, kind, options, said
):
    out = tmp_path / "out"
    given = ["probe", "compiled_cost", str(saved / kind), *options, "--out", str(out)]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("ffnlab probe: error: ") and not out.exists()


@pytest.mark.parametrize("kind", ["encoder", "autoencoder", "noprop"])
def test_a_probe_of_steps_needs_a_model_that_backpropagation_trains(saved, kind, capsys):
    assert main(["probe", "gradient_alignment", str(saved / kind), *IMAGES]) == 2
    accepted = "'decoder', 'mlp', 'convnet', 'vit', 'resnet', 'revcol', 'graph'"
    assert f"{accepted}, not '{kind}'" in capsys.readouterr().err


def test_a_model_of_no_kind_is_looked_at_by_itself(tmp_path, capsys):
    models.save(MLP((3, 2), key=jax.random.key(0)).maps[0], tmp_path / "map", format="ffnlab")
    saved, out = tmp_path, tmp_path
    assert "norm" in probed(saved, out, "weight_norms", "map")["figures"]
    assert main(["probe", "compiled_cost", str(tmp_path / "map"), *IMAGES]) == 2
    assert "a Linear, no kind of model" in capsys.readouterr().err


def test_shapes_of_images_that_are_rows():
    assert image_shape((64,)) == image_shape((64,), (8, 8)) == (8, 8, 1)
    assert image_shape((24,), (2, 4)) == (2, 4, 3) and image_shape((8, 8, 3)) == (8, 8, 3)
    with pytest.raises(ConfigError, match="rows of 24 numbers, which no square image has"):
        image_shape((24,))
