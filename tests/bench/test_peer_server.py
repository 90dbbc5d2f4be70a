"""How the peer's process chooses among forms; without torch."""

import runpy
import time
from pathlib import Path

import pytest

from ffnlab.bench import peer

Forms = runpy.run_path(str(Path(peer.__file__).with_name("peer_server.py")))["Forms"]


class Torch:
    """What `Forms` asks of torch."""

    def __init__(self):
        self.threads = []

    def set_num_threads(self, count):
        self.threads.append(count)


class Learner:
    """Counts its steps."""

    def __init__(self, seconds=0.0, fails=False):
        self.seconds, self.fails, self.count = seconds, fails, 0

    def restart(self):
        self.count = 0

    def step(self):
        if self.fails:
            raise RuntimeError("no C++ compiler")
        time.sleep(self.seconds)
        self.count += 1
        return self.count


@pytest.fixture
def forms():
    made = Forms.__new__(Forms)  # which imports torch
    made.torch, made.threads, made.chosen = Torch(), 1, {}
    return made


@pytest.mark.parametrize("fast", ["eager", "time first, compiled"])
def test_the_fastest_learner_goes_on_from_the_start(forms, fast):
    learners = {name: Learner(0.05 * (name != fast)) for name in ("eager", "time first, compiled")}
    answers = [forms.learned("task", learners, lambda x: x.step()) for _ in range(3)]
    assert [answer["loss"] for answer in answers] == [1, 2, 3]
    assert {answer["form"] for answer in answers} == {f"{fast}, threads: 1"}
    assert all(answer["seconds"] > 0 for answer in answers)
    assert [x.count for name, x in learners.items() if name != fast] == [0]


def test_a_form_that_cannot_run_here_is_passed_over(forms, capsys):
    learners = {"eager": Learner(), "compiled": Learner(fails=True)}
    assert forms.learned("task", learners, lambda x: x.step())["form"] == "eager, threads: 1"
    assert "compiled: no C++ compiler" in capsys.readouterr().err
