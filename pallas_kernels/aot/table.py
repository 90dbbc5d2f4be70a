"""The table of RESULTS.md: a row per case and chip, a column per minor version of jax.

A run replaces the column of its own jax and keeps the others; what a column lacks reads
"not compiled". A cell holds registers / spilled bytes, "yes" (a TPU has no such figures), "needs
jax 0.11.2" (the rule of the case's backend), or what failed.
"""

import re
from pathlib import Path

import jax

from pallas_kernels.aot.cases import Case

BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
FIXED = ["kernel", "chip", "instructions found"]
MISSING = "not compiled"


def write(path: Path, cases: dict[str, Case], rows: list[dict]) -> None:
    """Puts the rows of one run into the table.

    Args:
      path: of the text that holds the table between BEGIN and END.
      cases: all cases by name, in the order of the table.
      rows: of `__main__.compile_all`, one for each case and chip.
    """
    before, rest = path.read_text().split(BEGIN)
    old, after = rest.split(END)
    columns = parse(old)
    columns[f"jax {jax.__version__}"] = {tuple(r["job"].rsplit("@", 1)): cell(r) for r in rows}
    kept = {minor(title): title for title in columns}  # the last of each is the newest
    titles = sorted(kept.values(), key=minor)
    lines = [line([*FIXED, *titles]), line(["---"] * (len(FIXED) + len(titles)))]
    for case in cases.values():
        for chip in case.chips:
            cells = [columns[title].get((case.name, chip), MISSING) for title in titles]
            lines.append(line([case.name, chip, ", ".join(case.expect), *cells]))
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}")


def cell(row: dict) -> str:
    """A row of a run as a cell of the table."""
    if row["wrong"]:
        return "FAILED: " + row["wrong"].replace("|", "/").replace("\n", " ")
    if row.get("absent"):
        return row["absent"].split(", ")[0]
    return f"{row['registers']} / {row['spill']}" if row["registers"] else "yes"


def parse(text: str) -> dict[str, dict[tuple[str, str], str]]:
    """The columns of a table by title: cells by case and chip."""
    table = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    if not table or table[0][: len(FIXED)] != FIXED:
        return {}
    titles = table[0][len(FIXED) :]
    return {
        title: {(row[0], row[1]): row[len(FIXED) + i] for row in table[1:]}
        for i, title in enumerate(titles)
    }


def minor(title: str) -> tuple[int, ...]:
    """The first two numbers of a column's title.

    >>> minor("jax 0.12.0.1")
    (0, 12)
    """
    return tuple(map(int, re.findall(r"\d+", title)[:2]))


def line(cells: list[str]) -> str:
    """Cells as a line of the table."""
    return f"| {' | '.join(cells)} |"
