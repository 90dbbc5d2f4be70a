"""Time and memory of the main job: `ffnlab compress` on the embedded model, in a process."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ffnlab.storage.files import read_json

__all__ = ["job"]


def job() -> dict[str, float]:
    """Runs the job once.

    Returns:
      "seconds": wall clock, interpreter and imports included; "GiB": the job's largest resident
      set, as its report says.
    Raises:
      CalledProcessError: the job failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "job"
        begin = time.perf_counter()
        command = [sys.executable, "-m", "ffnlab", "compress", "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "GiB": read_json(out / "report.json")["peak_memory"] / 2**30}
