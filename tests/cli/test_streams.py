"""Standard streams that are closed, full, or read by nobody any more."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from ffnlab.cli.main import COMMANDS
from tests.often import often
from tests.parallel import launch

CLOSED = ["".join(d) for n in (1, 2, 3) for d in itertools.combinations("012", n)]
PARTS = [f"{name} {part}" for name in COMMANDS for part in COMMANDS[name].parts]
NO_SPACE = "standard output: No space left on device\n"


def shell(line: str, **options) -> subprocess.CompletedProcess:
    """Runs a line of bash in which `ffnlab` is the command."""
    script = f'ffnlab() {{ "{sys.executable}" -m ffnlab "$@"; }}; {line}'
    return subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, **options
    )


@pytest.mark.parametrize("closed", often(CLOSED, "1", "012"))
def test_every_command_runs_without_standard_streams(tmp_path, closed):
    lines = [f"{name} --help" for name in (*COMMANDS, *PARTS)]
    lines += ["list", "--help", "--version", "", "nix", "list --nix"]
    out = tmp_path / "statuses.json"
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.closed", str(out), closed, *lines],
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    statuses = json.loads(out.read_text())
    assert statuses == {line: 2 if "nix" in line or not line else 0 for line in lines}
    assert "Traceback" not in done.stderr


def test_no_file_gets_the_descriptor_of_a_closed_stream(tmp_path):
    script = f"""
import os, sys
from ffnlab.cli import streams
streams.open_missing()
with open({str(tmp_path / "data")!r}, "wb") as file:
    os.write(1, b"printed")
    os.write(2, b"logged")
    print("printed")
    print("logged", file=sys.stderr)
    file.write(bytes([file.fileno()]))
assert sys.stdin.read() == ""
assert all(os.path.samefile(f"/dev/fd/{{fd}}", os.devnull) for fd in range(3))
"""
    done = subprocess.run(
        ["bash", "-c", '"$0" -c "$1" <&- >&- 2>&-', sys.executable, script], check=False
    )
    assert done.returncode == 0
    content = (tmp_path / "data").read_bytes()
    assert len(content) == 1 and content[0] > 2


def test_open_streams_stay_as_they_are(capfd):
    script = "from ffnlab.cli import streams; streams.open_missing(); print('said')"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    assert capfd.readouterr().out == "said\n"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", ["--version", "--help", "list", "list --help"])
def test_a_full_output_is_an_error_in_one_line(arguments):
    done = shell(f"ffnlab {arguments} >/dev/full")
    command = "ffnlab list" if arguments.startswith("list") else "ffnlab"
    assert (done.returncode, done.stderr) == (2, f"{command}: error: {NO_SPACE}")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", ["nix", "", "list --nix"])
def test_where_nothing_can_be_said_the_status_says_it(arguments):
    done = shell(f"ffnlab {arguments} 2>/dev/full")
    assert done.returncode == 2 and "Traceback" not in done.stdout


@pytest.mark.parametrize("arguments", ["--help", "list", "list --help"])
def test_a_reader_that_has_gone_ends_it_quietly(arguments):
    done = shell(f"ffnlab {arguments} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("streams", "status"), [(">&- 2>&- <&-", 0), ("2>&-", 0), (">/dev/full", 2), ("2>/dev/full", 0)]
)
def test_a_run_without_streams_is_a_run(tmp_path, streams, status):
    config, out = launch.write_config(tmp_path, 30), tmp_path / "out"
    line = f"ffnlab train --config {config} --out {out}"
    done = shell(f"{line} {streams}", env=os.environ | {"XLA_FLAGS": launch.FLAGS})
    assert done.returncode == status, done.stderr
    assert done.stderr == (f"ffnlab train: error: {NO_SPACE}" if status else "")
    again = shell(f"{line} --resume", env=os.environ | {"XLA_FLAGS": launch.FLAGS})
    assert again.returncode == 0 and "bits per byte" in again.stdout, again.stderr
    assert "tried" not in again.stderr, "its checkpoints are whole"


def test_what_orbax_prints_of_errors_that_it_raises_is_left_out():
    script = """
import asyncio, logging, sys
from ffnlab.cli import streams
streams.mute_orbax()
for path in ("/lib/orbax/future.py", "/lib/other/future.py"):
    record = ("absl", logging.ERROR, path, 1, "of " + path, (), None)
    logging.getLogger("absl").handle(logging.LogRecord(*record))
logging.getLogger("asyncio").error("Future exception was never retrieved")
logging.getLogger("asyncio").error("slow")
class Dying:
    def __init__(self, what): self.what = what
    def __del__(self): raise RuntimeError(self.what)
for what in ("Event loop is closed", "another"):
    Dying(what)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    said = [line for line in done.stderr.splitlines() if line]
    assert done.returncode == 0, done.stderr
    assert "orbax" not in done.stderr and "retrieved" not in done.stderr
    assert "closed" not in done.stderr
    assert any("other" in line for line in said) and any("slow" in line for line in said)
    assert any("another" in line for line in said)
