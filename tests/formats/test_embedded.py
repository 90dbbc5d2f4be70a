"""The models that come with the package, and how a command line names them."""

from pathlib import Path

import jax
import pytest

from ffnlab import models
from ffnlab.errors import FFNLabError
from ffnlab.formats.embedded import SHIPPED, shipped

TINY = models.DecoderConfig(vocab=256, width=8, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8)


@pytest.mark.parametrize(("name", "width"), list(zip(SHIPPED, (128, 64), strict=True)))
def test_a_name_opens_a_model_of_bytes(name, width):
    model, tokenizer = models.open_model(Path(name))
    assert model.config.width == width and model.config.vocab == 256
    assert tokenizer.encode("def é") == list("def é".encode())


def test_without_a_name_it_is_the_embedded_one():
    assert models.open_model(None)[0].config == models.embedded()[0].config
    assert shipped(None) == "embedded"


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models.save(models.Decoder(TINY, key=jax.random.key(0)), tmp_path / "embedded")
    models.Tokenizer.bytes().save(tmp_path / "embedded")
    assert models.open_model(Path("embedded"))[0].config.width == 8
    assert shipped(Path("embedded")) is None


def test_another_name_is_no_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FFNLabError, match="embedded_large"):
        models.open_model(Path("embedded_large"))
