"""Tests of `ffnlab bench --vs qwix`: with a stand-in for qwix, and once with itself; none timed."""

import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest
import rich

from ffnlab.bench import quantized
from ffnlab.bench.quantized import Settings
from ffnlab.errors import FFNLabError, MissingExtraError

SMALL = Settings(d_in=256, d_out=8, rows=(1, 3), group=128, turns=2)
LARGEST = {"int8": 127.0, "int4": 7.5, "float8_e4m3fn": 448.0}


class Rounded(NamedTuple):
    """What stands in for `qwix.QArray`."""

    qvalue: jax.Array
    scale: jax.Array


def quantize(x, kind, *, channelwise_axes, tiled_axes=None):
    """`qwix.quantize` of matrices: groups of rows with scales per column, or scales per row."""
    kind = jnp.dtype(kind)
    tile = next(iter((tiled_axes or {0: 1}).values()))
    grouped = x.reshape(-1, tile, x.shape[1]) if tiled_axes else x[:, :, None]
    scale = jnp.max(jnp.abs(grouped), axis=1) / LARGEST[kind.name]
    q = grouped / scale[:, None]
    q = (
        q
        if kind.name.startswith("float")
        else jnp.clip(jnp.round(q), -8, 7 if "4" in kind.name else 127)
    )
    return Rounded(q.reshape(x.shape).astype(kind), scale)


def dot(x, w):
    """`qwix.dot` of an array or a rounded one with a rounded one."""
    if isinstance(x, Rounded):
        x = x.qvalue.astype(jnp.float32) * x.scale
    tile = w.qvalue.shape[0] // w.scale.shape[0]
    return x @ (w.qvalue.astype(jnp.float32) * jnp.repeat(w.scale, tile, axis=0))


@pytest.fixture
def qwix(monkeypatch):
    """Puts the stand-in in the place of qwix."""
    module = types.ModuleType("qwix")
    module.quantize, module.dot, module.__version__ = quantize, dot, "0"
    monkeypatch.setitem(sys.modules, "qwix", module)
    return module


def check(found):
    """Every format and number of rows is there, and all forms computed the same."""
    wanted = [(name, rows) for name in quantized.FORMATS for rows in SMALL.rows]
    assert [(p.format, p.rows) for p in found.products] == wanted
    for p in found.products:
        assert min(p.packed, p.prepared, p.theirs, p.ratio) > 0
        assert all("float32" in dtypes and p.format[:4] in dtypes for dtypes in p.dtypes)
        assert ("e4m3" in p.format) == ("e4m3" in p.dtypes[0])


def test_formats_rows_and_dtypes(qwix, capsys):
    found = quantized.compare(SMALL)
    check(found)
    rich.print(found)
    assert "256 x 8" in capsys.readouterr().out


def test_figures_of_other_work_are_refused(qwix):
    qwix.dot = lambda x, w: 1.01 * dot(x, w)
    with pytest.raises(FFNLabError, match="int8: the two sides do not compute the same"):
        quantized.compare(SMALL)


def test_figures_by_format_and_rows(monkeypatch, qwix):
    found = quantized.compare(SMALL)
    monkeypatch.setattr(quantized, "compare", lambda: found)
    assert set(quantized.ratios()) >= {"int8, 1", "int4, 3", "int4, x e4m3, 1"}


def test_shapes_of_a_model(fixtures):
    assert quantized.settings_for(None, 5) == Settings(turns=5)
    found = quantized.settings_for(fixtures / "models" / "llama2", 5)
    assert found.d_in == found.group and found.d_out > 0 and found.turns == 5


def test_without_qwix_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ffnlab\[parity\]'"):
        quantized.compare(SMALL)


@pytest.mark.parity
def test_qwix_computes_the_same():
    pytest.importorskip("qwix", reason="qwix is not installed; the extra 'parity' brings it")
    check(quantized.compare(SMALL))
