"""`python -m pallas_kernels.bench`: times ours beside XLA's and torch's on the GPU at hand.

Every row counts only with the device it was timed on; goals that were set for an H200 are judged
by what was measured. Most of the time goes into compiling; rows that have not begun after `MINUTES`
are left out.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax

from pallas_kernels.backend import device
from pallas_kernels.bench import goals
from pallas_kernels.bench.measure import Absent, floor
from pallas_kernels.bench.rows import rows

HEADER = (
    "| task | by | us (measured) | TB/s (measured) | TFLOP/s (measured) | us (floor) "
    "| of the floor | times the first |\n|---|---|---|---|---|---|---|---|"
)
MINUTES = 8.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--only", default="", help="rows whose task or name contains this")
    parser.add_argument("--list", action="store_true", help="names of the rows")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    chosen = [row for row in rows() if options.only in f"{row.task}, {row.name}"]
    if options.list:
        print("\n".join(f"{row.task}, {row.name}" for row in chosen))
        return 0
    kind, gpu = jax.devices()[0].device_kind, device()[0] == "gpu"
    if not gpu:
        able = [row for row in chosen if row.anywhere]
        print(
            f"no GPU here ({kind}): {len(able)} of {len(chosen)} rows can run, XLA's for few tokens"
        )
        chosen = able
    today = datetime.date.today().isoformat()
    print(f"\n{kind}, {today}, jax {jax.__version__}\n\n{HEADER}")
    found = table(chosen, kind, {} if gpu else {"sets": 2, "turns": 3})
    judged = goals.judge(found)
    if gpu:
        print("\n" + "\n".join([goals.HEADER, *map(goals.describe, judged)]))
    if options.json:
        facts = {"device": kind, "date": today, "jax": jax.__version__}
        facts |= {"rows": found, "goals": judged}
        options.json.write_text(json.dumps(facts, indent=1))
    return 0 if found and not any("wrong" in row for row in found) else 1


def table(chosen, kind, options):
    """Measures rows and prints a line for each; one that fails says why and the rest goes on.

    Args:
      chosen: `Row`s.
      kind: the device's name.
      options: of their `measure`.
    Returns:
      a list of {"task", "name"} with "us", "floor_us" and "ratio", or a reason: "absent", "wrong".
    """
    found, first, end = [], {}, time.monotonic() + 60 * MINUTES
    for row in chosen:
        try:
            if time.monotonic() > end:
                raise TimeoutError(f"{MINUTES} minutes are over; pick rows by --only")
            work = row.make()
            seconds = row.measure(work, **options)
        except Absent as reason:
            found.append({"task": row.task, "name": row.name, "absent": str(reason)})
            print(f"| {row.task} | {row.name} | not timed: {reason} | | | | | |", flush=True)
            continue
        except Exception as error:  # noqa: BLE001
            # Whatever a compiler or the device says is a line of the table.
            text = str(error).replace("\n", " ")[:200]
            found.append({"task": row.task, "name": row.name, "wrong": text})
            print(f"| {row.task} | {row.name} | failed: {text} | | | | | |", flush=True)
            continue
        least = floor(work, kind)
        first.setdefault(row.task, seconds)
        entry = {"task": row.task, "name": row.name, "us": 1e6 * seconds}
        entry |= {"floor_us": 1e6 * least if least else None, "ratio": first[row.task] / seconds}
        found.append(entry)
        print(describe(entry, work), flush=True)
    return found


def describe(entry, work):
    """A measured row as a line of the table."""
    us, least = entry["us"], entry["floor_us"]
    floor_, share = (f"{least:.1f}", f"{100 * least / us:.0f} %") if least else ("-", "-")
    return (
        f"| {entry['task']} | {entry['name']} | {us:.1f} | {work.nbytes / us / 1e6:.4g} "
        f"| {work.flops / us / 1e6:.4g} | {floor_} | {share} | {entry['ratio']:.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
