"""One study per paper: the smallest honest experiment that shows the paper's claims.

A study module has `run(*, out=None, quick=False, seed=0) -> Result` and is built from the public
API only, so that it is also the worked example of its method. Methods, models and losses do not
belong here. `table.py` is the list that `ffnlab list` prints; modules are imported by `load`.
"""

import difflib
import importlib
from types import ModuleType

from ffnlab.errors import SelectionError
from ffnlab.studies.status import last_status
from ffnlab.studies.table import STUDIES, Paper, Study

__all__ = ["STUDIES", "Paper", "Study", "last_status", "load"]


def load(slug: str) -> ModuleType:
    """Imports the module of a study.

    Args:
      slug: a key of `STUDIES`.
    Returns:
      the module; `load(slug).run(quick=True)` runs it.
    Raises:
      SelectionError: no such study; the message lists them, the nearest name first.

    >>> load("finercut").__name__
    'ffnlab.studies.finercut'
    """
    if slug not in STUDIES:
        near = difflib.get_close_matches(slug, STUDIES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise SelectionError(f"no study {slug!r}; {hint}there are: {', '.join(STUDIES)}")
    return importlib.import_module(STUDIES[slug].module)
