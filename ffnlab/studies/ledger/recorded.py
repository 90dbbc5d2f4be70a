"""Results of studies as they were recorded: reading them back, and what has changed since."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ffnlab.errors import FormatError
from ffnlab.storage.files import read_json, unsealed
from ffnlab.studies.ledger.sources import sources
from ffnlab.studies.result import Claim

__all__ = ["FULL", "QUICK", "Recorded", "changes", "differences", "file_of", "read"]

FULL, QUICK = "result.json", "quick.json"


class Recorded(NamedTuple):
    """A result that was written; see `ffnlab.studies.result.Result` for what each part is."""

    slug: str
    seed: int
    quick: bool
    settings: Mapping[str, object]
    seconds: float
    versions: Mapping[str, str]
    sources: Mapping[str, str]
    claims: Sequence[Claim]
    table: Sequence[Mapping[str, object]]
    pictures: Sequence[str]

    @property
    def text(self) -> object:
        """What identifies the text that it was measured on; None where there is none."""
        return self.settings.get("text")

    @property
    def made_with(self) -> str:
        """Versions in one line."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())

    @property
    def status(self) -> str:
        """`'m of n'` claims hold."""
        return f"{sum(claim.holds for claim in self.claims)} of {len(self.claims)}"


def file_of(folder: Path, slug: str, *, quick: bool = False) -> Path:
    """Where the result of a study is recorded, of its full or its quick form."""
    return folder / slug / (QUICK if quick else FULL)


def read(folder: Path, slug: str, *, quick: bool = False) -> Recorded | None:
    """Reads the recorded result of a study.

    Args:
      folder: of all results.
      slug: the study.
      quick: of its quick form.
    Returns:
      None where nothing is recorded.
    Raises:
      FormatError: the file is not as it was written, or is of another study or form.
    """
    file = file_of(folder, slug, quick=quick)
    try:
        content = unsealed(read_json(file), str(file))
    except FileNotFoundError:
        return None
    try:
        content["claims"] = [Claim(**claim) for claim in content["claims"]]
        found = Recorded(**{name: content[name] for name in Recorded._fields})
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{file} is no result of a study: {error}") from None
    if (found.slug, found.quick) != (slug, quick):
        form = "quick" if found.quick else "full"
        raise FormatError(f"{file} is of a {form} run of {found.slug}")
    return found


def changes(found: Recorded) -> list[str]:
    """The modules that have changed since a result was recorded; none where it is not stale.

    Args:
      found: of a study that there is.
    """
    old, new = dict(found.sources), sources(found.slug)
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def differences(old: Sequence[Claim], new: Sequence[Claim]) -> list[str]:
    """What came out otherwise than it was recorded, a line for each claim.

    Args:
      old: claims as they were recorded.
      new: claims of another run of the same study.

    >>> was = Claim("a < b", "-", "1 < 2", True, "seen", seeds=0)
    >>> differences([was], [Claim("a < b", "-", "3 < 2", False, "seen", seeds=0)])
    ['"a < b" held (1 < 2) and does not now (3 < 2)']
    """
    before, after = ({claim.claim: claim for claim in claims} for claims in (old, new))
    lines = []
    for words, was in before.items():
        now = after.get(words)
        if now is None:
            lines.append(f'"{words}" is no longer claimed')
        elif now.holds != was.holds:
            verdict = "held" if was.holds else "did not hold"
            change = "does not now" if was.holds else "does now"
            timed = ", timed" if now.timed else ""
            lines.append(f'"{words}" {verdict} ({was.ours}) and {change} ({now.ours}){timed}')
    return lines + [f'"{words}" was not claimed' for words in after if words not in before]
