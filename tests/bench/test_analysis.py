"""Tests of `ffnlab bench analysis` with a peer of NumPy; none is timed."""

import numpy as np
import pytest

from ffnlab.bench import analysis
from ffnlab.bench.analysis import Settings, compare
from ffnlab.bench.turns import Comparison, Task
from ffnlab.errors import FFNLabError

SMALL = Settings(rows=60, widths=(3, 14), pairs=200, known=0.5, inputs=(5, 9), boxes=3, turns=2)


class Fake:
    """Does in float64, by the signs of weights, what `analysis_peer.py` does."""

    spoil = 0.0

    def __init__(self, directory, tasks, packages):
        assert tasks == "analysis_peer.py" and packages == ("torch",)
        with np.load(f"{directory}/bounds.npz", allow_pickle=False) as saved:
            self.arrays = {name: saved[name].astype(np.float64) for name in saved.files}
        self.about = {"dtype": "float32", "threads": 1, "versions": {"numpy": "0"}}

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def ask(self, do, result):
        assert do == "bounds"
        low, high = self.arrays["low"], self.arrays["high"]
        for i in range(3):
            w, b = self.arrays[f"w{i}"], self.arrays[f"b{i}"]
            up, down = np.maximum(w, 0), np.minimum(w, 0)
            low, high = low @ up + high @ down + b, high @ up + low @ down + b
            if i < 2:
                low, high = np.maximum(low, 0), np.maximum(high, 0)
        if result:
            np.savez(result, low=low + self.spoil, high=high)
        return {"seconds": 1.0, "form": "by signs"}


def test_all_is_compared(monkeypatch):
    monkeypatch.setattr(analysis, "Peer", Fake)
    found = compare(SMALL)
    names = ("states, 3", "states, 14", "neighbours", "interpreter, 5", "interpreter, 9", "bounds")
    assert tuple(found.tasks) == names
    for name, task in found.tasks.items():
        assert task.ours > 0 and task.theirs > 0
        assert task.difference < (1 if name == "neighbours" else 1e-5)
    assert "nats off the known: ours" in found.tasks["neighbours"].form
    assert "KiB" in found.tasks["interpreter, 9"].form
    assert found.tasks["bounds"].form == "by signs"


def test_other_bounds_are_an_error(monkeypatch):
    monkeypatch.setattr(analysis, "Peer", type("Spoiled", (Fake,), {"spoil": 0.1}))
    with pytest.raises(FFNLabError, match="bounds: the two sides differ by"):
        compare(SMALL)
    with pytest.raises(FFNLabError, match="states: the two sides differ by"):
        analysis.held("states", 1.0, 1.01)


def test_ratios_are_of_all_tasks(monkeypatch):
    task = Task(1.0, 2.5, 2.5, 0.0, "")
    monkeypatch.setattr(analysis, "compare", lambda: Comparison("", {"bounds": task}, ""))
    assert analysis.ratios() == {"bounds": 2.5}


def test_the_interpreter_keeps_no_matrix():
    """The temporaries of the Jacobian grow with inputs times classes, ours do not hold F."""
    found = analysis.interpreter(600, 1).form
    ours, its = (
        float(part.split()[-1].replace(",", "")) for part in (found.split(" KiB")[0], found)
    )
    assert ours < 600 * 10 * 4 / 1024 <= its
