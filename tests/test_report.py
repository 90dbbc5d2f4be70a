"""Reports: printed, shown, and written whole or not at all; figures of a run over its steps."""

import base64
import dataclasses
import json
import re
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import parallel, report
from ffnlab.errors import ConfigError, MissingExtraError
from ffnlab.layers import MLP
from ffnlab.learning import backprop, labelled
from ffnlab.report import Report, Series, as_png, json_rows, plain
from ffnlab.storage import files


@dataclasses.dataclass(frozen=True)
class Zeros(Report):
    share: Mapping[str, float]

    def rows(self):
        return [{"layer": name, "zeros": share} for name, share in self.share.items()]

    def figures(self):
        return {f"zeros/{name}": share for name, share in self.share.items()}

    def draw(self, figure):
        figure.subplots().bar(list(self.share), list(self.share.values()))


FOUND = Zeros({"a [b]x[/b]": np.float32(0.25), "c": 0.123456})


def test_a_report_is_abstract():
    with pytest.raises(TypeError, match="draw.*figures.*rows"):
        Report()


def test_it_prints_rows_and_figures_without_reading_markup():
    said = str(FOUND)
    assert "a [b]x[/b]" in said and "0.1235" in said and "zeros/c" in said
    assert said.count("0.25") == 2, "in the table, and as a figure"


def test_a_report_without_figures_or_rows_prints_the_other():
    class Bare(Zeros):
        def rows(self):
            return []

    assert "zeros/c" in str(Bare({"c": 1.0})) and str(Bare({})) == ""


def test_json_is_of_plain_values():
    found = Zeros({"c": np.float32("nan"), "d": jnp.float32(0.5)}).as_json()
    assert found == {
        "report": "Zeros",
        "rows": [{"layer": "c", "zeros": None}, {"layer": "d", "zeros": 0.5}],
        "figures": {"zeros/c": None, "zeros/d": 0.5},
    }
    assert files.as_json(found) == found


def test_what_is_written_is_read_again(tmp_path):
    out = tmp_path / "new" / "folder"
    FOUND.write(out, about={"model": "embedded", "sizes": (1, 2)})
    assert {path.name for path in out.iterdir()} == {"report.json", "report.png"}
    found = files.read_json(out / "report.json")
    assert found.pop("about") == {"model": "embedded", "sizes": [1, 2]}
    assert found == FOUND.as_json()
    assert (out / "report.png").read_bytes() == as_png(FOUND.draw)
    Zeros({"other": 1.0}).write(out)
    assert files.read_json(out / "report.json") == Zeros({"other": 1.0}).as_json()
    assert list(tmp_path.rglob("*.tmp")) == []


def test_it_is_written_whole_or_not_at_all(tmp_path):
    class Broken(Zeros):
        def draw(self, figure):
            raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        Broken({"c": 1.0}).write(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"about\['f'\]"):
        FOUND.write(tmp_path / "out", about={"f": print})
    assert list(tmp_path.iterdir()) == []
    FOUND.write(tmp_path / "out")
    with pytest.raises(RuntimeError, match="no ink"):
        Broken({"c": 1.0}).write(tmp_path / "out")
    assert files.read_json(tmp_path / "out" / "report.json") == FOUND.as_json()


def test_files_of_others_are_not_replaced(tmp_path):
    FOUND.write(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds .'notes.txt'.; a report takes a folder of its"):
        FOUND.write(tmp_path / "out")
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_notebook_shows_tables_and_picture(monkeypatch):
    shown = FOUND._repr_mimebundle_(include=None, exclude=None)
    assert shown["text/plain"] == str(FOUND) and "a [b]x[/b]" in shown["text/html"]
    (png,) = re.findall(r'src="data:image/png;base64,([^"]+)"', shown["text/html"])
    assert base64.b64decode(png) == as_png(FOUND.draw)

    def absent(module, *, extra):
        raise MissingExtraError(module)

    monkeypatch.setattr(report, "require", absent)
    assert "<img" not in FOUND._repr_mimebundle_()["text/html"]


def test_plain_values():
    value = {"a": np.arange(3), "b": [np.float64("nan"), -np.inf, np.bool_(True)], "c": None}
    assert plain(value, "x") == {"a": [0, 1, 2], "b": [None, None, True], "c": None}
    json.dumps(plain(value, "x"), allow_nan=False)


# Series.

EVALUATIONS = {20: {"held/a": 1.0}, 0: {"held/a": 3.0, "held/b": 0.5, "rate": 9.0}}


def test_a_series_is_in_the_order_of_steps():
    series = Series(EVALUATIONS)
    assert series.names == ["held/a", "held/b", "rate"]
    assert series.rows() == [
        {"step": 0, "held/a": 3.0, "held/b": 0.5, "rate": 9.0},
        {"step": 20, "held/a": 1.0},
    ]
    assert series.figures() == {"held/a": 1.0, "held/b": 0.5, "rate": 9.0}, "the last of each"
    for nothing in ({}, {3: {}}):
        with pytest.raises(ConfigError, match="hold no figure"):
            Series(nothing)


def test_a_series_draws_a_picture_for_each_group():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    Series(EVALUATIONS).draw(figure)
    held, rate = figure.axes
    assert (held.get_ylabel(), rate.get_ylabel()) == ("held", "rate")
    lines = {line.get_label(): line.get_xydata().tolist() for line in held.get_lines()}
    assert lines == {"held/a": [[0, 3], [20, 1]], "held/b": [[0, 0.5]]}
    assert held.get_legend() and not rate.get_legend()


def test_a_resumed_run_is_read_as_its_outcome_has_it(tmp_path, key):
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    batches = lambda position: (x, np.arange(8) % 2)  # noqa: E731
    rule, model = backprop(labelled, optax.sgd(0.1)), MLP((3, 2), key=key)
    evaluate = lambda state: {"held": labelled(state.model, (jnp.asarray(x), batches(0)[1]))[0]}  # noqa: E731
    options = parallel.LoopOptions(log_every=1, evaluate_every=2, evaluate_at=(0,), progress=False)
    for steps in (3, 6):
        where = {"folder": tmp_path, "resume": True, "options": options}
        outcome = parallel.train(rule, model, batches, steps, key=key, evaluate=evaluate, **where)
    series = Series(outcome.evaluations)
    assert [at for at, _ in series.steps] == [0, 2, 3, 4, 6]
    read = Series.read(tmp_path, "held")
    assert read.rows() == series.rows()
    assert Series.read(tmp_path / "metrics.jsonl", "held") == read
    whole = Series.read(tmp_path)
    assert {"held", "loss"} <= set(whole.names) and "seconds" not in whole.names
    assert [at for at, _ in whole.steps] == list(range(7))
    with pytest.raises(ConfigError, match="has no figure 'helt'; it has .*'held'"):
        Series.read(tmp_path, "helt")


def test_rows_that_are_none_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "a": NaN, "who": "x"}\n{"step": 2, "a": 2}\n'
    deep = "[" * 100_000
    path.write_bytes(f'\n3\n{{"a": 1}}\n{deep}\n{good}{{"step": 3, "a"'.encode() + b"\xff")
    assert [row["step"] for row in json_rows(path)] == [1, 2]
    assert Series.read(path).evaluations[2] == {"a": 2.0}
    assert np.isnan(Series.read(path).evaluations[1]["a"])
    path.write_text("")
    with pytest.raises(ConfigError, match="hold no figure"):
        Series.read(path)
    with pytest.raises(FileNotFoundError):
        Series.read(tmp_path / "nowhere")
