"""`ffnlab tune`: what the kernels' own command is called with, and that it is the same command."""

import pytest

from ffnlab.cli.main import main
from pallas_kernels import tune


@pytest.fixture
def asked(monkeypatch):
    """The options that the kernels' command got, parsed by it."""
    calls = []

    def asked_for(words):
        calls.append(tune.parser().parse_args(words))
        return 0

    monkeypatch.setattr(tune, "main", asked_for)
    return calls


def test_without_options_the_defaults_are_the_kernels_own(asked):
    assert main(["tune"]) == 0
    assert asked == [tune.parser().parse_args([])]


def test_options_are_passed_on(asked, tmp_path):
    words = ["w4a8.glu", "sparse.glu", "--encoding", "tc", "--treatment", "table", "--again"]
    words += ["--scales", "float32", "--out", "float32", "--experts", "64"]
    words += ["--file", str(tmp_path / "tuned.json")]
    assert main(["tune", *words, "--shape", "1,256,512", "8,256,512"]) == 0
    (options,) = asked
    assert options.shape == [(1, 256, 512), (8, 256, 512)]
    options.shape = None
    assert options == tune.parser().parse_args(words)


def test_a_cpu_says_so(capsys):
    assert main(["tune", "w4a8.matmul"]) == 2
    assert "tune: error: no GPU here (jax finds cpu)" in capsys.readouterr().err
