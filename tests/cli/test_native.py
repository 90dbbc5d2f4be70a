"""Commands on directories of the native format: a decoder as any other, another kind by name."""

import jax
import pytest

from ffnlab import models
from ffnlab.cli.main import main
from ffnlab.cli.plan import settings_of
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer, save

CONFIG = models.DecoderConfig(
    vocab=256, width=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8, max_positions=16
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same decoder in both formats, and a network of another kind."""
    root = tmp_path_factory.mktemp("models")
    model = models.Decoder(CONFIG, key=jax.random.key(0))
    for name, form in (("hf", "dense"), ("native", "ffnlab")):
        save(model, root / name, format=form)
        Tokenizer.bytes().save(root / name)
    net = models.ConvNetConfig((1, 2), 3).make(key=jax.random.key(0))
    save(net, root / "convnet", format="ffnlab")
    return root


def test_what_is_said_of_a_decoder_does_not_depend_on_the_format(folders, capsys, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on the mat")
    generate = ["generate", "--prompt", "the", "--max-tokens", "3"]
    for command in (generate, ["eval", "--text", str(text)]):
        said = []
        for name in ("hf", "native"):
            assert main([command[0], str(folders / name), *command[1:]]) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] and said[0]


def test_a_plan_reads_the_configuration(folders):
    assert settings_of(folders / "native").model == settings_of(folders / "hf").model
    assert settings_of(folders / "native").model.width == 8


@pytest.mark.parametrize(
    "command",
    [["generate", "--prompt", "a"], ["eval"], ["compress"], ["plan"], ["bench"]],
    ids=lambda command: command[0],
)
def test_another_kind_is_named(folders, command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([command[0], str(folders / "convnet"), *command[1:]]) == 2
    assert "a model of kind 'convnet'; accepted here: 'decoder'" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="accepted here: 'decoder'"):
        settings_of(folders / "convnet")
