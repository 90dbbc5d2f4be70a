"""Talks to `peer_server.py` in an interpreter that has another library."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffnlab.errors import FFNLabError, MissingExtraError
from ffnlab.storage.files import StrPath

__all__ = ["Peer", "peer_python"]

VARIABLE = "FFNLAB_PARITY_PYTHON"
PACKAGES = ("torch", "transformers")


def peer_python(packages: Sequence[str] = PACKAGES) -> str:
    """The interpreter for the peer: what FFNLAB_PARITY_PYTHON names, else this one.

    Args:
      packages: that the peer needs.
    Raises:
      MissingExtraError: the variable is not set and one of the packages is not installed here.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return named
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{' and '.join(missing)} not installed; they come with the extra 'parity' "
            f"(pip install 'ffnlab[parity]'), or {VARIABLE} names an interpreter that has them",
            name=missing[0],
        )
    return sys.executable


class Peer:
    """A directory loaded by another library in its own process; a context manager.

    Attributes:
      about: what it said on loading: dtype, threads, versions.
    """

    def __init__(
        self,
        directory: StrPath,
        *,
        tasks: str = "transformers_peer.py",
        packages: Sequence[str] = PACKAGES,
        threads: int | None = None,
    ):
        """Starts the process and loads what it works on.

        Args:
          directory: what its `load` takes: for `transformers_peer.py` a Hugging Face directory that
            needs nothing of ffnlab.
          tasks: the file beside this one that says what the peer can do.
          packages: that it needs.
          threads: of torch; the CPUs that this process may use when None.
        Raises:
          MissingExtraError: there is no interpreter with the packages (see `peer_python`).
          FFNLabError: the process failed; the message ends with what it said.
        """
        files = (str(Path(__file__).with_name(name)) for name in ("peer_server.py", tasks))
        command = [peer_python(packages), "-W", "ignore", *files]
        self._said = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would fill
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=environment,
        )
        threads = cpus() if threads is None else threads
        self.about = self.ask("load", directory=str(directory), threads=threads)

    def ask(self, do: str, **request: object) -> dict[str, Any]:
        """One request and its answer; the keys are in the file of the tasks.

        Raises:
          FFNLabError: the process ended.
        """
        process = self._process
        try:
            process.stdin.write(json.dumps({"do": do, **request}) + "\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            line = ""
        else:
            line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            process.wait()
            self._said.seek(0)
            said = self._said.read().strip().splitlines()
            self.close()
            raise FFNLabError(f"the peer's process failed at {do!r}: {' '.join(said[-3:])}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        process = self._process
        process.kill()
        with contextlib.suppress(BrokenPipeError):  # a request that it did not read
            process.stdin.close()  # type: ignore[union-attr]
        process.stdout.close()  # type: ignore[union-attr]
        process.wait()
        self._said.close()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
