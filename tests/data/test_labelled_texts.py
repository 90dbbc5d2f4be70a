"""Texts with classes: files of JSON lines, the polarity sentences, and rows of tokens."""

import json
import zipfile

import numpy as np
import pytest

from ffnlab.data import labelled_texts, sentence_polarity, token_rows
from ffnlab.errors import ConfigError, FFNLabError, FormatError
from ffnlab.formats import Tokenizer


def written(path, *entries):
    path.write_text("\n".join(json.dumps(entry) for entry in entries) + "\n\n")
    return path


def test_names_and_numbers(tmp_path):
    named = [("bad", "no"), ("good", "yes"), ("so so", "maybe")]
    file = written(tmp_path / "a.jsonl", *({"text": t, "label": y} for t, y in named))
    found = labelled_texts(file)
    assert found.classes == ("maybe", "no", "yes") and found.y.tolist() == [1, 2, 0]
    assert found.texts == ("bad", "good", "so so")
    assert labelled_texts(file, ("yes", "no", "maybe")).y.tolist() == [1, 0, 2]
    file = written(tmp_path / "b.jsonl", {"text": "x", "label": 3}, {"text": "y", "label": 0})
    found = labelled_texts(file)
    assert found.y.tolist() == [3, 0] and found.classes == () and found.y.dtype == np.int32


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{"text": "x"}], "line 1 is not like"),
        ([{"text": "x", "label": 0}, {"text": "", "label": 0}], "line 2 is not like"),
        ([{"text": "x", "label": -1}], "line 1 is not like"),
        ([{"text": "x", "label": True}], "line 1 is not like"),
        ([["x", 1]], "line 1 is not like"),
        ([{"text": "x", "label": 0}, {"text": "y", "label": "a"}], "some labels are numbers"),
        ([{"text": "x", "label": "c"}], r"line 1: label 'c' is none of \['a', 'b'\]"),
        ([], "no texts"),
    ],
)
def test_files_that_are_none(tmp_path, entries, message):
    with pytest.raises(FormatError, match=message):
        labelled_texts(written(tmp_path / "a.jsonl", *entries), ("a", "b"))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(FFNLabError, match="cannot be read"):
        labelled_texts(tmp_path / "none.jsonl")
    (tmp_path / "bad.jsonl").write_text('{"text": "x", "label": 1}\n{"text"')
    with pytest.raises(FormatError, match="line 2 is not valid JSON"):
        labelled_texts(tmp_path / "bad.jsonl")
    with pytest.raises(FFNLabError, match="there is no such file"):
        sentence_polarity(tmp_path / "none.zip")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("sentence_polarity/rt-polarity.neg", "dull\n")
    with pytest.raises(FormatError, match="is not the polarity archive"):
        sentence_polarity(tmp_path / "other.zip")
    (tmp_path / "none.zip").write_bytes(b"PK")
    with pytest.raises(FormatError, match="is not the polarity archive"):
        sentence_polarity(tmp_path / "none.zip")


def test_the_polarity_sentences(data):
    found = sentence_polarity(data / "sentence_polarity" / "sentence_polarity.zip")
    assert found.classes == ("negative", "positive") and len(found.texts) == 10_662
    np.testing.assert_array_equal(found.y, np.repeat([0, 1], 5331))
    assert found.texts[0].startswith("simplistic , silly and tedious")
    assert found.texts[5331].startswith("the rock is destined to be the 21st century's new")


def test_rows_of_tokens():
    rows = token_rows(["abcdef", "é", ""], Tokenizer.bytes(), length=6)
    assert rows.tokens.tolist() == [[0, *b"abcde"], [0, 195, 169, 0, 0, 0], [0] * 6]
    assert rows.valid.sum(1).tolist() == [6, 3, 1] and rows.tokens.dtype == np.int32
    for texts, length in (([], 6), (["a"], 1)):
        with pytest.raises(ConfigError, match="room for one token"):
            token_rows(texts, Tokenizer.bytes(), length)
