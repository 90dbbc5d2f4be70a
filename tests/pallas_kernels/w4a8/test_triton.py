"""The Triton kernel of the INT4 x FP8 product: its body in a numpy model, its choice, its module.

Triton is not installed where the default tests run, and its interpreter wants torch. The body uses
a dozen names of `tl`; `Model` gives them in numpy, with NaN in memory that no block writes and an
error for a load outside an array. What the compiler makes of it is `make aot`'s part.
"""

import functools
import importlib.util
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import w4a8
from pallas_kernels.aot import CHIPS, lower_for
from pallas_kernels.backend import choose
from pallas_kernels.w4a8 import backends, triton
from tests.w4a8_operands import error, tokens, weights

SHAPE = jax.ShapeDtypeStruct
WIDE = 1e-6  # relative norm: float32 sums in another order


class Tensor(np.ndarray):
    """An array with Triton's conversion."""

    def to(self, dtype, bitcast=False):
        return self.view(dtype) if bitcast else self.astype(dtype)


class Pointer:
    """An array's memory at some offsets."""

    def __init__(self, flat, offset=0):
        self.flat, self.offset = flat, offset

    def __add__(self, step):
        return Pointer(self.flat, self.offset + step)


def load(pointer, mask, other):
    """Elements where the mask is set, which must lie in the array; `other` elsewhere."""
    at, mask = np.broadcast_arrays(pointer.offset, mask)
    assert (at[mask] >= 0).all() and (at[mask] < pointer.flat.size).all()
    values = pointer.flat[np.where(mask, at, 0)]
    return np.where(mask, values, values.dtype.type(other)).view(Tensor)


def store(pointer, value, mask):
    """Writes elements where the mask is set, each of them for the first time."""
    at, mask = np.broadcast_arrays(pointer.offset, mask)
    assert np.isnan(pointer.flat[at[mask]]).all()
    pointer.flat[at[mask]] = value[mask]


def dot(a, b, total=0):
    """A product of float16 with float32 sums."""
    assert a.dtype == b.dtype == np.float16 and min(*a.shape, b.shape[1]) >= 16
    return a.astype(np.float32) @ b.astype(np.float32) + total


def model(kernel, shape, grid, *args, warps, stages, **constants):
    """`_triton.launch` in numpy."""
    place, out = [], np.full(shape, np.nan, np.float32)
    triton.tl = types.SimpleNamespace(
        program_id=lambda axis: place[axis],
        arange=lambda first, last: np.arange(first, last, dtype=np.int32).view(Tensor),
        zeros=np.zeros,
        load=load,
        store=store,
        dot=dot,
        **{name: getattr(np, name) for name in ("float32", "float16", "uint16", "int64")},
    )
    memory = [Pointer(np.asarray(array).reshape(-1)) for array in args]
    for place[:] in itertools.product(*map(range, grid)):
        kernel(*memory, Pointer(out.reshape(-1)), **constants)
    return jnp.asarray(out)


@pytest.fixture
def interpreted(monkeypatch):
    """The product with its body in numpy."""
    monkeypatch.setattr(triton, "launch", model)
    monkeypatch.setattr(triton, "tl", None, raising=False)  # set by `model`, gone after the test
    return triton.matmul


@pytest.mark.parametrize(
    ("m", "n", "k", "group"), [(1, 200, 512, 128), (3, 128, 256, 32), (70, 40, 128, 64)]
)
def test_the_body_equals_the_reference(interpreted, m, n, k, group):
    codes, fragments, _ = weights(n, k, encoding="tc")
    scales = np.random.default_rng(2).uniform(0.004, 0.05, (k // group, n))
    scales, x = jnp.asarray(scales, jnp.bfloat16), tokens(m, k)
    y = interpreted(x, None, codes, scales, jnp.float32(2), group=group)
    expected = w4a8.matmul(x, codes, scales, divisor=2.0, group=group, backend="reference")
    assert y.shape == (m, n) and error(y, expected) < WIDE
    if group == 128:
        packed = interpreted(x, None, fragments, scales, jnp.float32(2), group=group)
        np.testing.assert_array_equal(packed, y)


def chosen(name="matmul", *, chip="a100", installed=True, old=True, requested=None, **facts):
    """The backend that a chip takes, with jax-triton installed or not and a jax without mma."""
    find = importlib.util.find_spec
    with pytest.MonkeyPatch.context() as patch:
        spec = lambda module: installed if module == "jax_triton" else find(module)  # noqa: E731
        patch.setattr(importlib.util, "find_spec", spec)
        table = backends.table(name, print, print)
        table = [b._replace(jax=(99,) if old else ()) if b.name == "sm80" else b for b in table]
        call = {"codes": None, "group": 128, "act": "e4m3", "treatment": "promote"} | facts
        where = {"platform": "gpu", "capability": CHIPS[chip].capability}
        return choose(table, requested, narrow=False, dtype=jnp.dtype("float32"), **where, **call)


def test_takes_what_the_other_kernels_cannot():
    codes, fragments, _ = weights(128, 128)
    for chip in ("a100", "l4"):
        assert chosen(chip=chip, codes=fragments).name == "triton"
        assert chosen("glu", chip=chip, codes=fragments).name == "triton"
        assert chosen(chip=chip, codes=fragments, old=False).name == "sm80"
        assert chosen(chip=chip, codes=codes, old=False, group=32).name == "triton"
    assert chosen("grouped", codes=fragments).name == "xla"
    for other in ({"installed": None}, {"chip": "t4"}, {"act": None}, {"treatment": "table"}):
        assert chosen(codes=codes, **other).name == "xla"
    assert chosen(chip="h200", codes=codes).name == "xla"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"installed": None}, r"jax-triton is not installed.*'ffnlab\[gpu\]'"),
        ({"group": 48}, "takes groups of 32, 64, 128 rows, group=48"),
        ({"treatment": "table"}, "scales partial sums, treatment='table'"),
        ({"act": None}, "rounds x to e4m3, act=None"),
        ({"chip": "h200"}, r"capability 8.x \(Ampere\); this device has 9.0"),
    ],
)
def test_says_why_it_cannot_run(change, message):
    with pytest.raises(ValueError, match=message):
        chosen(requested="triton", codes=weights(128, 128)[0], **change)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_triton") is None,
    reason="jax-triton is not installed; `make aot` compiles this kernel",
)
@pytest.mark.parametrize("chip", ["a100", "l4"])
def test_module_holds_the_triton_kernel(chip):
    codes, fragments, scales = weights(128, 256)
    x = SHAPE((2, 256), jnp.bfloat16)
    call = functools.partial(w4a8.matmul, group=128)
    abstract = jax.eval_shape(lambda: (codes, scales))
    assert lower_for(call, (x, *abstract), chip).count("triton_kernel_call") == 1
    many = jax.vmap(call, in_axes=(0, None, None))
    assert "triton_kernel_call" in lower_for(many, (SHAPE((3, 2, 256), x.dtype), *abstract), chip)
    joined = jax.eval_shape(lambda: w4a8.join(fragments, fragments, scales, scales))
    glu = functools.partial(w4a8.glu, backend="triton")
    assert lower_for(glu, (x, *joined), chip).count("triton_kernel_call") == 2
