"""The command that tunes: what it tries, that only right numbers win, that it goes on, and a CPU.

The clock is made up: no time is measured here. Products run for real, by the kernels' bodies in
the interpreter (jax 0.11) or by a stand-in with the kernel's contract.
"""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tune
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.tuning import cache, search, w4a8
from pallas_kernels.tuning import sparse as skipping
from pallas_kernels.tuning.trials import Trials
from pallas_kernels.w4a8 import calls, plan, reference
from pallas_kernels.w4a8.packed import Fragments, canonical, split_columns

SHAPE = ["--shape", "8,256,256"]
WIDE = ("float32", "float32")
HOPPER = tune.Place("sm90", True, cores=2)


def multiply(x, sx, words, scales, tiles, *, config, encoding, glu, treatment, out, interpret):
    """`sm90.multiply` in plain jnp; wrong with stages=8, and stages=6 is refused."""
    if config.stages == 6:
        raise ValueError("ptxas says\nno")
    options = {"group": 128, "treatment": treatment}
    n = scales.shape[2]
    w = [
        reference.dequantize(canonical(Fragments(one, encoding), n), scale, **options)
        for one, scale in zip(words, scales, strict=True)
    ]
    row = jnp.repeat(tiles, config.tile_m)
    y = jnp.einsum("mk,mkn->mn", x.astype(jnp.float32), jnp.stack(w)[row], precision="highest")
    if glu:
        gate, up = (half * unit[:, None] for half, unit in zip(split_columns(y), sx, strict=True))
        y = jax.nn.silu(gate) * up
    else:
        y = y * sx[0][:, None]
    return (y * (1.1 if config.stages == 8 else 1)).astype(out)


@pytest.fixture
def place(monkeypatch, tmp_path):
    """A GPU that is not there, its kernels, and a file for what is found."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "tuned.json"))
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "shipped.json")
    monkeypatch.setattr(tune, "here", lambda: HOPPER)
    tried = w4a8.candidates
    monkeypatch.setattr(w4a8, "candidates", lambda call, cores: tried(call, cores)[:3])
    monkeypatch.setattr(calls, "load", lambda name: types.SimpleNamespace(multiply=multiply))
    cache.reload()
    yield tmp_path / "tuned.json"
    cache.reload()


@pytest.fixture
def clock(monkeypatch):
    """A clock by which the third configuration timed of a task is the fastest; the works timed."""
    works = []

    def measure(work):
        works.append(work)
        return 1e-6 * (5 if len(works) % 100 == 3 else 10)

    monkeypatch.setattr(tune, "measure", measure)
    return works


def test_the_fastest_right_configuration_is_kept_and_taken(place, clock, capsys):
    assert tune.main(["w4a8.matmul", *SHAPE]) == 0
    (kept,), problems = cache.read(place)
    assert problems == [] and (kept.us, kept.heuristic_us) == (5, 10)
    said = capsys.readouterr().out
    assert f"1 tasks on cpu; kept in {place}" in said
    assert "| w4a8 matmul, 8 tokens, 256 x 256 | 10.0 | 5.0 | 2.00 | tile_m=8, columns=64" in said
    call = plan.Call("matmul", "sm90", 8, 256, 256)
    tuned = plan.pick(call, 2)
    assert w4a8.named(tuned) == kept.config != w4a8.named(plan.heuristic(call, 2))
    assert len(clock) == int(said.rsplit(" | ", 1)[1].split()[0]) > 2


@pytest.mark.parametrize("op", ["matmul", "glu", "grouped"])
def test_a_configuration_with_wrong_numbers_is_not_timed(place, op):
    call = plan.Call(op, "sm90", 8, 512, 256, experts=2 if op == "grouped" else 1)
    task = w4a8.task(call, 2)
    right, wrong = task.heuristic, plan.dataclasses.replace(task.heuristic, stages=8)
    assert task.error(right) < task.bound
    refused = plan.dataclasses.replace(task.heuristic, stages=6)
    trials = Trials(place, cache.key(task.op, task.m, task.facts))
    tried = task._replace(candidates=(wrong, refused))
    found = search.one(tried, lambda work: 1e-6, lambda text: None, trials)
    assert found.tried == 1 and found.entry.config == w4a8.named(right)
    (_, first), (_, second) = found.refused
    assert first.startswith("error 1.0e-01 from the reference") and second == "ptxas says no"
    assert "\n  not {" in search.line(task, found)


def test_a_nan_is_wrong_and_without_the_heuristic_nothing_is_kept(place, clock, capsys):
    task = w4a8.task(plan.Call("matmul", "sm90", 8, 256, 256), 2)
    broken = task._replace(error=lambda config: float("nan"))
    assert search.run([lambda: broken], path=place, measure=tune.measure) == 0
    assert not place.exists() and not clock
    assert "the heuristic's configuration failed" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_is_finished_and_goes_on(place, clock, monkeypatch, capsys):
    two = ["w4a8.matmul", "--shape", "8,256,256", "--shape", "64,256,256"]
    timed = tune.measure

    def interrupted(work):
        if work.common[0].shape[0] == 64:
            raise KeyboardInterrupt
        return timed(work)

    monkeypatch.setattr(tune, "measure", interrupted)
    assert tune.main(two) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert [entry.key.m for entry in cache.read(place)[0]] == [8]
    first = len(clock)
    monkeypatch.setattr(tune, "measure", timed)
    assert tune.main(two) == 0
    assert all(work.common[0].shape[0] == 64 for work in clock[first:]) and len(clock) > first
    assert "kept from 20" in capsys.readouterr().out
    second = len(clock)
    assert tune.main(two) == 0 and len(clock) == second
    assert tune.main([*two, "--again"]) == 0 and len(clock) == 2 * second


def test_each_trial_is_written_at_once_and_not_repeated(place, clock, monkeypatch, capsys):
    """A process that ends in the middle of a task has timed what it has timed."""
    timed, lost = tune.measure, []

    def dies(work):
        if len(clock) == 1:
            lost.append(True)
            raise RuntimeError("an illegal memory access was encountered")
        return timed(work)

    monkeypatch.setattr(tune, "measure", dies)
    monkeypatch.setattr(search, "alive", lambda: not lost)
    assert tune.main(["w4a8.matmul", *SHAPE]) == 1
    said = capsys.readouterr().err
    assert "the device is lost after w4a8 matmul, 8 tokens" in said and "illegal memory" in said
    assert not place.exists() and len(clock) == 1
    trials = place.with_name("tuned.json.trials")
    found = [json.loads(line)["found"] for line in trials.read_text().split("\n") if line]
    assert found == [10, "an illegal memory access was encountered"]
    with trials.open("a") as file:  # nor does a damaged line count
        file.write('{"key": 3}\n[]\n{"key"')
    lost.clear()
    monkeypatch.setattr(tune, "measure", timed)
    assert tune.main(["w4a8.matmul", *SHAPE]) == 0
    assert len(cache.read(place)[0]) == 1 and "illegal memory" in capsys.readouterr().out
    tried = len(clock) + 1  # one was lost, none was timed twice
    assert tried > 2 and trials.read_text().count('"found"') == tried
    assert tune.main(["w4a8.matmul", *SHAPE, "--again"]) == 0 and len(clock) == 2 * tried - 1


def test_a_device_that_computes_is_alive(monkeypatch):
    assert search.alive()

    def fault(x):
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")

    monkeypatch.setattr(search.jax, "block_until_ready", fault)
    assert not search.alive()


def test_another_file_and_other_forms_of_the_weights(place, clock, tmp_path):
    other = tmp_path / "other.json"
    forms = ["--encoding", "tc", "--scales", "float32", "--out", "float32", "--treatment", "table"]
    assert tune.main(["w4a8.glu", *SHAPE, *forms, "--file", str(other)]) == 0
    assert not place.exists()
    (entry,) = json.loads(other.read_text())["entries"]
    assert entry["facts"] == {
        name: getattr(plan.Call("glu", "sm90", 8, 512, 256, 1, "tc", "table", *WIDE), name)
        for name in ("kernel", "n", "k", "experts", "encoding", "treatment", "scales", "out")
    }


def test_what_is_asked_for_must_be_there(place, capsys):
    for arguments, message in (
        (["matmul"], "operation='matmul'; accepted here: w4a8.matmul, w4a8.glu"),
        (["w4a8.matmul", "--shape", "8,200,256"], "K=200 of matmul must be a multiple of 128"),
    ):
        assert tune.main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--shape", "8,200"])
    place.write_text("{}")
    assert tune.main(["w4a8.matmul", *SHAPE]) == 2
    assert "must hold 'version' and 'entries'" in capsys.readouterr().err


def test_a_cpu_says_so(capsys):
    assert tune.main([]) == 2
    assert "no GPU here (jax finds cpu)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("capability", "kernel", "skips"),
    [((9, 0), "sm90", True), ((8, 0), "sm80", True), ((7, 5), None, True), ((7, 0), None, False)],
)
def test_the_kernels_of_a_gpu(monkeypatch, capability, kernel, skips):
    monkeypatch.setattr(tune.backend, "device", lambda: ("gpu", capability))
    monkeypatch.setattr(tune.backend, "JAX_VERSION", (0, 12, 0))
    if not skips:
        with pytest.raises(ValueError, match="no kernel .* runs here: sm90: needs compute"):
            tune.here()
        return
    place = tune.here()
    assert (place.w4a8, place.sparse) == (kernel, skips)
    makers = tune.collect(tune.parser().parse_args([]), place)
    assert len(makers) == (2 * 14 + 4 if kernel else 0) + 8


@pytest.mark.parametrize("kernel", ["sm90", "sm80"])
@pytest.mark.parametrize("op", ["matmul", "glu", "grouped"])
@pytest.mark.parametrize("m", [1, 64, 8192])
def test_candidates_fit_and_hold_more_than_the_heuristic(kernel, op, m):
    for n, k in ((8192, 4096), (28672, 4096), (4096, 14336), (4096, 11008), (256, 128)):
        call = plan.Call(op, kernel, m, n, k, experts=8 if op == "grouped" else 1)
        heuristic = plan.heuristic(call, 132)
        assert plan.refuse(heuristic, call) is None
        tried = w4a8.candidates(call)
        assert all(plan.refuse(config, call) is None for config in tried)
        assert len({*tried, heuristic}) > (k > 128) and len(tried) < 40
        assert plan.build(w4a8.named(heuristic), call).tile_m == heuristic.tile_m


@pytest.mark.skipif(JAX_VERSION < INTERPRETER, reason="Pallas interprets GPU kernels from jax 0.11")
def test_the_kernel_itself_is_tuned_in_the_interpreter(monkeypatch, tmp_path, clock):
    monkeypatch.setattr(tune, "here", lambda: HOPPER._replace(interpret=True))
    monkeypatch.setattr(
        w4a8, "candidates", lambda call, cores: [plan.Config(8, 64, k_tiles=2, cores=2)]
    )
    path = tmp_path / "tuned.json"
    assert tune.main(["w4a8.matmul", *SHAPE, "--file", str(path)]) == 0
    assert cache.read(path)[0][0].key.op == "w4a8.matmul"


@pytest.mark.slow
@pytest.mark.skipif(JAX_VERSION < INTERPRETER, reason="Pallas interprets GPU kernels from jax 0.11")
@pytest.mark.parametrize("name", ["matvec", "glu"])
def test_sparse_products_are_tuned_in_the_interpreter(monkeypatch, tmp_path, clock, name):
    monkeypatch.setattr(tune, "here", lambda: HOPPER._replace(interpret=True))
    config = skipping.blocks.GpuConfig(blocks=2, unroll=4)
    monkeypatch.setattr(skipping, "candidates", lambda name: [config])
    path = tmp_path / "tuned.json"
    shape = ["--shape", "1,64,1024" if name == "matvec" else "1,1024,16"]
    assert tune.main([f"sparse.{name}", *shape, "--file", str(path)]) == 0
    kinds = [dict(entry.key.facts)["weights"] for entry in cache.read(path)[0]]
    assert sorted(kinds) == ["bfloat16", "int4"]
