"""The generated academic graph as its description has it, and Cora's words."""

import numpy as np
import pytest

from ffnlab.data import academic, cora, cora_words
from ffnlab.errors import ConfigError


def test_academic_is_what_it_is():
    nodes = academic(3)
    counts = {"paper": 600, "author": 400, "venue": 20, "term": 150}
    assert dict(nodes.graph.counts) == counts and nodes.target == "paper"
    assert nodes.x.keys() == {"paper"} and nodes.x["paper"].shape == (600, 32)
    assert [int(m.sum()) for m in nodes[4:]] == [360, 120, 120]
    assert np.sum(nodes[4:], axis=0).max() == 1 and set(np.unique(nodes.y)) == {0, 1, 2}
    edges = {name: each.num_edges for name, each in zip(nodes.graph.names, nodes.graph.edges)}  # noqa: B905
    pairs = {("author", "writes", "paper"): 240_000, ("paper", "at", "venue"): 12_000}
    pairs |= {("paper", "has", "term"): 90_000}
    rates = {name: edges[name] / count for name, count in pairs.items()}
    # Twice the probability of two classes: a third of pairs is four times as likely.
    assert rates == pytest.approx(dict(zip(pairs, (0.008, 0.04, 0.04), strict=True)), rel=0.15)
    same = nodes.x["paper"][nodes.y == 0].mean(0) - nodes.x["paper"].mean(0)
    assert np.abs(same).max() > 0.1
    again = academic(3)
    assert np.array_equal(again.x["paper"], nodes.x["paper"]) and np.array_equal(again.y, nodes.y)
    assert not np.array_equal(academic(4).y, nodes.y)


def test_links_prefer_a_class():
    nodes = academic(0, papers=300, inside=50.0, classes=2)
    at = nodes.graph.edges_of(("paper", "at", "venue"))
    for v in range(20):
        heard = nodes.y[np.asarray(at.senders)[np.asarray(at.receivers) == v]]
        assert max(np.bincount(heard, minlength=2)) / len(heard) > 0.9


def test_cora_words_are_cora(data):
    found, plain = (load(data / "planetoid_cora" / "cora.npz") for load in (cora_words, cora))
    assert dict(found.graph.counts) == {"paper": 2708, "word": 1433} and not found.x
    assert [edges.num_edges for edges in found.graph.edges] == [10556, 49216]
    has = found.graph.edges_of(("paper", "has", "word"))
    words = np.zeros_like(plain.x)
    words[np.asarray(has.senders), np.asarray(has.receivers)] = 1
    assert np.array_equal(words, plain.x)
    cites = found.graph.edges_of(("paper", "cites", "paper"))
    assert np.array_equal(cites.senders, plain.graph.senders)
    assert all(np.array_equal(a, b) for a, b in zip(found[3:], plain[2:], strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"papers": 0}, "papers=0"),
        ({"train": 0.9, "valid": 0.1}, "train=0.9"),
        ({"inside": -1.0}, "inside=-1.0"),
        ({"seed": -1}, "seed=-1"),
        ({"papers": 3, "authors": 1, "venues": 1, "terms": 1, "inside": 0.0}, "has no edges"),
    ],
)
def test_graphs_that_there_are_not(options, message):
    with pytest.raises(ConfigError, match=message):
        academic(**options)
