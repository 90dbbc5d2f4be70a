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
from collections.abc import Iterator, Sequence
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

    >>> "ffnlab.learning.optimizers.trust" in sources("lamb")
    True
    """
    study = STUDIES[slug]
    inside = ("ffnlab.studies", "ffnlab.bench", f"ffnlab.{study.package}")
    found, todo = {}, {study.module}
    while todo:
        module = todo.pop()
        path = file_of(module)
        if path is None:
            continue
        tree = ast.parse(path.read_bytes())
        found[module] = syntax_digest(tree)
        todo |= {name for name in imported(tree, inside) if counts(name, inside)} - found.keys()
    return dict(sorted(found.items()))


def counts(module: str, inside: Sequence[str]) -> bool:
    """Whether figures come from a module; the package of the studies holds none."""
    is_format = module == "ffnlab.studies" or is_within(module, FORMAT)
    return is_within(module, inside) and not is_format


def is_within(module: str, packages: Sequence[str]) -> bool:
    """Whether a module is one of these, or in one of them."""
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def file_of(module: str) -> Path | None:
    """The source of a module or package of ours; None of any other."""
    path = PARENT.joinpath(*module.split("."))
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def imported(tree: ast.AST, inside: Sequence[str]) -> Iterator[str]:
    """The modules that a syntax tree imports, anywhere; names in some packages are followed."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield home(node.module, alias.name) if is_within(node.module, inside) else name


def home(module: str, name: str) -> str:
    """The module that a name of another one comes from: packages re-export.

    >>> home("ffnlab.learning", "lamb"), home("ffnlab.learning", "noprop")
    ('ffnlab.learning.optimizers.trust', 'ffnlab.learning.noprop')
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
    return hashlib.sha256("\n".join(canonical(tree)).encode()).hexdigest()[:16]


def canonical(tree: ast.AST) -> list[str]:
    """A syntax tree as lines, a node before its parts, without docstrings and what is empty."""
    lines: list[str] = []
    todo: list[object] = [tree]
    while todo:
        value = todo.pop()
        parts: list[object] = []
        if isinstance(value, ast.Constant):
            line = f"Constant {ascii(value.value)}"
        elif isinstance(value, ast.JoinedStr):  # Python 3.12 puts empty strings into some
            parts = [part for part in value.values if getattr(part, "value", None) != ""]
            line = f"JoinedStr {len(parts)}"
        elif isinstance(value, ast.AST):
            fields = [(k, v) for k, v in ast.iter_fields(value) if k not in SILENT]
            said = {k: v for k, v in fields if v is not None and v != []}
            parts, line = list(said.values()), " ".join([type(value).__name__, *said])
        elif isinstance(value, list):
            parts = [item for item in value if not (isinstance(item, ast.Expr) and is_text(item))]
            line = f"list {len(parts)}"
        else:
            line = ascii(value)
        lines.append(line)
        todo += reversed(parts)
    return lines


def is_text(statement: ast.Expr) -> bool:
    """Whether a statement is a string and nothing else, as docstrings are."""
    return isinstance(statement.value, ast.Constant) and isinstance(statement.value.value, str)
