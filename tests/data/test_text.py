"""Windows of text: batches by position, held-out windows that count every token once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data import TextBatches, held_out_windows, read_text
from ffnlab.errors import FFNLabError


def test_windows_count_the_tokens_that_are_scored():
    scored = np.arange(40) % 5 != 0
    windows = held_out_windows(np.arange(40), 8, 3, scored=scored)
    targets = windows.tokens[:, 1:][windows.counted]
    np.testing.assert_array_equal(np.sort(targets), np.flatnonzero(scored))


def test_files_are_joined_in_order(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"one\r\ntwo\n")
    (tmp_path / "a.txt").write_bytes(b"three")
    assert read_text([tmp_path / "b.txt", tmp_path / "a.txt"]) == b"\0one\ntwo\n\0three\0"


def test_all_bad_files_are_named_at_once(tmp_path):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin.txt").write_bytes(b"ab\xe9")
    paths = [tmp_path / name for name in ("empty.txt", "latin.txt", "missing.txt")]
    with pytest.raises(FFNLabError) as caught:
        read_text(paths)
    message = str(caught.value)
    assert "empty.txt is empty" in message and "latin.txt is not UTF-8 text (byte 2)" in message
    assert "missing.txt cannot be read" in message
    with pytest.raises(FFNLabError, match="no text files"):
        read_text([])


@given(
    n=st.integers(30, 400),
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_an_epoch_shows_every_window_once(n, batch, length, seed):
    tokens = np.arange(n, dtype=np.int64)
    if ((n - 1) // length - 1) // batch < 1:
        with pytest.raises(FFNLabError, match="need at least"):
            TextBatches(tokens, batch, length, seed)
        return
    batches = TextBatches(tokens, batch, length, seed)
    for epoch in range(2):
        start = epoch * batches.per_epoch
        rows = np.concatenate([batches(start + i) for i in range(batches.per_epoch)])
        assert rows.dtype == np.int32 and rows.shape[1] == length + 1
        np.testing.assert_array_equal(np.diff(rows, axis=1), 1)  # consecutive tokens
        firsts = np.sort(rows[:, 0])
        np.testing.assert_array_equal(np.diff(firsts), length)  # windows tile, none twice
        assert n - (firsts[-1] - firsts[0] + length) <= (batch + 2) * length  # little is left out


def test_a_position_is_all_there_is_to_know():
    text = bytes(range(200))
    one, two = TextBatches(text, 2, 8, seed=5), TextBatches(text, 2, 8, seed=5)
    straight = [one(p) for p in range(30)]
    for position in (29, 3, 17, 3):
        np.testing.assert_array_equal(two(position), straight[position])
    other = TextBatches(text, 2, 8, seed=6)
    assert any((other(p) != straight[p]).any() for p in range(3))
    epoch = one.per_epoch
    assert (one(0) != one(epoch)).any()  # epochs differ


@pytest.mark.parametrize("bad", [{"batch": 0}, {"length": 0}])
def test_bad_sizes(bad):
    with pytest.raises(FFNLabError, match=f"{next(iter(bad))}=0 must be at least 1"):
        TextBatches(b"x" * 100, **({"batch": 2, "length": 3} | bad))


def test_short_text_is_named():
    with pytest.raises(FFNLabError, match="notes.txt has 10 tokens"):
        TextBatches(b"x" * 10, batch=2, length=8, source="notes.txt")


@given(n=st.integers(2, 60), length=st.integers(1, 12), data=st.data())
def test_every_token_is_counted_once(n, length, data):
    stride = data.draw(st.integers(1, length))
    windows = held_out_windows(np.arange(n), length, stride)
    targets = windows.tokens[:, 1:][windows.counted]
    np.testing.assert_array_equal(np.sort(targets), np.arange(1, n))
    places = np.broadcast_to(np.arange(length), windows.counted.shape)
    context = places[1:][windows.counted[1:]]  # of all windows but the first
    assert (context >= length - stride).all()
    grouped = list(windows.batches(4))
    assert all(part.tokens.shape == (4, length + 1) for part in grouped)
    assert sum(part.counted.sum() for part in grouped) == n - 1


def test_bad_windows():
    with pytest.raises(FFNLabError, match="stride=5"):
        held_out_windows(b"abcdef", 4, 5)
    with pytest.raises(FFNLabError, match="book has 1 tokens"):
        held_out_windows(b"a", 4, 2, "book")


def test_the_parts_of_a_batch_are_its_rows():
    batches = TextBatches(bytes(range(256)) * 4, batch=6, length=8)
    for position in (0, 3, batches.per_epoch):
        parts = [batches.part(index, 3)(position) for index in range(3)]
        np.testing.assert_array_equal(np.concatenate(parts), batches(position))
    with pytest.raises(FFNLabError, match="batch=6 does not divide into 4"):
        batches.part(0, 4)
