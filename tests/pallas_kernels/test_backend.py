"""Choosing a kernel's implementation: order, platforms, and all reasons at once."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backend as registry
from pallas_kernels import selftest
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


def test_the_environment_takes_backends_out_by_name(monkeypatch):
    table = (FAST, TPU, ANY)
    monkeypatch.setenv(registry.DISABLE, "mosaic, sm90")
    assert choose(table, platform="gpu", rows=2) is ANY
    assert choose(table, platform="tpu", rows=2) is TPU
    with pytest.raises(ValueError, match="sm90: disabled by PALLAS_KERNELS_DISABLE"):
        choose(table, "sm90", platform="gpu", rows=2)
    for wrong in ("sm9", "mosaic,xla"):
        monkeypatch.setenv(registry.DISABLE, wrong)
        with pytest.raises(ValueError, match=f"names {wrong[-3:]}; accepted: sm90, sm80, mosaic"):
            choose(table, platform="cpu", rows=2)
    monkeypatch.setenv(registry.DISABLE, "")
    assert choose(table, platform="gpu", rows=2) is FAST


def proven(test):
    """A backend of this machine that proves itself by `test`, before one that need not."""
    return Backend("sm90", print, test=test), ANY


def test_a_backend_that_fails_its_test_is_left_out_with_one_warning():
    ran = []

    def test():
        ran.append(True)
        raise ValueError("its results are\n2.0e-01 from the reference's")

    table = proven(test)
    with pytest.warns(UserWarning, match="backend sm90 failed its self-test on cpu: its res") as w:
        assert choose(table) is ANY and choose(table) is ANY
    assert len(w) == len(ran) == 1
    with topology.abstract_mesh("h200", 1, "x"):  # a device that is not here proves nothing
        assert choose(table) is table[0]
    assert choose(table, "sm90") is table[0]  # asked for by name
    assert len(ran) == 1


def test_a_test_runs_for_real_while_a_program_is_traced():
    found = []

    def test():
        found.append(float(jax.jit(lambda x: 2 * x)(jnp.float32(3))))

    @jax.jit
    def traced(x):
        assert choose(proven(test)).name == "sm90"
        return x + 1

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(traced(jnp.float32(1))) == 2
    assert found == [6.0]


def test_every_kernel_for_gpus_has_a_test():
    from pallas_kernels import attention, grouped, quantize, sparse, w4a8

    tables = [w4a8.api.BACKENDS, *sparse.api.BACKENDS.values(), quantize.api.TOKENS]
    tables += [quantize.api.GROUPS, grouped.api.MULTIPLY, grouped.api.OUTER]
    tables += [attention.api.BACKENDS, attention.api_decode.BACKENDS]
    kernels = [b for table in tables for b in table if b.name in ("sm90", "sm80", "mosaic")]
    assert len(kernels) == 18
    for kernel in kernels:
        assert callable(getattr(selftest, kernel.test.name))
        assert kernel.test.options == {"backend": kernel.name}


interpreted = pytest.mark.skipif(
    registry.JAX_VERSION < registry.INTERPRETER, reason="Pallas interprets from jax 0.11"
)


@interpreted
@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("w4a8", "sm90"),
        ("w4a8", "sm80"),
        ("quantize", "mosaic"),
        pytest.param("sparse", "mosaic", marks=pytest.mark.slow),
        pytest.param("grouped", "sm90", marks=pytest.mark.slow),
        pytest.param("prefill", "sm90", marks=pytest.mark.slow),
        pytest.param("decode", "sm90", marks=pytest.mark.slow),
    ],
)
def test_the_kernels_pass_their_tests_in_the_interpreter(kernel, name):
    getattr(selftest, kernel)(f"{name}_interpret")


def test_a_wrong_number_and_a_nan_fail():
    def run(x, name, wrong):
        return x if name == "reference" else wrong(x)

    x = jnp.ones((3,))
    selftest.compare(functools.partial(run, wrong=lambda x: x), 0.0, "sm90", x)
    for wrong in (lambda x: x.at[0].add(1e-2), lambda x: x.at[2].set(np.nan)):
        with pytest.raises(ValueError, match="from the reference's, above 1e-03"):
            selftest.compare(functools.partial(run, wrong=wrong), 1e-3, "sm90", x)
