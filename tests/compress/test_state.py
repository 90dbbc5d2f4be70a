"""What an interrupted job leaves behind, and when it may be taken up."""

import json

import pytest

from ffnlab.compress.state import FOLDER, begin
from ffnlab.errors import ConfigError, FormatError

IDENTITY = {"recipe": "r", "model": "m", "text": "t"}


def test_a_job_begins_and_ends_without_a_trace(tmp_path):
    state = begin(tmp_path / "new" / "out", IDENTITY)
    assert state.file.exists() and state.measured == {}
    state.finish()
    assert list((tmp_path / "new" / "out").iterdir()) == []


def test_measurements_are_there_after_an_interruption(tmp_path):
    begin(tmp_path, IDENTITY).record("original", {"perplexity": 2.5})
    state = begin(tmp_path, IDENTITY, interrupted="resume")
    assert state.measured == {"original": {"perplexity": 2.5}}


def test_an_interrupted_job_is_not_overwritten_unasked(tmp_path):
    begin(tmp_path, IDENTITY).record("original", {})
    with pytest.raises(ConfigError, match="--resume continues it, --restart throws it away"):
        begin(tmp_path, IDENTITY)
    assert begin(tmp_path, IDENTITY, interrupted="restart").measured == {}


@pytest.mark.parametrize("interrupted", ["resume", "restart"])
def test_without_an_interrupted_job_all_begin(tmp_path, interrupted):
    assert begin(tmp_path, IDENTITY, interrupted=interrupted).measured == {}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"recipe": "other"}, "another recipe:"),
        ({"model": "other", "text": "other"}, "another model, text:"),
        ({"more": 1}, "another more:"),
    ],
)
def test_another_job_is_not_resumed(tmp_path, changed, named):
    begin(tmp_path, IDENTITY)
    with pytest.raises(ConfigError, match=named):
        begin(tmp_path, IDENTITY | changed, interrupted="resume")


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"format": 2}', '{"format": 1, "identity": [], "measured": {}}', '{"format": 1}'],
)
def test_a_damaged_state_is_named(tmp_path, content):
    file = begin(tmp_path, IDENTITY).file
    file.write_text(content)
    with pytest.raises(FormatError, match="run.json"):
        begin(tmp_path, IDENTITY, interrupted="resume")


def test_the_state_is_plain_json(tmp_path):
    begin(tmp_path, IDENTITY).record("original", {"perplexity": 2.5})
    found = json.loads((tmp_path / FOLDER / "run.json").read_text())
    assert found == {
        "format": 1,
        "identity": IDENTITY,
        "measured": {"original": {"perplexity": 2.5}},
    }


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fireq", "02-fireq.npz"),
        ("a.b:c.d", "02-a.b.c.d.npz"),
        ("../x y/é", "02-...x.y..npz"),  # packages may register any name
        ("n" * 300, f"02-{'n' * 80}.npz"),
    ],
    ids=["ours", "module", "registered", "long"],
)
def test_statistics_lie_in_the_folder_whatever_the_transform_is_called(tmp_path, name, file):
    path = begin(tmp_path, IDENTITY).checkpoint(2, name)
    assert path == tmp_path / FOLDER / file
