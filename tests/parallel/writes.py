"""Ends a run at each of its changes to the file system, and resumes it.

`python -m tests.parallel.writes OUT`: a run that nothing disturbs, in OUT/0; then for every change
n = 1, 2, … that the process makes by itself (a folder made, a file renamed, flushed or removed) a
run in OUT/n that ends without a word just before that one, and is resumed. Each is a fork of this
process, which starts no jax. Writes [what was to come, status when resumed] of all to
OUT/writes.json, and what a run ended with to OUT/n.json.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab.parallel import Identity, LoopOptions, train
from ffnlab.rule import Rule
from ffnlab.storage.files import write_json
from tests.parallel.forks import status_of

# What a run imports late.
for module in ("orbax.checkpoint", "jax.experimental.multihost_utils"):
    importlib.import_module(module)

CHANGES = ("mkdir", "replace", "rename", "fsync", "unlink", "rmdir", "ftruncate", "pwrite")
ENDED = 86  # exit status of a run that was ended


def end_before(number: int, note: Path) -> None:
    """Lets this process end before its n-th change, whose name and file are noted."""
    left = [number]

    def wrapped(name: str, real: Callable) -> Callable:
        def change(*args: object, **kwargs: object) -> object:
            left[0] -= 1
            if not left[0]:
                file = os.open(note, os.O_WRONLY | os.O_CREAT)
                os.write(file, f"{name} {args[0]}".encode())
                os._exit(ENDED)
            return real(*args, **kwargs)

        return change

    for name in CHANGES:
        setattr(os, name, wrapped(name, getattr(os, name)))


def run(out: Path) -> None:
    """Adds up its batches: six steps, with rows, evaluations and checkpoints between."""
    step = jax.jit(lambda state, batch: (state + batch, {"size": (state + batch).sum()}))
    rule = Rule("sum", lambda model, key: jnp.zeros(3), step, lambda state, inputs: state)
    outcome = train(
        rule,
        None,
        lambda position: np.full(3, position, np.float32),
        6,
        key=jax.random.key(0),
        folder=out,
        resume=True,
        evaluate=lambda state: {"total": float(state.sum())},
        options=LoopOptions(2, 3, 2, progress=False),
        identity=Identity({"what": "a sum"}, lambda table, source, position: []),
    )
    state = np.asarray(outcome.state).tolist()
    write_json(out.with_suffix(".json"), [outcome.position, outcome.metrics, state])


def status(out: Path, number: int | None = None) -> int:
    """Exit status of a run in a process of its own, which ends before its n-th change."""
    child = os.fork()
    if child:
        return status_of(child)
    found = 1
    try:
        file = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(file, stream)
        if number is not None:
            end_before(number, out.with_suffix(".txt"))
        run(out)
        found = 0
    except BaseException:  # noqa: BLE001 the process ends here
        traceback.print_exc()
    finally:
        os._exit(found)


def main(out: Path) -> int:
    """Does what the module says; 0 when the undisturbed run got to its end."""
    whole, found, number = status(out / "0"), [], 1
    while status(out / str(number), number) == ENDED:
        change = (out / f"{number}.txt").read_text()
        found.append([change, status(out / str(number))])
        number += 1
    write_json(out / "writes.json", found)
    return whole


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
