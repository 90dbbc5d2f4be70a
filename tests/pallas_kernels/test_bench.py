"""The bench of the kernels: its rows can be traced, its figures add up, and a CPU says so."""

import json

import jax
import jax.numpy as jnp
import pytest

from ffnlab.cli.main import main as ffnlab
from pallas_kernels.aot import topology
from pallas_kernels.bench import Row, Work, __main__, measure, rows
from pallas_kernels.bench.measure import RATES, floor


def small():
    """A product of 4 x 8 x 16."""
    weights = lambda key: jax.random.normal(key, (8, 16))  # noqa: E731
    return Work(lambda x, w: x @ w, jnp.ones((4, 8)), weights, 4e6, 8e9, False)


def test_rows_are_unique_and_compared_with_xla_first():
    names = [(row.task, row.name) for row in rows()]
    assert len(set(names)) == len(names)
    first = {}
    for task, name in names:
        first.setdefault(task, name)
    feed_forward = [name for task, name in first.items() if "tokens" in task and "FFN" in task]
    assert set(feed_forward) == {"bfloat16 XLA"}


TRACED = ("Llama-3-8B FFN, 64", "8 experts of 4096 x 14336, 512", "70 % sparse")  # one of a kind


@pytest.mark.parametrize("task", TRACED)
def test_every_kind_of_row_can_be_traced_for_a_gpu(task):
    chosen = [row for row in rows() if task in row.task]
    assert len(chosen) >= 2
    for row in chosen:
        with topology.abstract_mesh("h200", 1, "x"):
            work = row.make()
            own = jax.eval_shape(work.weights, jax.random.key(0))
            y = jax.eval_shape(work.run, work.common, own)
        assert y.ndim == 2 and work.nbytes > 0 and work.flops > 0


@pytest.mark.parametrize("task", ["prefill, 1024", "4096 keys"])
def test_attention_can_be_traced_for_a_gpu(task):
    chosen = [row for row in rows() if task in row.task]
    assert len(chosen) == 3
    for row in chosen:
        if "cuDNN" in row.name:
            continue  # asks for the library's version, which only a GPU has
        with topology.abstract_mesh("h200", 1, "x"):
            work = row.make()
            own = jax.eval_shape(work.weights, jax.random.key(0))
            y = jax.eval_shape(work.run, work.common, own)
        assert y.shape == work.common.shape and work.nbytes > 0 and work.flops > 0


def test_a_floor_is_the_larger_of_memory_and_arithmetic():
    rate, bfloat16, fp8 = RATES["H200"]
    work = small()
    assert floor(work, "NVIDIA H200") == max(4e6 / rate, 8e9 / bfloat16)
    narrow = work._replace(fp8=True, nbytes=0)
    assert floor(narrow, "NVIDIA H200") == 8e9 / fp8
    assert floor(work, "cpu") is None and floor(work, "NVIDIA A100-SXM4-40GB") is not None


def test_a_row_is_timed_and_one_that_fails_says_why(capsys):
    assert 0 < measure(small(), sets=2, turns=2) < 10

    def broken():
        raise ValueError("no such layout")

    lines = [Row("task", "xla", small, True), Row("task", "ours", broken, True)]
    found = __main__.table(lines, "NVIDIA H200", {"sets": 1, "turns": 1})
    assert found[0]["ratio"] == 1 and found[1]["wrong"] == "no such layout"
    printed = capsys.readouterr().out
    assert "| task | ours | failed: no such layout |" in printed and "% |" in printed


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    out = tmp_path / "figures.json"
    assert __main__.main(["--only", "Llama-3-8B FFN, 64 tokens", "--json", str(out)]) == 1
    assert "no GPU here (cpu): 0 of 3 rows can run" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == []
    assert ffnlab(["bench", "kernels", "--names", "--only", "8 experts"]) == 0
    assert "8 experts of 4096 x 14336, 512 tokens, w4a8" in capsys.readouterr().out
