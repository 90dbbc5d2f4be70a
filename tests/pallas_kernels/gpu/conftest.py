"""The suite that a machine with a GPU runs: `make gpu-test`.

Without a GPU every test is skipped with that reason, and the suite fails: nothing was shown.
KERNELS_INTERPRETED=sm90 (or sm80) runs it anywhere on small shapes, with the kernels of that chip
in Pallas' interpreter, which checks the suite itself (`test_gpu_suite.py`).
"""

import os

import jax
import pytest

CHIP = os.environ.get("KERNELS_INTERPRETED")


@pytest.fixture
def interpreted():
    """Whether the kernels run in the interpreter."""
    return bool(CHIP)


@pytest.fixture
def kernel():
    """The name of the backend under test for a kernel of Hopper, or of Ampere and Ada."""
    from pallas_kernels.backend import device

    if CHIP:
        return f"{CHIP}_interpret"
    platform, capability = device()
    if platform != "gpu" or capability is None:
        pytest.skip(f"no NVIDIA GPU here: jax finds {jax.devices()[0].device_kind}")
    return {9: "sm90", 8: "sm80"}.get(capability[0]) or pytest.skip(
        f"no kernel for compute capability {capability[0]}.{capability[1]}"
    )


@pytest.fixture
def large(interpreted):
    """Factor of the shapes: 1 in the interpreter."""
    return 1 if interpreted else 8


def pytest_sessionfinish(session):
    """A run in which every test was skipped is no pass."""
    report = session.config.pluginmanager.get_plugin("terminalreporter")
    if session.exitstatus == 0 and report is not None and not report.stats.get("passed"):
        session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED
