"""What the README and the pages of docs/ show: Python runs, files are read, commands exist."""

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
PAGES = {
    page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))
}
PAGES["README.md"] = README


def of_language(name: str) -> dict[str, str]:
    """The blocks of a language by page and number."""
    return {
        f"{page}-{i}": block
        for page, text in PAGES.items()
        for i, block in enumerate(re.findall(rf"```{name}\n(.*?)```", text, flags=re.DOTALL))
    }


BLOCKS, TABLES = of_language("python"), of_language("toml")
MODULES = {
    match[1]: block for block in BLOCKS.values() if (match := re.match(r"# (\w+)\.py\n", block))
}
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
    assert "README.md-0" in BLOCKS and set(MODULES) == {"ternary", "forward_gradient", "confidence"}


@pytest.mark.parametrize("place", TABLES)
def test_files_are_read(place):
    found = tomllib.loads(TABLES[place])
    if "stage" in found:
        assert [stage.build().name for stage in parse_recipe(TABLES[place]).stages] == ["ternarize"]
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


@pytest.mark.parametrize("place", BLOCKS)
def test_code_runs(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # As written, but on an eighth of the text: programs of tests are not optimized.
    block = (
        BLOCKS[place]
        .replace(".train[:4096]", ".train[:512]")
        .replace("reshape(16, 256)", "reshape(2, 256)")
    )
    exec(compile(block, place, "exec"), {"__name__": "readme"})
    if '"small-model"' in block:
        _, tokenizer = open_model(Path("small-model"))  # as the commands that follow do
        assert tokenizer.encode("def") == [100, 101, 102]


def test_commands_and_targets_exist():
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL))
    named = set(re.findall(r"^ffnlab (\w+)", shell, flags=re.MULTILINE))
    assert named == set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    told = "\n".join(text for name, text in PAGES.items() if name != "api.md")  # which has prose
    for target in re.findall(r"`?make ([a-z-]+)", told):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_links_lead_somewhere():
    for name, text in PAGES.items():
        place = ROOT if name == "README.md" else ROOT / "docs"
        for link in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert link.startswith("https://") or (place / link).exists(), (name, link)
    assert set(re.findall(r"\(docs/(\S+?)\)", README)) == set(PAGES) - {"README.md"}
