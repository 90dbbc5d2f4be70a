"""The suite for a GPU, run in Pallas' interpreter: its own code is known to work."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from pallas_kernels import processes
from pallas_kernels.backend import INTERPRETER, JAX_VERSION

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "tests" / "pallas_kernels" / "gpu"
SPEC = importlib.util.spec_from_file_location("run", SUITE / "run.py")
suite = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(suite)
# Why a test of the suite may be skipped, by the chip whose kernels are interpreted.
REASONS = {
    "sm90": {"the Triton kernel is for Ampere and Ada"},
    "sm80": {
        "attention's kernels need Hopper",
        "grouped products have a kernel on Hopper only",
        "the kernel of Ampere and Ada has no table",
    },
}


def run(chip: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the suite as `make gpu-test` does, interpreted unless the chip is empty."""
    command = [sys.executable, SUITE / "run.py", "-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERNELS_INTERPRETED": chip}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


def test_every_test_of_the_suite_is_in_one_process():
    written = [
        f"{path.name}::{function.name}"
        for path in SUITE.glob("test_*.py")
        for function in ast.parse(path.read_text()).body
        if isinstance(function, ast.FunctionDef) and function.name.startswith("test_")
    ]
    assert sorted(test for group in suite.GROUPS.values() for test in group) == sorted(written)


def test_a_process_that_dies_or_hangs_costs_itself(monkeypatch, capfd, tmp_path):
    (tmp_path / "test_good.py").write_text("def test_good(): pass\n")
    (tmp_path / "test_dies.py").write_text("import os\ndef test_dies(): os.abort()\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(suite, "SUITE", tmp_path)
    groups = {name: (f"test_{name}.py",) for name in ("dies", "good")}
    monkeypatch.setattr(suite, "GROUPS", groups)
    assert suite.main(["-p", "no:cacheprovider"]) == 1
    said = capfd.readouterr().out
    assert "test_good PASSED" in said
    assert re.search(r"dies: failed, -6, \d+\ngood: passed, \d+\n", said)
    monkeypatch.setattr(suite, "GROUPS", {"good": groups["good"]})
    for ends, status in (([0], 0), ([0, 5], 0), ([5], 1), ([0, None], 1), ([0, 1], 1)):
        monkeypatch.setattr(suite, "GROUPS", dict.fromkeys(map(str, range(len(ends))), ()))
        told = iter(ends)
        monkeypatch.setattr(suite.processes, "run", lambda *_, **__: next(told))  # noqa: B023
        assert suite.main([]) == status
    assert "0: passed, 0\n1: took too long, 0\n" in capfd.readouterr().out


def ended(stat):
    """Whether a process is gone, or waits for a parent that reads its status."""
    try:
        return stat.read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_command_that_takes_too_long_is_ended_with_what_it_started(tmp_path):
    started = tmp_path / "child"
    command = ["sh", "-c", f"sleep 99 & echo $! > {started}; echo said before; wait"]
    with open(tmp_path / "output", "w+") as output:
        assert processes.run(command, 2, environment={}, output=output) is None
        output.seek(0)
        assert output.read() == "said before\n"
    child = Path(f"/proc/{started.read_text().strip()}/stat")
    for _ in range(500):  # it is killed with its group; the kernel ends it when it next runs
        if ended(child):
            break
        time.sleep(0.01)
    assert ended(child)
    code = "import os; raise SystemExit(int(os.environ['GIVEN']))"
    assert processes.run([sys.executable, "-c", code], 60, environment={"GIVEN": "7"}) == 7


@pytest.mark.slow
@pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason=f"jax {jax.__version__} has no interpreter for GPU kernels"
)
@pytest.mark.parametrize("chip", REASONS)
def test_every_test_runs_in_the_interpreter(chip):
    done = run(chip)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", done.stdout, re.MULTILINE)
    assert set(skipped) == REASONS[chip] and " passed" in done.stdout


@pytest.mark.slow
def test_a_machine_without_a_gpu_is_no_pass():
    done = run()
    assert done.returncode != 0 and "no NVIDIA GPU here: jax finds cpu" in done.stdout
