"""Pairs of domains, and the reader of sparse rows."""

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_sample_images, load_svmlight_file, make_moons

from ffnlab.data import find_folder, moons, on_photographs, read_svmlight, reviews
from ffnlab.errors import ConfigError, FFNLabError, FormatError
from tests.damaging import damaged


def test_the_target_is_the_source_turned():
    source, target = moons(3, count=40, noise=0.0)
    assert source.x.shape == (40, 2) and np.bincount(source.y).tolist() == [20, 20]
    np.testing.assert_allclose(source.x.mean(0), 0, atol=1e-6)
    # On circles of radius 2: the upper one around -m, the lower around (2, 1) - m.
    _, still = moons(3, count=40, noise=0.0, angle=0.0)
    turn = np.radians(35)
    back = target.x @ np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    np.testing.assert_allclose(back, still.x, atol=1e-5)
    upper, lower = still.x[still.y == 0], still.x[still.y == 1]
    centre = _centre(upper)
    np.testing.assert_allclose(_centre(lower) - centre, [2, 1], atol=1e-4)
    assert (upper[:, 1] >= centre[1] - 1e-5).all()
    assert (lower[:, 1] <= _centre(lower)[1] + 1e-5).all()


def test_moons_are_spaced_as_the_authors_have_them():
    source, _ = moons(count=40, noise=0.0)
    known, y = make_moons(40, noise=None, shuffle=False)
    for value in (0, 1):
        moved = 2 * (known - known.mean(0))[y == value]
        np.testing.assert_allclose(source.x[source.y == value], moved, atol=1e-6)


def _centre(x):
    """Of the circle of radius 2 through some points, by least squares."""
    a = np.c_[2 * x, np.ones(len(x))]
    found = np.linalg.lstsq(a, (x**2).sum(1), rcond=None)[0]
    assert found[2] + (found[:2] ** 2).sum() == pytest.approx(4, rel=1e-3)
    return found[:2]


def test_noise_and_seeds_of_moons():
    a, b = moons(0, noise=0.1), moons(0, noise=0.1)
    np.testing.assert_array_equal(a[0].x, b[0].x)
    assert not np.array_equal(a[0].x, moons(1, noise=0.1)[0].x)
    for options, message in (
        ({"count": 1}, "count=1"),
        ({"angle": float("nan")}, "angle=nan must be finite"),
        ({"seed": -1}, "seed=-1 must lie in 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            moons(**options)


def test_images_on_photographs_are_differences_to_a_patch():
    images = np.zeros((4, 8, 6), np.float32)
    images[2:] = 1
    found = on_photographs(images, seed=1)
    assert found.shape == (4, 8, 6, 3) and 0 <= found.min() and found.max() <= 1
    photographs = np.stack(load_sample_images().images) / 255
    for blended, image in zip(found, images, strict=True):
        patch = np.abs(blended - image[..., None])  # of black images the patch itself
        first = np.argwhere(np.abs(photographs[..., :, :, :] - patch[0, 0]).max(-1) < 1e-6)
        assert any(
            np.allclose(photographs[k, i : i + 8, j : j + 6], patch, atol=1e-6) for k, i, j in first
        )
    assert not np.array_equal(found[0], found[1])
    with pytest.raises(ConfigError, match="with values in"):
        on_photographs(np.full((1, 4, 4), np.nan, np.float32))
    np.testing.assert_array_equal(on_photographs(images[..., None], seed=1), found)
    in_colour = np.repeat(images[..., None], 3, axis=-1)
    in_colour[..., 1:] = 0  # in the other colours the patch itself
    red = on_photographs(in_colour, seed=1)
    np.testing.assert_array_equal(red[..., 0], found[..., 0])
    np.testing.assert_array_equal(red[..., 1:], on_photographs(0 * images, seed=1)[..., 1:])


@pytest.mark.parametrize(
    "images",
    [
        np.full((1, 2, 2), 1.5),
        np.zeros((1, 500, 2)),
        np.zeros((0, 2, 2)),
        np.zeros((1, 2, 2, 2)),
        np.zeros((1, 2, 2, 3, 1)),
    ],
)
def test_what_is_no_image_is_refused(images):
    with pytest.raises(ConfigError, match=r"images \(|images of 500 x 2"):
        on_photographs(images.astype(np.float32))


rows = st.lists(
    st.tuples(
        st.sampled_from([-1, 1]),
        st.dictionaries(st.integers(0, 19), st.integers(1, 99).map(lambda n: n / 4), max_size=6),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=25)
@given(rows)
def test_sparse_rows_are_read_as_scikit_learn_reads_them(tmp_path_factory, rows):
    file = tmp_path_factory.mktemp("rows") / "rows.svmlight"
    text = [
        " ".join([str(kind), *(f"{i}:{v}" for i, v in sorted(row.items()))]) for kind, row in rows
    ]
    file.write_text("\n".join(text) + "  # the end\n\n")
    found = read_svmlight(file, width=20)
    x, y = load_svmlight_file(str(file), n_features=20, zero_based=True)
    np.testing.assert_array_equal(found.x, x.toarray().astype(np.float32))
    np.testing.assert_array_equal(found.y, (y > 0).astype(np.int32))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 3:1 2:1", "line 1: '2:1'; indices rise"),
        ("1 5:1", "'5:1'; indices rise from 0 to 4"),
        ("1 0:nan", "'0:nan'"),
        ("1 x", "no class and INDEX:VALUE"),
        ("one 1:1", "no class and INDEX:VALUE"),
        ("inf 1:1", "no class and"),
        ("", "no rows"),
        ("-3 1:1", r"classes \[-3\]"),
        ("1 1:\xff", "damaged"),
    ],
)
def test_damaged_rows_are_named(tmp_path, text, message):
    (tmp_path / "rows").write_bytes(text.encode("latin-1"))
    with pytest.raises(FormatError, match=message):
        read_svmlight(tmp_path / "rows", width=5)


def test_files_that_are_cut_or_flipped_are_refused_or_read(tmp_path):
    text = b"".join(b"1 %d:1 4:0.5\n" % (i % 4) for i in range(50))
    file = tmp_path / "rows.gz"
    for content in damaged(gzip.compress(text), 60):
        file.write_bytes(content)
        try:
            assert read_svmlight(file, width=5).x.shape[1] == 5
        except FormatError as error:
            assert str(file) in str(error)
    with pytest.raises(FFNLabError, match="no such file"):
        read_svmlight(tmp_path / "none", width=5)


def test_reviews_from_files_of_their_format(tmp_path):
    for part, n in (("train", 3), ("test", 2)):
        with gzip.open(tmp_path / f"dvd_{part}.svmlight.gz", "wb") as file:
            file.write(b"".join(b"%d 7:2 4999:1\n" % (1 - 2 * (i % 2)) for i in range(n)))
    train, test = reviews("dvd", tmp_path)
    assert train.x.shape == (3, 5000) and train.y.tolist() == [1, 0, 1] and len(test.x) == 2
    assert train.x[0, [7, 4999]].tolist() == [2, 1] and train.x[0].sum() == 3
    with pytest.raises(ConfigError, match="domain='kitchen'"):
        reviews("kitchen", tmp_path)


@pytest.mark.skipif(find_folder("amazon_reviews") is None, reason="needs amazon_reviews")
def test_the_real_reviews():
    train, test = reviews("books")
    assert train.x.shape == (2000, 5000) and test.x.shape == (4465, 5000)
    assert 0.4 < train.y.mean() < 0.6 and train.x.max() >= 8
