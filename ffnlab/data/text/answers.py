"""Answers from the logits of windows, questions by article, and windows as a tokenizer has them."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from ffnlab.data.text.squad import Question, SpanLayout, SpanWindows
from ffnlab.errors import ConfigError, at_least
from ffnlab.formats import Tokenizer

__all__ = ["answers_of", "by_article", "span_layout"]


def answers_of(
    windows: SpanWindows,
    questions: Sequence[Question],
    logits: Float[np.ndarray, "w t 2"],
    *,
    longest: int = 30,
) -> list[str]:
    """The span with the largest sum of logits of each question, over all of its windows.

    Only spans of the context count, so that an answer is always given. A token may be the whole
    answer, which the code of arXiv 2204.09598 leaves out.

    Args:
      windows: of the questions.
      questions: all that the windows were made of.
      logits: of being the first and the last token of the answer.
      longest: tokens of an answer, >= 1.
    Returns:
      a text for each question; "" where no window has a span with finite logits.
    Raises:
      ConfigError: logits of another shape.

    >>> letters = lambda text: ([ord(c) for c in text], [(i, i + 1) for i in range(len(text))])
    >>> from ffnlab.data import Answer, span_windows
    >>> asked = [Question("1", "?", "abcd", (Answer("bc", 1),), "")]
    >>> found = span_windows(asked, letters, SpanLayout(length=5, stride=2))
    >>> answers_of(found, asked, np.eye(5, dtype=np.float32)[None, :, [2, 3]])
    ['bc']
    """
    at_least(1, longest=longest)
    if logits.shape != (*windows.tokens.shape, 2):
        raise ConfigError(
            f"logits {logits.shape}; the windows are {windows.tokens.shape}, so that "
            f"{(*windows.tokens.shape, 2)} is accepted"
        )
    w, t = windows.tokens.shape
    inside = (windows.offsets[..., 0] >= 0)[..., None] & np.isfinite(logits)
    first, last = np.moveaxis(np.where(inside, logits.astype(np.float64), -np.inf), -1, 0)
    best, span = np.full(w, -np.inf), np.zeros((w, 2), int)
    for more in range(min(longest, t)):
        sums = first[:, : t - more] + last[:, more:]
        place = sums.argmax(1)
        found = sums[np.arange(w), place]
        better = found > best
        best = np.where(better, found, best)
        span[better] = np.stack([place, place + more], axis=-1)[better]
    texts, scores = [""] * len(questions), np.full(len(questions), -np.inf)
    for i, question in enumerate(windows.question):
        if best[i] > scores[question]:
            scores[question] = best[i]
            texts[question] = windows.text(questions, i, *span[i])
    return texts


def by_article(questions: Sequence[Question]) -> list[tuple[Question, ...]]:
    """Questions of each article, in the order in which their titles first come.

    A split by article has no text on both sides, which one by question would.
    """
    found: dict[str, list[Question]] = {}
    for question in questions:
        found.setdefault(question.title, []).append(question)
    return [tuple(each) for each in found.values()]


def span_layout(tokenizer: Tokenizer, length: int, stride: int) -> SpanLayout:
    """Windows as BERT has them: its CLS and SEP, or where there are none bos and eos.

    Args:
      tokenizer: whose roles say which ids those are.
      length, stride: see `SpanLayout`.
    Raises:
      ConfigError: it has neither.

    >>> span_layout(Tokenizer.bytes(), 16, 4).first
    (0,)
    """
    cls, sep = tokenizer.role("cls"), tokenizer.role("sep")
    first = tokenizer.bos if cls is None else cls
    between = next(iter(tokenizer.eos), None) if sep is None else sep
    if first is None or between is None:
        raise ConfigError("the tokenizer has no id to begin a text with, or none to end it")
    pad = 0 if tokenizer.pad is None else tokenizer.pad
    return SpanLayout(length, stride, (first,), (between,), (between,), pad)
