"""Whisper's encoder in files: against what `transformers` made of it (recorded), out and in."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, quantization, transform
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import KINDS, load, save
from ffnlab.formats.huggingface.dialects import read_config, write_config
from ffnlab.formats.safetensors import entry, open_directory, write_directory
from ffnlab.models import AudioEncoder, AudioEncoderConfig
from ffnlab.testing import equal

VARIANTS = ["encoder", "model", "whole"]
TOLERANCE = 2e-5  # float32 on other kernels; states of order 2
WHISPER = {
    "model_type": "whisper",
    "d_model": 16,
    "encoder_ffn_dim": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
}
run = jax.jit(lambda model, frames: model(frames))


@functools.cache  # no test changes a model
def loaded(folder):
    return load(folder)


def expected(folder):
    with np.load(folder / "expected.npz", allow_pickle=False) as saved:
        return dict(saved)


def stored(folder):
    checkpoint = open_directory(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("name", VARIANTS)
def test_states_of_every_layout(fixtures, name):
    folder = fixtures / "audio_encoders" / name
    want, model = expected(folder), loaded(folder)
    assert isinstance(model, AudioEncoder) and isinstance(model, KINDS["audio"].model)
    assert model.config == AudioEncoderConfig(
        8, 16, 24, 2, 4, 12, "gelu_tanh" if name == "encoder" else "gelu"
    )
    found = run(model, jnp.asarray(want["frames"]))
    assert np.abs(np.asarray(found) - want["states"]).max() < TOLERANCE


def test_what_was_loaded_is_saved_as_it_was(fixtures, tmp_path):
    folder = fixtures / "audio_encoders" / "encoder"
    model = loaded(folder)
    assert save(model, tmp_path / "again", max_shard_bytes=4_000) == ()
    want, found = stored(folder), stored(tmp_path / "again")
    assert want.keys() == found.keys() and len(want) > 20
    assert all(np.array_equal(want[key], found[key]) for key in want)
    save(models.stack(loaded(fixtures / "audio_encoders" / "whole")), tmp_path / "stacked")
    assert equal(load(tmp_path / "stacked"), loaded(fixtures / "audio_encoders" / "whole"))
    save(model, tmp_path / "native", format="ffnlab")
    assert equal(load(tmp_path / "native", kinds=("audio",)), model)


def test_a_kernel_is_read_in_pieces_and_onto_a_mesh(fixtures, monkeypatch):
    folder = fixtures / "audio_encoders" / "encoder"
    monkeypatch.setattr("ffnlab.formats.stream.PIECE", 16)
    assert equal(load(folder), loaded(folder))
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    cut = lambda path, axes, shape: jax.sharding.NamedSharding(  # noqa: E731
        mesh,
        jax.sharding.PartitionSpec("a", "b")
        if path.startswith("conv") and len(shape) == 2
        else jax.sharding.PartitionSpec(),
    )
    assert equal(load(folder, sharding=cut), loaded(folder))


def test_cut_and_quantized_encoders_are_written(fixtures, tmp_path):
    model = loaded(fixtures / "audio_encoders" / "encoder")
    frames = jnp.asarray(expected(fixtures / "audio_encoders" / "encoder")["frames"])
    small, _ = transform.apply(
        quantization.fireq(group=8, kv=None), models.remove(model, [2]), [frames]
    )
    save(small, tmp_path / "dense")
    again = load(tmp_path / "dense")
    assert models.removed(again) == [2]
    assert np.abs(run(again, frames) - run(small, frames)).max() < 1e-4  # scales in another order
    save(small, tmp_path / "packed", format="compressed-tensors")
    packed = load(tmp_path / "packed")
    assert np.abs(run(packed, frames) - run(small, frames)).max() < 1e-4
    assert equal(packed.conv_in, small.conv_in), "convolutions are not packed"


def test_configs_go_back_and_forth():
    config = read_config(WHISPER)
    assert config == AudioEncoderConfig(80, 16, 24, 2, 4)
    assert read_config(write_config(config)) == config


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"d_model": 15}, "width=15 must be even"),
        ({"encoder_attention_heads": 3}, "multiple of heads=3"),
        (
            {"num_mel_bins": 0, "encoder_layers": 10**6},
            "(?s)num_mel_bins=0.*encoder_layers=1000000",
        ),
        ({"activation_function": "mish"}, "activation_function='mish'"),
    ],
)
def test_configs_that_are_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        read_config(WHISPER | change)


@pytest.mark.parametrize("change", [{"activation": "softplus"}, {"family": "wav2vec"}])
def test_what_a_directory_cannot_say_is_named(change):
    with pytest.raises(ConfigError, match=next(iter(change.values()))):
        write_config(dataclasses.replace(read_config(WHISPER), **change))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t | {"conv1.weight": t["conv1.weight"][:, :, :2]}, r"\[16, 8, 3\]"),
        (lambda t: t | {"fc3": t["layer_norm.bias"]}, "'fc3' is not part"),
        (lambda t: t | {"encoder.layer_norm.bias": t["layer_norm.bias"]}, "are the same tensor"),
        (
            lambda t: {k: v for k, v in t.items() if "embed" not in k},
            "'embed_positions.weight' is mis",
        ),
        (
            lambda t: t | {"layers.0.self_attn.k_proj.bias": t["layer_norm.bias"]},
            "k_proj.bias' is not",
        ),
        (lambda t: t | {"conv2.bias": t["conv2.bias"] * np.nan}, "NaN"),
        (
            lambda t: t | {"layers.0.fc2.weight": t["layers.0.fc2.weight"] * 2e38},
            r"layers\[0\] gives",
        ),
    ],
)
def test_damaged_directories(fixtures, tmp_path, change, told):
    source = fixtures / "audio_encoders" / "encoder"
    shutil.copy(source / "config.json", tmp_path)
    tensors = {name: entry(array) for name, array in change(stored(source)).items()}
    write_directory(tmp_path, tensors)
    with pytest.raises(FormatError, match=told):
        load(tmp_path)


def test_a_directory_of_another_kind_is_named(fixtures):
    with pytest.raises(
        ConfigError, match="holds a model of kind 'audio'; accepted here: 'decoder'"
    ):
        load(fixtures / "audio_encoders" / "encoder", kinds=("decoder",))
    said = json.loads((fixtures / "audio_encoders" / "encoder" / "config.json").read_text())
    assert said["architectures"] == ["WhisperEncoder"]
