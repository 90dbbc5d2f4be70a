"""`ffnlab train` and `plan` on speech: a decoder that hears, from a file to a model directory."""

import json
import wave

import jax
import numpy as np
import pytest

from ffnlab import formats, models
from ffnlab.cli.inputs.speech import load_speech
from ffnlab.cli.main import main
from ffnlab.cli.training import TrainConfig, abstract_batch, fresh, rule_of
from ffnlab.errors import ConfigError
from ffnlab.models import AudioEncoder, AudioEncoderConfig
from ffnlab.parallel import parse_mesh, read_config
from ffnlab.routing import pal

FILE = """
[model]
vocab = 64
width = 16
hidden = 16
layers = 2
heads = 2
kv_heads = 2
head_dim = 8
[model.audio]
widths = [1600, 8]
ways = ["prepended", "attended"]
start = 1
[data]
kind = "speech"
recordings = "sounds"
speakers = ["bob"]
encoders = ["", "encoder"]
question = "? "
size = 20
batch = 4
[run]
steps = 2
dtype = "float32"
[optimizer]
rate = 0.01
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Recordings by two speakers, an encoder, and a training file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sounds").mkdir()
    random = np.random.default_rng(0)
    for digit in range(3):
        for speaker in ("ann", "bob"):
            for take in range(2):
                with wave.open(
                    str(tmp_path / "sounds" / f"{digit}_{speaker}_{take}.wav"), "wb"
                ) as file:
                    file.setparams((1, 2, 16_000, 0, "NONE", ""))
                    file.writeframes((random.normal(size=3_000) * 3e3).astype("<i2").tobytes())
    config = AudioEncoderConfig(80, 8, 8, 1, 2, 50)
    formats.save(AudioEncoder(config, key=jax.random.key(1)), tmp_path / "encoder")
    (tmp_path / "run.toml").write_text(FILE)
    return tmp_path


def load(folder):
    settings = read_config(folder / "run.toml", TrainConfig)
    return load_speech(settings.data, settings.model)


@pytest.mark.slow
def test_trained_resumed_written_and_planned(folder, capsys):
    assert main(["train", "--config", "run.toml", "--dry-run"]) == 0
    assert main(["train", "--config", "run.toml", "--out", "run", "--no-progress"]) == 0
    assert "accuracy" in capsys.readouterr().out
    record = json.loads((folder / "run" / "model" / "training.json").read_text())
    assert record["data"]["number"] == 12 and 0 <= record["held_out_accuracy"] <= 1
    model = formats.load(folder / "run" / "model")
    assert model.config.audio.ways == ("prepended", "attended")
    settings = read_config(folder / "run.toml", TrainConfig)
    data = load_speech(settings.data, settings.model)
    sounds, (tokens, answers) = data.held_out
    right = np.asarray(pal.answer(model, sounds, tokens)).argmax(-1) == answers[:, -1]
    assert record["held_out_accuracy"] == pytest.approx(right.mean())
    heard = pal.hear(model, jax.tree.map(lambda x: x[:1], sounds))
    assert models.generate(heard, [[63, 32]], max_tokens=2).tokens.shape == (1, 2)
    wanted = jax.tree.map(np.shape, data.batches(settings)(0))
    found = abstract_batch(settings, parse_mesh("dp=1"), 4, 0)
    assert jax.tree.map(lambda x: x.shape, found) == wanted


@pytest.mark.parametrize("loss", ["", 'loss = "routed"\n', 'loss = "specialized"\n'])
def test_a_mixture_hears(folder, loss):
    """What mixtures and routed updates add is of the model that hears."""
    made = '[[transform]]\nname = "upcycle"\nexperts = 2\n'
    made += '[[transform]]\nname = "lora_experts"\nexperts = 2\nrank = 2\n'
    (folder / "run.toml").write_text(loss + FILE + made)
    settings = read_config(folder / "run.toml", TrainConfig)
    rule, mesh = rule_of(settings), parse_mesh("dp=1")
    model = jax.eval_shape(lambda key: fresh(settings, key), jax.random.key(0))
    state = jax.eval_shape(rule.init, model, jax.random.key(0))
    batch = abstract_batch(settings, mesh, 4, 0)
    _, metrics = jax.eval_shape(rule.step, state, batch)
    assert ("share" if "specialized" in loss else "balance") in metrics
    (folder / "run.toml").write_text('loss = "random_choices"\n' + FILE)
    with pytest.raises(ConfigError, match="is of rows of text; speech has none"):
        rule_of(read_config(folder / "run.toml", TrainConfig))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            FILE[FILE.index('kind = "speech"') : FILE.index("batch")],
            "",
            "reads speech: set kind in",
        ),
        ('["", "encoder"]', '[""]', "hears 2, of"),
        ('question = "? "', 'question = "~"', "the byte 126; the model has 64"),
        ('question = "? "', 'question = ""', "question=''"),
        ("start = 1", "start = 3", "start=3 is beyond layers=2"),
        ('"attended"]', '"both"]', "ways="),
        ("size = 20", "size = 0", "size=0"),
    ],
)
def test_files_that_are_refused(folder, old, new, told):
    (folder / "run.toml").write_text(FILE.replace(old, new))
    with pytest.raises(ConfigError, match=told):
        rule_of(read_config(folder / "run.toml", TrainConfig))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("1600", "1601", r"give widths \[1600, 8\].*\[1601, 8\]"),
        ('["bob"]', '["eve"]', "held_out=.*eve"),
        ('"encoder"]', '"run.toml"]', "not a directory"),
    ],
)
def test_data_that_do_not_fit(folder, old, new, told):
    (folder / "run.toml").write_text(FILE.replace(old, new))
    with pytest.raises(ValueError, match=told):
        load(folder)
