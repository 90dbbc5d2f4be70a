"""`python -m pallas_kernels.first`: the stages one after another, a page, and JSON.

What a stage says is kept as it comes, so that one that dies or is ended leaves what it had found.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from pallas_kernels import processes
from pallas_kernels.first.stages import STAGES
from pallas_kernels.first.worker import NO_GPU

MINUTES = 9.0  # of all stages; in the interpreter, which is slow and ends, hours
TAIL = 600  # letters of what a failed stage printed last


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m pallas_kernels.first", description=__doc__)
    parser.add_argument("--interpret", action="store_true", help="anywhere, on tiny shapes, slowly")
    parser.add_argument("--only", default="", help="stages whose name contains this")
    parser.add_argument("--json", type=Path, help="also write what was found to this file")
    options = parser.parse_args(arguments)
    scale = 60 if options.interpret else 1
    found, end = [], time.monotonic() + 60 * MINUTES * scale
    for number, stage in enumerate(STAGES):
        if options.only not in stage.name:
            continue
        left = min(stage.seconds * scale, end - time.monotonic())
        found.append(one(number, left, options.interpret))
        print(page(found[-1:]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))
        if found[-1]["status"] == NO_GPU:
            return 1
    return 0 if found and all(stage["status"] == 0 for stage in found) else 1


def one(number, seconds, interpret):
    """What the process of a stage found.

    Args:
      number: of the stage.
      seconds: that are left for it.
      interpret: whether kernels run in the interpreter.
    Returns:
      {"stage", "status", "seconds", "found", "said"}: the exit status, None where it took too long;
      what it showed; and the end of what else it printed, where it failed.
    """
    stage, start = STAGES[number], time.monotonic()
    result: dict[str, object] = {"stage": stage.name, "status": None, "seconds": 0.0}
    result |= {"found": [], "said": ""}
    if seconds < 1:
        return result | {"said": f"{MINUTES} minutes are over"}
    command = [sys.executable, "-m", "pallas_kernels.first.worker", str(number)]
    environment = {"CUDA_LAUNCH_BLOCKING": "1"} if stage.blocking else {}
    with tempfile.TemporaryFile("w+") as output:
        result["status"] = processes.run(
            [*command, *(["interpret"] if interpret else [])],
            seconds,
            environment=environment,
            output=output,
        )
        output.seek(0)
        lines = output.read().splitlines()
    result["seconds"] = round(time.monotonic() - start, 1)
    result["found"] = [json.loads(line) for line in lines if line.startswith('{"what"')]
    if result["status"] != 0:
        result["said"] = "\n".join(x for x in lines if not x.startswith('{"what"'))[-TAIL:]
    return result


def page(found):
    """Stages as text: a line for each finding."""
    lines = []
    for stage in found:
        status = {0: "ok", None: "took too long"}.get(stage["status"], "FAILED")
        lines.append(f"{stage['stage']}: {status}, {stage['seconds']} s {stage['said']}".rstrip())
        for fact in stage["found"]:
            facts = {name: value for name, value in fact.items() if name != "what"}
            lines.append(f"  {fact['what']}: " + ", ".join(map(shown, facts, facts.values())))
    return "\n".join(lines)


def shown(name, value):
    """A fact in few letters."""
    if isinstance(value, float):
        return f"{name} {value:.4g}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "; ".join(f"{kernel} {us:.1f}" for kernel, us in value)
    return f"{name} {value}"


if __name__ == "__main__":
    sys.exit(main())
