"""Tests of the project itself: what is shipped, what is imported where, sizes, docstrings, pins."""

import ast
import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import ffnlab

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ffnlab", "pallas_kernels")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

# Floors of ffnlab, lowest first: a package imports from its own floor and those below it.
FLOORS = (
    {
        *("clock", "errors", "compat", "docstrings", "options", "outside", "progress"),
        *("scores", "storage"),
    },
    {"weights", "tree", "transform", "rule", "probe", "report", "graph"},
    {"layers"},
    {"models", "losses"},
    {"formats"},
    {"text", "data", "parallel"},
    {
        *("routing", "pruning", "quantization", "sparsity"),
        *("structure", "editing", "learning", "analysis"),
    },
    {"federated", "networks", "graphs", "sequences", "systems"},
    {"bench", "cli", "compress", "recipes", "studies", "testing"},
)
METHODS = next(floor for floor in FLOORS if "learning" in floor)
SYSTEMS = next(floor for floor in FLOORS if "graphs" in floor)

# Packages of extras, imported inside functions only, through `ffnlab.errors.require`.
OPTIONAL = {
    *(
        "PIL",
        "array_record",
        "compressed_tensors",
        "grain",
        "huggingface_hub",
        "jax_triton",
        "lm_eval",
    ),
    *(
        "jinja2",
        "matplotlib",
        "peft",
        "qwix",
        "sklearn",
        "tensorboardX",
        "tensorflow",
        "tensorflow_datasets",
    ),
    *("tokenizers", "torch", "torch_geometric", "transformers", "triton", "tyro"),
}
MAX_FILE, MAX_FUNCTION = 400, 60  # lines; a function's docstring is not counted


def name_of(path: Path) -> str:
    """The dotted module name of a source file."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [name for name in map(name_of, FILES) if not name.endswith("__main__")]


def imports(tree: ast.AST, module: str) -> list[str]:
    """Dotted names that a syntax tree imports; `from a import b` gives a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write the whole name"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def runs_on_import(tree: ast.Module) -> ast.Module:
    """The tree without function bodies and `if TYPE_CHECKING:` blocks."""

    class Cut(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Cut().visit(tree)


def floor_of(dotted: str) -> int | None:
    """The floor of `ffnlab.x…`; None for the top level itself and names that are no package."""
    parts = dotted.split(".")
    if len(parts) < 2 or parts[1] not in ffnlab.__all__:
        return None
    return next((i for i, floor in enumerate(FLOORS) if parts[1] in floor), None)


def test_every_package_has_a_floor_and_is_reachable():
    folder = ROOT / "ffnlab"
    present = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__"}
    present |= {path.parent.name for path in folder.glob("*/__init__.py")}
    assert present == set(ffnlab.__all__), "ffnlab.__all__ lists the modules and packages there are"
    assert present <= set().union(*FLOORS), "a new package gets its floor in FLOORS"
    for name in ffnlab.__all__:
        assert getattr(ffnlab, name).__name__ == f"ffnlab.{name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ffnlab.nothing
    assert set(ffnlab.__all__) < set(dir(ffnlab))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_down(path):
    module = name_of(path)
    names = imports(ast.parse(path.read_text()), module)
    if module.startswith("pallas_kernels"):
        allowed = {*sys.stdlib_module_names, "jax", "numpy", "pallas_kernels"}
        allowed |= {"jaxlib", "jax_triton", "triton"}
        assert {name.partition(".")[0] for name in names} <= allowed
        return
    own_floor, own = floor_of(module), (module.split(".") + [""])[1]
    for name in names:
        floor = floor_of(name) if name.startswith("ffnlab.") else None
        if floor is None or own_floor is None:
            continue
        assert floor <= own_floor, f"{module} imports {name}, which stands on a higher floor"
        other = name.split(".")[1]
        siblings = own in METHODS and other in METHODS and other != own
        assert not siblings, f"{module} imports {name}: methods do not import each other"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_optional_packages_are_imported_where_used(path):
    names = imports(runs_on_import(ast.parse(path.read_text())), name_of(path))
    found = {name.partition(".")[0] for name in names} & OPTIONAL
    assert not found, f"{name_of(path)} imports {found} at its top level"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_sizes(path):
    text = path.read_text()
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            first = body[0].lineno if body else node.end_lineno
            assert node.end_lineno - first < MAX_FUNCTION, f"{node.name} is too long"
        if isinstance(node, ast.Name):
            assert node.id != "NotImplementedError", "no stubs"


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_docstrings(module):
    loaded = importlib.import_module(module)
    assert loaded.__doc__, f"{module} has no docstring"
    for name in getattr(loaded, "__all__", ()):
        value = getattr(loaded, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)):
            continue
        own = vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__
        written = own and not own.startswith(f"{name}(")  # what dataclass makes up is no docstring
        assert written, f"{module}.{name} has no docstring"


class Finder(doctest.DocTestFinder):
    """Finds the examples of functions that the import hook has wrapped."""

    def _from_module(self, module, object):
        return super()._from_module(module, inspect.unwrap(object))


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module):
    loaded = importlib.import_module(module)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report: list[str] = []
    for test in Finder().find(loaded, module):
        runner.run(test, out=report.append)
    assert not runner.failures, "".join(report)


def modules_after(program: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after a program."""
    program += "\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return set(done.stdout.split())


def test_import_is_quick_and_quiet():
    loaded = {name.partition(".")[0] for name in modules_after("import ffnlab")}
    assert loaded.isdisjoint(OPTIONAL | {"jax", "flax", "numpy", "optax", "orbax", "rich"})
    inside = {name for name in modules_after("import ffnlab") if name.startswith("ffnlab")}
    assert inside == {"ffnlab"}


def test_no_module_touches_an_optional_package_on_import():
    loaded = modules_after("\n".join(f"import {module}" for module in MODULES))
    # grain and tokenizers may be loaded by other libraries; torch and TensorFlow never are.
    heavy = {"torch", "tensorflow", "jax_triton", "triton", "matplotlib", "transformers", "lm_eval"}
    heavy |= {"torch_geometric"}
    assert {name.partition(".")[0] for name in loaded}.isdisjoint(heavy)


def test_wheel_has_types_data_and_nothing_else(tmp_path):
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"ffnlab-{ffnlab.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {name for name in names if ".dist-info/" not in name}
    assert {name.partition("/")[0] for name in shipped} == set(PACKAGES)
    data = {p for p in (ROOT / "ffnlab").rglob("*") if p.suffix != ".pyc" and p.is_file()}
    assert {path.relative_to(ROOT).as_posix() for path in data} <= shipped
    assert {"ffnlab/py.typed", "pallas_kernels/py.typed"} <= shipped
    assert any(name.endswith("licenses/LICENSE") for name in names)


def requirements(*extras: str) -> list[Requirement]:
    """The project's direct requirements, of the core and some extras."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][e] for e in extras)]
    return [Requirement(text) for requirements in lists for text in requirements]


@pytest.mark.parametrize("version", ["3.11", "3.12"])
def test_pins_cover_what_make_installs(version):
    path = ROOT / "constraints" / f"py{version.replace('.', '')}.txt"
    pins = {}
    for line in path.read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", line), f"{path.name}: {line}"
        name, _, pinned = line.partition("==")
        pins[canonicalize_name(name)] = pinned
    for requirement in requirements("run", "test", "dev", "parity", "eval"):
        marker = requirement.marker
        if marker is None or marker.evaluate({"python_version": version}):
            pinned = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(pinned), f"{requirement} is pinned to {pinned}"


def test_every_requirement_has_a_lower_bound_and_no_source():
    for requirement in requirements(*PROJECT["optional-dependencies"]):
        assert requirement.url is None
        assert any(spec.operator == ">=" for spec in requirement.specifier), requirement
    core = {requirement.name for requirement in requirements()}
    assert core.isdisjoint(OPTIONAL) and not any(r.extras for r in requirements())


def test_make_and_ci_name_no_package_index():
    for name in ("Makefile", ".ci/run", "pyproject.toml"):
        assert not re.search(r"index-url|https?://|--find-links", (ROOT / name).read_text()), name
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
