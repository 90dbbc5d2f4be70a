"""Which code a study's figures come from, and digests of it by which a result is found stale.

That code is the study's module, and what it imports, directly or not, of the modules of studies,
of `ffnlab.bench` and of the package of its method. What lies below (layers, weights, training) is
left out: it is tested by itself, and every study would be stale at every change. So are the
modules that say how a result is written, and packages that only re-export.

A digest is of the syntax: no comment, docstring, line break or spelling of a number changes it, nor
the version of Python that reads it. Nothing is imported to find it.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import ffnlab
from ffnlab.studies.table import STUDIES

__all__ = ["sources", "syntax_digest"]

PARENT = Path(ffnlab.__file__).resolve().parent.parent
FORMAT = ("ffnlab.studies.result", "ffnlab.studies.run", "ffnlab.studies.status")
FORMAT += ("ffnlab.studies.table", "ffnlab.studies.ledger")
# Fields of syntax trees that say nothing, or not in all versions of Python.
SILENT = frozenset({"ctx", "kind", "type_comment", "type_ignores"})


def sources(slug: str) -> dict[str, str]:
    """The modules that a study's figures come from, each with its digest.

    Args:
      slug: a key of `STUDIES`.
    Returns:
      dotted name -> 16 hexadecimal digits, by name.

    >>> list(sources("lamb"))[:2]
    ['ffnlab.learning.backprop', 'ffnlab.learning.trust']
    """
    study = STUDIES[slug]
    inside = ("ffnlab.studies", "ffnlab.bench", f"ffnlab.{study.package}")
    found, todo = {}, [study.module]
    while todo:
        module = todo.pop()
        path = file_of(module)
        outside = not is_within(module, *inside) or is_within(module, *FORMAT)
        if module in found or path is None or outside or module == "ffnlab.studies":
            continue
        tree = ast.parse(path.read_bytes())
        found[module] = syntax_digest(tree)
        todo += imported(tree)
    return dict(sorted(found.items()))


def is_within(module: str, *packages: str) -> bool:
    """Whether a module is one of these, or in one of them."""
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def file_of(module: str) -> Path | None:
    """The source of a module or package of ours; None of any other."""
    path = PARENT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def imported(tree: ast.AST) -> Iterator[str]:
    """The modules that a syntax tree imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (home(node.module, alias.name) for alias in node.names)


def home(module: str, name: str) -> str:
    """The module that a name of another one comes from: packages re-export.

    >>> home("ffnlab.learning", "lamb"), home("ffnlab.learning", "noprop")
    ('ffnlab.learning.trust', 'ffnlab.learning.noprop')
    """
    if file_of(f"{module}.{name}"):
        return f"{module}.{name}"
    path = file_of(module)
    if path is None or path.name != "__init__.py":
        return module
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    return home(node.module, alias.name)
    return module


def syntax_digest(tree: ast.AST) -> str:
    """A digest of what code does, as far as its syntax tells.

    >>> syntax_digest(ast.parse("x = 1_000  # many")) == syntax_digest(ast.parse("x = (1000)"))
    True
    """
    text = json.dumps(canonical(tree))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def canonical(value: object) -> object:
    """A syntax tree as lists and strings, without docstrings and what is empty."""
    if isinstance(value, ast.Constant):
        return ["Constant", ascii(value.value)]
    if isinstance(value, ast.AST):
        fields = [(k, v) for k, v in ast.iter_fields(value) if k not in SILENT]
        said = [[k, canonical(v)] for k, v in fields if v is not None and v != []]
        if isinstance(value, ast.JoinedStr):  # Python 3.12 puts empty strings into some
            said = [canonical(part) for part in value.values if not is_empty(part)]
        return [type(value).__name__, *said]
    if isinstance(value, list):
        return [canonical(item) for item in value if not is_text(item)]
    return ascii(value)


def is_empty(part: ast.expr) -> bool:
    """Whether a part of an f-string is an empty string."""
    return isinstance(part, ast.Constant) and part.value == ""


def is_text(item: object) -> bool:
    """Whether a statement is a string and nothing else, as docstrings are."""
    if not isinstance(item, ast.Expr) or not isinstance(item.value, ast.Constant):
        return False
    return isinstance(item.value.value, str)
