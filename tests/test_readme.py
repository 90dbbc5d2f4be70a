"""The README's Python runs, in a folder of its own, its files are read, its commands exist."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from ffnlab.cli.main import COMMANDS
from ffnlab.cli.searching import SearchSettings
from ffnlab.cli.training import TrainConfig, rule_of
from ffnlab.editing import parse_facts
from ffnlab.formats import open_model
from ffnlab.parallel import from_table
from ffnlab.recipes import parse_recipe
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
TABLES = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
MODULES = {match[1]: block for block in BLOCKS if (match := re.match(r"# (\w+)\.py\n", block))}
ENCODER = {"kind": "encoder", "vocab": 8, "width": 8, "hidden": 8, "layers": 1, "heads": 1}
ENCODER |= {"head_dim": 8}  # of what is started from
SIZES = {"vocab": 8, "width": 8, "hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """The blocks that are modules, where Python finds them."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def test_readme_has_code():
    assert len(BLOCKS) >= 2 and set(MODULES) == {"ternary", "forward_gradient", "confidence"}


@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
def test_files_are_read(table):
    found = tomllib.loads(table)
    if "stage" in found:
        assert [stage.build().name for stage in parse_recipe(table).stages] == ["ternarize"]
    elif "search" in found:
        assert from_table(found["search"], SearchSettings).options.budget == 100
        assert found.keys() == {"model", "data", "search"}
    elif "fact" in found:
        assert [fact.text for fact in parse_facts(found)] == ["import json"]
    elif "project" not in found:
        reads_questions = found.get("data", {}).get("kind") == "questions"
        model = ENCODER if reads_questions else SIZES
        whole = {"model": model, "run": {"steps": 1}} | found
        rule = rule_of(from_table(whole, TrainConfig))
        assert rule.name in found.get("rule", "backprop")


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_code_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As written, but on an eighth of the text: programs of tests are not optimized.
    block = block.replace(".train[:4096]", ".train[:512]").replace(
        "reshape(16, 256)", "reshape(2, 256)"
    )
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    if '"small-model"' in block:
        _, tokenizer = open_model(Path("small-model"))  # as the commands that follow do
        assert tokenizer.encode("def") == [100, 101, 102]


def test_commands_and_targets_exist():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    named = set(re.findall(r"^ffnlab (\w+)", shell, flags=re.MULTILINE))
    assert named == set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
