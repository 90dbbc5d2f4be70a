"""Encoders in files: saved and read back, names of older checkpoints, and what is refused."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, quantization, transform
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import ignored_by_others, open_model
from ffnlab.formats.huggingface.load import load
from ffnlab.formats.huggingface.save import save
from ffnlab.formats.opening import config_of, loaded_config
from ffnlab.formats.safetensors import entry, open_directory, write_directory
from ffnlab.layers import FFN
from ffnlab.testing import equal, tiny_encoder

tokens = jax.random.randint(jax.random.key(1), (2, 7), 1, 32)
run = jax.jit(lambda model, tokens: model(tokens))
KINDS = ["bert", "bert_masked", "bert_untied", "bert_classes", "distilbert_masked"]


def stored(folder):
    """The tensors of a directory by name."""
    checkpoint = open_directory(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def rewrite(source, target, change):
    """A copy of a directory whose tensors are those that `change` gives for the old ones."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    tensors = change(stored(source))
    write_directory(target, {name: entry(array) for name, array in tensors.items()})
    return target


def configured(folder, **change):
    """A directory with other entries in its config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_what_was_loaded_is_saved_as_it_was(tmp_path, fixtures, name):
    model = load(fixtures / "encoders" / name)
    assert save(model, tmp_path / "again", max_shard_bytes=8_000) == ()
    assert equal(load(tmp_path / "again"), model)
    want, found = stored(fixtures / "encoders" / name), stored(tmp_path / "again")
    if name == "bert_untied":  # one parameter here; the second name is the one that is computed
        want["cls.predictions.bias"] = want["cls.predictions.decoder.bias"]
    assert want.keys() == found.keys()
    assert all(np.array_equal(want[key], found[key]) for key in want)
    save(models.stack(model), tmp_path / "stacked")
    assert equal(load(tmp_path / "stacked"), model)


def test_older_names_are_those_of_today(tmp_path, fixtures):
    old = load(fixtures / "encoders" / "bert_old")
    assert old.pooler is None
    assert old.head is None
    save(old, tmp_path / "new")
    names = stored(tmp_path / "new").keys()
    assert not [n for n in names if n.endswith(("gamma", "beta")) or "pooler" in n or "ids" in n]
    assert equal(load(tmp_path / "new"), old)


def test_the_prefix_may_be_there_or_not(tmp_path, fixtures):
    base, masked = (fixtures / "encoders" / name for name in ("bert", "bert_masked"))
    more = rewrite(base, tmp_path / "more", lambda held: {f"bert.{k}": v for k, v in held.items()})
    assert equal(load(more), load(base))
    less = rewrite(
        masked,
        tmp_path / "less",
        lambda held: {k.removeprefix("bert."): v for k, v in held.items()},
    )
    assert equal(load(less), load(masked))
    both = rewrite(
        base,
        tmp_path / "both",
        lambda held: held | {"bert.pooler.dense.bias": held["pooler.dense.bias"]},
    )
    with pytest.raises(FormatError, match="are the same tensor"):
        load(both)


def test_a_copy_of_the_embedding_is_tied_and_another_head_is_not(tmp_path, fixtures):
    def with_head(scale):
        def change(held):
            embed = held["bert.embeddings.word_embeddings.weight"]
            return held | {"cls.predictions.decoder.weight": embed * np.float32(scale)}

        return change

    source = fixtures / "encoders" / "bert_masked"
    copied = load(rewrite(source, tmp_path / "copied", with_head(1)))
    assert equal(copied, load(source))
    other = load(rewrite(source, tmp_path / "other", with_head(2)))
    assert other.config.tie_embeddings is False
    assert loaded_config(tmp_path / "other", ("encoder",)) == other.config
    bias = other.head_bias.get_value()
    assert jnp.allclose(other(tokens) - bias, 2 * (copied(tokens) - bias), atol=1e-4)


def test_a_base_model_has_a_pooler_where_a_tensor_says_so(tmp_path, fixtures):
    def without(*names):
        return lambda held: {k: v for k, v in held.items() if k not in names}

    source = fixtures / "encoders" / "bert"
    plain = load(
        rewrite(source, tmp_path / "plain", without("pooler.dense.weight", "pooler.dense.bias"))
    )
    assert plain.config.pooler is None
    assert loaded_config(tmp_path / "plain", ("encoder",)) == plain.config
    assert config_of(tmp_path / "plain", ("encoder",)).pooler == "tanh", "without its tensors"
    assert "transformers draws a random one" in save(plain, tmp_path / "again")[0]
    assert equal(load(tmp_path / "again"), plain)
    with pytest.raises(FormatError, match="pooler.dense.bias' is missing"):
        load(rewrite(source, tmp_path / "half", without("pooler.dense.bias")))


def test_all_that_does_not_fit_is_told_at_once(tmp_path, fixtures):
    def change(held):
        held = dict(held)
        del held["distilbert.transformer.layer.1.ffn.lin1.bias"]
        held["vocab_transform.weight"] = np.zeros((3, 16), np.float32)
        held["distilbert.embeddings.LayerNorm.bias"] = np.zeros(16, np.int32)
        return held | {"classifier.weight": np.zeros((2, 16), np.float32)}

    wrong = rewrite(fixtures / "encoders" / "distilbert_masked", tmp_path / "wrong", change)
    with pytest.raises(FormatError) as told:
        load(wrong)
    for part in (
        "4 problems",
        "layer.1.ffn.lin1.bias' is missing",
        "vocab_transform.weight' has shape [3, 16], config.json asks for [16, 16]",
        "LayerNorm.bias' is int32",
        "classifier.weight' is not part of the model",
    ):
        assert part in str(told.value)


def test_sizes_are_checked_before_anything_is_made(tmp_path, fixtures):
    shutil.copytree(fixtures / "encoders" / "bert", tmp_path / "deep")
    with pytest.raises(FormatError, match="num_hidden_layers=1000, but there are only"):
        load(configured(tmp_path / "deep", num_hidden_layers=1000))
    with pytest.raises(FormatError, match="asks for"):
        load(configured(tmp_path / "deep", num_hidden_layers=2, vocab_size=2**24))
    with pytest.raises(ConfigError, match="max_positions=8: an encoder has max_positions=16"):
        load(fixtures / "encoders" / "bert", max_positions=8)


def test_numbers_that_are_none_are_refused(tmp_path, fixtures):
    def change(name, value):
        return lambda held: held | {name: np.full_like(held[name], value)}

    source, name = fixtures / "encoders" / "bert_masked", "cls.predictions.bias"
    with pytest.raises(FormatError, match="NaN or infinity"):
        load(rewrite(source, tmp_path / "nan", change(name, np.nan)))
    huge = "bert.encoder.layer.1.output.LayerNorm.weight"
    wrong = rewrite(source, tmp_path / "huge", change(huge, 3e38))
    with pytest.raises(FormatError, match=r"layers\[1\] gives NaN or infinity for one token"):
        load(wrong)
    last = "cls.predictions.transform.LayerNorm.weight"
    with pytest.raises(FormatError, match="head gives NaN or infinity for one token"):
        load(rewrite(source, tmp_path / "head", change(last, 3e38)))


@pytest.mark.parametrize("units", [(0,), (1, 2), (2, 3), (0, 1, 2, 3)])
def test_removed_sublayers_are_written_as_zeros_and_come_back(tmp_path, fixtures, units):
    model = models.remove(load(fixtures / "encoders" / "bert_span"), units)
    notes = save(model, tmp_path / "less")
    assert notes == (f"removal of {_count(len(units))}: written as zeros, computed in vain",)
    assert equal(load(tmp_path / "less"), model)
    plain = load(tmp_path / "less", extras=False)
    assert models.removed(plain) == []
    assert jnp.abs(run(plain, tokens) - run(model, tokens)).max() < 1e-5  # the same sums


def _count(n):
    return f"{n} sublayer{'' if n == 1 else 's'}"


@pytest.mark.parametrize("format", ["int4", "int8", "float8"])
def test_quantized_maps_are_packed_and_come_back(tmp_path, fixtures, format):
    source = load(fixtures / "encoders" / "distilbert_classes")
    step = quantization.nearest(format=format, group=8, activations="e4m3")
    model, _ = transform.apply(step, source, [])
    save(model, tmp_path / "packed", format="compressed-tensors")
    assert equal(load(tmp_path / "packed"), model)
    names = stored(tmp_path / "packed")
    end = "weight" if format == "float8" else "weight_packed"
    assert f"distilbert.transformer.layer.0.ffn.lin1.{end}" in names
    assert names["pre_classifier.weight"].dtype == np.float32


def test_formats_of_the_outer_maps_are_in_the_sidecar(tmp_path, fixtures):
    source = load(fixtures / "encoders" / "bert_masked")
    step = quantization.nearest(
        format="int8", activations="e4m3", select=lambda path, node: path == "transform.dense"
    )
    model, _ = transform.apply(step, source, [])
    assert "the Int8 format: 1 linear map written as dense matrices" in ignored_by_others(model)
    save(model, tmp_path / "dense")
    found = load(tmp_path / "dense")
    assert found.transform.dense.weight.act == "e4m3"
    assert jnp.abs(run(found, tokens) - run(model, tokens)).max() < 1e-4


def test_what_no_directory_can_say_is_refused_by_name(tmp_path):
    gated = tiny_encoder(gated=True)
    with pytest.raises(
        FormatError, match=r"layers\[0\].ffn is a GatedFFN; a bert directory has FFN"
    ):
        save(gated, tmp_path / "gated")
    with pytest.raises(ConfigError, match="a bert checkpoint has no place for norm.bias"):
        save(tiny_encoder(norm="before"), tmp_path / "before")
    with pytest.raises(ConfigError, match="cannot say positions='rotary'"):
        save(tiny_encoder(positions="rotary"), tmp_path / "rotary")
    wide = tiny_encoder(head=None, pooler="relu")
    with pytest.raises(ConfigError, match="cannot say pooler='relu'"):
        save(wide, tmp_path / "wide")
    assert isinstance(tiny_encoder().layers[0].ffn, FFN)
    assert list(tmp_path.iterdir()) == []


def test_the_native_format_says_what_no_family_can(tmp_path):
    model = tiny_encoder(gated=True, positions="rotary", norm="before")
    models.save(model, tmp_path / "native", format="ffnlab")
    assert equal(models.load(tmp_path / "native", kinds=("encoder",)), model)


def test_kinds_are_told_apart_before_anything_is_read(fixtures):
    folder = fixtures / "encoders" / "bert"
    assert equal(models.load(folder, kinds=("encoder",)), load(folder))
    with pytest.raises(ConfigError, match="kind 'encoder'; accepted here: 'decoder'"):
        models.load(folder, kinds=("decoder",))
    with pytest.raises(ConfigError, match="kind 'decoder'; accepted here: 'encoder'"):
        models.load(fixtures / "models" / "llama2", kinds=("encoder",))


def test_commands_for_decoders_say_what_they_found(tmp_path, fixtures):
    with pytest.raises(ConfigError, match="kind 'encoder'; accepted here: 'decoder'"):
        open_model(fixtures / "encoders" / "bert")


def test_labels_are_kept(tmp_path, fixtures):
    model = load(fixtures / "encoders" / "bert_classes")
    assert model.config.labels == ("no", "yes", "maybe")
    model.config = dataclasses.replace(model.config, labels=None)
    save(model, tmp_path / "plain")
    assert load(tmp_path / "plain").config.labels is None
