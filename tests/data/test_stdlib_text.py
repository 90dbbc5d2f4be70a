"""The standard library as a corpus: fixed by rule, split by name, told apart by hash."""

import hashlib
from pathlib import Path

import pytest

from ffnlab.data.text.stdlib_text import (
    EXCLUDED,
    HELD_OUT,
    MIN_FILES,
    SEPARATOR,
    is_source,
    join,
    stdlib_text,
    text_identity,
    validation_split,
)
from ffnlab.errors import FFNLabError


@pytest.fixture
def library(tmp_path) -> Path:
    """A small made-up standard library with everything that must be left out."""
    files = {f"module{i:03}.py": f"x = {i}\n".encode() for i in range(MIN_FILES)}
    files |= {"json/decoder.py": b"held = 1\r\n", "json/extra.py": b"# trained\n"}
    files |= {"copy.py": b"held = 2\n", "empty.py": b"", "latin.py": b"# \xe9\n", "nul.py": b"\0"}
    files |= {"site-packages/p.py": b"no", "test/test_a.py": b"no", "a/tests/b.py": b"no"}
    files |= {"encodings/cp1.py": b"no", "html/entities.py": b"no", "_sysconfigdata_x.py": b"no"}
    files |= {"config-3.11/c.py": b"no", "sitecustomize.py": b"no", "notes.txt": b"no"}
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path


def test_what_is_read(library):
    text = stdlib_text(library)
    assert text.held_out == b"\0held = 2\n\0held = 1\n\0"
    assert b"no" not in text.train and b"held" not in text.train and b"\r" not in text.train
    parts = text.train.split(SEPARATOR)
    assert parts[0] == parts[-1] == b""
    assert parts[1:-1] == [b"# trained\n", *(f"x = {i}\n".encode() for i in range(MIN_FILES))]
    assert text.identity["train_files"] == MIN_FILES + 1 and text.identity["held_out_files"] == 2


def test_stripped_installations_are_refused(tmp_path, library):
    with pytest.raises(FFNLabError, match="no sources: use a full Python"):
        stdlib_text(tmp_path / "nothing")
    for name in ("json/decoder.py", "copy.py"):
        (library / name).unlink()
    stdlib_text.cache_clear()
    with pytest.raises(FFNLabError, match="0 of the held-out modules"):
        stdlib_text(library)


def test_the_running_interpreter():
    text = stdlib_text()
    assert 4e6 < len(text.train) < 3e7 and 1.5e5 < len(text.held_out) < 3e5
    assert text.identity["held_out_files"] == len(HELD_OUT)
    assert text.identity["train_sha256"] == hashlib.sha256(text.train).hexdigest()
    trained = set(text.train.split(SEPARATOR)) - {b""}
    held = set(text.held_out.split(SEPARATOR)) - {b""}
    assert not trained & held
    for module in held:  # nor does a trained file contain a held-out one
        assert module not in text.train


def test_settings_are_chosen_on_training_modules_only(tmp_path):
    for i in range(130):
        (tmp_path / f"m{i:03}.py").write_text(f"x = {i}\n")
    (tmp_path / "copy.py").write_text("held\n")
    text = stdlib_text(tmp_path)
    found = validation_split(text)
    assert found.held_out == b"\0x = 0\n\0x = 60\n\0x = 120\n\0"
    rest = [f"x = {i}\n".encode() for i in range(130) if i not in (0, 60, 120)]
    assert found.train == b"\0" + b"\0".join(rest) + b"\0"
    assert b"held" not in found.train + found.held_out
    assert (found.identity["train_files"], found.identity["held_out_files"]) == (127, 3)
    assert found.identity["held_out_sha256"] == hashlib.sha256(found.held_out).hexdigest()


def test_rules_by_name():
    assert all(map(is_source, HELD_OUT))
    assert not any(is_source(f"{folder}/a.py") for folder in EXCLUDED)
    assert not is_source("json/decoder.pyc") and not is_source("_sysconfigdata__linux.py")


def test_order_is_by_path_and_identity_by_content():
    assert join({"b": b"2", "a": b"1"}) == join({"a": b"1", "b": b"2"}) == b"\x001\x002\x00"
    one, two = text_identity(b"a", b"b"), text_identity(b"a", b"c")
    assert one["train_sha256"] == two["train_sha256"]
    assert one["held_out_sha256"] != two["held_out_sha256"]
