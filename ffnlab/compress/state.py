"""What an interrupted job needs to go on: `OUT/.resume`.

`run.json` says which job it is (digests of recipe, model and text) and what was measured after each
finished stage; one npz per stage holds its statistics as `ffnlab.transform.calibrate` saves them,
at the end of every pass. A stage that had finished is not calibrated again, only rewritten; one
that had not goes on at its last pass. All files are written atomically.
"""

import dataclasses
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from ffnlab.errors import ConfigError, FormatError
from ffnlab.storage.files import read_json, write_json

__all__ = ["FOLDER", "Interrupted", "State", "begin"]

FOLDER = ".resume"
RUN_FILE = "run.json"
FORMAT = 1
UNSAFE = re.compile(r"[^\w.-]+", re.ASCII)  # in the name of a file
LONGEST = 80
Interrupted = Literal["refuse", "resume", "restart"]


@dataclasses.dataclass
class State:
    """The state of one job on disk.

    Attributes:
      folder: OUT/.resume.
      identity: what the job is, name -> digest or setting.
      measured: what was measured, by key ("original", "stage 1", …), as JSON.
    """

    folder: Path
    identity: Mapping[str, object]
    measured: dict[str, dict[str, object]]

    @property
    def file(self) -> Path:
        """Where identity and measurements are."""
        return self.folder / RUN_FILE

    def record(self, key: str, measurement: dict[str, object]) -> None:
        """Keeps one measurement; it is on disk when this returns."""
        self.measured[key] = measurement
        self.write()

    def write(self) -> None:
        """Writes `run.json`."""
        content = {"format": FORMAT, "identity": dict(self.identity), "measured": self.measured}
        write_json(self.file, content)

    def checkpoint(self, number: int, name: str) -> Path:
        """The file for the statistics of a stage; names from outside may have any character."""
        return self.folder / f"{number:02}-{UNSAFE.sub('.', name)[:LONGEST]}.npz"

    def finish(self) -> None:
        """Removes the state: the job is done."""
        shutil.rmtree(self.folder)


def begin(
    out: Path, identity: Mapping[str, object], *, interrupted: Interrupted = "refuse"
) -> State:
    """Begins a job in a folder, or takes up the one that was interrupted there.

    Args:
      out: the job's folder; made when missing.
      identity: what the job is, JSON values.
      interrupted: what to do with an interrupted job there: "refuse" to start, "resume" it, or
        "restart", which throws it away. When there is none, all three begin.
    Raises:
      ConfigError: an interrupted job is there and is refused, or what is to be resumed is another
        job.
      FormatError: the state is damaged.
    """
    folder = out / FOLDER
    if folder.exists() and interrupted == "restart":
        shutil.rmtree(folder)
    if (folder / RUN_FILE).exists():
        if interrupted != "resume":
            raise ConfigError(
                f"{out} holds an interrupted run: --resume continues it, --restart throws it away, "
                "--out writes elsewhere"
            )
        return State(folder, identity, read(folder / RUN_FILE, identity))
    folder.mkdir(parents=True, exist_ok=True)
    state = State(folder, identity, {})
    state.write()
    return state


def read(file: Path, identity: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The measurements of an interrupted job, which must be the one described by `identity`."""
    found = read_json(file)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise FormatError(f"{file}: not the state of a run that this version can resume")
    earlier, measured = found.get("identity"), found.get("measured")
    if not isinstance(earlier, dict) or not isinstance(measured, dict):
        raise FormatError(f"{file}: 'identity' and 'measured' must be objects")
    changed = sorted(
        key for key in earlier.keys() | identity.keys() if earlier.get(key) != identity.get(key)
    )
    if changed:
        raise ConfigError(
            f"{file.parent.parent} was begun with another {', '.join(changed)}: put back what it "
            "was to go on, or begin anew with --restart"
        )
    return measured
