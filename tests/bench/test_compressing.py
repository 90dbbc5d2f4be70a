"""The main job's bench: reads time and memory from a job that is only pretended here."""

import subprocess
from pathlib import Path

import pytest

from ffnlab.bench import compressing


def test_figures_come_from_the_clock_and_the_report(monkeypatch):
    seen = []

    def pretended(command, **options):
        seen.append(command)
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "report.json").write_text('{"peak_memory": 3221225472}')
        assert options["check"]

    monkeypatch.setattr(subprocess, "run", pretended)
    found = compressing.job()
    assert found["GiB"] == 3.0 and 0 < found["seconds"] < 60
    assert seen[0][1:4] == ["-m", "ffnlab", "compress"]


def test_a_failed_job_is_an_error(monkeypatch):
    monkeypatch.setattr(compressing.sys, "executable", "false")
    with pytest.raises(subprocess.CalledProcessError):
        compressing.job()
