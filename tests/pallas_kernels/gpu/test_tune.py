"""The command that tunes, on the device itself: candidates run, the kernels take what is kept."""

import pytest

from pallas_kernels import tune
from pallas_kernels.tuning import cache, w4a8
from pallas_kernels.w4a8 import plan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("op", ["matmul", "glu", "grouped"])
def test_tuned_configurations_are_right_and_taken(kernel, interpreted, monkeypatch, tmp_path, op):
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "tuned.json"))
    cache.reload()
    name, tried, few = kernel.removesuffix("_interpret"), w4a8.candidates, 1 if interpreted else 4
    monkeypatch.setattr(w4a8, "candidates", lambda call, cores: tried(call, cores)[:few])
    if interpreted:
        place = tune.Place(name, False, 2, interpret=True)
        monkeypatch.setattr(tune, "here", lambda: place)
        monkeypatch.setattr(tune, "measure", lambda work: 1e-6)
    assert tune.main([f"w4a8.{op}", "--shape", "16,512,512", "--experts", "2"]) == 0
    (entry,), problems = cache.read(cache.user_file())
    assert problems == [] and 0 < entry.us <= entry.heuristic_us
    facts = dict(entry.key.facts)
    call = plan.Call(op, name, 16, facts["n"], facts["k"], facts["experts"])
    assert w4a8.named(plan.pick(call, 132)) == entry.config
    monkeypatch.undo()
    cache.reload()
