"""What a GPU is asked first: the run is bounded, keeps what it found, and knows a wrong number."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.first import STAGES, Here, __main__, products, stages
from pallas_kernels.first.machine import differing, error
from pallas_kernels.first.worker import NO_GPU, main

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason=f"jax {jax.__version__} has no interpreter for GPU kernels"
)


def shown(capsys):
    """What was found so far."""
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_wrong_number_is_named_with_its_place(capsys):
    here, wanted = Here(True), np.arange(6).reshape(2, 3)
    products.report(here, "right", wanted.astype(np.float32), wanted)
    wrong = wanted.astype(np.float32)
    wrong[0, 2], wrong[1, 1] = np.nan, 7
    products.report(here, "wrong", wrong, wanted, number="0.0")
    right, found = shown(capsys)
    assert right == {"what": "right", "wrong": 0, "of": 6, "first": None}
    assert (found["wrong"], found["number"]) == (2, "0.0")
    assert found["first"] == {"at": [0, 2], "got": "nan", "wanted": 2.0}


def test_bits_that_differ_and_errors_are_counted():
    x = np.array([1.0, 2.0], np.float32)
    assert differing(x, x.copy()) == 0 and error(x, x) == 0
    assert differing(x, np.array([1.0, -2.0], np.float32)) == 1
    assert differing(np.float32([0.0]), np.float32([-0.0])) == 1  # equal, and other bits
    assert np.isnan(error(np.array([1.0, np.nan]), x))


@interpreted
def test_decoded_weights_are_right_in_the_interpreter(capsys):
    products.words(Here(True))
    found = shown(capsys)
    assert [f["what"] for f in found] == ["tc, promote", "sm, promote", "tc, table"]
    assert all(f["wrong"] == 0 and f["of"] == 128 * 128 for f in found)
    assert all(float(f["number"]) == f["wanted_number"] for f in found)


def process(monkeypatch, code, **change):
    """Makes every stage a process with this code, of two stages."""
    monkeypatch.setattr(__main__, "STAGES", (STAGES[0], STAGES[2]))
    run = __main__.processes.run

    def instead(command, seconds, **options):
        assert command[1:3] == ["-m", "pallas_kernels.first.worker"]
        return run([sys.executable, "-c", code], change.get("seconds", seconds), **options)

    monkeypatch.setattr(__main__.processes, "run", instead)


FINDS = 'print(\'{"what": "copy", "us": 12.345678, "launches": [["fusion", 1.0]]}\', flush=True);'


def test_what_a_stage_found_before_it_died_is_on_the_page_and_in_the_file(
    monkeypatch, capsys, tmp_path
):
    process(monkeypatch, FINDS + "import os; print('last words', flush=True); os.abort()")
    path = tmp_path / "found.json"
    assert __main__.main(["--json", str(path)]) == 1
    said = capsys.readouterr().out
    assert "machine: FAILED" in said and "last words" in said
    assert "  copy: us 12.35, fusion 1.0\n" in said
    first, second = json.loads(path.read_text())
    assert (first["stage"], first["status"]) == ("machine", -6)
    assert first["found"][0]["us"] == 12.345678
    assert second["stage"] == "w4a8: decoded weights"  # the next one had its turn


def test_a_stage_that_hangs_is_ended_and_the_whole_is_bounded(monkeypatch, capsys):
    process(monkeypatch, "import time; time.sleep(99)", seconds=0.2)
    assert __main__.main(["--only", "machine"]) == 1
    assert "machine: took too long" in capsys.readouterr().out
    monkeypatch.setattr(__main__, "MINUTES", 0.0)
    assert __main__.main([]) == 1
    assert "w4a8: decoded weights: took too long, 0.0 s 0.0 minutes are over" in (
        capsys.readouterr().out
    )


def test_without_a_gpu_the_first_stage_is_the_last(monkeypatch, capsys):
    assert main("0") == NO_GPU
    assert "no NVIDIA GPU here: jax finds cpu" in capsys.readouterr().err
    process(monkeypatch, f"raise SystemExit({NO_GPU})")
    assert __main__.main([]) == 1
    assert "decoded weights" not in capsys.readouterr().out


def test_stages_are_told_apart_and_launches_are_blocked_unless_timed(monkeypatch):
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    seen = {}

    def run(command, seconds, *, environment, output):
        seen[STAGES[int(command[3])].name] = dict(environment), seconds, command[4:]
        return 0

    monkeypatch.setattr(__main__.processes, "run", run)
    assert __main__.main([]) == 0
    assert [name for name, (variables, *_) in seen.items() if not variables] == [
        "machine",
        "w4a8: repeats",
        "w4a8: blocks that share tokens",
        "times by kernel",
        "tuning",
    ]
    limits = [seconds for _, seconds, _ in seen.values()]
    assert max(limits[:-1]) <= 60 < limits[-1] <= 540  # tuning has what is left of nine minutes
    assert all(rest == [] for *_, rest in seen.values())
    assert list(seen)[-3] == "decode, INT4 with e4m3 scales"  # what may fault comes last


def test_every_stage_is_a_function_that_there_is():
    for stage in stages.STAGES:
        module = __import__(stage.run.module, fromlist=[stage.run.name])
        assert callable(getattr(module, stage.run.name))


@pytest.mark.slow
@interpreted
def test_the_whole_runs_in_the_interpreter(tmp_path):
    path = tmp_path / "found.json"
    command = [sys.executable, "-m", "pallas_kernels.first", "--interpret", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = {stage["stage"]: stage["found"] for stage in json.loads(path.read_text())}
    assert list(found) == [stage.name for stage in STAGES] and all(found.values())
    facts = [fact for stage in found.values() for fact in stage]
    assert all(fact.get("wrong", 0) == 0 and fact.get("runs_that_differ", 0) == 0 for fact in facts)
    errors = {fact["what"]: fact["error"] for fact in facts if "error" in fact}
    assert len(errors) > 15 and all(e < (0.1 if "fp8" in w else 0.02) for w, e in errors.items())
