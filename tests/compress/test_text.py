"""Texts of a job: how they are split, and how they become windows."""

import dataclasses

import numpy as np
import pytest

from ffnlab.compress import Text, file_text, standard_text
from ffnlab.compress.text import calibration, encode, held_out
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.formats import Tokenizer
from ffnlab.recipes import Calibration, Evaluation

BYTES = Tokenizer.bytes()
LONG = bytes(range(1, 251)) * 40
TEXT = Text(LONG, LONG, "a test", "both the same")


class Words:
    """A tokenizer whose ids are words, with 1 before every text and 0 for all it does not know."""

    eos = ()

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids 2 and up."""
        return [1] * special + [2 + int(w) if w.isdigit() else 0 for w in text.split()]


def test_files_are_split_one_by_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"{name}\n" * 50)
    text = file_text([tmp_path / "a", tmp_path / "b"])
    assert text.train == b"\0" + b"a\n" * 45 + b"\0" + b"b\n" * 45
    assert text.held_out == b"\0" + b"a\n" * 5 + b"\0" + b"b\n" * 5
    assert text.source == f"{tmp_path}/a, {tmp_path}/b"
    said = text.as_json()
    assert said["split"].startswith("the last tenth of every document")
    assert said["held_out_bytes"] == 22 and len(said["train_sha256"]) == 64


def test_files_that_will_not_do(tmp_path):
    (tmp_path / "short").write_text("x")
    with pytest.raises(ConfigError, match="too short to hold a tenth of it out"):
        file_text([tmp_path / "short"])
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(FFNLabError, match="binary is not UTF-8 text.*missing cannot be read"):
        file_text([tmp_path / "binary", tmp_path / "missing"])


def test_the_standard_library_is_the_text_without_files():
    text = standard_text()
    assert text.source.startswith("standard library of Python 3.")
    assert len(text.train) > 20 * len(text.held_out) > 20 * 100_000


def test_calibration_is_evenly_spaced_batches_of_one_shape():
    settings = Calibration(tokens=1000, window=16, batch=4)
    batches = calibration(TEXT, BYTES, settings, 256)
    assert len(batches) == 1000 // 16 // 4
    assert {batch.shape for batch in batches} == {(4, 16)}
    assert all(bytes(row.tolist()) in LONG for batch in batches for row in batch)
    last = batches[-1][-1]
    assert bytes(last.tolist()) == LONG[-16:]


def test_a_short_text_gives_fewer_batches():
    text = dataclasses.replace(TEXT, train=LONG[:100])
    settings = Calibration(tokens=1000, window=16, batch=2)
    assert len(calibration(text, BYTES, settings, 256)) == 3
    with pytest.raises(ConfigError, match="a test has 20 tokens to calibrate on"):
        calibration(dataclasses.replace(TEXT, train=LONG[:20]), BYTES, settings, 256)


@pytest.mark.parametrize("length", [17, 33, 34, 100, 1000])
def test_the_whole_held_out_text_is_counted_once(length):
    text = dataclasses.replace(TEXT, held_out=LONG[:length])
    samples = held_out(text, BYTES, Evaluation(tokens=0, window=16, batch=4), 256)
    assert samples.counted.sum() == length - 1
    assert samples.bytes_per_token == 1.0
    scored = samples.tokens[:, 1:][samples.counted]
    assert bytes(scored.tolist()) == LONG[1:length]


def test_some_of_the_held_out_text_is_evenly_spaced():
    samples = held_out(TEXT, BYTES, Evaluation(tokens=100, window=16, batch=4), 256)
    assert samples.tokens.shape == (7, 17) and samples.counted.all()
    assert bytes(samples.tokens[0].tolist()) == LONG[:17]
    assert bytes(samples.tokens[-1].tolist()) == LONG[-17:]


def test_batches_are_filled_up_with_rows_that_do_not_count():
    samples = held_out(TEXT, BYTES, Evaluation(tokens=100, window=16, batch=4), 256)
    groups = list(samples.batches(4))
    assert [tokens.shape for tokens, _ in groups] == [(4, 17), (4, 17)]
    assert sum(int(counted.sum()) for _, counted in groups) == samples.counted.sum()


def test_too_little_held_out_text():
    text = dataclasses.replace(TEXT, held_out=LONG[:10])
    with pytest.raises(ConfigError, match="a test has 10 held-out tokens; one window of 16"):
        held_out(text, BYTES, Evaluation(tokens=0, window=16), 256)


def test_every_window_begins_as_the_tokenizer_wants():
    words = b" ".join(b"%d" % i for i in range(200))
    text = Text(words, words, "numbers", "-")
    (batch,) = calibration(text, Words(), Calibration(tokens=40, window=10, batch=4), 300)
    assert batch.shape == (4, 10)
    assert batch[:, 0].tolist() == [1] * 4
    assert batch[0].tolist() == [1, *range(2, 11)]
    samples = held_out(text, Words(), Evaluation(tokens=0, window=10), 300)
    assert samples.tokens[:, 0].tolist() == [1] * len(samples.tokens)
    assert samples.counted[0, 0] and samples.counted.sum() == 200
    assert samples.bytes_per_token == len(words) / 200


def test_a_tokenizer_of_another_model():
    with pytest.raises(
        ConfigError, match=r"id 250, the model has ids 0\.\.199: they do not belong"
    ):
        calibration(TEXT, BYTES, Calibration(tokens=64, window=16, batch=4), 200)


def test_a_long_text_is_sampled_before_it_is_encoded():
    words = b"".join(b"%d one two three\n" % i for i in range(300_000))
    (ids, _, _), prefix = encode(words, Words(), 1000)
    assert prefix == [1]
    numbers = ids[ids > 1] - 2
    assert numbers[0] < 100 and numbers[-1] > 290_000 and len(ids) < 400_000
    assert (np.diff(numbers[numbers >= 2]) > 0).mean() > 0.99


def test_what_stands_between_documents_does_not_count():
    text = Text(b"\0" + b"1 2 3 " * 9, b"\0" + b"1 2 3\0" + b"4 5 6 7 8", "numbers", "-")
    samples = held_out(text, Words(), Evaluation(tokens=0, window=4), 300)
    scored = samples.tokens[:, 1:][samples.counted]
    assert scored.tolist() == [3, 4, 5, 6, 7, 8, 9, 10]
    assert samples.bytes_per_token == 14 / 8
