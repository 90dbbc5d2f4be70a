"""Questions whose answers are spans of a text: files in the format of SQuAD, and their windows.

Positions in a file are characters (code points) of the context. A window is
`first + question + between + part of the context + last`; its answer is a pair of positions in it,
both inside, or (0, 0) where the answer is not wholly in the window.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from ffnlab.data.folders import folder
from ffnlab.errors import ConfigError, FFNLabError, FormatError, at_least
from ffnlab.storage.files import read_json

__all__ = ["Answer", "Question", "SpanLayout", "SpanWindows", "span_windows", "squad"]

QUOTED = 60  # characters of a file that a message repeats

Place = int | np.integer
# Token ids of a text, and (first, end) of the characters that each stands for.
Encode = Callable[[str], tuple[Sequence[int], Sequence[tuple[int, int]]]]


class Answer(NamedTuple):
    """A span of the context.

    Attributes:
      text: not empty.
      start: of its first character; context[start : start + len(text)] is the text.
    """

    text: str
    start: int


class Question(NamedTuple):
    """A question on a text.

    Attributes:
      name: its "id" in the file, of which each is there once.
      text: the question.
      context: in which the answer is.
      answers: all that are right; () where the text has none.
      title: of the article.
    """

    name: str
    text: str
    context: str
    answers: tuple[Answer, ...]
    title: str


def squad(path: str | Path | None = None) -> tuple[Question, ...]:
    """Questions of a file in the format of SQuAD 1.1, or 2.0 where some have no answer.

    Args:
      path: JSON, {"data": [{"title", "paragraphs": [{"context", "qas": [{"id", "question",
        "answers": [{"text", "answer_start"}], "is_impossible"}]}]}]}; the English questions of
        xquad in FFNLAB_DATA when None. "title" and "is_impossible" may be missing.
    Returns:
      in the order of the file.
    Raises:
      FFNLabError: there is no file.
      FormatError: no such JSON, an answer that is not at its place in the context, a question with
        answers that says it has none or the other way round, or a name given twice; where is named.
    Source: arXiv 1606.05250, arXiv 1806.03822.
    """
    file = folder("xquad") / "xquad.en.first36.json" if path is None else Path(path)
    if not file.exists():
        raise FFNLabError(f"{file}: there is no such file")
    found, names = [], set()
    for question in _questions(read_json(file), str(file)):
        if question.name in names:
            raise FormatError(f"{file}: two questions have the id {question.name[:QUOTED]!r}")
        names.add(question.name)
        found.append(question)
    if not found:
        raise FormatError(f"{file}: no questions")
    return tuple(found)


def _questions(content: object, file: str) -> Iterator[Question]:
    for i, article in enumerate(_field(content, "data", list, file)):
        where = f"{file}: data[{i}]"
        title = _field(article, "title", str, where, "")
        for j, paragraph in enumerate(_field(article, "paragraphs", list, where)):
            place = f"{where}.paragraphs[{j}]"
            context = _field(paragraph, "context", str, place)
            for k, entry in enumerate(_field(paragraph, "qas", list, place)):
                yield _question(entry, context, title, f"{place}.qas[{k}]")


def _question(entry: object, context: str, title: str, where: str) -> Question:
    impossible = _field(entry, "is_impossible", bool, where, False)
    given = _field(entry, "answers", list, where)
    if impossible == bool(given):
        raise FormatError(f"{where}: {len(given)} answers and is_impossible={impossible}")
    answers = tuple(
        _answer(answer, context, f"{where}.answers[{i}]") for i, answer in enumerate(given)
    )
    name, text = _field(entry, "id", str, where), _field(entry, "question", str, where)
    return Question(name, text, context, answers, title)


def _answer(entry: object, context: str, where: str) -> Answer:
    text, start = _field(entry, "text", str, where), _field(entry, "answer_start", int, where)
    if not text or start < 0 or context[start : start + len(text)] != text:
        raise FormatError(f"{where}: {text[:QUOTED]!r} is not at {start} in the context")
    return Answer(text, start)


def _field(value: object, name: str, kind: type, where: str, default: Any = None) -> Any:
    """A value of an object, of one type; `default` where there is none."""
    if not isinstance(value, dict):
        raise FormatError(f"{where} is not an object of JSON")
    found = value.get(name, default)
    if type(found) is not kind:  # a bool is no int here
        raise FormatError(f"{where}: {name} is {type(found).__name__}, not {kind.__name__}")
    return found


@dataclasses.dataclass(frozen=True)
class SpanLayout:
    """How a question and a part of its context make a window.

    Attributes:
      length: tokens of a window.
      stride: tokens of the context between the starts of two windows, >= 1.
      first, between, last: special tokens before the question, between the two, at the end:
        (101,), (102,), (102,) for BERT.
      pad: fills a window that is not full.
    """

    length: int
    stride: int
    first: tuple[int, ...] = ()
    between: tuple[int, ...] = ()
    last: tuple[int, ...] = ()
    pad: int = 0

    def __post_init__(self) -> None:
        at_least(1, length=self.length, stride=self.stride)


class SpanWindows(NamedTuple):
    """Windows of questions, w in all; those of a question follow each other.

    Attributes:
      tokens: [w, length], padded.
      valid: [w, length], false on padding.
      types: [w, length], 1 for the context and `last`, else 0.
      start, end: [w], positions of the answer's first and last token; (0, 0) where the answer is
        not wholly in the window.
      question: [w], which question, an index.
      offsets: [w, length, 2], the characters of the context that a token stands for, end excluded;
        -1 for all other tokens.
    """

    tokens: Int32[np.ndarray, "w t"]
    valid: Bool[np.ndarray, "w t"]
    types: Int32[np.ndarray, "w t"]
    start: Int32[np.ndarray, "w"]
    end: Int32[np.ndarray, "w"]
    question: Int32[np.ndarray, "w"]
    offsets: Int32[np.ndarray, "w t 2"]

    @property
    def ends(self) -> Int32[np.ndarray, "w 2"]:
        """(start, end) of each window, as `ffnlab.losses.span` takes them."""
        return np.stack([self.start, self.end], axis=-1)

    def inputs(self, *, types: bool = True) -> dict[str, np.ndarray]:
        """What an encoder is given, by name; with `types` where it has types of tokens."""
        found = {"tokens": self.tokens, "valid": self.valid}
        return found | ({"types": self.types} if types else {})

    def text(self, questions: Sequence[Question], window: Place, start: Place, end: Place) -> str:
        """The text between two positions of a window, as it is written in the context.

        Args:
          questions: those that the windows were made of.
          window: its row.
          start, end: positions of the first and of the last token; (0, 0) for no answer.
        Returns:
          the text; "" for no answer.
        Raises:
          ConfigError: no such window, or positions that are not in its context or not in order.
        """
        if not 0 <= window < len(self.tokens):
            raise ConfigError(f"window={window} is not one of {len(self.tokens)}")
        if start == end == 0:
            return ""
        spans = self.offsets[window]
        inside = np.flatnonzero(spans[:, 0] >= 0)
        if not len(inside) or not inside[0] <= start <= end <= inside[-1]:
            place = f"{inside[0]} to {inside[-1]}" if len(inside) else "nowhere"
            raise ConfigError(f"start={start}, end={end}; the context of the window is {place}")
        context = questions[self.question[window]].context
        return context[spans[start, 0] : spans[end, 1]]


def span_windows(questions: Sequence[Question], encode: Encode, layout: SpanLayout) -> SpanWindows:
    """Cuts the contexts of questions into windows; the first of several answers is taken.

    Args:
      questions: at least one.
      encode: of a text the token ids, without special tokens, and by token the (first, end)
        characters that it stands for; both never fall. An answer's tokens are those that share a
        character with it.
      layout: of a window.
    Returns:
      `SpanWindows`; every token of a context is in at least one.
    Raises:
      ConfigError: no questions, a window without room for `stride` tokens of the context, offsets
        that are none, or an answer that no token stands for.

    >>> letters = lambda text: ([ord(c) for c in text], [(i, i + 1) for i in range(len(text))])
    >>> asked = [Question("1", "?", "abcdef", (Answer("de", 3),), "")]
    >>> found = span_windows(asked, letters, SpanLayout(length=5, stride=2))
    >>> [bytes(row.tolist()) for row in found.tokens], found.start.tolist(), found.end.tolist()
    ([b'?abcd', b'?cdef'], [0, 2], [0, 3])
    """
    if not questions:
        raise ConfigError("questions: none; at least one is needed")
    known: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # many questions share a context
    rows: list[tuple] = []
    for index, question in enumerate(questions):
        if question.context not in known:
            known[question.context] = _encoded(encode, question.context, question.name)
        asked, _ = _encoded(encode, question.text, question.name)
        rows += [
            (*row[:-1], np.int32(index), row[-1])
            for row in _windows(question, asked, *known[question.context], layout)
        ]
    return SpanWindows(*(np.stack(column) for column in zip(*rows, strict=True)))


def _encoded(encode: Encode, text: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [n] and offsets [n, 2] of a text, checked."""
    ids, offsets = encode(text)
    tokens = np.asarray(ids, np.int32).reshape(-1)
    spans = np.asarray(offsets, np.int32).reshape(-1, 2)
    fits = len(tokens) == len(spans)
    if fits and len(spans):
        rising = (np.diff(spans, axis=0) >= 0).all() and (spans[:, 0] <= spans[:, 1]).all()
        fits = bool(rising and spans.min() >= 0 and spans.max() <= len(text))
    if not fits:
        raise ConfigError(
            f"question {name[:QUOTED]!r}: encode gave {len(tokens)} tokens and {len(spans)} "
            f"offsets; as many (first, end) that never fall, within 0 to {len(text)}, are accepted"
        )
    return tokens, spans


def _windows(
    question: Question,
    asked: np.ndarray,
    context: np.ndarray,
    spans: np.ndarray,
    layout: SpanLayout,
) -> Iterator[tuple]:
    """Rows of `SpanWindows` of one question, without its index."""
    before = np.array([*layout.first, *asked, *layout.between], np.int32)
    room = layout.length - len(before) - len(layout.last)
    if room < layout.stride or not len(before):
        raise ConfigError(
            f"question {question.name[:QUOTED]!r}: length={layout.length} leaves {room} tokens for "
            f"the context beside {len(before)} before it; stride={layout.stride} and at least 1 "
            "before it are needed"
        )
    answer = _tokens_of(question, spans)
    for begin in range(0, max(1, len(context) - room + layout.stride), layout.stride):
        part = context[begin : begin + room]
        row = np.concatenate([before, part, np.array(layout.last, np.int32)])
        fill = layout.length - len(row)
        tokens = np.pad(row, (0, fill), constant_values=layout.pad)
        place = np.arange(layout.length)
        valid = place < len(row)
        offsets = np.full((layout.length, 2), -1, np.int32)
        offsets[len(before) : len(before) + len(part)] = spans[begin : begin + room]
        start = end = 0
        if answer is not None and begin <= answer[0] and answer[1] < begin + len(part):
            start, end = (len(before) + token - begin for token in answer)
        types = (valid & (place >= len(before))).astype(np.int32)
        yield tokens, valid, types, np.int32(start), np.int32(end), offsets


def _tokens_of(question: Question, spans: np.ndarray) -> tuple[int, int] | None:
    """The first and the last token that share a character with the first answer."""
    if not question.answers:
        return None
    text, begin = question.answers[0]
    first = int(np.searchsorted(spans[:, 1], begin, side="right"))
    last = int(np.searchsorted(spans[:, 0], begin + len(text), side="left")) - 1
    if first > last:
        raise ConfigError(
            f"question {question.name[:QUOTED]!r}: no token stands for the answer {text[:QUOTED]!r}"
        )
    return first, last
