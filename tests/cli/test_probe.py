"""`ffnlab probe` from its arguments to its files."""

import json
import re
import sys

import jax
import pytest

from ffnlab import models
from ffnlab.analysis import PROBES, gradient_alignment, weight_norms
from ffnlab.cli.main import main
from ffnlab.cli.probe import parsed
from ffnlab.compress.text import calibration, file_text
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.learning import backprop, next_token
from ffnlab.models import Decoder
from ffnlab.recipes import Calibration
from tests.compress.conftest import CONFIG, WORDS
from tests.test_outside import register

MODULE = '''
"""A probe of how deep a model is."""
import dataclasses
from ffnlab.probe import Probe
from ffnlab.report import Report

@dataclasses.dataclass(frozen=True)
class Depth(Report):
    depth: int

    def rows(self):
        return [{"depth": self.depth}]

    def figures(self):
        return {"depth": float(self.depth)}

    def draw(self, figure):
        figure.subplots().bar([0], [self.depth])

def depth(*, times: int = 1) -> Probe:
    """How deep it is.

    Args:
      times: what the depth is multiplied by.
    """
    return Probe("depth", lambda m: None, None, lambda m, s: Depth(times * len(m.layers)))
'''


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(3))


@pytest.fixture(scope="module")
def inputs(model, tmp_path_factory):
    """A folder with a model directory and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    models.save(model, folder / "model")
    Tokenizer.bytes().save(folder / "model")
    (folder / "text.txt").write_bytes(WORDS)
    return folder


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "probes_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("probes_of_mine", None)


def said_by(capsys) -> str:
    """What was printed, without the frames of tables and where their lines end."""
    return " ".join(re.sub("[│┃]", " ", capsys.readouterr().out).split())


def read(folder):
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.png"}
    return json.loads((folder / "report.json").read_text())


def test_a_probe_of_the_model_alone_needs_no_text(model, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    select = "layers[1].ffn"
    given = ["probe", "weight_norms", str(inputs / "model"), "--option", f"select={select}"]
    assert main(given) == 0
    found = read(tmp_path / "runs" / "probe" / "weight_norms")
    assert found.pop("about") == {
        "probe": "weight_norms",
        "options": {"select": select},
        "model": str(inputs / "model"),
    }
    expected = weight_norms(select=select)(model)
    assert found == json.loads(json.dumps(expected.as_json()))
    said = capsys.readouterr().out
    assert "layers[1].ffn.down.w" in said and "runs/probe/weight_norms: report.json" in said


def test_a_probe_sees_the_calibration_text(model, inputs, tmp_path):
    text, out = str(inputs / "text.txt"), tmp_path / "out"
    sizes = ["--tokens", "200", "--window", "16", "--batch", "3", "--out", str(out)]
    given = ["gradient_alignment", str(inputs / "model"), "--text", text, "--option", "seed=2"]
    assert main(["probe", *given, *sizes]) == 0
    words = file_text([text])
    batches = calibration(words, Tokenizer.bytes(), Calibration(200, 16, 3), CONFIG.vocab)
    assert len(batches) == 4
    found = read(out)
    assert found["about"]["text"] == words.as_json() | {"rows": 12, "window": 16}
    expected = gradient_alignment(backprop(), next_token, seed=2)(model, batches)
    assert found["figures"]["cosine"] == pytest.approx(expected.figures()["cosine"], abs=1e-6)


def test_the_list_and_the_options(capsys):
    assert main(["probe", "--list"]) == 0
    said = said_by(capsys)
    assert all(name in said for name in PROBES) and "looks at the model alone" in said
    assert main(["probe", "--keys"]) == 0
    said = said_by(capsys)
    assert all(f"ffnlab probe {name}" in said for name in PROBES)
    assert "seed integer 0 of the rule's first state." in said and "begin" not in said
    assert main(["probe", "weight_norms", "--keys"]) == 0
    said = capsys.readouterr().out
    assert "select" in said and "'**'" in said and "gradient_alignment" not in said


def test_probes_of_others_have_names(modules, inputs, tmp_path, capsys):
    register(
        modules, ["deep = probes_of_mine:depth", "lost = nowhere:probe"], group="ffnlab.probes"
    )
    for name in ("deep", "probes_of_mine:depth"):
        out = tmp_path / name.partition(":")[0]
        given = [name, str(inputs / "model"), "--option", "times=3", "--out", str(out)]
        assert main(["probe", *given]) == 0
        assert read(out)["figures"] == {"depth": 3.0 * CONFIG.layers}
        assert read(out)["about"]["probe"] == name
    capsys.readouterr()
    assert main(["probe", "--list"]) == 0
    said = said_by(capsys)
    assert "How deep it is." in said and "no module 'nowhere'" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            [],
            "name is missing; there are: compiled_cost, gradient_alignment, information_plane,",
        ),
        (["weight_norm"], "unknown probe 'weight_norm'; did you mean 'weight_norms'?"),
        (["weight_norms", "--option", "selects=x"], "unknown option 'selects'"),
        (["weight_norms", "--option", "select=3"], "select"),
        (["weight_norms", "--option", "select"], "option 'select' must be NAME=VALUE"),
        (["weight_norms", "--option", "select=nowhere"], "matches nothing"),
        (["compiled_cost", "--window", "1"], "window"),
        (["lossy_information"], "looks at inputs with classes"),
        (["weight_norms", "nowhere"], "nowhere"),
    ],
)
def test_errors_of_use_are_a_line_and_write_nothing(given, said, inputs, tmp_path, capsys):
    where = [str(inputs / "model")] if given and "nowhere" not in given[1:2] else []
    name, options = given[:1], given[1:]
    out = tmp_path / "out"
    assert main(["probe", *name, *where, *options, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("ffnlab probe: error: ")
    assert not out.exists()


def test_options_are_toml_and_strings_may_be_bare():
    found = parsed(["a=3", "b=true", 'c="x"', "d=layers[0]**", "e=", "f=[1, 2]", "g=a=b"])
    assert found == {"a": 3, "b": True, "c": "x", "d": "layers[0]**", "e": "", "f": [1, 2]} | {
        "g": "a=b"
    }
    for wrong in (["a"], ["=3"], ["a=1", "a=2"]):
        with pytest.raises(ConfigError, match="must be NAME=VALUE, each name once"):
            parsed(wrong)
