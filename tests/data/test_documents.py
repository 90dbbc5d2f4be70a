"""Documents: one way to read, to split and to score them, and digests that tell them apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data.text.documents import (
    check_ids,
    digest,
    documents_of,
    is_seen,
    joined,
    read_documents,
    scored,
    split,
    split_all,
    starts_with,
)
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.formats import Tokenizer

BYTES = Tokenizer.bytes()


class Words:
    """A tokenizer whose ids are words, with special ids before and after a text."""

    def __init__(self, before=(1,), after=(), eos=()):
        self.before, self.after, self.eos = list(before), list(after), tuple(eos)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids 10 and up: 10 + the number that a word is."""
        ids = [10 + int(word) if word.isdigit() else 9 for word in text.split()]
        return [*self.before, *ids, *self.after] if special else ids


def test_files_become_documents(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfone\r\ntwo\n\0three\0\0")
    (tmp_path / "b").write_bytes("f\ufeffour".encode())
    documents = read_documents([tmp_path / "a", tmp_path / "b"])
    assert documents == [b"one\ntwo\n", b"three", "f\ufeffour".encode()]
    assert joined(documents) == b"\0one\ntwo\n\0three\0f\xef\xbb\xbfour"
    assert documents_of(joined(documents)) == documents


def test_files_without_text_are_named(tmp_path):
    for name, content in {"nul": b"\0\0", "mark": b"\xef\xbb\xbf", "half": b"a\xe2\x82"}.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FFNLabError, match=r"nul is empty; .*mark is empty; .*half is not UTF-8"):
        read_documents([tmp_path / name for name in ("nul", "mark", "half")])


@given(st.text(min_size=1, max_size=300))
def test_a_split_loses_nothing_and_cuts_no_character(words):
    document = words.encode()
    first, rest = split(document)
    assert first + rest == document
    first.decode(), rest.decode()
    # At most a character less than nine tenths, unless a line break moves the cut.
    assert b"\n" in document or len(first) > 0.9 * len(document) - 5


def test_a_split_prefers_a_line_break():
    document = b"a line\n" * 100 + b"end"
    first, rest = split(document)
    assert first.endswith(b"\n") and len(first) == 7 * 90


def test_every_document_gives_its_tenth():
    documents = [b"a\n" * 50, b"b\n" * 100, b"c"]  # one character is all held out
    assert split_all(documents, "x") == (
        [b"a\n" * 45, b"b\n" * 90],
        [b"a\n" * 5, b"b\n" * 10, b"c"],
    )
    with pytest.raises(ConfigError, match="x is too short to hold a tenth of it out"):
        split_all([b"c"], "x")


def test_what_was_trained_on_is_known_by_its_parts():
    one, two, three = b"one\n" * 30, b"two\n" * 30, b"three\n" * 30
    trained = {digest(split(one)[0]), digest(two)}
    assert not is_seen(trained, split(one)[1], one)  # the tenth that training held out
    assert is_seen(trained, one, one)
    assert is_seen(trained, split(one)[0], split(one)[0])  # the same part as a file of its own
    assert is_seen(trained, split(two)[1], two) and is_seen(trained, two, two)
    assert not is_seen(trained, three, three) and not is_seen(trained, split(three)[1], three)


@pytest.mark.parametrize(
    ("tokenizer", "ids", "counted"),
    [
        # Seventeen bytes are seventeen predictions; the NUL that ends a document is one too.
        (BYTES, [0, *b"1 2", 0, *b"3 4 5"], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Words([1]), [1, 11, 12, 1, 13, 14, 15], [0, 1, 1, 0, 1, 1, 1]),
        (Words([1, 2], [3]), [1, 2, 11, 12, 1, 2, 13, 14, 15], [0, 0, 1, 1, 0, 0, 1, 1, 1]),
        (Words([], [3], [3]), [3, 11, 12, 3, 13, 14, 15], [0, 1, 1, 0, 1, 1, 1]),
        (Words([], []), [11, 12, 13, 14, 15], [0, 1, 1, 1, 1]),
    ],
)
def test_only_text_is_scored(tokenizer, ids, counted):
    found = scored(joined([b"1 2", b"3 4 5"]), tokenizer)
    assert found.tokens.tolist() == ids and found.tokens.dtype == np.int32
    assert found.counted.tolist() == [bool(flag) for flag in counted]
    # Bytes that the counted tokens stand for: all 8, a NUL too, or four fifths of them.
    expected = 9 if tokenizer is BYTES else 8 if found.counted.sum() == 5 else 6
    assert found.nbytes == expected
    assert found.bytes_per_token == expected / sum(counted)


def test_a_text_of_seventeen_bytes_is_seventeen_predictions():
    text = joined([b"seventeen bytes \xc2\xa7"[:16] + b"!"])
    assert scored(text, BYTES).counted.sum() == scored(text, BYTES).nbytes == 17


def test_what_a_tokenizer_puts_before_a_text():
    assert starts_with(Words([1, 2], [3])) == [1, 2]
    assert starts_with(Words([])) == starts_with(Words([], [3])) == starts_with(BYTES) == []


def test_ids_that_the_model_lacks():
    check_ids(np.array([0, 255]), 256)
    check_ids(np.zeros(0, np.int32), 1)
    with pytest.raises(ConfigError, match=r"id 256, the model has ids 0\.\.255"):
        check_ids(np.array([256, 3]), 256)
