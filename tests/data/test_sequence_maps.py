"""Maps between sequences: their definitions, and what a file must have."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from ffnlab.data import drawn_pairs, read_pairs
from ffnlab.errors import ConfigError, FormatError


def test_maps_are_their_definitions():
    pairs = drawn_pairs("waves", 50, 3, seed=1)
    a, b, c = pairs.x[..., 0].T
    expected = np.stack([np.sin(3 * a) * b, np.sin(3 * b) * c, np.abs(c - a)], 1)
    assert pairs.y[..., 0] == pytest.approx(expected, abs=1e-6)
    assert pairs.x.dtype == pairs.y.dtype == np.float32
    first = drawn_pairs("first", 50, 3, 2, low=0.0, high=5.0)
    assert np.array_equal(first.y[:, 0, 0], first.x[:, 0, 0]) and not first.y[:, 1:].any()
    assert first.x.min() >= 0 and 4 < first.x.max() <= 5
    assert not np.array_equal(pairs.x, drawn_pairs("waves", 50, 3, seed=2).x)


def test_pairs_are_read(tmp_path):
    x, y = np.ones((4, 3, 2)), np.zeros((4, 3, 1), np.float16)
    save_file({"x": x, "y": y}, tmp_path / "p.safetensors")
    found = read_pairs(tmp_path / "p.safetensors")
    assert np.array_equal(found.x, x) and found.y.shape == (4, 3, 1)
    assert found.x.dtype == found.y.dtype == np.float32


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"x": np.ones((4, 3, 2))}, r"has no tensor \['y'\]; it has \['x'\]"),
        ({"x": np.ones((4, 3, 2)), "y": np.ones((4, 2, 2))}, r"x \[4, 3, 2\] and y \[4, 2, 2\]"),
        ({"x": np.ones((4, 3)), "y": np.ones((4, 3))}, "must be"),
        ({"x": np.ones((0, 3, 1)), "y": np.ones((0, 3, 1))}, "must be"),
        ({"x": np.full((4, 3, 2), np.inf), "y": np.ones((4, 3, 2))}, "x has NaN or infinity"),
    ],
)
def test_bad_files_are_named(tmp_path, tensors, said):
    save_file(tensors, tmp_path / "p.safetensors")
    with pytest.raises(FormatError, match=said):
        read_pairs(tmp_path / "p.safetensors")


def test_what_is_no_file_is_named(tmp_path):
    (tmp_path / "p").write_bytes(b"no")
    for name in ("p", "nowhere"):
        with pytest.raises(FormatError, match=f"{name} cannot be read"):
            read_pairs(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "tides"}, "unknown map 'tides'; there are: waves, first"),
        ({"count": 0}, "count=0"),
        ({"length": 1}, "length=1"),
        ({"low": 2.0}, "low=2.0 must lie below high=1.0"),
    ],
)
def test_bad_draws_are_named(options, said):
    with pytest.raises(ConfigError, match=said):
        drawn_pairs(**{"name": "waves", "count": 5, "length": 2} | options)
