"""Files in the format of SQuAD, their windows, and the way back to the text."""

import copy
import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import Answer, Question, SpanLayout, find_folder, span_windows, squad
from ffnlab.errors import ConfigError, FFNLabError, FormatError
from tests.damaging import damaged

CONTEXT = "The café (1889) isn't far:  go north."
FILE = {
    "version": "v2.0",
    "data": [
        {
            "title": "Way",
            "paragraphs": [
                {
                    "context": CONTEXT,
                    "qas": [
                        {
                            "id": "a",
                            "question": "Since when?",
                            "is_impossible": False,
                            "answers": [
                                {"text": "1889", "answer_start": 10},
                                {"text": "(1889)", "answer_start": 9},
                            ],
                        },
                        {
                            "id": "b",
                            "question": "Who?",
                            "is_impossible": True,
                            "answers": [],
                            "plausible_answers": [{"text": "The", "answer_start": 0}],
                        },
                    ],
                }
            ],
        },
        {
            "paragraphs": [
                {
                    "context": "Ja.",
                    "qas": [
                        {
                            "id": "c",
                            "question": "?",
                            "answers": [{"text": "Ja", "answer_start": 0}],
                        }
                    ],
                }
            ]
        },
    ],
}


def letters(text):
    """A token a character."""
    return [ord(c) for c in text], [(i, i + 1) for i in range(len(text))]


def words(text):
    """A token a run of characters without a space."""
    found = list(re.finditer(r"\S+", text))
    return [len(m[0]) for m in found], [m.span() for m in found]


def saved(tmp_path, content):
    file = tmp_path / "questions.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_questions_of_a_file(tmp_path):
    a, b, c = squad(saved(tmp_path, FILE))
    assert a == Question(
        "a", "Since when?", CONTEXT, (Answer("1889", 10), Answer("(1889)", 9)), "Way"
    )
    assert b.name == "b" and b.answers == () and b.context == CONTEXT
    assert c.title == "" and c.answers == (Answer("Ja", 0),)


def changed(*path, value):
    """`FILE` with another value at a place; None removes it."""
    content = copy.deepcopy(FILE)
    inner = content
    for step in path[:-1]:
        inner = inner[step]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return content


PARAGRAPH = ("data", 0, "paragraphs", 0)
FIRST = (*PARAGRAPH, "qas", 0)
ANSWER = (*FIRST, "answers", 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "not an object"),
        ('{"data": []}', "no questions"),
        (changed("data", value=None), "data is NoneType, not list"),
        (changed("data", 0, value=3), r"data\[0\] is not an object"),
        (changed("data", 0, "title", value=3), "title is int, not str"),
        (changed(*PARAGRAPH, "context", value=None), r"paragraphs\[0\]: context is NoneType"),
        (
            changed(*PARAGRAPH, "context", value="The"),
            r"qas\[0\].answers\[0\]: '1889' is not at 10",
        ),
        (changed(*ANSWER, "answer_start", value=11), "'1889' is not at 11"),
        (changed(*ANSWER, "answer_start", value=-27), "'1889' is not at -27"),
        (changed(*ANSWER, "answer_start", value=True), "answer_start is bool, not int"),
        (changed(*ANSWER, "answer_start", value=10.0), "answer_start is float, not int"),
        (changed(*ANSWER, "text", value=""), "'' is not at 10"),
        (changed(*FIRST, "is_impossible", value=True), "2 answers and is_impossible=True"),
        (changed(*FIRST, "answers", value=[]), "0 answers and is_impossible=False"),
        (changed(*FIRST, "id", value="c"), "two questions have the id 'c'"),
        (changed(*FIRST, "id", value=7), "id is int, not str"),
        (changed(*FIRST, "question", value=None), "question is NoneType"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, content, message):
    with pytest.raises(FormatError, match=message):
        squad(saved(tmp_path, content))


def test_no_file_and_no_regular_file(tmp_path):
    with pytest.raises(FFNLabError, match="no such file"):
        squad(tmp_path / "none")
    with pytest.raises(FormatError, match="not a regular file"):
        squad(tmp_path)


def test_files_that_are_cut_or_flipped_are_refused_or_read(tmp_path):
    file = tmp_path / "questions.json"
    for content in damaged(json.dumps(FILE).encode(), 200):
        file.write_bytes(content)
        try:
            for question in squad(file):
                for text, start in question.answers:
                    assert question.context[start:].startswith(text)
        except FormatError as error:
            assert str(file) in str(error)


def test_a_window_by_hand():
    asked = [Question("1", "a b", "c dd e f g", (Answer("dd e", 2),), "")]
    ids = {word: i for i, word in enumerate("_ a b c dd e f g".split())}

    def encode(text):
        spans = [m.span() for m in re.finditer(r"\S+", text)]
        return [ids[text[i:j]] for i, j in spans], spans

    layout = SpanLayout(length=8, stride=2, first=(101,), between=(102, 103), last=(104,), pad=9)
    with pytest.raises(ConfigError, match="leaves 1 tokens"):
        span_windows(asked, encode, SpanLayout(7, 2, (101,), (102, 103), (104,)))
    found = span_windows(asked, encode, layout)
    assert found.tokens.tolist() == [
        [101, 1, 2, 102, 103, 3, 4, 104],
        [101, 1, 2, 102, 103, 5, 6, 104],
        [101, 1, 2, 102, 103, 7, 104, 9],
    ]
    assert found.valid.sum(1).tolist() == [8, 8, 7] and not found.valid[2, 7]
    assert found.types.tolist()[0] == [0] * 5 + [1] * 3
    assert found.types.tolist()[2] == [0] * 5 + [1, 1, 0]
    assert found.offsets[1].tolist() == [[-1, -1]] * 5 + [[5, 6], [7, 8], [-1, -1]]
    # Half of the answer is in the first and half in the second window: in neither.
    assert found.start.tolist() == found.end.tolist() == [0, 0, 0]
    wider = span_windows(asked, encode, SpanLayout(9, 2, (101,), (102, 103), (104,)))
    assert wider.start.tolist() == [6, 0] and wider.end.tolist() == [7, 0]
    assert wider.text(asked, 0, 6, 7) == "dd e" and wider.text(asked, 1, 0, 0) == ""


@settings(max_examples=50)
@given(st.data())
def test_windows_cover_the_context_and_know_the_answer(data):
    n = data.draw(st.integers(1, 20))
    context = "".join(chr(97 + i) for i in range(n))
    begin = data.draw(st.integers(0, n - 1))
    end = data.draw(st.integers(begin + 1, n))
    stride = data.draw(st.integers(1, 6))
    room = data.draw(st.integers(stride, 9))
    asked = [Question("q", "?", context, (Answer(context[begin:end], begin),), "")]
    found = span_windows(asked, letters, SpanLayout(room + 2, stride, last=(1,)))
    parts = [context[i : i + room] for i in range(0, n, stride)]
    wanted = parts[: 1 + next(i for i, part in enumerate(parts) if part.endswith(context[-1]))]
    rows = ["".join(map(chr, row[ok])) for row, ok in zip(found.tokens, found.valid, strict=True)]
    assert rows == [f"?{part}\x01" for part in wanted]
    for i, part in enumerate(wanted):
        place = part.find(context[begin:end])
        expected = (0, 0) if place < 0 else (1 + place, place + end - begin)
        assert (found.start[i], found.end[i]) == expected
        text = found.text(asked, i, *expected)
        assert text == ("" if place < 0 else context[begin:end])


def test_tokens_of_no_or_shared_characters():
    # As byte-level tokenizers: "é" is two tokens of one character, and a token of none is between.
    spans = [(0, 1), (1, 2), (1, 2), (2, 2), (2, 3)]
    asked = [Question("q", "?", "aéb", (Answer("é", 1),), "")]

    def encode(text):
        return ([7], [(0, 1)]) if text == "?" else ([1, 2, 3, 4, 5], spans)

    found = span_windows(asked, encode, SpanLayout(length=6, stride=5))
    assert (found.start[0], found.end[0]) == (2, 3) and found.text(asked, 0, 2, 3) == "é"


def test_a_question_without_answer_and_which_question_a_window_is_of(tmp_path):
    asked = squad(saved(tmp_path, FILE))
    found = span_windows(asked, words, SpanLayout(length=6, stride=2))
    assert found.question.tolist() == [0, 0, 0, 1, 1, 2]
    assert found.start[3:].tolist() == [0, 0, 1] and found.end[3:].tolist() == [0, 0, 1]
    assert found.text(asked, 0, found.start[0], found.end[0]) == "(1889)"
    assert found.text(asked, 5, 1, 1) == "Ja."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, q: f.text(q, 9, 0, 0), "window=9 is not one of 2"),
        (lambda f, q: f.text(q, 0, 0, 1), "start=0, end=1; the context of the window is 1 to 3"),
        (lambda f, q: f.text(q, 0, 2, 4), "start=2, end=4"),
        (lambda f, q: f.text(q, 0, 3, 2), "start=3, end=2"),
        (lambda f, q: span_windows([], letters, SpanLayout(5, 1)), "at least one"),
        (lambda f, q: SpanLayout(5, 0), "stride=0"),
        (lambda f, q: SpanLayout(0, 1), "length=0"),
        (lambda f, q: span_windows(q, lambda t: ([1], []), SpanLayout(5, 1)), "1 tokens and 0"),
        (lambda f, q: span_windows(q, lambda t: ([1], [(0, 99)]), SpanLayout(5, 1)), "within 0 to"),
        (
            lambda f, q: span_windows(q, lambda t: ([1, 2], [(1, 1), (0, 1)]), SpanLayout(5, 1)),
            "never fall",
        ),
        (
            lambda f, q: span_windows(q, lambda t: ([1], [(0, 1)]), SpanLayout(5, 1)),
            "no token stands for the answer 'cd'",
        ),
        (
            lambda f, q: span_windows(
                [q[0]._replace(text="")], letters, SpanLayout(length=5, stride=1)
            ),
            "at least 1 before it",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    asked = [Question("q", "?", "abcd", (Answer("cd", 2),), "")]
    found = span_windows(asked, letters, SpanLayout(length=5, stride=2, last=(1,)))
    assert len(found.tokens) == 2
    with pytest.raises(ConfigError, match=message):
        call(found, asked)


@pytest.mark.skipif(find_folder("xquad") is None, reason="needs xquad")
@pytest.mark.parametrize("language", ["en", "vi"])
def test_every_real_answer_comes_back(language):
    asked = squad(find_folder("xquad") / f"xquad.{language}.first36.json")
    assert len(asked) == 925 and len({q.context for q in asked}) == 180
    for encode, length, stride in ((letters, 2000, 400), (words, 160, 60)):
        found = span_windows(asked, encode, SpanLayout(length, stride, (1,), (2,), (2,)))
        answered = set()
        for row in np.flatnonzero(found.end > 0):
            question = asked[found.question[row]]
            text, begin = question.answers[0]
            wanted = text
            if encode is words:  # whole words: those that share a character with the answer
                spans = [m.span() for m in re.finditer(r"\S+", question.context)]
                shared = [s for s in spans if s[0] < begin + len(text) and s[1] > begin]
                wanted = question.context[shared[0][0] : shared[-1][1]]
            assert found.text(asked, row, found.start[row], found.end[row]) == wanted
            answered.add(int(found.question[row]))
        assert answered == set(range(len(asked)))
