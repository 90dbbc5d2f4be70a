"""The suite for a GPU, a process per kernel: `make gpu-test`.

One fault ends a process's context and nothing else: what is likeliest to work comes first, INT4
decoding last. Every launch is waited for, so that a fault is its own kernel's, and results are
printed as they come. Arguments go to pytest.
"""

import os
import sys
import time
from pathlib import Path

from pallas_kernels import processes

SUITE = Path(__file__).parent
LIMIT = 300  # seconds of a process; in the interpreter, which is slow, an hour
PASSED, NOTHING = 0, 5  # pytest's exit statuses
GROUPS = {
    "rounding": ("test_kernels.py::test_roundings_are_the_references_bits",),
    "sparse": ("test_decoding.py::test_sparse",),
    "w4a8": (
        "test_kernels.py::test_w4a8_matmul",
        "test_kernels.py::test_w4a8_with_a_residual_and_squares",
    ),
    "w4a8, several pieces per block": (
        "test_kernels.py::test_several_pieces_per_block",
        "test_kernels.py::test_several_pieces_per_block_with_a_residual_and_squares",
        "test_kernels.py::test_several_pieces_per_block_with_an_empty_expert",
    ),
    "w4a8 by Triton": ("test_kernels.py::test_w4a8_by_triton",),
    "w4a8, FP8 table": ("test_kernels.py::test_w4a8_table",),
    "w4a8, gated and grouped": (
        "test_kernels.py::test_w4a8_glu",
        "test_kernels.py::test_w4a8_grouped",
    ),
    "grouped": ("test_kernels.py::test_grouped_products_and_gradients",),
    "prefill": (
        "test_decoding.py::test_prefill",
        "test_decoding.py::test_prefill_in_every_form",
    ),
    "decode, 16 bits": ("test_decoding.py::test_decode_of_16_bits",),
    "tuning": ("test_tune.py::test_tuned_configurations_are_right_and_taken",),
    "decode, INT4": ("test_decoding.py::test_decode",),
}


def main(arguments):
    """Runs the groups; returns the exit status: 0 where some pass and none fails."""
    limit = 3600 if os.environ.get("KERNELS_INTERPRETED") else LIMIT
    command = [sys.executable, "-m", "pytest", "-v", "-c", str(SUITE / "pytest.ini")]
    command += ["--rootdir", str(SUITE), "--confcutdir", str(SUITE), *arguments]
    status = {}
    for name, tests in GROUPS.items():
        print(f"\n=== {name} ===", flush=True)
        start, chosen = time.monotonic(), [str(SUITE / test) for test in tests]
        environment = {"CUDA_LAUNCH_BLOCKING": "1", "PYTHONUNBUFFERED": "1"}
        done = processes.run([*command, *chosen], limit, environment=environment)
        status[name] = done, time.monotonic() - start
    print("\nprocess: exit status, seconds")
    for name, (done, seconds) in status.items():
        said = {PASSED: "passed", NOTHING: "nothing passed", None: "took too long"}
        print(f"{name}: {said.get(done, f'failed, {done}')}, {seconds:.0f}")
    ends = {done for done, _ in status.values()}
    return 0 if PASSED in ends and ends <= {PASSED, NOTHING} else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
