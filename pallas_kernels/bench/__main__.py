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
    facts = {"device": kind, "date": today, "jax": jax.__version__}

    def keep(found, **more):
        if options.json:
            options.json.write_text(json.dumps(facts | {"rows": found} | more, indent=1))

    found = table(chosen, kind, {} if gpu else {"sets": 2, "turns": 3}, keep)
    print(f"\n{kind}, {today}, jax {jax.__version__}\n\n{HEADER}")
    print("\n".join(map(describe, found)))
    judged = goals.judge(found)
    if gpu:
        print("\n" + "\n".join([goals.HEADER, *map(goals.describe, judged)]))
    keep(found, goals=judged)
    return 0 if found and not any("wrong" in row for row in found) else 1


def table(chosen, kind, options, keep=lambda found: None):
    """Measures rows, those that are asked first before the rest, and prints each as it is done.

    Compiling what ours is compared with takes XLA's tuning of products most of the time. A row that
    fails says why and the rest goes on.

    Args:
      chosen: `Row`s.
      kind: the device's name.
      options: of their `measure`.
      keep: called after each row with all that is found.
    Returns:
      a list of {"task", "name"} with "us", "floor_us", "ratio", "TB/s" and "TFLOP/s", or a reason:
      "absent", "wrong"; in the order of `chosen`.
    """
    found, end = {}, time.monotonic() + 60 * MINUTES
    for row in sorted(chosen, key=lambda row: not row.early):
        found[row.task, row.name] = entry = one(row, kind, options, end)
        print(f"{row.task}, {row.name}: {said(entry)}", flush=True)
        keep(list(found.values()))
    ordered, first = [found[row.task, row.name] for row in chosen], {}
    for entry in ordered:
        if "us" in entry:
            entry["ratio"] = first.setdefault(entry["task"], entry["us"]) / entry["us"]
    return ordered


def one(row, kind, options, end):
    """What measuring a row gave, see `table`; nothing begins after `end`."""
    entry = {"task": row.task, "name": row.name}
    try:
        if time.monotonic() > end:
            raise TimeoutError(f"{MINUTES} minutes are over; pick rows by --only")
        work = row.make()
        seconds = row.measure(work, **options)
    except Absent as reason:
        return entry | {"absent": str(reason)}
    except Exception as error:  # noqa: BLE001
        # Whatever a compiler or the device says is a line of the table.
        return entry | {"wrong": str(error).replace("\n", " ")[:200]}
    least = floor(work, kind)
    entry |= {"us": 1e6 * seconds, "floor_us": 1e6 * least if least else None}
    return entry | {"TB/s": work.nbytes / seconds / 1e12, "TFLOP/s": work.flops / seconds / 1e12}


def said(entry):
    """The time of a row, or why it has none."""
    if "us" in entry:
        return f"{entry['us']:.1f} us"
    return f"not timed: {entry['absent']}" if "absent" in entry else f"failed: {entry['wrong']}"


def describe(entry):
    """A row as a line of the table."""
    start = f"| {entry['task']} | {entry['name']} |"
    if "us" not in entry:
        return f"{start} {said(entry)} | | | | | |"
    us, least = entry["us"], entry["floor_us"]
    floor_, share = (f"{least:.1f}", f"{100 * least / us:.0f} %") if least else ("-", "-")
    return (
        f"{start} {us:.1f} | {entry['TB/s']:.4g} | {entry['TFLOP/s']:.4g} | {floor_} | {share} "
        f"| {entry['ratio']:.2f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
