"""The dense model of equal bytes: its figures, and what is said of them."""

import dataclasses
import json

import pytest

from ffnlab import models, tree
from ffnlab.compress import Row, embedded_rival, rival
from ffnlab.compress.rival import record
from ffnlab.errors import FormatError

ROW = Row("fireq", 5.0, 2.3, 1, 1, 1, 1.0, 1.0, 1.0, 0.0)


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """Writes figures in the place of the committed ones."""
    monkeypatch.setattr(rival.resources, "files", lambda package: tmp_path)
    (tmp_path / "embedded").mkdir()

    def write(content):
        (tmp_path / "embedded" / "equal_bytes.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(("bits", "wins"), [(2.2, True), (2.4, False)])
def test_the_fewer_bits_win(figures, text, bits, wins):
    said = text.as_json()
    figures({"nbytes": 800_000, "bits_per_byte": bits, "text": said})
    found = embedded_rival(ROW, text=text)
    assert (found.nbytes, found.bits_per_byte, found.wins) == (800_000, bits, wins)
    assert found.note == "trained on as many tokens; on the same text"


def test_another_text_is_named(figures, text):
    other = {"held_out_sha256": "x", "python": "3.99.1"}
    figures({"nbytes": 800_000, "bits_per_byte": 2.2, "text": other})
    assert "standard library of Python 3.99.1" in embedded_rival(ROW, text=text).note


def test_there_may_be_none(figures, text):
    assert embedded_rival(ROW, text=text) is None


@pytest.mark.parametrize("content", [{}, [], {"nbytes": 1, "bits_per_byte": "x", "text": {}}])
def test_damaged_figures_are_named(figures, text, content):
    figures(content)
    with pytest.raises(FormatError, match="equal_bytes.json"):
        embedded_rival(ROW, text=text)


def test_figures_are_measured_as_the_recipe_does(
    model, tokenizer, text, recipe, tmp_path, monkeypatch
):
    models.save(model, tmp_path)
    tokenizer.save(tmp_path)
    (tmp_path / "training.json").write_text('{"steps": 3}')
    monkeypatch.setattr(rival.recipes, "default", lambda: recipe)
    monkeypatch.setattr(rival, "standard_text", lambda: text)
    found = json.loads(json.dumps(record(tmp_path)))
    assert found["nbytes"] == tree.nbytes(model) and 6 < found["bits_per_byte"] < 10
    assert found["evaluation"] == dataclasses.asdict(recipe.evaluation)
    assert found["text"] == text.as_json() and found["training"] == {"steps": 3}
