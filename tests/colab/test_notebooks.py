"""Notebooks run whole, quickly, and are what their reviewed text says."""

import ast
import contextlib
import importlib.util
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import nbclient
import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
OFTEN = ("kernels", "probes", "start_here")  # the others run in `make test-slow`
notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert NOTEBOOKS


@notebooks
def test_notebook_is_its_text_form_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    reviewed = jupytext.read(path.with_suffix(".py"))
    cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source) for cell in reviewed.cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs for cell in code)
    assert len(code) <= 20
    assert all(cell.source.count("\n") < 25 for cell in code)
    for cell in code:
        ast.parse(cell.source)


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=[] if path.stem in OFTEN else pytest.mark.slow, id=path.stem)
        for path in NOTEBOOKS
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_notebook_runs(path: Path, tmp_path, monkeypatch):
    monkeypatch.setenv("FFNLAB_FAST", "1")
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)


def first_cell(path: Path) -> str:
    """The first code cell of a notebook."""
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


def test_all_notebooks_begin_alike():
    assert len({first_cell(path) for path in NOTEBOOKS}) == 1
    assert first_cell(NOTEBOOKS[0]).startswith('source = "ffnlab"')


def clone_at(folder: Path) -> Path:
    """As much of a clone as the cell looks at."""
    (folder / "ffnlab").mkdir(parents=True)
    (folder / "ffnlab" / "__init__.py").touch()
    return folder


def wheel_at(folder: Path) -> Path:
    """A wheel, without content."""
    (folder / "ffnlab-0.1.0-py3-none-any.whl").touch()
    return folder / "ffnlab-0.1.0-py3-none-any.whl"


@pytest.mark.parametrize(
    ("prepare", "source"),
    [
        (lambda here: "ffnlab", "ffnlab"),  # nothing beside it: the released package
        (wheel_at, "ffnlab"),
        (lambda here: clone_at(here / "ffnlab"), "ffnlab"),  # cloned beside the notebook
        (lambda here: clone_at(here.parent), "ffnlab"),  # the notebook lies in the clone's colab/
        (lambda here: clone_at(here / "mine"), "mine"),
        (lambda here: "ffnlab==0.1", "ffnlab==0.1"),
    ],
    ids=["nothing", "wheel", "clone beside", "clone above", "a path", "a version"],
)
@pytest.mark.parametrize("works", [True, False])
def test_the_first_cell_installs_what_is_there(prepare, source, works, tmp_path, monkeypatch):
    here, asked = tmp_path / "colab", []
    here.mkdir()
    expected = prepare(here)
    monkeypatch.chdir(here)
    # Of a clone beside it the interpreter says that it is a package without a file.
    spec = types.SimpleNamespace(origin=None) if (here / "ffnlab").is_dir() else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    run = lambda command: asked.append(command) or types.SimpleNamespace(returncode=not works)  # noqa: E731
    monkeypatch.setattr(subprocess, "run", run)
    cell = first_cell(NOTEBOOKS[0]).replace('source = "ffnlab"', f'source = "{source}"')
    with contextlib.nullcontext() if works else pytest.raises(SystemExit) as stopped:
        exec(compile(cell, "first cell", "exec"), {})
    assert asked == [[sys.executable, "-m", "pip", "install", "-q", f"{expected}[run]"]]
    if not works:
        said = f"pip cannot install {expected}: put a clone or wheel of ffnlab beside the notebook"
        assert str(stopped.value) == said


def test_the_first_cell_leaves_an_installed_package_alone(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command: pytest.fail("installed again"))
    exec(compile(first_cell(NOTEBOOKS[0]), "first cell", "exec"), {})
