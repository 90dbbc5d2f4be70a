"""What a docstring says of each argument or attribute: the one source of help texts."""

import inspect
import re

__all__ = ["entries", "prose"]

SECTION = re.compile(r"([A-Z]\w+):")
ENTRY = re.compile(r"  (\w[\w, ]*): (.*)")


def prose(documented: object) -> list[str]:
    """The paragraphs of a docstring before its first section, each as one line.

    >>> prose(entries)[0]
    'What a section of a docstring says of each name, as one line.'
    """
    head = re.split(r"(?m)^[A-Z]\w+:$", inspect.getdoc(documented) or "")[0]
    return [" ".join(paragraph.split()) for paragraph in head.split("\n\n") if paragraph.strip()]


def entries(documented: object, section: str) -> dict[str, str]:
    '''What a section of a docstring says of each name, as one line.

    Names that share an entry ("batch, length: of the rows.") get the same text.

    Args:
      documented: a function or class.
      section: "Args" or "Attributes".

    >>> def rows(batch, length):
    ...     """Cuts.
    ...
    ...     Args:
    ...       batch, length: of the
    ...         rows.
    ...     """
    >>> entries(rows, "Args")
    {'batch': 'of the rows.', 'length': 'of the rows.'}
    '''
    found: dict[str, str] = {}
    inside, names = False, []
    for line in (inspect.getdoc(documented) or "").splitlines():
        if SECTION.fullmatch(line):
            inside = line == f"{section}:"
        elif inside and (entry := ENTRY.fullmatch(line)):
            names = entry[1].split(", ")
            found |= dict.fromkeys(names, entry[2])
        elif inside and line.startswith("    "):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
        elif not line.startswith("  "):
            inside = False
    return found
