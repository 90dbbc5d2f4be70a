"""A repository's results as a whole: the pages with their tables, and what is wrong with them."""

from collections.abc import Iterator
from pathlib import Path

from ffnlab.errors import FormatError
from ffnlab.studies.ledger.api import api_page
from ffnlab.studies.ledger.recorded import Recorded, changes, read
from ffnlab.studies.ledger.tables import (
    AXES,
    SYSTEMS,
    Results,
    axes_table,
    ledger_page,
    systems_table,
    with_table,
)
from ffnlab.studies.result import PICTURE_LIMIT
from ffnlab.studies.table import STUDIES

__all__ = ["FOLDER", "pages", "problems", "recorded"]

FOLDER = "results"


def recorded(root: Path, *, quick: bool = False) -> Results:
    """What is recorded of every study.

    Args:
      root: of the repository.
      quick: of the quick forms.
    Raises:
      FormatError: a result is damaged.
    """
    return {slug: read(root / FOLDER, slug, quick=quick) for slug in STUDIES}


def pages(root: Path, results: Results) -> dict[Path, str]:
    """The pages that are written, or have tables that are, as they should be.

    Raises:
      FormatError: a page has no place for its table.
    """
    axes = axes_table(results.get("mesh-axes"))
    written = {
        root / FOLDER / "README.md": ledger_page(results),
        root / "docs" / "api.md": api_page(),
    }
    for name, table, place in (
        (SYSTEMS, systems_table(results), "README.md"),
        (AXES, axes, "docs/training.md"),
    ):
        page = root / place
        try:
            written[page] = with_table(page.read_text(encoding="utf-8"), name, table)
        except FormatError as error:
            raise FormatError(f"{place}: {error}") from None
    return written


def problems(root: Path, results: Results) -> Iterator[str]:
    """What is wrong with the results of a repository, a line each; stale ones too."""
    folder = root / FOLDER
    for slug, result in results.items():
        if result is None:
            yield f"{slug} has no result"
            continue
        if changed := changes(result):
            yield f"{slug} is stale: {', '.join(changed)} changed since it was run"
        yield from picture_problems(folder / slug, result)
    for slug, result in recorded(root, quick=True).items():
        if result is None:
            yield f"{slug} has no result of its quick form"
    strange = {path.name for path in folder.glob("*") if path.is_dir()} - set(STUDIES)
    yield from (f"{folder / name} is of no study" for name in sorted(strange))


def picture_problems(folder: Path, result: Recorded) -> Iterator[str]:
    """Pictures that are missing, too large, or of an earlier run."""
    sizes = {file.name: file.stat().st_size for file in folder.glob("*.png")}
    for name in sorted(sizes.keys() | set(result.pictures)):
        if name not in sizes:
            yield f"{folder / name} is missing"
        elif name not in result.pictures:
            yield f"{folder / name} is none of the result's pictures"
        elif sizes[name] > PICTURE_LIMIT:
            yield f"{folder / name} has {sizes[name]:,} bytes, at most {PICTURE_LIMIT:,}"
