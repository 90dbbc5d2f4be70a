"""Scores against scikit-learn and cases by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics

from ffnlab.errors import ConfigError
from ffnlab.scores import (
    calibration_error,
    exact_match,
    hits_at,
    macro_f1,
    normalised,
    roc_auc,
    span_f1,
)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_scikit_learn(pairs):
    predicted, true = np.array(pairs).T
    want = metrics.f1_score(true, predicted, average="macro", zero_division=0)
    assert macro_f1(predicted, true) == pytest.approx(want)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30))
def test_the_area_is_that_of_scikit_learn(pairs):
    scores, positive = np.array([p[0] for p in pairs]) / 4, np.array([p[1] for p in pairs])
    if positive.all() or not positive.any():
        with pytest.raises(ConfigError, match="are positive; both kinds"):
            roc_auc(scores, positive)
    else:
        assert roc_auc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores))


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=2, max_size=30), st.data())
def test_hits_are_counted_beside_the_kth_best_negative(pairs, data):
    scores, positive = np.array([p[0] for p in pairs]) / 4, np.array([p[1] for p in pairs])
    if positive.all() or not positive.any():
        with pytest.raises(ConfigError, match="are positive; both kinds"):
            hits_at(1, scores, positive)
        return
    negative = sorted(scores[~positive].tolist(), reverse=True)
    k = data.draw(st.integers(1, len(negative)))
    hits = [score > negative[k - 1] for score in scores[positive].tolist()]
    assert hits_at(k, scores, positive) == pytest.approx(sum(hits) / len(hits))
    order = np.random.default_rng(k).permutation(len(scores))
    assert hits_at(k, scores[order], positive[order]) == hits_at(k, scores, positive)


@pytest.mark.parametrize("k", [0, 3])
def test_hits_beside_more_negatives_than_there_are(k):
    with pytest.raises(ConfigError, match=f"k={k} of 2 negative examples"):
        hits_at(k, np.array([0.1, 0.2, 0.3]), np.array([1, 0, 0]))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("The Cat", "cat"),
        ("a  man, an idea; the end.", "man idea end"),
        ("Theory and another", "theory and another"),
        ("U.S.A.", "usa"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_the_official_script_does(text, said):
    assert normalised(text) == said


@pytest.mark.parametrize(
    ("predicted", "answers", "em", "f1"),
    [
        ("the Eiffel Tower!", ["Eiffel tower", "tower"], 1, 1),
        ("big tower", ["Eiffel tower", "castle"], 0, 0.5),
        ("red red fox", ["red fox"], 0, 0.8),
        ("", [], 1, 1),
        ("something", [], 0, 0),
        ("the", ["a"], 1, 1),
        ("the", ["word"], 0, 0),
        ("", ["word"], 0, 0),
    ],
)
def test_spans_by_hand(predicted, answers, em, f1):
    assert exact_match(predicted, answers) == em
    assert span_f1(predicted, answers) == pytest.approx(f1)


def test_calibration_by_hand():
    p = np.array([[0.9, 0.1], [0.95, 0.05], [0.55, 0.45], [0.3, 0.7]])
    true = np.array([0, 1, 0, 1])
    # Ten bins: (.8, .9] .9 right; (.9, 1] .95 wrong; (.5, .6] .55 right; (.6, .7] .7 right.
    want = (abs(1 - 0.9) + abs(0 - 0.95) + abs(1 - 0.55) + abs(1 - 0.7)) / 4
    assert calibration_error(p, true, bins=10) == pytest.approx(want)
    assert calibration_error(p, true, bins=1) == pytest.approx(abs(0.75 - 0.775))
    assert calibration_error(np.eye(3), np.arange(3)) == 0
    # Gaps of either sign within a bin cancel: it is the bin that is calibrated.
    both = np.array([[0.5, 0.5], [0.5, 0.5]])
    assert calibration_error(both, np.array([0, 1])) == pytest.approx(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: macro_f1(np.array([0, 1]), np.array([0])), "2 predicted classes for 1"),
        (lambda: macro_f1(np.array([3]), np.array([0]), 3), "0 to 2 are accepted"),
        (lambda: macro_f1(np.array([-1]), np.array([0])), "classes -1 to -1"),
        (lambda: macro_f1(np.array([], int), np.array([], int)), "integers"),
        (lambda: roc_auc(np.array([np.nan, 1]), np.array([0, 1])), "must be numbers"),
        (lambda: roc_auc(np.array([0.0, 1]), np.array([0, 2])), "0 or 1"),
        (lambda: calibration_error(np.array([[0.5, 0.6]]), np.array([0])), "add up to 1"),
        (lambda: calibration_error(np.array([[0.5, 0.5]]), np.array([2])), "0 to 1"),
        (lambda: calibration_error(np.eye(2), np.arange(2), bins=0), "bins=0"),
    ],
)
def test_what_is_no_prediction_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
