"""Rows of two kinds of token: by their definition, and by what their docstrings promise."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import CaptionedDigits, Labelled, RuleSegments, captioned
from ffnlab.data.interleaved import LETTERS, NAMES, START, answered, caption_length
from ffnlab.errors import ConfigError


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), position=st.integers(0, 99))
def test_segments_follow_a_rule_of_their_family_by_turns(seed, position):
    source = RuleSegments(2, 65, seed=seed)
    rows = source(position)
    assert rows.shape == (2, 65) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows, source(position))
    for row in rows:
        family = row // 16
        cuts = np.flatnonzero(np.diff(family)) + 1
        segments = np.split(row % 16, cuts)
        assert all(8 <= len(segment) <= 16 for segment in segments[1:-1])
        for kind, segment in zip(family[[0, *cuts]], segments, strict=True):
            holds = [
                all((a * y + b * x + c) % 16 == z for x, y, z in zip(s, s[1:], s[2:], strict=False))
                for a, b, c in source.rules[kind]
                for s in [segment.tolist()]
            ]
            assert any(holds)


def test_rows_differ_by_seed_and_position_and_use_every_rule():
    source = RuleSegments(8, 65)
    assert not np.array_equal(source(0), source(1))
    assert not np.array_equal(source(0), RuleSegments(8, 65, seed=1)(0))
    assert set(np.unique([source(i) for i in range(8)])) == set(range(32))
    starts = np.concatenate([source(i)[:, 0] // 16 for i in range(8)])
    assert 0.2 < starts.mean() < 0.8, "rows begin with either family"


def digits() -> Labelled:
    """A digit of each class, whose pixels rise from black to white."""
    x = np.tile(np.linspace(0, 1, 64, dtype=np.float32), (10, 1))
    return Labelled(x, np.arange(10, dtype=np.int32))


def read(row: np.ndarray) -> str:
    """A row of tokens as text, an image as one star."""
    letters = [LETTERS[t] if t < START else "<" if t == START else "*" for t in row]
    return "".join(letters).replace("*" * 64, "*")


def test_captions_stand_around_images():
    told = np.arange(10) % 2 == 0
    rows = captioned(digits(), told)
    for i, name in enumerate(NAMES):
        length = int(rows.segments[i].sum())
        assert rows.segments[i].tolist() == [1] * length + [0] * (84 - length)
        said = name if told[i] else "digit"
        assert read(rows.tokens[i, :length]) == f"<a {said} *it is {name}"
        assert not rows.tokens[i, length:].any()
    image = rows.tokens[0][rows.tokens[0] > START] - START - 1
    assert image.tolist() == sorted(image) and (image.min(), image.max()) == (0, 15)
    assert rows.positions.tolist() == [list(range(84))] * 10
    assert max(rows.tokens.max(), 43) == 43 == CaptionedDigits.vocab - 1
    assert CaptionedDigits.starts == (START + 1,)


def test_batches_are_drawn_anew_and_half_of_them_told():
    source = CaptionedDigits(digits(), 200, seed=3)
    first, again, other = source(0), source(0), source(1)
    np.testing.assert_array_equal(first.tokens, again.tokens)
    assert not np.array_equal(first.tokens, other.tokens)
    untold = sum("a digit" in read(row) for row in first.tokens)
    assert 70 < untold < 130
    assert len({read(row).split("it is ")[1].strip() for row in first.tokens}) == 10


def test_what_cannot_be_is_refused():
    for wrong in ({"batch": 0}, {"length": 0}, {"tokens": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            RuleSegments(**{"batch": 1, "length": 9} | wrong)
    for wrong in ({"batch": 0}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            CaptionedDigits(digits(), **{"batch": 1} | wrong)
    told = np.ones(10, bool)
    with pytest.raises(ConfigError, match=r"told \(9,\)"):
        captioned(digits(), told[1:])
    with pytest.raises(ConfigError, match=r"images \(10, 8, 8\)"):
        captioned(Labelled(digits().x.reshape(10, 8, 8), digits().y), told)
    with pytest.raises(ConfigError, match="classes 0 to 9 of 2 names"):
        captioned(digits(), told, ("cat", "dog"))
    for name in ("Cat", "", "c1"):
        with pytest.raises(ConfigError, match=f"name '{name}' of a class"):
            caption_length(("dog", name), 4)


def test_other_images_are_called_by_their_names():
    names = ("cat", "polar bear")
    x = np.tile(np.linspace(0, 1, 6, dtype=np.float32), (4, 1))
    told = np.array([True, False, True, False])
    rows = captioned(Labelled(x, np.array([0, 0, 1, 1])), told, names)
    assert rows.tokens.shape[1] == caption_length(names, 6)
    said = [
        read(row[:length]) for row, length in zip(rows.tokens, rows.segments.sum(1), strict=True)
    ]
    assert said == [
        "<a cat ******it is cat",
        "<a thing ******it is cat",
        "<a polar bear ******it is polar bear",
        "<a thing ******it is polar bear",
    ]
    assert (rows.segments.sum(1).max(), 1) == (rows.tokens.shape[1], rows.segments.max())
    where = answered(rows)
    answers = [read(row[at]) for row, at in zip(rows.tokens, where, strict=True)]
    assert answers == ["cat", "cat", "polar bear", "polar bear"]
