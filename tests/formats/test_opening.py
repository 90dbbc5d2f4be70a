"""`load` and `save`: which format a directory is opened as, and written in."""

import json

import jax
import pytest
from flax import nnx

from ffnlab import layers, models
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import Tokenizer, load, open_model, save
from ffnlab.formats.directory import NATIVE_FILE
from ffnlab.formats.huggingface.load import load as load_huggingface
from ffnlab.formats.opening import config_of, for_others
from ffnlab.testing import tiny


def convnet():
    """A network that no Hugging Face family can say."""
    return models.ConvNet((1, 3), 2, key=jax.random.key(0))


def ungated():
    """A decoder with one plain FFN."""
    model = tiny()
    model.layers[1].ffn = layers.FFN(16, 8, key=jax.random.key(0))
    return model


def test_a_directory_is_opened_as_what_it_is(tmp_path):
    save(tiny(), tmp_path / "hf")
    save(models.stack(tiny()), tmp_path / "native", format="ffnlab")
    assert jax.tree.structure(load(tmp_path / "hf")) == jax.tree.structure(tiny())
    assert isinstance(load(tmp_path / "native").layers, models.Stacked)
    assert models.load is load and models.save is save
    assert not (tmp_path / "hf" / NATIVE_FILE).exists()
    assert not (tmp_path / "native" / "config.json").exists()
    for folder in ("hf", "native"):
        assert config_of(tmp_path / folder).width == tiny().config.width


@pytest.mark.parametrize(
    ("model", "error", "part"),
    [
        (convnet, ConfigError, "model is a ConvNet"),
        (lambda: layers.MLP((2, 3), key=jax.random.key(0)), ConfigError, "model is a MLP"),
        (ungated, FormatError, r"layers\[1\].ffn is a FFN"),
    ],
)
def test_what_no_family_can_say_names_the_part_and_the_format(model, error, part, tmp_path):
    with pytest.raises(error, match=f'{part}.*; format="ffnlab" writes any model'):
        save(model(), tmp_path / "m")
    assert save(model(), tmp_path / "m", format="ffnlab") == ()
    assert jax.tree.structure(load(tmp_path / "m")) == jax.tree.structure(model())


def test_options_of_one_format_are_refused_by_the_other(tmp_path):
    save(tiny(), tmp_path / "m", format="ffnlab")
    for options in ({"max_positions": 8}, {"extras": False}):
        with pytest.raises(ConfigError, match="native format, which takes neither"):
            load(tmp_path / "m", **options)


def test_another_kind_than_asked_for(tmp_path):
    save(convnet(), tmp_path / "c", format="ffnlab")
    save(tiny(), tmp_path / "d")
    message = "c holds a model of kind 'convnet'; accepted here: 'decoder'"
    (tmp_path / "c" / "model.safetensors").unlink()  # it is said before any array is looked at
    for opened in (open_model, config_of, lambda place: load(place, kinds=("decoder",))):
        with pytest.raises(ConfigError, match=message):
            opened(tmp_path / "c")
    with pytest.raises(ConfigError, match="kind 'decoder'; accepted here: 'mlp', 'convnet'"):
        load(tmp_path / "d", kinds=("mlp", "convnet"))


def test_a_configuration_of_another_kind(tmp_path):
    save(tiny(), tmp_path / "m", format="ffnlab")
    content = json.loads((tmp_path / "m" / NATIVE_FILE).read_text())
    other = {"type": "MLPConfig", "fields": {"sizes": [2, 3]}}
    content["tree"]["static"]["config"] = other
    (tmp_path / "m" / NATIVE_FILE).write_text(json.dumps(content))
    with pytest.raises(FormatError, match="config is a MLPConfig, of another kind"):
        config_of(tmp_path / "m")
    with pytest.raises(FormatError, match="no decoder that can be run"):
        load(tmp_path / "m")


def test_a_native_decoder_is_opened_with_its_tokenizer(tmp_path):
    save(tiny(), tmp_path / "m", format="ffnlab")
    Tokenizer.bytes().save(tmp_path / "m")
    model, tokenizer = open_model(tmp_path / "m")
    assert jax.tree.structure(model) == jax.tree.structure(tiny())
    assert tokenizer.encode("a") == [97]


def test_a_copy_for_other_tools(tmp_path):
    save(models.stack(tiny()), tmp_path / "m", format="ffnlab")
    with for_others(tmp_path / "m") as folder:
        assert isinstance(load_huggingface(folder).layers, nnx.List)
    assert not folder.exists()
    save(tiny(), tmp_path / "hf")
    with for_others(tmp_path / "hf") as folder:
        assert folder == tmp_path / "hf"
