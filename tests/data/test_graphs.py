"""Cora as its description has it, its format against damage, and the generated twin."""

import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import block_model, cora
from ffnlab.errors import ConfigError, FFNLabError, FormatError
from ffnlab.storage.files import JSON_LIMIT

SMALL = {
    "num_nodes": np.int64(4),
    "num_feat": np.int64(3),
    "feat_indptr": np.array([0, 2, 2, 3, 4], np.int32),
    "feat_indices": np.array([0, 2, 1, 0], np.int32),
    "feat_data": np.array([1, 0.5, 2, 1], np.float32),
    "labels": np.array([0, 1, 1, 0], np.int16),
    "edges": np.array([[0, 1], [2, 1], [1, 2]], np.int32),
    "train_idx": np.array([0], np.int32),
    "val_idx": np.array([3, 1], np.int32),
    "test_idx": np.array([], np.int32),
}


@pytest.fixture
def written(tmp_path):
    """Writes the small file with some members changed, or left out where they are None."""

    def write(**changes):
        members = {name: a for name, a in (SMALL | changes).items() if a is not None}
        np.savez_compressed(tmp_path / "small.npz", **members)
        return tmp_path / "small.npz"

    return write


def test_cora_is_what_it_is(data):
    found = cora(data / "planetoid_cora" / "cora.npz")
    assert found.graph.num_nodes == 2708 and found.graph.num_edges == 2 * 5278
    assert found.x.shape == (2708, 1433) and set(np.unique(found.x)) == {0, 1}
    assert found.x.sum() == 49216 and set(np.unique(found.y)) == set(range(7))
    assert [int(m.sum()) for m in found[3:]] == [140, 500, 1000]
    assert np.bincount(found.y[found.train]).tolist() == [20] * 7
    assert found.y[:5].tolist() == [3, 4, 4, 0, 3] and 633 in neighbours(found.graph, 0)
    same = found.y[found.graph.senders] == found.y[found.graph.receivers]
    assert 0.8 < same.mean() < 0.82  # 0.81 of citations stay in their class


def neighbours(graph, node):
    return np.asarray(graph.senders)[np.asarray(graph.receivers) == node].tolist()


def test_a_file_of_the_format(written):
    found = cora(written())
    np.testing.assert_array_equal(found.x, [[1, 0, 0.5], [0, 0, 0], [0, 2, 0], [1, 0, 0]])
    assert found.y.tolist() == [0, 1, 1, 0] and found.y.dtype == np.int32
    assert [neighbours(found.graph, i) for i in range(4)] == [[1], [0, 2], [1], []]
    assert found.train.tolist() == [True, False, False, False]
    assert found.valid.tolist() == [False, True, False, True] and not found.test.any()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"labels": None}, "labels"),
        ({"labels": np.array([0, -1, 0, 0], np.int16)}, "labels must lie in 0"),
        ({"labels": np.zeros(3, np.int16)}, r"labels.npy has int16\[3\], not int16\(4,\)"),
        ({"labels": np.zeros(4, object)}, "labels.npy has object"),
        ({"num_nodes": np.int64(-1)}, "num_nodes=-1"),
        ({"num_feat": np.int64(2**28)}, "at most 268435456 numbers"),
        ({"feat_indptr": np.array([1, 2, 2, 3, 4], np.int32)}, "begin at 0 and rise by 0..3"),
        ({"feat_indptr": np.array([0, 3, 2, 3, 4], np.int32)}, "rise by 0..3"),
        ({"feat_indptr": np.array([0, 4, 4, 4, 4], np.int32)}, "rise by 0..3"),
        ({"feat_indptr": np.array([0, 2, 2, 3, 5], np.int32)}, "feat_indices.npy has int32"),
        ({"feat_indices": np.array([0, 3, 1, 0], np.int32)}, r"feat_indices must lie in 0\.\.2"),
        ({"feat_indices": np.array([0, -1, 1, 0], np.int32)}, "feat_indices must lie"),
        ({"feat_data": np.array([1, np.nan, 2, 1], np.float32)}, "feat_data must be finite"),
        ({"edges": np.array([[0, 4]], np.int32)}, r"receivers\[0\]=4 must lie in 0\.\.3"),
        ({"edges": np.array([[-1, 0]], np.int32)}, r"senders\[0\]=-1"),
        ({"edges": np.array([[0, 1, 2]], np.int32)}, r"edges.npy has int32\[1, 3\]"),
        ({"edges": np.array([[0, 1]])}, "edges.npy has int64"),
        ({"train_idx": np.array([4], np.int32)}, r"train_idx must lie in 0\.\.3"),
        ({"train_idx": np.array([3], np.int32)}, "no node in common"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(written, changes, said):
    with pytest.raises(FormatError, match=f"small.npz is no graph of labelled nodes: .*{said}"):
        cora(written(**changes))


def test_a_size_that_is_free_is_bounded(written, tmp_path):
    long = np.zeros(JSON_LIMIT // 4 + 1, np.int32)  # four bytes too many, all of node 0
    with pytest.raises(FormatError, match=r"train_idx.npy has int32"):
        cora(written(train_idx=long))
    with pytest.raises(FFNLabError, match="there is no such file"):
        cora(tmp_path / "none.npz")


@settings(max_examples=60)
@given(st.data())
def test_damage_ends_in_an_error_that_names_the_file(draws):
    content = io.BytesIO()
    np.savez(content, **SMALL)
    raw = bytearray(content.getvalue())
    for _ in range(draws.draw(st.integers(1, 4))):
        raw[draws.draw(st.integers(0, len(raw) - 1))] = draws.draw(st.integers(0, 255))
    raw = raw[: draws.draw(st.integers(0, len(raw)))] if draws.draw(st.booleans()) else raw
    check_bytes(bytes(raw))


def check_bytes(raw):
    """The reader gives a sound graph or a FormatError, and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "damaged.npz"
        file.write_bytes(raw)
        try:
            found = cora(file)
        except FormatError as error:
            assert "damaged.npz" in str(error)
        else:
            assert len(found.x) == len(found.y) == found.graph.num_nodes


def test_members_that_pickle_are_not_loaded(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as archive:
        archive.writestr("num_nodes.npy", b"\x80\x04N.")
    with pytest.raises(FormatError, match=r"p\.npz is no graph"):
        cora(tmp_path / "p.npz")


def test_blocks_are_as_likely_as_asked():
    found = block_model(3, nodes=1500, classes=3, inside=0.04, across=0.01)
    graph, y = found.graph, found.y
    senders, receivers = np.asarray(graph.senders), np.asarray(graph.receivers)
    assert set(zip(senders, receivers, strict=True)) == set(zip(receivers, senders, strict=True))
    assert not np.any(senders == receivers)
    sizes = np.bincount(y)
    assert len(sizes) == 3 and sizes.min() > 400
    same = (sizes * (sizes - 1)).sum()  # ordered pairs
    other = 1500 * 1499 - same
    is_same = y[senders] == y[receivers]
    # Five standard deviations of a binomial.
    for count, of, p in ((is_same.sum(), same, 0.04), ((~is_same).sum(), other, 0.01)):
        assert abs(count / of - p) < 5 * np.sqrt(2 * p / of)


def test_features_lie_around_centres_of_classes():
    still = block_model(0, noise=0.0)
    for c in range(4):
        own = still.x[still.y == c]
        assert np.ptp(own, axis=0).max() == 0
    assert len(np.unique(still.x, axis=0)) == 4
    noisy = block_model(0, noise=2.0)
    np.testing.assert_array_equal(noisy.y, still.y)
    assert 1.9 < (noisy.x - still.x).std() < 2.1


def test_a_split_and_a_seed():
    found = block_model(5, nodes=50, train=10, valid=15)
    assert [int(m.sum()) for m in found[3:]] == [10, 15, 25]
    assert np.all(found.train.astype(int) + found.valid + found.test == 1)
    again = block_model(5, nodes=50, train=10, valid=15)
    other = block_model(6, nodes=50, train=10, valid=15)
    np.testing.assert_array_equal(found.x, again.x)
    np.testing.assert_array_equal(found.graph.senders, again.graph.senders)
    assert not np.array_equal(found.y, other.y)
    assert block_model(nodes=1, train=1, valid=0).graph.num_edges == 0


@pytest.mark.parametrize(
    "options",
    [{"inside": 1.1}, {"across": -0.1}, {"nodes": 0}, {"train": 500, "valid": 101}, {"valid": -1}],
)
def test_numbers_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="|".join(f"{k}=" for k in options)):
        block_model(**options)
