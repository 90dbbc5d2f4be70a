"""The README's Python runs, in a folder of its own, and its commands exist."""

import re
from pathlib import Path

import pytest

from ffnlab.cli.main import COMMANDS
from ffnlab.models import open_model
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_readme_has_code():
    assert len(BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    if "models.save" in block:
        _, tokenizer = open_model(Path("small-model"))  # as the commands that follow do
        assert tokenizer.encode("def") == [100, 101, 102]


def test_commands_and_targets_exist():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    named = set(re.findall(r"^ffnlab (\w+)", shell, flags=re.MULTILINE))
    assert named == set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
