"""Tasks from labelled data."""

import numpy as np
import pytest

from ffnlab.data import Labelled, permuted, split
from ffnlab.errors import ConfigError

ROWS = Labelled(np.arange(20, dtype=np.float32).reshape(4, 5), np.array([3, 1, 1, 0], np.int32))
TWO = Labelled(-ROWS.x[:2], ROWS.y[:2])


def test_a_task_permutes_all_parts_alike():
    tasks = permuted(ROWS, TWO, tasks=3, seed=1)
    np.testing.assert_array_equal(tasks[0][0].x, ROWS.x)
    orders = []
    for train, test in tasks:
        order = (train.x[0]).astype(int)  # the first row counts the columns
        np.testing.assert_array_equal(train.x, ROWS.x[:, order])
        np.testing.assert_array_equal(test.x, TWO.x[:, order])
        np.testing.assert_array_equal(train.y, ROWS.y)
        orders.append(tuple(order))
    assert len(set(orders)) == 3 and all(sorted(o) == list(range(5)) for o in orders)
    more = permuted(ROWS, tasks=5, seed=1)
    np.testing.assert_array_equal(more[2][0].x, tasks[2][0].x)
    assert not np.array_equal(permuted(ROWS, tasks=2, seed=2)[1][0].x, tasks[1][0].x)


def test_a_task_has_its_classes_from_zero():
    first, second = split(ROWS, TWO, classes=[[1, 3], [0]])
    np.testing.assert_array_equal(first[0].x, ROWS.x[:3])
    assert first[0].y.tolist() == [1, 0, 0] and first[1].y.tolist() == [1, 0]
    assert second[0].y.tolist() == [0] and len(second[1].x) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: permuted(tasks=1), "one width is accepted"),
        (lambda: permuted(ROWS, tasks=0), "tasks"),
        (lambda: permuted(ROWS, Labelled(ROWS.x[:, :2], ROWS.y), tasks=1), "one width"),
        (lambda: split(classes=[[0]]), "at least one part"),
        (lambda: split(ROWS, classes=[[0, 2]]), r"\[2\] must be in the data"),
        (lambda: split(ROWS, classes=[[1, 1]]), "once in a task"),
        (lambda: split(ROWS, classes=[[]]), "once in a task"),
    ],
)
def test_what_is_no_task_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
