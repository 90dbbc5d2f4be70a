"""Tests of `ffnlab bench` with a peer that is ourselves, and once with transformers; none timed."""

import importlib.util
import json
import os
import sys

import numpy as np
import pytest
import rich

from ffnlab import models, weights
from ffnlab.bench import peer, versus
from ffnlab.bench.peer import Peer, peer_python
from ffnlab.bench.versus import Settings
from ffnlab.errors import FFNLabError, MissingExtraError

SMALL = Settings(prompt=4, new=3, prefill=8, window=8, windows=2, turns=2)


@pytest.fixture
def directory(fixtures):
    """A tiny model."""
    return fixtures / "models" / "llama2"


@pytest.fixture
def fake(monkeypatch):
    """Puts ourselves in the place of the peer; its answers may be changed on the way."""

    def install(change=lambda answer: answer):
        class Fake:
            about = {"dtype": "float32", "threads": 3, "versions": {"fake": "1.0"}}

            def __init__(self, directory):
                self.model = weights.prepare(models.load(directory, extras=False))

            def ask(self, do, tokens=None, prompt=None, new=None, rows=None):
                answer = {
                    "prefill": lambda: versus.prefill(self.model, np.array(tokens)),
                    "decode": lambda: versus.decode(self.model, np.array(prompt), new),
                    "evaluate": lambda: versus.evaluate(self.model, np.array(rows)),
                }[do]()
                return change({**json.loads(json.dumps(answer)), "form": "our own"})

            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

        monkeypatch.setattr(versus, "Peer", Fake)

    return install


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Names a shell script as the peer's interpreter."""
    if os.name != "posix":
        pytest.skip("needs a POSIX shell")

    def install(text):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        monkeypatch.setenv(peer.VARIABLE, str(path))

    return install


def test_both_sides_do_the_same_tasks(directory, fake, capsys):
    fake()
    found = versus.compare(directory, SMALL)
    assert list(found.tasks) == ["prefill", "decode", "evaluate"]
    assert [task.tokens for task in found.tasks.values()] == [8, 3, 16]
    for task in found.tasks.values():
        assert task.ours > 0 and task.theirs > 0 and task.ratio > 0 and task.form == "our own"
    rich.print(found)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("float32") == 2 and "fake 1.0" in said and "up to 3 threads" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: {**answer, "tokens": [-1]}, "prefill: .* 0% of tokens equal"),
        (
            lambda answer: answer | ({"nats": 2 * answer["nats"]} if "nats" in answer else {}),
            "evaluate: .* loss differs by 5.0e-01",
        ),
    ],
)
def test_figures_of_other_work_are_refused(directory, fake, change, said):
    fake(change)
    with pytest.raises(FFNLabError, match=said):
        versus.compare(directory, SMALL)


def test_the_embedded_model_is_measured_by_default(monkeypatch):
    seen = []

    def compare(directory):
        seen.append(models.load(directory, extras=False).config)
        task = versus.Task("decode", 1, 1.0, 2.0, 2.0, "equal", "fake")
        return versus.Comparison({"decode": task}, "", "")

    monkeypatch.setattr(versus, "compare", compare)
    assert versus.ratios() == {"decode": 2.0}
    assert (seen[0].width, seen[0].hidden, seen[0].layers) == (128, 384, 8)


def test_the_peer_is_asked_line_by_line(program):
    program('while read -r line; do echo "$line"; done')
    with Peer("a model", threads=2) as echo:
        assert echo.about == {"do": "load", "directory": "a model", "threads": 2}
        assert echo.ask("decode", prompt=[1, 2]) == {"do": "decode", "prompt": [1, 2]}


def test_what_a_failing_peer_says_is_passed_on(program):
    program("echo it is broken >&2; exit 3")
    with pytest.raises(FFNLabError, match="failed at 'load': it is broken"):
        Peer("a model")


def test_without_torch_the_extra_is_named(monkeypatch):
    monkeypatch.delenv(peer.VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"ffnlab\[parity\].*FFNLAB_PARITY_PYTHON"):
        peer_python()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert peer_python() == sys.executable


@pytest.mark.parity
def test_transformers_computes_the_same(directory):
    try:
        peer_python()
    except MissingExtraError as error:
        pytest.skip(str(error))
    found = versus.compare(directory, SMALL)
    assert all(task.form for task in found.tasks.values())
    assert "torch" in found.theirs and "float32" in found.theirs
