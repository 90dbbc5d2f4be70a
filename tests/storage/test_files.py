"""Tests of ffnlab.storage.files: whole or absent, and strict JSON."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.errors import DamagedError, FormatError
from ffnlab.storage import files


def test_write_appears_at_the_end_of_the_block(tmp_path):
    path = tmp_path / "new" / "a.bin"
    with files.atomic_write(path) as file:
        file.write(b"12")
        assert not path.exists()
    assert path.read_bytes() == b"12"
    assert os.listdir(path.parent) == ["a.bin"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), files.atomic_write(path, "w") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_write_respects_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        with files.atomic_write(tmp_path / "a") as file:
            file.write(b"")
    finally:
        os.umask(previous)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_write_rejects_other_modes(tmp_path):
    with pytest.raises(ValueError, match="mode='a' is not one of"), files.atomic_write("x", "a"):
        pass


def test_folder_replaces_the_old_one_as_a_whole(tmp_path):
    target = tmp_path / "model"
    for names in (["a", "b"], ["c"]):
        with files.atomic_dir(target) as folder:
            for name in names:
                (folder / name).write_text(name)
        assert sorted(os.listdir(target)) == names
    assert os.listdir(tmp_path) == ["model"]


def test_failed_folder_leaves_the_old_one(tmp_path):
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("")
    with pytest.raises(RuntimeError), files.atomic_dir(target) as folder:
        (folder / "new").write_text("")
        raise RuntimeError
    assert os.listdir(target) == ["old"]
    assert os.listdir(tmp_path) == ["model"]


def test_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "a").write_text("kept")
    with pytest.raises(NotADirectoryError), files.atomic_dir(tmp_path / "a"):
        pass
    assert (tmp_path / "a").read_text() == "kept"


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    # Lone surrogates are no text and have no UTF-8.
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("abc"), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(values)
def test_json_round_trip(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_json_takes_arrays_and_numpy_numbers(tmp_path):
    value = {"n": np.int64(3), "x": np.float32(0.5), "a": np.arange(2), "j": jnp.ones(2)}
    files.write_json(tmp_path / "a.json", value)
    assert files.read_json(tmp_path / "a.json") == {"n": 3, "x": 0.5, "a": [0, 1], "j": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("value", "error"),
    [(float("nan"), ValueError), ([np.float32("inf")], ValueError), ({"a": object()}, TypeError)],
)
def test_json_that_cannot_be_said_is_not_written(tmp_path, value, error):
    with pytest.raises(error):
        files.write_json(tmp_path / "a.json", value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[NaN]",
        b"[Infinity]",
        b'{"a": 1, "a": 2}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"1" * 5000,
    ],
    ids=["empty", "open", "nan", "infinity", "twice", "not utf-8", "deep", "long number"],
)
def test_bad_json_names_the_file(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"bad\.json"):
        files.read_json(path)


def test_json_over_the_limit_is_not_parsed(tmp_path):
    path = tmp_path / "big.json"
    path.write_text(json.dumps([0] * 100))
    with pytest.raises(FormatError, match="more than 50 bytes"):
        files.read_json(path, limit=50)


def test_what_is_sealed_comes_back_and_no_change_is_believed():
    value = {"b": [1, 2.5, None, "ä", {"x": True}], "a": np.float32(0.1), 3: (1,)}
    wanted = {"b": [1, 2.5, None, "ä", {"x": True}], "a": float(np.float32(0.1)), "3": [1]}
    found = files.sealed(value)
    assert files.unsealed(json.loads(json.dumps(dict(reversed(found.items())))), "a") == wanted
    changes = [{"b": []}, {"a": 1}, {"3": [True]}, {"3": [1.0]}, {"c": None}, {"sha256": ""}]
    for changed in (*(found | change for change in changes), {}, [], None, 3, {"sha256": 3}):
        with pytest.raises(DamagedError, match="the file is not the file that was written"):
            files.unsealed(changed, "the file")
    del found["3"]
    with pytest.raises(DamagedError):
        files.unsealed(found, "the file")


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda p: p.symlink_to("/dev/zero")])
def test_only_regular_files_are_opened_and_nothing_is_waited_for(tmp_path, make):
    make(tmp_path / "a")
    for read in (files.open_regular, files.read_json, files.sha256):
        with pytest.raises(FormatError, match="a is not a regular file"):
            read(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        files.open_regular(tmp_path / "b")


def test_remove_takes_whatever_is_there(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("")
    makers = (os.mkdir, os.mkfifo, Path.touch, lambda p: p.symlink_to(tmp_path / "kept"))
    for make in makers:
        make(tmp_path / "a")
        files.remove(tmp_path / "a")
        files.remove(tmp_path / "a")
        assert os.listdir(tmp_path) == ["kept"] and (tmp_path / "kept" / "file").exists()
