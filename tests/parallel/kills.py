"""Kills a training run again and again, resumes it, and writes down what happened.

`python -m tests.parallel.kills CONFIG OUT KILLS SEED SAVING LONGEST`: a run that nothing disturbs,
in OUT/whole, and one in OUT/cut that is killed KILLS times (SIGKILL), of which at least SAVING
while a checkpoint is being written, the others within LONGEST milliseconds of their first step. All
but the first kill wait until there is a whole checkpoint to fall back to.
Prints one JSON object per kill, and writes all to OUT/kills.json.
"""

import dataclasses
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from ffnlab.parallel import checkpoints
from ffnlab.storage.files import write_json
from tests.parallel.forks import fork, is_over, status_of
from tests.parallel.launch import rows

TRIES = 4  # per kill, until enough of them fell into a save


def begin(config: Path, out: Path) -> int:
    """Starts or resumes the run in a process of its own; its process id."""
    return fork(Path(f"{out}.log"), "--config", str(config), "--out", str(out), "--resume")


def unfinished(out: Path) -> list[int]:
    """Steps of which a checkpoint was begun and not ended."""
    folder = out / "checkpoint"
    return [s for s in checkpoints.steps(folder) if not checkpoints.is_finished(folder, s)]


@dataclasses.dataclass
class Killed:
    """One kill.

    Attributes:
      step: the newest that was logged.
      behind: that of the newest whole checkpoint, 0 without one.
      saving: whether a save went on.
      ready: seconds from the start to the first step.
    """

    step: int
    behind: int
    saving: bool
    ready: float


def newest(out: Path) -> int:
    """The step of the newest whole checkpoint; 0 without one."""
    folder = out / "checkpoint"
    return max(
        (s for s in checkpoints.steps(folder) if checkpoints.is_finished(folder, s)), default=0
    )


def kill_one(
    config: Path, out: Path, draw: random.Random, in_save: bool, longest: float, early: bool
) -> Killed | None:
    """Resumes the run and kills it at a random moment; None where it ended before that.

    Unless it is `early`, the moment comes when there is a checkpoint.
    """
    before, left, start = len(rows(out)), set(unfinished(out)), time.monotonic()
    child = begin(config, out)
    while len(rows(out)) == before or not rows(out):  # resuming drops what came after
        before = min(before, len(rows(out)))
        if is_over(child):
            return None
        time.sleep(0.005)
    ready = time.monotonic() - start
    while not early and not newest(out):
        if is_over(child):
            return None
        time.sleep(0.005)
    if in_save:
        while not set(unfinished(out)) - left:
            if is_over(child):
                return None
        time.sleep(draw.uniform(0, 0.02))
    else:
        time.sleep(draw.uniform(0, longest))
    if is_over(child):
        return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    step = max((row["step"] for row in rows(out)), default=0)
    return Killed(step, newest(out), bool(set(unfinished(out)) - left), ready)


def main(config: Path, out: Path, kills: int, seed: int, saving: int, longest: int) -> int:
    """Does what the module says; 0 when the killed run got to its end."""
    draw = random.Random(seed)
    whole = status_of(begin(config, out / "whole"))
    found: list[Killed] = []
    for _ in range(TRIES * kills):
        missing = saving - sum(kill.saving for kill in found)
        if len(found) >= kills and missing <= 0:
            break
        in_save = missing > 0 and draw.random() < 0.7
        killed = kill_one(config, out / "cut", draw, in_save, longest / 1000, early=not found)
        if killed is not None:
            found.append(killed)
            print(json.dumps(dataclasses.asdict(killed)), flush=True)
    write_json(out / "kills.json", [dataclasses.asdict(kill) for kill in found])
    return status_of(begin(config, out / "cut")) or whole


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:7])))
