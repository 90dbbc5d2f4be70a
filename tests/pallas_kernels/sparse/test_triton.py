"""The Triton kernels of the sparse products: chosen where Mosaic is not, else refused by name."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import sparse
from pallas_kernels.aot import lower_for
from pallas_kernels.backend import choose
from pallas_kernels.sparse import GpuConfig, api

SHAPE = jax.ShapeDtypeStruct


def chosen(name, *, m=1, capability=(7, 5), installed=True, requested=None, monkeypatch):
    """The backend that a GPU of some capability takes, with jax-triton installed or not."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: installed if n == "jax_triton" else find(n)
    )
    table = [b._replace(jax=(99,)) if b.name == "mosaic" else b for b in api.BACKENDS[name]]
    facts = {"m": m, "weights": (SHAPE((4096, 4096), jnp.float16),), "config": GpuConfig()}
    return choose(
        table, requested, platform="gpu", capability=capability, named=bool(requested), **facts
    ).name


def test_takes_older_gpus_where_mosaic_does_not_run(monkeypatch):
    pick = functools.partial(chosen, monkeypatch=monkeypatch)
    assert pick("matvec") == pick("rows", capability=(8, 9)) == "triton"
    assert pick("glu", m=2) == pick("glu", capability=(9, 0)) == pick("take") == "dense"
    assert pick("matvec", installed=None) == "dense"


def test_says_what_to_install(monkeypatch):
    with pytest.raises(ValueError, match=r"jax-triton is not installed.*'ffnlab\[gpu\]'"):
        chosen("rows", installed=None, requested="triton", monkeypatch=monkeypatch)
    with pytest.raises(ValueError, match=r"below 9.0 \(Turing\); this device has 9.0"):
        chosen("rows", capability=(9, 0), requested="triton", monkeypatch=monkeypatch)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None,
    reason="jax-triton is not installed; `make aot` compiles these kernels",
)
@pytest.mark.parametrize("name", ["matvec", "rows"])
def test_module_holds_a_triton_kernel(name):
    w, x = SHAPE((256, 512), jnp.float16), SHAPE((1, 256), jnp.float16)
    args = (x, w) if name == "matvec" else (SHAPE((1, 512), jnp.float16), w, x)
    text = lower_for(functools.partial(getattr(sparse, name), backend="triton"), args, "t4")
    assert text.count("triton_kernel_call") == 1
