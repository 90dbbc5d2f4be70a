"""The suite for a GPU, run in Pallas' interpreter: its own code is known to work."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from pallas_kernels.backend import INTERPRETER, JAX_VERSION

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "tests" / "pallas_kernels" / "gpu"
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
    command = [sys.executable, "-m", "pytest", "-c", SUITE / "pytest.ini", "--rootdir", SUITE]
    command += ["--confcutdir", SUITE, "-p", "no:cacheprovider", SUITE]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "KERNELS_INTERPRETED": chip}
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)


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
