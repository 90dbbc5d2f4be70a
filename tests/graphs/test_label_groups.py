"""Groups of labels: the authors' code, and a node's own class, which must not be in them."""

import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.graph import Hetero
from ffnlab.graphs import label_groups
from tests.fixtures.rphgnn import record

BOTH = record.RELATIONS | {("paper", "cites", "paper"): record.BOTH_WAYS}
# Both ways, one way with a loop and an edge twice, a pair that hears only each other.
GRAPHS = {
    "both ways": BOTH,
    "one way": record.RELATIONS
    | {("paper", "cites", "paper"): ((0, 1, 1, 2, 3, 3, 5, 5), (1, 0, 0, 0, 3, 2, 5, 5))},
    "alone": {("paper", "at", "venue"): ((0, 1, 2, 2), (0, 0, 1, 2))},
}


def groups_of(relations, y=record.Y, dtype="float32"):
    graph = Hetero.make(record.NODES, relations)
    return label_groups(graph, "paper", y, record.KNOWN, record.CLASSES, dtype=dtype)


def test_the_authors_code_finds_the_same(fixtures):
    found = groups_of(BOTH)
    with np.load(fixtures / "rphgnn" / "official.npz", allow_pickle=False) as saved:
        expected = [saved[f"labels.{i}"] for i in range(len(found.entries))]
        assert f"labels.{len(expected)}" not in saved
    for group, wanted in zip(found.groups, expected, strict=True):
        np.testing.assert_allclose(group, wanted, atol=1e-6)
    assert [(e.parity, e.relation[1]) for e in found.entries] == [
        ("even", "writes"),
        ("even", "at"),
        ("odd", "cites"),
        ("even", "cites"),
    ]
    assert found.sizes == ((1, 3),) * 4


@pytest.mark.parametrize("name", GRAPHS)
def test_a_node_hears_nothing_of_its_own_class(name):
    for i in np.flatnonzero(record.KNOWN):
        first, moved = groups_of(GRAPHS[name]), False
        for c in range(record.CLASSES):
            y = record.Y.copy()
            y[i] = c
            other = groups_of(GRAPHS[name], y)
            np.testing.assert_allclose(other.rows[i], first.rows[i], atol=1e-5)
            moved |= not np.allclose(other.rows, first.rows)
        assert moved or name == "alone"  # others hear it


def test_rows_are_distributions():
    for relations in GRAPHS.values():
        found = groups_of(relations)
        for entry, group in zip(found.entries, found.groups, strict=True):
            total = group.sum(-1)
            if entry.parity == "odd":  # nothing is heard where nobody else is
                assert not group[5:].any()
                total = total[total > 0]
            assert group.min() >= 0
            np.testing.assert_allclose(total, 1, atol=1e-6)
    group = groups_of(GRAPHS["alone"]).groups[0][:, 0]
    np.testing.assert_allclose(group[2:], 1 / 3, atol=1e-7)  # hear themselves, or nobody
    np.testing.assert_array_equal(group[:2].argmax(1), record.Y[[1, 0]])


def test_bad_input():
    graph = Hetero.make(record.NODES, BOTH)
    y, known = record.Y, record.KNOWN
    for changed, message in (
        ({"target": "book"}, "kind='book'"),
        ({"classes": 1}, "classes=1 must be at least 2"),
        ({"classes": 2}, r"known classes, in 0..1"),
        ({"y": y[1:]}, r"y \[6\]"),
        ({"known": ~np.ones(7, bool)}, "known classes"),
    ):
        given = {"target": "paper", "y": y, "known": known, "classes": 3} | changed
        with pytest.raises(ConfigError, match=message):
            label_groups(graph, **given)
