"""What tests of the ledger share: results of studies, and folders of them as runs leave them."""

import functools
from pathlib import Path

from ffnlab.storage.files import sealed, write_json
from ffnlab.studies.ledger.recorded import FULL, QUICK
from ffnlab.studies.ledger.sources import sources
from ffnlab.studies.result import Claim, Result

code_of = functools.cache(sources)


def claim(words: str, holds: bool = True, **options) -> Claim:
    """A claim of one seed that says hardly anything."""
    fields = {"paper": "the paper's", "ours": "ours", "evidence": "seen", "seeds": 1}
    return Claim(claim=words, holds=holds, **fields | options)


def result(slug: str, *claims: Claim, **options) -> Result:
    """A result of a study as `ffnlab run SLUG` gives it, with one picture."""
    fields = {
        "title": "t",
        "settings": {"size": 3},
        "seed": 0,
        "quick": False,
        "seconds": 90.0,
        "versions": {"python": "3.11.7", "jax": "0.10.2"},
        "sources": code_of(slug),
        "pictures": {"line": print},
    }
    return Result(slug=slug, claims=claims or [claim("it works")], **fields | options)


def leave(found: Result, folder: Path, name: str = FULL) -> None:
    """Writes what a result's `write` does, with nothing drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    for stem in found.pictures:
        (folder / f"{stem}.png").write_bytes(b"a picture")
    write_json(folder / name, sealed(found.as_json()))


def record(folder: Path, slug: str, *claims: Claim, quick: bool = False, **options) -> Result:
    """Writes a result as `ffnlab run --all` leaves it."""
    found = result(slug, *claims, quick=quick, **options | ({"pictures": {}} if quick else {}))
    leave(found, folder / slug, QUICK if quick else FULL)
    return found
