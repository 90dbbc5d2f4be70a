"""`make ledger` and `make ledger-check`: `python -m ffnlab.studies.ledger [--check]`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ffnlab.errors import FormatError
from ffnlab.storage.files import atomic_write
from ffnlab.studies.ledger.pages import pages, problems, recorded

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables and lists what is wrong; with --check only lists it, and returns 1."""
    parser = argparse.ArgumentParser(prog="ledger", description="Writes tables from results.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail on any problem")
    parser.add_argument("--root", type=Path, default=Path(), help="of the repository")
    options = parser.parse_args(arguments)
    try:
        results = recorded(options.root)
        wanted = pages(options.root, results)
        found = list(problems(options.root, results))
    except (FormatError, OSError) as error:
        print(f"ledger: error: {error}", file=sys.stderr)
        return 2
    for page, text in wanted.items():
        if page.is_file() and page.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            found.append(f"{page} differs from the results: make ledger")
            continue
        with atomic_write(page, "w") as file:
            file.write(text)
        print(f"written: {page}")
    for problem in found:
        print(problem)
    return int(options.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
