"""Series: files of them, hostile ones too; parts and windows that know no future; time marks."""

import datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data import find_folder
from ffnlab.data.scaling import scaling_of
from ffnlab.data.series import (
    ETT_PARTS,
    etth1,
    lagged_series,
    parts_of,
    read_series,
    time_marks,
    window_starts,
    windows,
)
from ffnlab.errors import ConfigError, FFNLabError, FormatError

GOOD = "date,a,b\n2016-07-01 00:00:00,1.5,2\n2016-07-01 01:00:00,-3,1e3\n"


def test_a_file_is_read(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text(GOOD + "\n2016-07-01T03:00:00+01:00,0,0\n")
    found = read_series(file)
    assert found.names == ("a", "b") and found.values.dtype == np.float32
    np.testing.assert_array_equal(found.values, [[1.5, 2], [-3, 1000], [0, 0]])
    assert found.times.tolist()[-1] == datetime.datetime(2016, 7, 1, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("-3,1e3", "-3"), "line 3 has 2 columns, not 3"),
        (("-3", "nan"), "line 3.*not all finite"),
        (("-3", "inf"), "line 3.*not all finite"),
        (("-3", "1e39"), "line 3.*not all finite"),
        (("-3", "x"), "line 3.*not all finite"),
        (("-3", ""), "line 3.*not all finite"),
        (("07-01 01", "07-01 00"), "line 3: '2016-07-01 00:00:00' is not after"),
        (("07-01 01", "07-41 01"), "line 3: '2016-07-41 01:00:00' is no time"),
        (("date,a,b", "date,a,a"), "each with a name of its own"),
        (("date,a,b\n", "\n"), "0 columns in the header"),
        (("date,a,b", "date"), "1 columns in the header"),
        (("-3", '"-3'), "no CSV file"),
    ],
)
def test_files_that_are_refused(tmp_path, change, message):
    file = tmp_path / "a.csv"
    file.write_text(GOOD.replace(*change))
    with pytest.raises(FormatError, match=message):
        read_series(file)


def test_files_that_are_none(tmp_path):
    with pytest.raises(FFNLabError, match="cannot be read"):
        read_series(tmp_path / "none.csv")
    file = tmp_path / "a.csv"
    for content in (b"date,a\n\xff\xfe", b"", b"date,a\n", b"\x00" * 100):
        file.write_bytes(content)
        with pytest.raises(FormatError):
            read_series(file)


@given(content=st.binary(max_size=200))
def test_no_file_breaks_the_reader(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "any.csv"
    file.write_bytes(content)
    try:
        found = read_series(file)
    except FFNLabError:
        return
    assert np.isfinite(found.values).all() and (np.diff(found.times) > np.timedelta64(0)).all()


@given(
    length=st.integers(1, 6),
    horizon=st.integers(1, 4),
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_every_forecast_lies_in_one_part(length, horizon, parts):
    total, covered = sum(parts), []
    for part in parts_of(total, parts):
        if part.stop - max(part.start, length) < horizon:
            with pytest.raises(ConfigError, match="too few"):
                window_starts(part, length, horizon)
            continue
        starts = window_starts(part, length, horizon)
        assert starts.min() >= 0
        told = starts[:, None] + length + np.arange(horizon)
        assert told.min() == max(part.start, length) and told.max() == part.stop - 1
        covered.append(set(told.ravel()))
    assert not set.intersection(*covered) if len(covered) > 1 else True


def test_the_future_changes_nothing_before_it():
    """Neither what is read, nor scales, nor marks."""
    series = lagged_series(0, length=200)
    parts = parts_of(200, (0.7, 0.1, 0.2))
    later = series.values.copy()
    later[150:] = 1e4
    one, other = (scaling_of(values[parts[0]]) for values in (series.values, later))
    np.testing.assert_array_equal(one.mean, other.mean)
    np.testing.assert_array_equal(one.deviation, other.deviation)
    starts = window_starts(parts[1], 20, 5)
    starts = starts[starts + 20 <= 150]
    marks = time_marks(series.times)
    a, b = (windows(scaling(v), marks, starts, 20, 5)
            for v, scaling in ((series.values, one), (later, other)))  # fmt: skip
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.marks, marks[starts[:, None] + np.arange(20)])
    assert (a.y[-1] != b.y[-1]).any()


def test_parts_that_are_none():
    for parts in ((0.7, 0.4), (0.5, 0.0), (), (80, 30), (0.001,)):
        with pytest.raises(ConfigError, match="parts="):
            parts_of(100, parts)


def test_later_series_are_told_by_earlier_ones():
    values = lagged_series(3).values.astype(float)
    assert values.shape == (6000, 8)
    for late in (1, 4, 7):
        there = np.corrcoef(values[: -3 * late, 0], values[3 * late :, late])[0, 1]
        assert abs(there) > 0.97 > 0.95 > abs(np.corrcoef(values[:, 0], values[:, late])[0, 1])
    assert np.abs(lagged_series(4).values - lagged_series(3).values).max() > 0.1


def test_marks_are_the_calendars():
    day = datetime.datetime(2023, 12, 31, 23)  # a Sunday, the last hour of the year
    marks = time_marks(np.array([day, day + datetime.timedelta(hours=1)], "datetime64[s]"))
    np.testing.assert_allclose(marks, [[0.5, 0.5, 0.5, 364 / 365 - 0.5], [-0.5, -0.5, -0.5, -0.5]])
    leap = time_marks(np.array(["2016-02-29T12:30:00"], "datetime64[s]"))
    np.testing.assert_allclose(leap, [[12 / 23 - 0.5, -0.5, 28 / 30 - 0.5, 59 / 365 - 0.5]])


@pytest.mark.skipif(find_folder("etth1") is None, reason="FFNLAB_DATA has no etth1")
def test_etth1_and_its_published_parts():
    found = etth1()
    assert found.values.shape == (17420, 7) and found.names[-1] == "OT"
    parts = parts_of(len(found.values), ETT_PARTS)
    counts = [len(window_starts(part, 96, 96)) for part in parts]
    assert counts == [8449, 2785, 2785], "windows of the published loaders"
    np.testing.assert_allclose(found.values[0, -1], 30.531, rtol=1e-6)


@pytest.mark.skipif(find_folder("nab") is None, reason="FFNLAB_DATA has no nab")
def test_files_of_nab_are_read():
    found = read_series(find_folder("nab") / "nyc_taxi.csv")
    assert found.values.shape[1] == 1 and found.names == ("value",)
    assert (np.diff(found.times) == np.timedelta64(30, "m")).all()
