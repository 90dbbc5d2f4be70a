"""The table of vowels."""

import numpy as np
import pytest

from ffnlab.data import find_folder, vowels
from ffnlab.errors import ConfigError, FFNLabError, FormatError
from tests.damaging import damaged


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


def test_files_that_are_cut_or_flipped_are_refused_or_read(tmp_path):
    file = table(tmp_path, *(f"m,{i},A,100,{i},2,3,4" for i in range(5)), "w,1,i,1,2,3,4,5")
    for content in damaged(file.read_bytes(), 200):
        file.write_bytes(content)
        try:
            found = vowels(file)
        except FormatError as error:
            assert str(file) in str(error)
        else:
            assert len(found.x) == len(found.y) and not (found.x < 0).any()


@pytest.mark.skipif(find_folder("vowels") is None, reason="needs vowels")
def test_the_real_vowels():
    found = vowels()
    assert len(found.x) == 1668 and len(found.names) == 12 and found.groups == ("b", "g", "m", "w")
    assert found.speaker.max() == 138 and np.isfinite(found.x).all()
    men, women = (np.median(found.of_group(g).x[:, 1]) for g in "mw")
    assert men < 150 < 200 < women
