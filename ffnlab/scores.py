"""Scores of predictions in NumPy: classes, rankings, spans of text, calibration."""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from ffnlab.errors import ConfigError

__all__ = [
    "calibration_error",
    "exact_match",
    "hits_at",
    "macro_f1",
    "normalised",
    "roc_auc",
    "span_f1",
    "span_scores",
]

ARTICLES = re.compile(r"\b(a|an|the)\b")


def macro_f1(
    predicted: Int[np.ndarray, "n"], true: Int[np.ndarray, "m"], classes: int | None = None
) -> float:
    """Mean over classes of F1 = 2 hits / (predicted + true); a class that never occurs counts not.

    Args:
      predicted, true: classes, whole numbers >= 0.
      classes: how many there are; those up to the largest that occurs when None.
    Raises:
      ConfigError: no examples, other shapes, or a class out of range.

    >>> macro_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]))
    0.733...
    """
    check_classes(predicted=predicted, true=true, classes=classes)
    n = max(int(predicted.max()), int(true.max())) + 1 if classes is None else classes
    said, there = np.bincount(predicted, minlength=n), np.bincount(true, minlength=n)
    hits = np.bincount(true[predicted == true], minlength=n)
    occurs = said + there > 0
    return float(np.mean(2 * hits[occurs] / (said + there)[occurs]))


def roc_auc(scores: Float[np.ndarray, "n"], positive: np.ndarray) -> float:
    """Chance that a positive example has a higher score than a negative one; ties count half.

    Args:
      scores: higher for what is thought positive.
      positive: [n] bool, or 0 and 1.
    Raises:
      ConfigError: other shapes, scores that are no numbers, or examples of one kind alone.

    >>> roc_auc(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1]))
    0.75
    """
    scores, chosen = of_two_kinds(scores, positive)
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank of equal scores
    m, n = int(chosen.sum()), int((~chosen).sum())
    return float((ranks[chosen].sum() - m * (m + 1) / 2) / (m * n))


def hits_at(k: int, scores: Float[np.ndarray, "n"], positive: np.ndarray) -> float:
    """Share of positive examples with a higher score than the k-th best negative one (Hits@k).

    Args:
      k: at least 1.
      scores: higher for what is thought positive.
      positive: [n] bool, or 0 and 1; k or more are not.
    Raises:
      ConfigError: fewer negative examples than k, other shapes, scores that are no numbers, or
        examples of one kind alone.

    >>> hits_at(2, np.array([0.9, 0.5, 0.4, 0.6, 0.4, 0.1]), np.array([1, 1, 1, 0, 0, 0]))
    0.666...
    """
    scores, chosen = of_two_kinds(scores, positive)
    negative = scores[~chosen]
    if not 1 <= k <= len(negative):
        raise ConfigError(f"k={k} of {len(negative)} negative examples; 1 to as many are accepted")
    return float(np.mean(scores[chosen] > np.partition(negative, -k)[-k]))


def of_two_kinds(scores: np.ndarray, positive: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(scores float64, which are positive), checked.

    Raises:
      ConfigError: other shapes, scores that are no numbers, or examples of one kind alone.
    """
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive)
    if scores.ndim != 1 or positive.shape != scores.shape:
        raise ConfigError(f"scores {scores.shape} and positive {positive.shape}; [n] are accepted")
    if not np.isfinite(scores).all() or not np.isin(positive, (0, 1)).all():
        raise ConfigError("scores must be numbers, and positive 0 or 1")
    chosen = positive.astype(bool)
    if chosen.all() or not chosen.any():
        raise ConfigError(f"{int(chosen.sum())} of {len(chosen)} examples are positive; both kinds")
    return scores, chosen


def normalised(answer: str) -> str:
    """An answer in lower case, without punctuation, articles and runs of spaces.

    Source: the evaluation script of SQuAD (arXiv 1606.05250).

    >>> normalised("The  Cat's, an end")
    'cats end'
    """
    plain = "".join(c for c in answer.lower() if c not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", plain).split())


def exact_match(predicted: str, answers: Sequence[str]) -> float:
    """1.0 where a prediction is one of the answers, normalised; else 0.0.

    Args:
      predicted: the text of a span; "" for no answer.
      answers: all that are right; () where there is none, which "" alone matches.
    """
    return max(float(normalised(predicted) == normalised(a)) for a in answers or ("",))


def span_f1(predicted: str, answers: Sequence[str]) -> float:
    """F1 of the words that a prediction shares with an answer, the best of all answers.

    Args:
      predicted, answers: as `exact_match`. Where one of the two is empty after normalisation, F1 is
        1 if both are and else 0.

    >>> span_f1("in the city", ["The city of Rome"])
    0.4
    """
    return max(_words_f1(normalised(predicted), normalised(a)) for a in answers or ("",))


def span_scores(
    predicted: Sequence[str], answers: Sequence[Sequence[str | tuple]]
) -> tuple[float, float]:
    """Mean exact match and mean F1 of predictions, each 0 to 1.

    Args:
      predicted: the text of a span for each question.
      answers: of each question all that are right, as texts or as tuples that begin with one
        (`ffnlab.data.Answer`).
    Raises:
      ConfigError: no questions, or answers of another number of them.

    >>> span_scores(["Rome", "the city"], [["Rome"], ["city of Rome", "a city"]])
    (1.0, 1.0)
    """
    if not len(predicted) or len(predicted) != len(answers):
        raise ConfigError(f"{len(predicted)} predictions for {len(answers)} questions, 1 or more")
    texts = [[a if isinstance(a, str) else a[0] for a in each] for each in answers]
    pairs = list(zip(predicted, texts, strict=True))
    means = (sum(score(p, t) for p, t in pairs) / len(pairs) for score in (exact_match, span_f1))
    exact, f1 = means
    return exact, f1


def _words_f1(predicted: str, answer: str) -> float:
    mine, theirs = predicted.split(), answer.split()
    if not mine or not theirs:
        return float(mine == theirs)
    shared = (Counter(mine) & Counter(theirs)).total()
    return 2 * shared / (len(mine) + len(theirs))


def calibration_error(
    probabilities: Float[np.ndarray, "n c"], true: Int[np.ndarray, "n"], *, bins: int = 15
) -> float:
    """Expected calibration error: mean gap between confidence and accuracy, by bins of confidence.

    sum_k n_k / n |accuracy_k - confidence_k|,   bin k: confidence in ((k - 1) / bins, k / bins]

    Args:
      probabilities: of each class.
      true: classes.
      bins: of equal width, >= 1.
    Raises:
      ConfigError: no examples, other shapes, a class out of range, or rows that are no
        probabilities.
    Source: arXiv 1706.04599, equation 3.

    >>> round(calibration_error(np.array([[0.8, 0.2], [0.6, 0.4]]), np.array([0, 1])), 3)
    0.4
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or bins < 1:
        raise ConfigError(f"probabilities {p.shape}, bins={bins}; [n, c] and bins >= 1 expected")
    check_classes(true=np.asarray(true), predicted=p.argmax(1), classes=p.shape[1])
    if not np.isfinite(p).all() or p.min() < 0 or np.abs(p.sum(1) - 1).max() > 1e-3:
        raise ConfigError("rows of probabilities must be >= 0 and add up to 1")
    confidence, right = p.max(1), p.argmax(1) == true
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(place, weights=right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / len(p))


def check_classes(*, predicted: np.ndarray, true: np.ndarray, classes: int | None) -> None:
    """Raises ConfigError unless both are as many whole numbers from 0 to classes - 1."""
    for name, values in (("predicted", predicted), ("true", true)):
        if values.ndim != 1 or not len(values) or not np.issubdtype(values.dtype, np.integer):
            raise ConfigError(f"{name} is {values.dtype}{list(values.shape)}; integers [n], n >= 1")
        if values.min() < 0 or (classes is not None and values.max() >= classes):
            raise ConfigError(
                f"{name} has classes {values.min()} to {values.max()}; 0 to "
                f"{'any' if classes is None else classes - 1} are accepted"
            )
    if predicted.shape != true.shape:
        raise ConfigError(f"{len(predicted)} predicted classes for {len(true)} true ones")
