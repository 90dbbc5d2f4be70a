"""`python -m pallas_kernels.aot`: compiles every shipped kernel and writes the table.

The table goes into the section "Compiled" of RESULTS.md; the exit status is 1 if any expectation
failed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax

from pallas_kernels.aot.cases import Case, collect
from pallas_kernels.backend import JAX_VERSION

RESULTS = Path(__file__).parent.parent / "RESULTS.md"
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.aot", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this; no table")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    options = parser.parse_args()
    cases = {name: case for name, case in collect().items() if options.only in name}
    if options.list:
        print("\n".join(cases))
        return 0
    rows = compile_all([f"{c.name}@{chip}" for c in cases.values() for chip in ready(c)])
    if not options.only:
        write(cases, rows)
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(rows) - len(wrong)} of {len(rows)} compiled as expected, jax {jax.__version__}")
    return 1 if wrong or not rows else 0


def ready(case: Case) -> tuple[str, ...]:
    """The chips this jax can compile a case for."""
    return case.chips if case.jax <= JAX_VERSION else ()


def compile_all(jobs: list[str]) -> list[dict]:
    """A row for each job, in order.

    Each chip has a process of its own: jaxlib keeps the first architecture that it assembled for.
    """
    chips = dict.fromkeys(job.rsplit("@", 1)[1] for job in jobs)
    rows = [
        row for chip in chips for row in compile_some([j for j in jobs if j.endswith(f"@{chip}")])
    ]
    return sorted(rows, key=lambda row: jobs.index(row["job"]))


def compile_some(jobs: list[str]) -> list[dict]:
    """A row for each job; a process that dies costs the case it died of, the rest goes on."""
    rows: list[dict] = []
    while len(rows) < len(jobs):
        command = [sys.executable, "-m", "pallas_kernels.aot.worker", *jobs[len(rows) :]]
        process = subprocess.run(command, capture_output=True, text=True)
        for line in process.stdout.splitlines():
            if line.startswith('{"job"'):
                rows.append(json.loads(line))
                print(describe(rows[-1]), flush=True)
        if len(rows) < len(jobs):
            error = process.stderr[-400:]
            rows.append({"job": jobs[len(rows)], "wrong": f"the compiler died: {error}"})
            print(describe(rows[-1]), flush=True)
    return rows


def describe(row: dict) -> str:
    """A row as a line of text."""
    if row["wrong"]:
        return f"FAILED {row['job']}: {row['wrong']}"
    if not row["registers"]:
        return f"{row['job']}: compiled"
    return f"{row['job']}: {row['registers']} registers, {row['spill']} bytes spilled"


def write(cases: dict[str, Case], rows: list[dict]) -> None:
    """Replaces the table in RESULTS.md."""
    lines = [
        f"jax {jax.__version__}; every figure of this table is compiled, none measured.",
        "",
        "| kernel | chip | registers (compiled) | spilled bytes (compiled) "
        "| instructions found (compiled) |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        name, chip = row["job"].rsplit("@", 1)
        found = row["wrong"] or ", ".join(cases[name].expect)
        known = bool(row.get("registers"))  # a TPU has no such figures
        registers, spill = (row["registers"], row["spill"]) if known else ("-", "-")
        lines.append(f"| {name} | {chip} | {registers} | {spill} | {found} |")
    text = RESULTS.read_text()
    before, rest = text.split(BEGIN)
    RESULTS.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
