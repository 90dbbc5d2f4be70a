"""The bench of the kernels: its rows can be traced, its figures add up, and a CPU says so."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from ffnlab.cli.main import main as ffnlab
from pallas_kernels.aot import topology
from pallas_kernels.bench import Row, Work, __main__, goals, measure, picture, rows, torch
from pallas_kernels.bench.measure import RATES, Absent, alone, floor, varied


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
        if "torch" in row.name:
            continue
        with topology.abstract_mesh("h200", 1, "x"):
            work = row.make()
            own = jax.eval_shape(work.weights, jax.random.key(0))
            y = jax.eval_shape(work.run, work.common, own)
        assert y.ndim == 2 and work.nbytes > 0 and work.flops > 0


@pytest.mark.parametrize("task", ["prefill, 1024", "4096 keys"])
def test_attention_can_be_traced_for_a_gpu(task):
    chosen = [row for row in rows() if task in row.task]
    assert len(chosen) == (4 if "prefill" in task else 3)
    for row in chosen:
        if "cuDNN" in row.name or "torch" in row.name:
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
    assert "task, ours: failed: no such layout\n" in capsys.readouterr().out
    assert __main__.describe(found[1]) == "| task | ours | failed: no such layout | | | | | |"
    assert "% | 1.00 |" in __main__.describe(found[0])


def test_what_is_asked_first_is_timed_first_and_kept_at_once(capsys):
    lines = [Row("task", "xla", small, True), Row("task", "ours", small, True, early=True)]
    lines = [
        row._replace(measure=lambda work, us=us: us) for row, us in zip(lines, (6, 2), strict=True)
    ]
    kept = []
    found = __main__.table(lines, "cpu", {}, lambda found: kept.append([r["name"] for r in found]))
    assert kept == [["ours"], ["ours", "xla"]] and [row["ratio"] for row in found] == [1, 3]
    early = [row for row in rows() if row.early]
    assert {row.name for row in early} >= {"w4a8", "INT4", "bfloat16", "attention FP8"}
    assert not any("XLA" in row.name or "cuDNN" in row.name or "torch" in row.name for row in early)


def test_a_product_is_the_difference_of_two_programs():
    clock, passed = [0.0], []

    def program(products):
        def run():
            clock[0] += 3.0 + 0.25 * products  # 3 seconds of dispatch
            passed.append(products)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("time.perf_counter", lambda: clock[0])
        assert alone(program(8), program(32), 8, 32, 3, lambda done: done) == 0.25
        same = program(0)
        assert alone(same, same, 8, 32, 3, lambda done: done) == 3 / 32  # an upper bound
    assert passed[:8] == [8, 32] * 4


def test_every_product_of_a_program_has_tokens_of_its_own():
    """Nothing that is computed of tokens alone can serve two products."""
    work = small()
    common = jnp.arange(32.0).reshape(4, 8), jnp.arange(4)
    turned = [varied(common, i) for i in range(8)]
    assert len({x[0].tobytes() for x, _ in turned}) == 8
    assert all((ints == common[1]).all() for _, ints in turned)
    work, seen = work._replace(common=common[0]), []
    with jax.disable_jit():
        measure(work._replace(run=lambda x, w: seen.append(x) or x @ w), sets=2, turns=1)
    seen = [x.tobytes() for x in seen if not isinstance(x, jax.core.Tracer)]
    assert len(set(seen)) == 8 and len(seen) == 2 * (2 + 8)


def test_without_a_gpu_it_says_so(capsys, tmp_path):
    out = tmp_path / "figures.json"
    assert __main__.main(["--only", "Llama-3-8B FFN, 64 tokens", "--json", str(out)]) == 1
    assert "no GPU here (cpu): 0 of 5 rows can run" in capsys.readouterr().out
    assert json.loads(out.read_text())["rows"] == []
    assert ffnlab(["bench", "kernels", "--names", "--only", "8 experts"]) == 0
    assert "8 experts of 4096 x 14336, 512 tokens, w4a8" in capsys.readouterr().out


def test_without_torch_its_rows_say_so_and_the_run_is_whole(capsys, monkeypatch):
    chosen = [row for row in rows() if row.task == "Llama-3-8B FFN, 1 tokens"]
    assert [row.name for row in chosen[-2:]] == ["bfloat16 torch", "FP8 torch"]
    monkeypatch.setattr(torch.importlib.util, "find_spec", lambda name: None)
    found = __main__.table(chosen[-2:], "NVIDIA H200", {})
    assert [row["absent"] for row in found] == ["torch is not installed"] * 2
    assert ", FP8 torch: not timed: torch is not installed\n" in capsys.readouterr().out
    monkeypatch.undo()
    blind = types.SimpleNamespace(cuda=types.SimpleNamespace(is_available=lambda: False))
    monkeypatch.setattr(torch.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(torch.importlib, "import_module", lambda name: blind)
    with pytest.raises(Absent, match="torch finds no GPU"):
        torch.library()


def test_rows_after_the_limit_are_named_as_left_out(capsys, monkeypatch):
    monkeypatch.setattr(__main__, "MINUTES", -1)
    (row,) = __main__.table([Row("task", "xla", small, True)], "NVIDIA H200", {})
    assert row["wrong"] == "-1 minutes are over; pick rows by --only"
    assert rows()[0].make().weights is rows()[5].make().weights  # compiled once for all tokens


def every_row(us):
    """Figures for all rows: `us` gives a row's microseconds by its name."""
    return [{"task": r.task, "name": r.name, "us": us(r.name), "floor_us": 9} for r in rows()]


def test_goals_are_met_missed_or_not_measured():
    slow = ("XLA", "torch", "ragged_dot", "cuDNN")
    met = goals.judge(every_row(lambda name: 40 if any(word in name for word in slow) else 10))
    assert [goal["met"] for goal in met] == [True] * 4 + [False] + [True] * 2
    sparse = met[4]  # no faster than the dense product here
    assert goals.describe(sparse).endswith(
        "| 1.30 | 1.00 | Llama-3-8B FFN, 1 token, 70 % sparse | missed |"
    )
    found = every_row(lambda name: 10)
    assert [goal["met"] for goal in goals.judge(found)] == [1, 0, 0, 1, 0, 0, 1]
    half = [row for row in found if "8B" in row["task"] and row["name"] in ("w4a8", "FP8 XLA")]
    judged = {goal["goal"]: goal for goal in goals.judge(half)}
    assert judged["w4a8 FFN up to 64 tokens, share of the floor"]["met"] is None
    assert judged["w4a8 FFN up to 64 tokens, share of the floor"]["worst"] == 0.9
    assert judged["grouped, speed over ragged_dot"]["worst"] is None
    assert "| - | - | not all measured |" in goals.describe(
        judged["grouped, speed over ragged_dot"]
    )


def test_goals_name_rows_that_there_are():
    names = {(row.task, row.name) for row in rows()}
    for goal in goals.goals():
        assert goal.pairs
        assert {side for pair in goal.pairs for side in pair if side is not None} <= names


@pytest.mark.parity
def test_torch_does_the_same_work(monkeypatch):
    monkeypatch.setattr(torch, "DEVICE", "cpu")
    library = torch.library()
    shared = torch.matrices([(32, 64), (32, 64), (64, 32)], 0)
    rounded = [w.T.contiguous().to(library.float8_e4m3fn).T for w in shared]
    for make in (torch.dense, torch.fp8):
        work = make(4, 32, 64, (1.0, 2.0))
        y = work.run(work.common, work.weights(0))
        assert y.shape == (4, 32) and y.dtype == library.bfloat16 and bool(y.isfinite().all())
        assert work.weights(0)[0].shape == (32, 64) and 0 < torch.measure(work, sets=2, turns=2) < 9
    wide = torch.dense(4, 32, 64, (1.0, 2.0)).run(torch.normal((4, 32), 99), shared)
    narrow = torch.fp8(4, 32, 64, (1.0, 2.0)).run(torch.normal((4, 32), 99), rounded)
    assert float((wide - narrow).norm() / wide.norm()) < 0.1  # three roundings to e4m3
    work = torch.prefill(8, 4, 2, 16, (1.0, 2.0))
    assert work.run(work.common, work.weights(0)).shape == (1, 4, 8, 16)


def test_the_picture_shows_floors_and_what_was_measured(tmp_path, capsys):
    from matplotlib.figure import Figure

    drawn = Figure()
    picture.draw(drawn, "H200")
    left, right = drawn.axes
    assert {line.get_label() for line in left.lines} == {
        f"{form}: floor" for form in ("bfloat16", "FP8", "w4a8")
    }
    bytes_ = 3 * 4096 * 14336 * (0.5 + 2 / 128)  # INT4 with bfloat16 scales of 128; x is small
    least = right.lines[2].get_ydata()[0]
    assert least == pytest.approx(1e6 * bytes_ / RATES["H200"][0], rel=1e-3)
