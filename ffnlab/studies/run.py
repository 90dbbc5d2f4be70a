"""Runs a study by name and lists the studies: what `ffnlab run` and `ffnlab list` call."""

import dataclasses

from rich.table import Table
from rich.text import Text

from ffnlab.errors import check_seed
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, load
from ffnlab.studies.ledger.sources import sources
from ffnlab.studies.result import Result
from ffnlab.studies.status import last_status, record

__all__ = ["overview", "run_study"]


def run_study(
    slug: str,
    *,
    out: StrPath | None = None,
    quick: bool = False,
    seed: int = 0,
) -> Result:
    """Runs one study, notes how it ended, and writes the digests of its code into the result.

    Args:
      slug: a key of `STUDIES`.
      out: folder for `result.json` and the pictures; None writes nothing.
      quick: the form that ends within 60 s on two cores.
      seed: changes the draw; >= 0.
    Returns:
      the study's result. A claim that does not hold is a finding, not an error.
    Raises:
      SelectionError: no such study.
      ConfigError: a seed that is none.
      Exception: whatever the study raised, after it was noted.
    """
    study = load(slug)
    check_seed(seed)
    code = sources(slug)  # before it runs: a file may be edited in the meantime
    try:
        result = study.run(quick=quick, seed=seed)
        result = dataclasses.replace(result, sources=code).write(out)
    except BaseException as error:
        record(slug, f"failed: {type(error).__name__}", quick=quick, seed=seed)
        raise
    record(slug, result.status, quick=quick, seed=seed)
    return result


def overview() -> Table:
    """All studies as a rich table: slug, title, package and how the last run ended."""
    table = Table()
    for column in ("slug", "title", "package", "last run"):
        table.add_column(column)
    for slug, study in STUDIES.items():
        table.add_row(slug, Text(study.title), study.package, Text(last_status(slug)))
    return table
