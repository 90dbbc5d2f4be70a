"""The list of studies, running one by name, and how its last run is remembered."""

import importlib.util
import json
import types

import pytest
from rich.console import Console

from ffnlab import studies
from ffnlab.errors import SelectionError
from ffnlab.studies import run
from ffnlab.studies.ledger.sources import sources
from ffnlab.studies.result import Claim, Result

CLAIM = Claim("it works", "-", "yes", True, "seen", seeds=1)


@pytest.fixture(autouse=True)
def notes(monkeypatch, tmp_path):
    """A state folder of the test's own."""
    monkeypatch.setenv("FFNLAB_STATE", str(tmp_path / "state"))
    return tmp_path / "state" / "studies"


def fake(monkeypatch, function):
    monkeypatch.setattr(run, "load", lambda slug: types.SimpleNamespace(run=function))


def good(*, quick, seed):
    fields = {"title": "t", "settings": {}, "seconds": 0.0, "claims": [CLAIM]}
    return Result(slug="finercut", seed=seed, quick=quick, **fields)


def test_every_study_has_a_module_and_a_title():
    for slug, study in studies.STUDIES.items():
        assert study.slug == slug and study.name and study.title and study.package
        if study.paper:
            assert study.paper.title and study.paper.link.startswith("https://")
            assert 1950 < study.paper.year < 2100
        assert importlib.util.find_spec(study.module) is not None, study.module


def test_unknown_study():
    with pytest.raises(SelectionError, match=r"did you mean 'finercut'.*there are: "):
        studies.load("finecut")


def test_a_run_is_written_and_remembered(monkeypatch, tmp_path):
    assert studies.last_status("finercut") == "never run"
    fake(monkeypatch, good)
    result = run.run_study("finercut", out=tmp_path / "out", quick=True, seed=5)
    written = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result.seed == 5 == written["seed"] and written["quick"] is True
    assert written["sources"] == sources("finercut")
    assert studies.last_status("finercut").startswith("1 of 1 claims hold (quick, seed 5, ")


def test_a_failure_is_remembered_and_passed_on(monkeypatch):
    def bad(**options):
        raise RuntimeError("no")

    fake(monkeypatch, bad)
    with pytest.raises(RuntimeError, match="no"):
        run.run_study("finercut")
    assert studies.last_status("finercut").startswith("failed: RuntimeError (full, seed 0, ")


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff", b'{"status": 1, "quick": 0, "seed": 0, "time": 1e99}']
)
def test_damaged_notes_read_as_none(notes, content):
    notes.mkdir(parents=True)
    (notes / "finercut.json").write_bytes(content)
    assert studies.last_status("finercut") == "never run"


def test_a_state_folder_that_cannot_be_written_is_no_failure(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FFNLAB_STATE", str(tmp_path / "file"))
    fake(monkeypatch, good)
    assert run.run_study("finercut").status == "1 of 1 claims hold"
    assert studies.last_status("finercut") == "never run"


def test_state_folder_follows_the_desktop_convention(monkeypatch, tmp_path):
    monkeypatch.delenv("FFNLAB_STATE")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    fake(monkeypatch, good)
    run.run_study("finercut")
    assert (tmp_path / "ffnlab" / "studies" / "finercut.json").is_file()


def test_overview_lists_all():
    console = Console(width=120)
    with console.capture() as capture:
        console.print(run.overview())
    text = capture.get()
    assert all(slug in text for slug in studies.STUDIES) and "never run" in text
