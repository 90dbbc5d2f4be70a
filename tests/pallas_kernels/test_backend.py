"""Choosing a kernel's implementation: order, platforms, and all reasons at once."""

import pytest

from pallas_kernels.aot import topology
from pallas_kernels.backend import Backend, choose, device, lazy, named_capability


def refuse_odd(*, rows):
    return f"rows={rows} is odd" if rows % 2 else None


FAST = Backend("sm90", print, platforms=("gpu",), refuse=refuse_odd)
TPU = Backend("tpu", print, platforms=("tpu",), refuse=refuse_odd)
ANY = Backend("xla", print)
SLOW = Backend("reference", print, automatic=False)


def test_the_first_that_can_run_is_taken():
    table = (FAST, TPU, ANY, SLOW)
    assert choose(table, platform="gpu", rows=2) is FAST
    assert choose(table, platform="gpu", rows=3) is ANY
    assert choose(table, platform="tpu", rows=2) is TPU
    assert choose(table, platform="cpu", rows=2) is ANY
    assert choose(table, rows=2) is ANY  # this machine


def test_by_name():
    table = (FAST, ANY, SLOW)
    assert choose(table, "reference", platform="gpu", rows=2) is SLOW
    assert choose(table, "sm90", platform="gpu", rows=2) is FAST


def test_refusals_say_why():
    with pytest.raises(ValueError, match="sm90: runs on gpu, this is cpu"):
        choose((FAST, ANY), "sm90", platform="cpu", rows=2)
    with pytest.raises(ValueError, match="sm90: rows=3 is odd; tpu: runs on tpu, this is gpu"):
        choose((FAST, TPU), platform="gpu", rows=3)
    with pytest.raises(ValueError, match="'fast' is unknown; accepted: None, 'sm90', 'xla'"):
        choose((FAST, ANY), "fast", platform="cpu", rows=2)


HOPPER = Backend("sm90", print, platforms=("gpu",), at_least=(9, 0), below=(10, 0))
TURING = Backend("fma", print, platforms=("gpu",), at_least=(7, 5))


def test_the_capability_of_a_gpu_decides():
    table = (HOPPER, TURING, ANY)
    for capability, chosen in (
        ((9, 0), HOPPER),
        ((8, 0), TURING),
        ((10, 0), TURING),
        ((7, 0), ANY),
    ):
        assert choose(table, platform="gpu", capability=capability) is chosen
    assert choose(table, platform="gpu") is ANY  # unknown: nothing is assumed
    message = r"sm90: needs compute capability 9.x \(Hopper\); this device has 8.0"
    with pytest.raises(ValueError, match=message):
        choose(table, "sm90", platform="gpu", capability=(8, 0))
    message = r"fma: needs compute capability 7.5 or newer \(Turing\); this device has 7.0"
    with pytest.raises(ValueError, match=message):
        choose((HOPPER, TURING), platform="gpu", capability=(7, 0))


def test_the_version_of_jax_decides():
    future = Backend("next", print, jax=(99,))
    assert choose((future, ANY)) is ANY
    with pytest.raises(ValueError, match="next: needs jax 99, this is"):
        choose((future, ANY), "next")


@pytest.mark.parametrize(
    ("chip", "expected"),
    [("h200", (9, 0)), ("a100", (8, 0)), ("l4", (8, 9)), ("t4", (7, 5)), ("v5e", None)],
)
def test_the_device_is_the_meshs(chip, expected):
    assert device() == ("cpu", None)
    with topology.abstract_mesh(chip, 2, "x"):
        assert device() == (topology.CHIPS[chip].platform, expected)
    assert named_capability("NVIDIA L40S") == (8, 9) and named_capability("NVIDIA A10G") == (8, 6)
    assert named_capability("some new GPU") is None


def test_a_lazy_function_is_imported_at_its_call():
    missing = lazy("pallas_kernels.no_such_module", "run")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        missing()
    assert lazy("builtins", "sorted", reverse=True)([1, 2]) == [2, 1]
