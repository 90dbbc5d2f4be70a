"""Where data is looked for, and what is said when it is not there."""

import re

import pytest

from ffnlab import data
from ffnlab.errors import FFNLabError


def test_a_folder_is_found_by_its_name(tmp_path, monkeypatch):
    (tmp_path / "corpus").mkdir()
    monkeypatch.setenv("FFNLAB_DATA", str(tmp_path))
    assert data.folder("corpus") == data.find_folder("corpus") == tmp_path / "corpus"


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "corpus").write_text("a file, and no folder")
    monkeypatch.setenv("FFNLAB_DATA", str(tmp_path))
    looked = re.escape(str(tmp_path / "corpus"))
    with pytest.raises(FFNLabError, match=f"data 'corpus': there is no folder {looked}; set FFN"):
        data.folder("corpus")
    assert data.find_folder("corpus") is None
    for value in ("", None):
        if value is None:
            monkeypatch.delenv("FFNLAB_DATA")
        else:
            monkeypatch.setenv("FFNLAB_DATA", value)
        with pytest.raises(FFNLabError, match="data 'corpus': FFNLAB_DATA is not set; set FFNLAB"):
            data.folder("corpus")
        assert data.find_folder("corpus") is None
