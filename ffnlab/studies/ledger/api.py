"""The page of all public names, `docs/api.md`: each by the first sentence of its docstring."""

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator

import ffnlab
from ffnlab.docstrings import prose

__all__ = ["api_page", "documented"]

SENTENCE = re.compile(r"(.+?[.:])(?:\s|$)")
COMMANDS_OWN = {"bench", "cli", "embedded", "embedded_small", "presets", "studies"}
LEFT_OUT = COMMANDS_OWN | {"compat", "docstrings", "options", "outside", "progress"}
BEGINNING = """\
# All public names

What a package gives, by the first sentence of its docstring, which says shapes, errors and sources
in full (`help(ffnlab.layers.GatedFFN)`). Written by `make ledger`.
"""


def documented() -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules whose names are public, as they are imported, and the names."""
    for name in sorted(set(ffnlab.__all__) - LEFT_OUT):
        module = importlib.import_module(f"ffnlab.{name}")
        if getattr(module, "__all__", None):
            yield module.__name__, tuple(module.__all__)
        for below in pkgutil.iter_modules(getattr(module, "__path__", ())):
            package = importlib.import_module(f"{module.__name__}.{below.name}")
            if below.ispkg and getattr(package, "__all__", None):
                yield package.__name__, tuple(package.__all__)


def api_page() -> str:
    """A table for each module that `documented` gives."""
    parts = [BEGINNING]
    for module, names in documented():
        there = importlib.import_module(module)
        rows = "\n".join(f"| `{name}` | {said(getattr(there, name))} |" for name in names)
        parts.append(
            f"## {module}\n\n{said(there)}\n\n| name | what it is |\n| --- | --- |\n{rows}\n"
        )
    return "\n".join(parts)


def said(thing: object) -> str:
    """The first sentence of a docstring, for a cell of a table.

    >>> said(api_page)
    'A table for each module that `documented` gives.'
    >>> said(3)
    'A constant or an alias of a type.'
    """
    has_own = inspect.ismodule(thing) or inspect.isclass(thing) or inspect.isroutine(thing)
    first = next(iter(prose(thing)), "") if has_own else ""
    found = SENTENCE.match(first)
    sentence = found[1] if found else first or "A constant or an alias of a type."
    return sentence.removesuffix(":").removesuffix(".").replace("|", "\\|") + "."
