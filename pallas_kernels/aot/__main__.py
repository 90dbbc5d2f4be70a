"""`python -m pallas_kernels.aot`: compiles every shipped kernel and writes the table.

The figures go into this jax's column of the table in RESULTS.md, section "Compiled"; the exit
status is 1 if any expectation failed.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import jax

from pallas_kernels.aot import table
from pallas_kernels.aot.cases import Case, collect, too_old

RESULTS = Path(__file__).parent.parent / "RESULTS.md"


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
    absent = refused(cases)
    jobs = [f"{c.name}@{chip}" for c in cases.values() for chip in c.chips]
    # A program of several kernels: they may have been compiled in this process, which keeps them
    # and writes no PTX again.
    alone = {f"{c.name}@{chip}" for c in cases.values() for chip in c.chips if c.launches}
    rows = compile_all([job for job in jobs if job not in absent], alone)
    for job, reason in absent.items():
        print(f"{job}: {reason}")
    if not options.only:
        late = [{"job": job, "wrong": "", "absent": absent[job]} for job in absent]
        table.write(RESULTS, cases, rows + late)
    wrong = [row for row in rows if row["wrong"]]
    print(
        f"{len(rows) - len(wrong)} of {len(rows)} compiled as expected, jax {jax.__version__}; "
        f"{len(absent)} need a newer jax"
    )
    return 1 if wrong or not rows else 0


def refused(cases: dict[str, Case]) -> dict[str, str]:
    """The jobs that this jax cannot compile, by the rules of their backends, and the reasons."""
    pairs = [(case, chip) for case in cases.values() for chip in case.chips]
    reasons = {f"{case.name}@{chip}": too_old(case, chip) for case, chip in pairs}
    return {job: reason for job, reason in reasons.items() if reason is not None}


def compile_all(jobs: list[str], alone: Collection[str] = ()) -> list[dict]:
    """A row for each job, in order.

    Each chip has a process of its own, since jaxlib keeps the first architecture that it assembled
    for, and so has each job of `alone`.
    """
    groups: dict[str, list[str]] = {}
    for job in jobs:
        groups.setdefault(job if job in alone else job.rsplit("@", 1)[1], []).append(job)
    rows = [row for group in groups.values() for row in compile_some(group)]
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


if __name__ == "__main__":
    sys.exit(main())
