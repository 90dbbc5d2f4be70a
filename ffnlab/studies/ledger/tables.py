"""The tables that are written from recorded results: the ledger, of systems, of mesh axes."""

import re
from collections.abc import Iterable, Mapping, Sequence

from ffnlab.errors import FormatError
from ffnlab.studies.ledger.recorded import FULL, Recorded
from ffnlab.studies.table import STUDIES, Study

__all__ = ["AXES", "SYSTEMS", "axes_table", "ledger_page", "marks", "systems_table", "with_table"]

SYSTEMS, AXES = "systems", "axes"  # tables inside other pages
SPECIAL = re.compile(r"([\\|*_<>\[\]~`$])")
NONE_YET = "not run yet"

Results = Mapping[str, Recorded | None]  # slug -> what is recorded


def ledger_page(results: Results) -> str:
    """`results/README.md`: every claim beside its paper's figure, and how each study was run.

    Args:
      results: of every study.
    """
    found = [result for result in results.values() if result is not None]
    claims = [claim for result in found for claim in result.claims]
    return "\n".join(
        [
            "# The ledger of claims",
            "",
            "Written by `make ledger` from the results in this folder, which `ffnlab run --all` "
            "leaves; nothing here is written by hand.",
            f"{sum(claim.holds for claim in claims)} of {len(claims)} claims of "
            f"{len(found)} studies hold. A claim that does not is a finding.",
            "",
            "Of several seeds, ours are means with their range or standard error. How a claim was "
            "decided stands in the study's `result.json`, beside all that was measured.",
            "",
            *markdown(
                ("system", "paper", "claim", "paper's figure", "ours", "basis", "holds"),
                claim_rows(results),
            ),
            "",
            "## How they were run",
            "",
            *markdown(("study", "seed", "minutes", "with", "pictures"), run_rows(results)),
            "",
        ]
    )


def claim_rows(results: Results) -> Iterable[Sequence[str]]:
    """A row for each claim; the paper stands in the first of a study."""
    for slug, result in results.items():
        name, paper = STUDIES[slug].name, paper_of(STUDIES[slug])
        if result is None:
            yield name, paper, NONE_YET, "", "", "", ""
            continue
        for i, claim in enumerate(result.claims):
            texts = (claim.claim, claim.paper, claim.ours, claim.basis)
            holds = "yes" if claim.holds else "**no**"
            yield name, "" if i else paper, *map(escaped, texts), holds


def run_rows(results: Results) -> Iterable[Sequence[str]]:
    """A row for each study that was run."""
    for slug, result in results.items():
        if result is None:
            continue
        pictures = " ".join(
            f"[{name.removesuffix('.png')}]({slug}/{name})" for name in result.pictures
        )
        study = f"[{slug}]({slug}/{FULL})"
        yield study, str(result.seed), f"{result.seconds / 60:.1f}", result.made_with, pictures


def systems_table(results: Results) -> str:
    """The README's table: what each system does, and how many of its claims hold.

    Args:
      results: of every study.
    """
    rows = []
    for slug, result in results.items():
        study = STUDIES[slug]
        name = f"[{study.name}]({study.paper.link})" if study.paper else study.name
        status = NONE_YET if result is None else result.status
        rows.append(
            (name, f"`ffnlab.{study.package}`", study.title, status, f"`ffnlab run {slug}`")
        )
    return "\n".join(markdown(("system", "package", "what it does", "claims hold", "study"), rows))


def axes_table(result: Recorded | None) -> str:
    """What each axis of a mesh costs, from the study `mesh-axes`."""
    if result is None:
        return NONE_YET
    columns = ("axis", "mesh", "products", "parameters", "temporary", "sent a step", "bubble")
    columns += ("loss differs by",)
    rows = [
        [str(row[c]) if isinstance(row[c], str) else f"{row[c]:.3g}" for c in columns]
        for row in result.table
    ]
    return "\n".join(markdown(columns, rows))


def marks(name: str) -> tuple[str, str]:
    """What a table inside a page stands between.

    >>> marks("systems")
    ('<!-- systems: written by make ledger -->', '<!-- end of systems -->')
    """
    return f"<!-- {name}: written by make ledger -->", f"<!-- end of {name} -->"


def with_table(page: str, name: str, table: str) -> str:
    """A page with a table between the marks of it.

    Raises:
      FormatError: the marks are not there, or not once each in this order.
    """
    opening, closing = marks(name)
    before, begin, rest = page.partition(opening)
    _, end, after = rest.partition(closing)
    if not begin or not end or opening in rest or closing in before + after:
        raise FormatError(f"no place for the {name}: {opening} and {closing}, once each")
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


def paper_of(study: Study) -> str:
    """A study's paper as a link; nothing of a comparison."""
    if study.paper is None:
        return ""
    title, year, link = study.paper
    return f"[{escaped(title)}]({link}) ({year})"


def escaped(text: str) -> str:
    """A text without line breaks and marks of Markdown, for a cell.

    >>> escaped("ratio = ||x||")
    'ratio = \\\\|\\\\|x\\\\|\\\\|'
    """
    return SPECIAL.sub(r"\\\1", " ".join(text.split()))


def markdown(names: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [names, ["---"] * len(names), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
