"""Tests of `ffnlab bench learning` with a peer of NumPy, and once with torch; none is timed."""

import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from ffnlab.bench import learning, peer
from ffnlab.bench.learning import Settings, compare
from ffnlab.bench.turns import Comparison, Task
from ffnlab.errors import ConfigError, FFNLabError, MissingExtraError

SMALL = Settings(
    batch=2, length=3, inputs=4, hidden=5, sizes=(6, 7, 3), together=2, steps=5, turns=2
)


class Fake:
    """Does in float64, with gradients by hand, what `learning_peer.py` does."""

    about = {"versions": {"fake": "1.0"}, "threads": 3}
    spoil = ""

    def __init__(self, directory, *, tasks, packages):
        assert tasks == "learning_peer.py" and packages == ("torch",)
        assert Path(peer.__file__).with_name(tasks).is_file()
        self.given, self.position, self.generated_steps = {}, 0, 0
        for file in Path(directory).glob("*.npz"):
            with np.load(file, allow_pickle=False) as saved:
                self.given[file.stem] = {
                    k: v.astype(float) if v.dtype == np.float32 else v for k, v in saved.items()
                }
        self.alone = {k: v.copy() for k, v in (self.given["small"] | self.given["alone"]).items()}
        self.taught_at = 0

    def ask(self, do, *, rate=0.0, steps=None, inner=0):
        if do == "peak":
            return {"peak": 3 * 2**20}
        if do == "forward_forward":
            loss = self.forward_forward(rate, steps, inner)
        else:
            loss = self.recurrent(rate) if do == "recurrent" else getattr(self, do)(rate, steps)
        wrong = 1.01 if self.spoil == do else 1
        return {"seconds": 0.5, "form": "loop", "loss": wrong * loss}

    def recurrent(self, rate):
        a = self.given["recurrent"]
        x, width = a["x"], a["target"].shape[-1]
        h = c = np.zeros((len(x), width))
        kept, ys = [], []
        for t in range(x.shape[1]):
            gates = x[:, t] @ a["w_input"] + h @ a["w_hidden"] + a["b"]
            i, f, g, o = np.split(gates, 4, axis=1)
            i, f, o, g = *(1 / (1 + np.exp(-v)) for v in (i, f, o)), np.tanh(g)
            kept.append((h, c, i, f, g, o))
            c = f * c + i * g
            h = o * np.tanh(c)
            ys.append(h)
        far = np.stack(ys, 1) - a["target"]
        slopes = {name: np.zeros_like(a[name]) for name in ("w_input", "w_hidden", "b")}
        dh = dc = np.zeros_like(h)
        for t in reversed(range(x.shape[1])):
            h, c, i, f, g, o = kept[t]
            new = f * c + i * g
            dh = dh + 2 * far[:, t] / far.size
            dc = dc + dh * o * (1 - np.tanh(new) ** 2)
            parts = (dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g**2))
            d = np.concatenate([*parts, dh * np.tanh(new) * o * (1 - o)], 1)
            slopes["w_input"] += x[:, t].T @ d
            slopes["w_hidden"] += h.T @ d
            slopes["b"] += d.sum(0)
            dh, dc = d @ a["w_hidden"].T, dc * f
        for name, slope in slopes.items():
            a[name] -= rate * slope
        return (far**2).mean()

    def small(self, rate, steps):
        a = self.given["small"]
        for i in range(steps):
            self.descend(a, rate, self.position + i)
        self.position += steps
        return self.descend(a, 0.0, self.position)

    def hypernetwork(self, rate, steps):
        h, start = self.given["hypernetwork"], self.generated_steps
        for i in range(steps):
            self.descend_generated(h, rate, start + i)
        self.generated_steps += steps
        return self.descend_generated(h, 0.0, start + steps)

    def descend_generated(self, h, rate, position):
        """A step of the network's own weights, by unit steps, and what it is by the chain rule."""
        small = self.given["small"]
        names = ("b0", "w0", "b1", "w1")
        u = np.hstack([np.repeat(h["task"], len(h["pieces"]), 0), h["pieces"]])
        inner = np.maximum(u @ h["w0"] + h["b0"], 0)
        flat = (inner @ h["w1"] + h["b1"]).reshape(-1)
        ends = np.cumsum([small[name].size for name in names])
        parts = np.split(flat[: ends[-1]], ends[:-1])
        made = {k: p.reshape(small[k].shape) for k, p in zip(names, parts, strict=True)}
        a = {k: v.copy() for k, v in made.items()} | {k: small[k] for k in ("x", "labels")}
        loss = self.descend(a, 1.0, position)
        slope = np.zeros_like(flat)
        slope[: ends[-1]] = np.concatenate([(made[k] - a[k]).reshape(-1) for k in names])
        slope = slope.reshape(len(u), -1)
        back = slope @ h["w1"].T * (inner > 0)
        back_u, width = back @ h["w0"].T, h["task"].shape[1]
        h["w1"] -= rate * inner.T @ slope
        h["b1"] -= rate * slope.sum(0)
        h["w0"] -= rate * u.T @ back
        h["b0"] -= rate * back.sum(0)
        h["task"] -= rate * back_u[:, :width].sum(0, keepdims=True)
        h["pieces"] -= rate * back_u[:, width:]
        return loss

    def descend(self, a, rate, position):
        """A step; the loss before it."""
        at = position % len(a["x"])
        x, labels, rows = a["x"][at], a["labels"][at], np.arange(len(a["labels"][at]))
        inner = np.maximum(x @ a["w0"] + a["b0"], 0)
        y = inner @ a["w1"] + a["b1"]
        p = np.exp(y) / np.exp(y).sum(1, keepdims=True)
        loss = -np.log(p[rows, labels]).mean()
        p[rows, labels] -= 1
        back = (p / len(x)) @ a["w1"].T * (inner > 0)
        for name, slope in {
            "w1": inner.T @ p / len(x),
            "b1": p.mean(0),
            "w0": x.T @ back,
            "b0": back.sum(0),
        }.items():
            a[name] -= rate * slope
        return loss

    def forward_forward(self, rate, steps, inner):
        for _ in range(steps):
            self.taught(self.alone, self.taught_at, rate, inner)
            self.taught_at += 1
        return self.taught(self.alone, self.taught_at, 0.0, 1)

    def taught(self, a, at, rate, inner):
        """Layers that learn alone from a batch; the mean of their losses before that."""
        x, labels = (a[name][at % len(a["x"])] for name in ("x", "labels"))
        rows, classes = len(x), a["w1"].shape[1]
        mark = np.eye(classes)[np.concatenate([labels, a["wrong"][at]])]
        h = np.tile(x, (2, 1))
        h[:, :classes] = mark * np.tile(np.abs(x).max(1, keepdims=True), (2, 1))
        losses = []
        for i, is_last in ((0, False), (1, True)):
            w, b, p = a[f"w{i}"], a[f"b{i}"], a[f"p{i}"]
            out = lambda: (  # noqa: E731
                h @ w + b if is_last else np.maximum(h @ w + b, 0)  # noqa: B023
            )
            for k in range(inner):
                z = out()
                length = np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-6)
                g = z @ p / length[:, 0] / np.linalg.norm(p)
                gap = g[:rows] - g[rows:]
                if k == 0:
                    losses.append(np.log1p(np.exp(-4 * gap)).mean())
                by_gap = -4 / (1 + np.exp(4 * gap)) / rows
                by_g = np.concatenate([by_gap, -by_gap])[:, None]
                by_z = by_g * (p / np.linalg.norm(p) - g[:, None] * z / length) / length
                by_z = by_z if is_last else by_z * (z > 0)
                w -= rate * h.T @ by_z
                b -= rate * by_z.sum(0)
            h = out()
        return np.mean(losses)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_both_sides_do_the_same(monkeypatch):
    monkeypatch.setattr(learning, "Peer", Fake)
    for rate in ("RATE", "GENTLE"):  # so that wrong gradients are seen
        monkeypatch.setattr(learning, rate, 0.5)
    found = compare(SMALL)
    names = ["recurrent", "small", "hypernetwork", "forward_forward"]
    assert list(found.tasks) == names
    for task in found.tasks.values():
        assert task.ours > 0 and task.theirs == 0.5 and task.form == "loop"
        assert 0 < task.difference < 1e-5 and task.ratio > 0
    assert "fake 1.0, up to 3 threads" in found.about
    assert found.peaks[0] > 2**20 and found.peaks[1] == 3 * 2**20
    assert "the peer's 3 MiB" in printed(found)


def printed(found):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


@pytest.mark.parametrize("do", ["recurrent", "small", "hypernetwork", "forward_forward"])
def test_figures_of_other_work_are_refused(monkeypatch, do):
    monkeypatch.setattr(learning, "Peer", type("Spoiled", (Fake,), {"spoil": do}))
    with pytest.raises(
        FFNLabError, match=f"{do}: the two sides' losses differ by (1.0e-02|9.9e-03)"
    ):
        compare(SMALL)


def test_the_first_turn_does_not_count():
    rows = [(9.0, 1.0, {"loss": 1.0, "seconds": 1.0}), (2.0, 1.0, {"loss": 1.0, "seconds": 4.0})]
    for row in rows:
        row[2]["form"] = "loop"
    assert learning.task_of("small", rows) == Task(2.0, 4.0, 2.0, 0.0, "loop")


def test_ratios_are_those_of_the_tasks(monkeypatch):
    task = Task(1.0, 2.0, 2.5, 0.0, "eager")
    monkeypatch.setattr(learning, "compare", lambda: Comparison("", {"small": task}, ""))
    assert learning.ratios() == {"small": 2.5}


@pytest.mark.parametrize("wrong", [{"turns": 0}, {"together": 0}, {"hidden": 0}, {"steps": 0}])
def test_sizes_are_positive(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Settings(**wrong)


@pytest.mark.parity
def test_with_torch():
    try:
        peer.peer_python(learning.PACKAGES)
    except MissingExtraError as error:
        pytest.skip(str(error))
    found = compare(SMALL)
    assert all(task.form for task in found.tasks.values()) and "torch" in found.about
