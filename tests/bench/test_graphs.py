"""Tests of `ffnlab bench graphs` with a peer of NumPy, and once with torch; none is timed."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import rich

from ffnlab.bench import graphs, peer
from ffnlab.bench.graphs import Settings, compare
from ffnlab.bench.turns import Comparison, Task
from ffnlab.errors import FFNLabError, MissingExtraError
from ffnlab.models import OneForecastConfig

TINY = OneForecastConfig((2, 3), 2, 2, 0, width=4, blocks=3, heads=2)
FORECAST = Task(1.0, 2.0, 2.0, 1e-6, "dense")  # what `tests/bench/test_forecast.py` is of

SMALL = Settings(sizes=((7, 20), (5, 30)), width=3, inputs=4, turns=2, forecast=TINY)


class Fake:
    """Does with dense matrices in float64 what `graphs_peer.py` does."""

    about = {"versions": {"fake": "1.0"}, "threads": 3}
    spoil = ""

    def __init__(self, directory, *, tasks, packages):
        assert tasks == "graphs_peer.py" and packages == ("torch", "torch_geometric")
        assert Path(peer.__file__).with_name(tasks).is_file()
        self.cases = {p.stem: self.read(p) for p in Path(directory).glob("*.npz")}

    def read(self, file):
        with np.load(file, allow_pickle=False) as saved:
            a = dict(saved)
        n = len(a["x"])
        matrix = np.zeros((n, n))
        for side, into in (("", matrix), ("transposed_", np.zeros((n, n)))):
            rows = np.repeat(np.arange(n), np.diff(a[f"{side}starts"]))
            np.add.at(into, (rows, a[f"{side}senders"]), a[f"{side}values"])
            np.testing.assert_allclose(into, matrix.T if side else matrix, rtol=1e-6)
        return a | {"matrix": matrix, "b": np.zeros(a["w"].shape[1]), "w": a["w"].astype(float)}

    def ask(self, do, case, result="", rate=None):
        a = self.cases[case]
        wrong = 1.01 if self.spoil == do else 1
        answer = {"seconds": 0.5, "form": "dense"}
        if do == "train":
            return answer | {"loss": wrong * self.step(a, rate)}
        arrays = [a["matrix"] @ a["x"]]
        arrays += [a["matrix"].T @ a["gradient"]] if do != "forward" else []
        if result:
            np.savez(result, *arrays[:-1], wrong * arrays[-1])
        return answer

    def step(self, a, rate):
        inner = a["matrix"] @ a["x"]
        y = inner @ a["w"] + a["b"]
        p = np.exp(y - y.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        rows = np.arange(len(y))
        value = -np.log(p[rows, a["labels"]]).mean()
        p[rows, a["labels"]] -= 1
        a["w"] -= rate * inner.T @ p / len(y)
        a["b"] -= rate * p.mean(0)
        return value

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def no_forecast(monkeypatch):
    """A step of a forecast that is not taken."""
    monkeypatch.setattr(graphs, "forecast_step", lambda config, *, turns: FORECAST)


def test_both_sides_do_the_same(monkeypatch, capsys, no_forecast):
    monkeypatch.setattr(graphs, "Peer", Fake)
    found = compare(SMALL)
    does = ("forward", "backward", "two_products")
    expected = [*(f"{do}, {n}" for n in (7, 5) for do in does), "train", "forecast"]
    assert list(found.tasks) == expected
    assert found.tasks["forecast"] is FORECAST
    for task in list(found.tasks.values())[:-1]:
        assert task.ours > 0 and task.theirs == 0.5 and task.form == "dense"
        assert 0 < task.difference < 1e-5 and task.ratio > 0
    rich.print(found)
    said = " ".join(capsys.readouterr().out.split())
    assert "fake 1.0, up to 3 threads" in said and "float32 both" in said


@pytest.mark.parametrize("do", ["forward", "backward", "two_products", "train"])
def test_figures_of_other_work_are_refused(monkeypatch, do):
    monkeypatch.setattr(graphs, "Peer", type("Spoiled", (Fake,), {"spoil": do}))
    with pytest.raises(FFNLabError, match=f"{do}.*the two sides.* differ by (1.0e-02|9.9e-03)"):
        compare(SMALL)


def test_ratios_are_those_of_the_tasks(monkeypatch):
    task = Task.of([(1.0, 2.0), (1.0, 3.0), (2.0, 5.0)], 0.0, "dense")
    assert (task.ours, task.theirs, task.ratio) == (1.0, 3.0, 2.5)
    monkeypatch.setattr(graphs, "compare", lambda: Comparison("", {"train": task}, ""))
    assert graphs.ratios() == {"train": 2.5}


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    find = lambda name: None if name == "torch_geometric" else name  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(MissingExtraError, match="^torch_geometric not installed"):
        compare(SMALL)


@pytest.mark.parity
def test_with_torch():
    try:
        peer.peer_python(graphs.PACKAGES)
    except MissingExtraError as error:
        pytest.skip(str(error))
    found = compare(SMALL)
    assert all(task.form for task in found.tasks.values()) and "PyG" in found.about
