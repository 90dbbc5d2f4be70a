"""`ffnlab launch`: which processes are started, started again, and what becomes of the others."""

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from ffnlab.cli.main import main
from ffnlab.errors import ConfigError, MeshError
from ffnlab.parallel import launch as launching
from ffnlab.parallel import parse_mesh
from ffnlab.parallel.launch import Place, launch, places
from tests.parallel import launch as runs

HERE = Place("127.0.0.1")
# What a run does in a test: says what it was given, then acts by its rank and start.
RUN = """
import json, os, pathlib, signal, sys, time
pairs = [word for word in sys.argv[2:] if word != "--resume"]
given = dict(zip(pairs[::2], pairs[1::2]))
folder, rank = pathlib.Path(sys.argv[1]), int(given["--process-id"])
count, again = int(given["--num-processes"]), "--resume" in sys.argv
number = len(list(folder.glob(f"*-{rank}.json")))
(folder / f"{number}-{rank}.json").write_text(json.dumps({"given": sys.argv[2:], "gpus":
    os.environ.get("CUDA_VISIBLE_DEVICES"), "host": os.environ.get("HOST")}))
print("hello from", rank, flush=True)
"""


def running(folder: Path, body: str) -> list[str]:
    """A command whose processes do what a piece of Python says."""
    script = folder / "run.py"
    script.write_text(RUN + textwrap.dedent(body))
    return [sys.executable, str(script), str(folder)]


def starts(folder: Path) -> list[list[str]]:
    """Arguments by start and rank."""
    found = sorted(folder.glob("*.json"))
    return [[p.stem, *json.loads(p.read_text())["given"]] for p in found]


def test_processes_are_told_who_they_are_and_their_output_is_passed_on(tmp_path, capfd):
    assert launch(running(tmp_path, ""), [HERE] * 3) == 0
    out = capfd.readouterr().out.splitlines()
    assert sorted(out) == [f"[{i}] hello from {i}" for i in range(3)]
    told = starts(tmp_path)
    assert [name for name, *_ in told] == ["0-0", "0-1", "0-2"]
    addresses = {given[given.index("--coordinator") + 1] for _, *given in told}
    assert len(addresses) == 1 and addresses.pop().startswith("127.0.0.1:")
    for i, (_, *given) in enumerate(told):
        assert given[2:] == ["--num-processes", "3", "--process-id", str(i)]


def test_the_survivors_of_a_death_are_started_again_and_go_on(tmp_path, capfd):
    body = """
    if not again and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if not again:
        time.sleep(0.3)
        sys.exit(1)  # the others feel it
    """
    assert launch(running(tmp_path, body), [HERE] * 3, 2) == 0
    again = [given for name, *given in starts(tmp_path) if "--resume" in given]
    assert len(again) == 2 and all("2" == g[g.index("--num-processes") + 1] for g in again)
    error = capfd.readouterr().err
    assert "process 1 (127.0.0.1) died: SIGKILL; 2 left, which go on" in error


def test_one_that_hangs_after_another_ones_death_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(launching, "GRACE", 0.3)
    body = """
    if not again:
        if rank == 0:
            sys.exit(1)
        time.sleep(600)
    """
    begin = time.monotonic()
    assert launch(running(tmp_path, body), [HERE] * 2) == 0
    assert time.monotonic() - begin < 60
    last = starts(tmp_path)[-1]
    assert last[0] == "1-0" and last[last.index("--num-processes") + 1] == "1"


def test_fewer_than_the_least_end_the_run(tmp_path, capfd):
    body = "os.kill(os.getpid(), signal.SIGSEGV) if rank == 2 - int(again) else time.sleep(0.5)"
    assert launch(running(tmp_path, body), [HERE] * 3, 2) == 1
    error = capfd.readouterr().err
    assert "died: SIGSEGV; 2 left, which go on" in error
    assert "1 left, less than 2: it ends; --resume goes on" in error


@pytest.mark.parametrize("status", [2, 3])
def test_what_all_refuse_is_not_tried_again(tmp_path, status):
    assert launch(running(tmp_path, f"sys.exit({status})"), [HERE] * 3) == status
    assert len(starts(tmp_path)) == 3


def test_after_a_death_fewer_are_tried_where_the_mesh_does_not_fit(tmp_path, capfd):
    body = """
    if not again and rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(3 if count in (3, 4) and again else 0 if again else 1)
    """
    assert launch(running(tmp_path, body), [HERE] * 5, 2) == 0
    error = capfd.readouterr().err
    assert "4 processes do not fit" in error and "3 processes do not fit" in error
    (tmp_path / "none").mkdir()
    never = body.replace("count in (3, 4) and again", "again")
    assert launch(running(tmp_path / "none", never), [HERE] * 4, 2) == 1
    assert "no number of processes from 3 down to 2 fits" in capfd.readouterr().err


def test_a_signal_is_passed_on_and_the_run_ends_as_it_does(tmp_path):
    body = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    (folder / f"ready-{rank}").touch()
    time.sleep(600)
    """
    command = running(tmp_path, body)

    def stop() -> None:
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    assert launch(command, [HERE] * 2) == 0
    thread.join()
    assert len(starts(tmp_path)) == 2


def executable(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_under_slurm_one_process_per_host(tmp_path, monkeypatch):
    executable(tmp_path / "scontrol", '[ "$3" = "n[1-3]" ] && printf "n1\\nn2\\nn3\\n"')
    executable(tmp_path / "srun", 'shift 4; HOST=$1; export HOST; shift; exec "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    monkeypatch.delenv("SLURM_STEP_ID", raising=False)
    found = places(None)
    assert [place.host for place in found] == ["n1", "n2", "n3"]
    assert found == places(3) and places(2) == found[:2]
    body = "os.kill(os.getpid(), 9) if not again and rank == 1 else time.sleep(0.3)"
    assert launch(running(tmp_path, body), found) == 0
    assert json.loads((tmp_path / "0-2.json").read_text())["host"] == "n3"
    told = [json.loads((tmp_path / f"1-{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["host"] for each in told] == ["n1", "n3"]  # the host that died is left out
    assert told[0]["given"][1].startswith("n1:")
    with pytest.raises(ConfigError, match=r"processes=4 must lie in 1\.\.3"):
        places(4)
    monkeypatch.setenv("SLURM_STEP_ID", "0")  # within srun: each task would start them all
    with pytest.raises(ConfigError, match="processes is not given"):
        places(None)


def test_gpus_of_a_machine_are_shared(tmp_path, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,0,2")
    assert launch(running(tmp_path, ""), places(2)) == 0
    told = [json.loads((tmp_path / f"0-{rank}.json").read_text())["gpus"] for rank in (0, 1)]
    assert told == ["3,1", "0,2"]
    with pytest.raises(ConfigError, match="processes=3 does not divide the 4 GPUs"):
        places(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    executable(tmp_path / "nvidia-smi", "printf '0\\n1\\n'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [place.variables["CUDA_VISIBLE_DEVICES"] for place in places(2)] == ["0", "1"]
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert [place.variables for place in places(2)] == [{}, {}]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", "2", "--", "generate", "x"], "the command behind -- is 'generate x'"),
        (["-n", "2"], "the command behind -- is 'nothing'"),
        (["-n", "0", "--", "train"], "processes=0 must be at least 1"),
        (["-n", "2", "--min", "3", "--", "train"], r"min=3 must lie in 1..2"),
        (["-n", "2", "--min", "0", "--", "train"], r"min=0 must lie in 1..2"),
        (["-n", "2", "--", "train", "--process-id", "1"], "--process-id is set by `ffnlab launch`"),
        (["-n", "2", "--", "train", "--coordinator=x"], "--coordinator is set by `ffnlab launch`"),
        (["--", "train"], "processes is not given"),
    ],
)
def test_bad_arguments(arguments, said, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setattr(launching, "once", lambda *_: pytest.fail("nothing is started"))
    status = 2
    try:
        status = main(["launch", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    written = capsys.readouterr()
    assert said in written.out + written.err


def test_a_command_that_is_not_there():
    with pytest.raises(ConfigError, match="'nowhere' cannot be started: No such file"):
        launch(["nowhere"], [HERE])


def test_a_mesh_that_does_not_fit_has_an_exit_status_of_its_own(tmp_path):
    with pytest.raises(MeshError, match="needs 512 devices"):
        parse_mesh("dp=512")
    config = runs.write_config(tmp_path, 1)
    config.write_text(config.read_text() + 'mesh = "dp=512"\n')
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 3
    config.write_text(config.read_text().replace("dp=512", "dp=x"))
    assert main(["train", "--config", str(config), "--out", str(tmp_path / "run")]) == 2


# Real runs.


def begun(config: Path, out: Path, count: int, least: int) -> subprocess.Popen:
    """`ffnlab launch` of a run on one device a process; its output is in OUT.log."""
    command = [sys.executable, "-m", "ffnlab", "launch", "-n", str(count), "--min", str(least)]
    command += ["--", "train", "--config", str(config), "--out", str(out)]
    with open(f"{out}.log", "w") as log:
        variables = os.environ | {"XLA_FLAGS": runs.FLAGS, "PYTHONPATH": str(runs.ROOT)}
        process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
    process.log = Path(f"{out}.log")
    return process


def kill(rank: int, out: Path) -> None:
    """Kills the process of that rank."""
    found = subprocess.run(
        ["pgrep", "-f", f"ffnlab train .*--out {out} .*--process-id {rank}"],
        capture_output=True,
        text=True,
        check=True,
    )
    for number in found.stdout.split():
        os.kill(int(number), signal.SIGKILL)


@pytest.mark.faults
def test_a_run_that_loses_processes_goes_on_with_the_rest(tmp_path):
    config = runs.write_config(tmp_path, 240, rate=0.005)
    text = config.read_text().replace("packed = true", "")
    config.write_text(text + 'mesh = "dp=-1"\ndtype = "float32"\n')
    alone = runs.start(config, tmp_path / "alone")
    assert alone.wait(timeout=runs.PATIENCE) == 0, alone.log.read_text()
    out = tmp_path / "run"
    process = begun(config, out, 4, 2)
    runs.wait_for_step(process, out, 30)
    kill(2, out)
    # Of the three that are left, two divide the batch of 8.
    runs.wait_for_step(process, out, 90)
    assert process.wait(timeout=runs.PATIENCE) == 0, process.log.read_text()
    log = process.log.read_text()
    assert "process 2 (127.0.0.1) died: SIGKILL; 3 left" in log and "3 processes do not fit" in log
    lost, whole = runs.losses(out), runs.losses(tmp_path / "alone")
    assert list(lost) == list(whole) == list(range(1, 241))
    assert max(abs(lost[step] - whole[step]) for step in whole) < 1e-5
    from ffnlab.parallel import Goodput

    found = Goodput.read(out)
    assert len(found.parts) == 2 and found.seconds["restarts"] > 0
    assert sum(found.seconds.values()) == pytest.approx(found.wall, rel=0.01)
