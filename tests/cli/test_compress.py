"""`ffnlab compress` from its arguments to its files, and what a kill leaves behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from ffnlab import models
from ffnlab.cli.main import main
from ffnlab.compress import read_report
from ffnlab.data.text.documents import digest, split
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder
from tests.compress.conftest import CONFIG, RECIPE, WORDS

# What the makers of a model put beside its weights.
BESIDE = {
    "chat_template.jinja": "{{ messages[0].content }}",
    "generation_config.json": '{"do_sample": true, "top_p": 0.9, "eos_token_id": 0}',
    "special_tokens_map.json": '{"eos_token": "\\u0000"}',
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a model directory, a text and a recipe."""
    folder = tmp_path_factory.mktemp("inputs")
    models.save(Decoder(CONFIG, key=jax.random.key(3)), folder / "model")
    Tokenizer.bytes().save(folder / "model")
    (folder / "text.txt").write_bytes(WORDS)
    trained = [[digest(part)] for part in split(WORDS)]
    for name, content in BESIDE.items():
        (folder / "model" / name).write_text(content)
    record = {"steps": 3, "documents": dict(zip(("train", "held_out"), trained, strict=True))}
    (folder / "model" / "training.json").write_text(json.dumps(record))
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


def arguments(inputs, out, *more: str) -> list[str]:
    """The command line of the job; a flag of `more` stands in place of its own."""
    files = {"--text": inputs / "text.txt", "--recipe": inputs / "recipe.toml"}
    own = [part for flag, file in files.items() if flag not in more for part in (flag, str(file))]
    return ["compress", str(inputs / "model"), *own, "--out", str(out), *more]


def test_a_model_directory_is_compressed(inputs, tmp_path, capsys):
    out = tmp_path / "[" / "out]"  # what rich would read as the end of a style
    assert main(arguments(inputs, out, "--dense")) == 0
    said, warned = capsys.readouterr()
    assert "warning" not in warned  # it is measured on what training held out
    assert f"{out}: model, report.json, pictures\n" in said
    assert "held-out quality, size and speed after each stage" in said
    assert "recipe: recipe.toml" in said
    report = read_report(out / "report.json")
    assert report.model["source"] == str(inputs / "model")
    assert report.data["source"] == str(inputs / "text.txt")
    assert report.rival is None and report.seconds["load"] > 0
    assert [written.folder for written in report.exports] == ["model", "dense"]
    for written in report.exports:
        sizes = {f.name: f.stat().st_size for f in (out / written.folder).iterdir()}
        assert written.nbytes == sum(sizes.values()) - sizes["training.json"]
        again = models.load(out / written.folder)
        assert models.removed(again) and again.config.layers == CONFIG.layers
        origin = json.loads((out / written.folder / "training.json").read_text())
        for name, content in BESIDE.items():
            found = (out / written.folder / name).read_text()
            assert found == content or json.loads(found) == json.loads(content)
        assert origin["documents"]["train"] == [digest(split(WORDS)[0])] and "steps" not in origin


def test_a_text_that_was_trained_on_is_warned_of(inputs, tmp_path, capsys, monkeypatch):
    def stop(*_, origin, **__):
        raise ConfigError(f"enough; {len(origin['documents']['train'])} known")

    monkeypatch.setattr("ffnlab.compress.compress", stop)
    model = shutil.copytree(inputs / "model", tmp_path / "model")
    record = {"documents": {"train": [digest(WORDS)], "held_out": []}}
    (model / "training.json").write_text(json.dumps(record))
    files = ["--text", str(inputs / "text.txt"), "--recipe", str(inputs / "recipe.toml")]
    assert main(["compress", str(model), *files, "--out", str(tmp_path / "out")]) == 2
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith(
        "ffnlab compress: warning: the model was trained on 1 of the 1 documents"
    )
    assert error.endswith("enough; 1 known")


def test_killed_and_stopped_and_resumed(inputs, tmp_path):
    for attempt in range(4):  # on a busy machine the job may end before the signal arrives
        out = tmp_path / f"out{attempt}"
        started(inputs, out).kill_when("original", signal.SIGKILL)
        stopped = started(inputs, out, "--resume").kill_when("finercut", signal.SIGINT)
        if stopped.returncode != 0:
            break
    assert stopped.returncode == 130
    assert stopped.stderr.endswith(f"--out {out} --resume\n")
    assert "interrupted; what was finished is kept" in stopped.stderr
    measured = json.loads((out / ".resume" / "run.json").read_text())["measured"]
    assert main(arguments(inputs, out, "--resume")) == 0
    report = read_report(out / "report.json")
    assert report.rows[0].speed == measured["original"]["speed"]
    assert not (out / ".resume").exists()


class started:
    """The job in a process of its own."""

    def __init__(self, inputs, out, *more: str):
        command = [sys.executable, "-m", "ffnlab", *arguments(inputs, out, *more)]
        self.file = out / ".resume" / "run.json"
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
        )

    def kill_when(self, label: str, with_signal: signal.Signals) -> subprocess.CompletedProcess:
        """Sends a signal as soon as a stage is measured."""
        while self.process.poll() is None:
            if self.file.exists() and label in json.loads(self.file.read_text())["measured"]:
                self.process.send_signal(with_signal)
                break
            time.sleep(0.02)
        out, error = self.process.communicate(timeout=300)
        return subprocess.CompletedProcess((), self.process.returncode, out, error)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resume", "--restart"], "--resume and --restart exclude each other"),
        (["--recipe", "none.toml"], "none.toml: No such file or directory"),
        (["--text", "none.txt"], "none.txt cannot be read"),
        (["--also", "none.txt"], "--also compares the embedded model with its rival; model is "),
    ],
)
def test_errors_of_use_are_one_line(inputs, tmp_path, capsys, more, said):
    assert main(arguments(inputs, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("ffnlab compress: error: ") and said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_that_is_no_model(tmp_path, capsys):
    assert main(["compress", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "config.json" in capsys.readouterr().err


def test_an_interrupted_run_is_not_overwritten(inputs, tmp_path, capsys):
    folder = tmp_path / "out" / ".resume"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    assert main(arguments(inputs, tmp_path / "out")) == 2
    assert "--resume continues it, --restart throws it away" in capsys.readouterr().err


def test_a_classifier_is_compressed_on_images(tmp_path, capsys):
    model = models.ConvNet([1, 4, 4, 4], 10, key=jax.random.key(0))
    models.save(model, tmp_path / "net", format="ffnlab")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[evaluation]\nsamples = 60\n[[stage]]\ntransform = "nearest"\ngroup = 2\n')
    files = [str(tmp_path / "net"), "--recipe", str(recipe), "--out", str(tmp_path / "out")]
    assert main(["compress", *files, "--images", "digits"]) == 0
    said = capsys.readouterr().out
    assert "data: digits" in said and "accuracy" in said and "images/s" in said
    report = read_report(tmp_path / "out" / "report.json")
    assert report.measured_on == {"images": 60} and report.exports[0].format == "ffnlab"
    assert isinstance(models.load(tmp_path / "out" / "model"), models.ConvNet)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "digits", "--text", "x"], "exclude each other"),
        (["--images", "digits", "--records", "x"], "exclude each other"),
        (["--images", "digits"], "--recipe FILE"),
    ],
)
def test_what_a_classifier_is_not_given(tmp_path, capsys, options, said):
    assert main(["compress", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err
