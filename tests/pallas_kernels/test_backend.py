"""Choosing a kernel's implementation: order, platforms, and all reasons at once."""

import pytest

from pallas_kernels.backend import Backend, choose


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
