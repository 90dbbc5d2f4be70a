"""Augmented questions: other words, and answers that stand as they did."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import Answer, Question, eda, nearest_words
from ffnlab.data.text.eda import STOP
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer

TEXT = "In 1889 (the old) Eiffel-Tower, an old tower, rose quickly; it's 330m tall. Old men ran."
TABLE = {"old": ("aged", "ancient"), "rose": ("stood",), "tall": ("high",), "the": ("THE",)}
TABLE |= {"tower": ("spire",), "men": ("people",)}


def asked(*answers: str, text: str = TEXT) -> Question:
    """A question on the text with answers that are in it."""
    places = tuple(Answer(a, text.index(a)) for a in answers)
    return Question("q", "What?", text, places, "Towers")


def synonyms(word: str) -> tuple[str, ...]:
    """Of the table."""
    assert word == word.lower()
    return TABLE.get(word, ())


def words(text: str) -> list[str]:
    """In order, in lower case."""
    return re.findall(r"\w+", text.lower())


WAYS = ("replaced", "inserted", "swapped", "left_out")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 999),
    share=st.sampled_from([0.05, 0.5, 1.0]),
    way=st.sampled_from(WAYS),
    answers=st.sampled_from([("1889",), ("Eiffel-Tower", "old tower"), ("330", "it's 330m"), ()]),
)
def test_answers_stand_where_they_say(seed, share, way, answers):
    question = asked(*answers)
    options = dict.fromkeys(WAYS, 0.0) | {way: share}
    found = eda([question], synonyms, copies=3, seed=seed, **options)
    assert [q.name for q in found] == ["q/eda0", "q/eda1", "q/eda2"]
    guarded = {w for answer in answers for w in words(answer)}
    count = lambda text: {w: words(text).count(w) for w in guarded}  # noqa: E731
    for new in found:
        assert [a.text for a in new.answers] == list(answers)
        for text, start in new.answers:
            assert new.context[start : start + len(text)] == text
        if way != "inserted":
            assert count(new.context) == count(TEXT), "a word of an answer is touched nowhere"
        assert (new.text, new.title) == (question.text, question.title)
    assert found == eda([question], synonyms, copies=3, seed=seed, **options)


def test_each_way_does_what_it_says():
    question, one = asked("1889"), {"copies": 1, "replaced": 0.0}
    plain = words(TEXT)
    (replaced,) = eda([question], synonyms, copies=1, replaced=1.0)
    pairs = list(zip(plain, words(replaced.context), strict=True))
    for old, new in pairs:
        is_known = old in TABLE and old not in STOP
        assert new in TABLE[old] if is_known else new == old
    assert len({new for old, new in pairs if old == "old"}) == 1, "one synonym wherever it stands"
    assert replaced.context.endswith(("Aged people ran.", "Ancient people ran."))
    (inserted,) = eda([question], synonyms, inserted=0.2, **one)
    assert len(words(inserted.context)) == len(plain) + int(0.2 * 15)  # of words of letters
    (swapped,) = eda([question], synonyms, swapped=0.2, **one)
    assert sorted(words(swapped.context)) == sorted(plain) and words(swapped.context) != plain
    (bare,) = eda([question], synonyms, left_out=1.0, **one)
    assert words(bare.context) == ["1889", "330m"]
    both = eda([question], synonyms, copies=4, replaced=0.5, left_out=1.0)
    assert [words(q.context) == ["1889", "330m"] for q in both] == [False, True, False, True]


def test_the_share_is_of_the_words():
    letters = [a + b for a in "bcdfghjk" for b in "aeiou"]
    question = asked("ba", text=" ".join(letters))
    (found,) = eda([question], lambda word: (word + "x",), copies=1, replaced=0.25)
    assert sum(word.endswith("x") for word in words(found.context)) == 10


BAD = {
    "copies=0": {"copies": 0},
    "'replaced': 1.5": {"replaced": 1.5},
    "one of them above 0": {"replaced": 0.0},
    "seed=-1": {"seed": -1},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_options(message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        eda([asked("1889")], synonyms, **BAD[message])


def test_no_questions():
    with pytest.raises(ConfigError, match="questions: none"):
        eda([], synonyms)


class Words:
    """Stands in for a tokenizer's backend: ids of some tokens."""

    tokens = ("[CLS]", "king", "queen", "##king", "the", "apple", "Kings", "prince")

    def token(self, index: int) -> str:
        """Of an id."""
        return self.tokens[index]


def test_synonyms_are_the_nearest_rows():
    tokenizer = Tokenizer.bytes()
    tokenizer.backend = Words()
    tokenizer.backend.size = 8
    rows = np.array(
        [[1, 0], [1, 0], [0.9, 0.1], [1, 0], [1, 0], [-1, 0.3], [1, 0], [0.6, 0.5]], np.float32
    )
    found = nearest_words(rows, tokenizer, k=2, least=0.5)
    assert found("king") == ("queen", "prince"), "no piece, stop word or other spelling"
    assert found("apple") == () and found("the") == () and found("unknown") == ()
    assert nearest_words(rows, tokenizer, k=1)("king") == ("queen",)
    np.testing.assert_array_equal(rows[2], np.float32([0.9, 0.1]))
