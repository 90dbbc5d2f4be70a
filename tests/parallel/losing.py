"""A run of several processes that loses one of them, and is started again.

`python -m tests.parallel.losing CONFIG OUT COUNT VICTIM HEARTBEAT`: writes OUT/lost.json with the
exit statuses of the processes that were left, seconds until they had all ended, and the statuses of
the second start. Their output is in OUT/first-I.log and OUT/second-I.log.
"""

import os
import signal
import sys
import time
from pathlib import Path

from ffnlab.storage.files import write_json
from tests.parallel.forks import fork, status_of
from tests.parallel.launch import PATIENCE, free_port, rows

KILL_AT = 12  # the step after which it dies


def start(name: str, config: Path, out: Path, count: int, heartbeat: int) -> list[int]:
    """Starts or resumes all processes of the run."""
    common = ["--config", str(config), "--out", str(out / "run"), "--resume"]
    common += ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", str(count)]
    common += ["--heartbeat", str(heartbeat)]
    logs = [out / f"{name}-{i}.log" for i in range(count)]
    return [fork(log, *common, "--process-id", str(i)) for i, log in enumerate(logs)]


def main(config: Path, out: Path, count: int, victim: int, heartbeat: int) -> None:
    """Does what the module says."""
    children = start("first", config, out, count, heartbeat)
    deadline = time.monotonic() + PATIENCE
    while not any(row["step"] >= KILL_AT for row in rows(out / "run")):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    os.kill(children[victim], signal.SIGKILL)
    begin = time.monotonic()
    left = [status_of(child) for i, child in enumerate(children) if i != victim]
    found = {"left": left, "seconds": time.monotonic() - begin, "rows": len(rows(out / "run"))}
    found["again"] = [status_of(c) for c in start("second", config, out, count, heartbeat)]
    write_json(out / "lost.json", found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:6]))
