"""Tasks from labelled data, and the table of vowels."""

import numpy as np
import pytest

from ffnlab.data import Labelled, find_folder, permuted, split, vowels
from ffnlab.errors import ConfigError, FFNLabError, FormatError

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


def table(tmp_path, *rows, head="type,speaker,vowel,dur,f0,f1,f2,f3"):
    """A file of vowels."""
    file = tmp_path / "vowels.csv"
    file.write_text("\n".join([head, *rows]) + "\n")
    return file


def test_vowels_are_read_by_column(tmp_path):
    file = table(
        tmp_path,
        "2100,m,1.0,A,200,120,700,1100",
        "2300,w,1.0,i,210,220,300,2700",
        ",m,1.0,i,190,130,310,0",
        head="f3,type,speaker,vowel,dur,f0,f1,f2",
    )
    found = vowels(file)
    assert found.names == ("A", "i") and found.groups == ("m", "w")
    assert found.x[0].tolist() == [200, 120, 700, 1100, 2100]
    assert np.isnan(found.x[2]).tolist() == [False, False, False, True, True]
    assert found.y.tolist() == [0, 1, 1] and found.speaker.tolist() == [0, 1, 0]
    assert found.of_group("m").x.tolist() == found.x[:1].tolist()
    with pytest.raises(ConfigError, match="group 'b'"):
        found.of_group("b")


def test_speakers_are_in_one_part_alone(tmp_path):
    rows = [f"{g},{s},{v},1,1,1,1,{100 * s + ord(g)}" for g in "mw" for s in range(5) for v in "Ai"]
    found = vowels(table(tmp_path, *rows))
    train, test = found.by_speaker(0.4)
    assert len(train.x) == 12 and len(test.x) == 8
    assert not set(train.x[:, 4]) & set(test.x[:, 4])
    assert not np.array_equal(found.by_speaker(0.4, seed=5)[1].x, test.x)
    with pytest.raises(ConfigError, match="held_out=0"):
        found.by_speaker(0.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["m,1,A,1,2,3"], "line 2: 6 cells, 8 columns"),
        (["m,1,A,1,2,3,4,x"], "line 2: could not convert"),
        (["m,1,A,1,2,3,4,-5"], "at least 0"),
        (["m,1,A,1,2,3,4,nan"], "at least 0"),
        ([], "no rows"),
    ],
)
def test_another_table_is_refused(tmp_path, rows, message):
    with pytest.raises(FormatError, match=message):
        vowels(table(tmp_path, *rows))
    with pytest.raises(FormatError, match="columns"):
        vowels(table(tmp_path, *rows, head="a,b"))
    with pytest.raises(FFNLabError, match="no such file"):
        vowels(tmp_path / "none")


@pytest.mark.skipif(find_folder("vowels") is None, reason="needs vowels")
def test_the_real_vowels():
    found = vowels()
    assert len(found.x) == 1668 and len(found.names) == 12 and found.groups == ("b", "g", "m", "w")
    assert found.speaker.max() == 138 and np.isfinite(found.x).all()
    men, women = (np.median(found.of_group(g).x[:, 1]) for g in "mw")
    assert men < 150 < 200 < women
