"""The job from end to end: results, resumption, the check of what was written, messages."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from ffnlab import models, transform, weights
from ffnlab.compress import TextTask, compress, export, job, measure, read_report
from ffnlab.compress.measure import quality
from ffnlab.compress.plan import digest, labels_of
from ffnlab.compress.state import FOLDER, State
from ffnlab.compress.text import Text, held_out
from ffnlab.errors import ConfigError, FormatError, NumericalError
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder
from ffnlab.quantization import nearest
from ffnlab.recipes import Stage, parse_recipe
from ffnlab.storage import files, npz
from ffnlab.transform import Transform
from tests.compress.conftest import CONFIG, RECIPE
from tests.holding import holder

TIMED = ("speed", "speed_original", "seconds")


def lasting(report):
    """A report without what differs between two runs of the same job."""
    rows = [dataclasses.replace(row, **dict.fromkeys(TIMED, 1.0)) for row in report.rows]
    return dataclasses.replace(report, rows=tuple(rows), seconds={}, peak_memory=0)


@pytest.fixture(scope="module")
def finished(model, tokenizer, text, recipe, tmp_path_factory):
    """(folder, report) of a job that nothing interrupted."""
    out = tmp_path_factory.mktemp("finished")
    return out, compress(
        model, recipe, TextTask(tokenizer, text), out, source="a test", progress=False
    )


def test_the_folder_holds_what_is_promised(finished):
    out, report = finished
    names = {path.name for path in out.iterdir()}
    assert names == {"model", "report.json", "pareto.png", "removal.png"}
    assert read_report(out / "report.json") == report
    for picture in out.glob("*.png"):
        content = picture.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_rows_say_what_the_stages_did(finished, model):
    _, report = finished
    original, pruned, quantized = report.rows
    assert [row.stage for row in report.rows] == ["original", "finercut", "fireq"]
    assert original.parameters > pruned.parameters
    assert original.nbytes > pruned.nbytes > 2 * quantized.nbytes
    assert original.flops > pruned.flops
    assert quantized.cache_bytes < 0.4 * pruned.cache_bytes
    assert all(row.speed > 0 and row.speed_original > 0 for row in report.rows)
    assert original.seconds == 0 < pruned.seconds
    assert report.model["source"] == "a test" and report.model["sha256"] == digest(model)
    assert all(
        math.log2(row.scores["perplexity"]) == pytest.approx(row.scores["bits_per_byte"])
        for row in report.rows
    )


def test_what_was_written_is_what_was_measured(finished, text, tokenizer, recipe):
    out, report = finished
    (written,) = report.exports
    assert written.score == report.rows[-1].scores["perplexity"]
    samples = held_out(text, tokenizer, recipe.evaluation, 256)
    for extras, expected in ((True, written.score), (False, written.score_elsewhere)):
        loaded = weights.prepare(models.load(out / "model", extras=extras))
        assert quality(loaded, samples, 4).perplexity == pytest.approx(expected, rel=1e-6)
    assert written.score_elsewhere != written.score
    assert any("int4 keys and values" in sentence for sentence in written.ignored)
    assert Tokenizer.load(out / "model").encode("a") == [97]
    assert written.files == export.checksums(out / "model")


def test_quantized_weights_are_small_on_disk(finished):
    out, report = finished
    (written,) = report.exports
    assert (written.folder, written.format) == ("model", "compressed-tensors")
    config = files.read_json(out / "model" / "config.json")
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert written.nbytes == sum(path.stat().st_size for path in (out / "model").iterdir())
    stored, header = report.rows[-1].nbytes, 8000
    assert (out / "model" / "model.safetensors").stat().st_size < 1.3 * stored + header


def test_the_dense_directory_comes_beside_the_packed_one(model, tokenizer, tmp_path):
    small, _ = transform.apply(nearest(group=32), models.remove(model, [2]), [], progress=False)
    arguments = (tokenizer.save, tmp_path, 7.0, lambda model, label: 7.0)
    written = export.export(small, *arguments, dense=True)
    assert [(w.folder, w.format) for w in written] == [
        ("model", "compressed-tensors"),
        ("dense", "dense"),
    ]
    assert 2 * written[0].nbytes < written[1].nbytes
    packed, dense = (models.load(tmp_path / w.folder) for w in written)
    assert isinstance(packed.layers[0].ffn.up.weight, weights.Int4)
    assert isinstance(dense.layers[0].ffn.up.weight, weights.Dense)
    assert "quantization_config" not in files.read_json(tmp_path / "dense" / "config.json")
    assert any("written as dense matrices" in sentence for sentence in written[1].ignored)


def test_a_model_without_quantized_weights_is_written_dense(model, tokenizer, tmp_path):
    arguments = (tokenizer.save, tmp_path, 7.0, lambda model, label: 7.0)
    (written,) = export.export(models.remove(model, [0]), *arguments, dense=True)
    assert (written.folder, written.format) == ("model", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_model_given_stays_as_it_is(finished, model):
    _, report = finished
    assert digest(model) == report.model["sha256"]


def test_phases_are_timed(finished):
    _, report = finished
    phases = ["load", "prepare", "evaluate", "decode", "finercut", "fireq"]
    assert list(report.seconds) == [*phases, "write and check", "pictures"]
    assert report.peak_memory > 10_000_000


class Stop(BaseException):
    """What a kill looks like from inside."""


def stop_after_measuring(label, monkeypatch):
    record = State.record

    def stopping(self, key, measurement):
        record(self, key, measurement)
        if key == label:
            raise Stop

    monkeypatch.setattr(State, "record", stopping)


def stop_after_saving(count, monkeypatch):
    """Stops when statistics were saved for the `count`-th time."""
    save, saved = npz.save_stats, []

    def stopping(path, stats):
        save(path, stats)
        saved.append(path)
        if len(saved) == count:
            raise Stop

    monkeypatch.setattr(npz, "save_stats", stopping)


def stop_in(module, name, monkeypatch):
    def stopping(*args, **kwargs):
        raise Stop

    monkeypatch.setattr(module, name, stopping)


INTERRUPTIONS = {
    "before anything was measured": lambda m: stop_in(measure, "quality", m),
    "after the original": lambda m: stop_after_measuring("original", m),
    "in the middle of the search": lambda m: stop_after_saving(1, m),
    "at the end of the search": lambda m: stop_after_saving(2, m),
    "after pruning": lambda m: stop_after_measuring("finercut", m),
    "after calibrating fireq": lambda m: stop_after_saving(3, m),
    "after quantizing": lambda m: stop_after_measuring("fireq", m),
    "while writing": lambda m: stop_in(export, "checksums", m),
    "while drawing": lambda m: stop_in(job, "as_png", m),
}


def test_a_folder_takes_one_job_at_a_time(model, tokenizer, text, recipe, tmp_path):
    with (
        holder(tmp_path) as (process, _),
        pytest.raises(ConfigError, match=rf"process {process.pid}\b"),
    ):
        compress(model, recipe, TextTask(tokenizer, text), tmp_path, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["run.lock"]


@pytest.mark.parametrize("when", INTERRUPTIONS)
def test_an_interrupted_job_ends_as_if_nothing_had_happened(
    finished, model, tokenizer, text, recipe, tmp_path, when
):
    arguments = (model, recipe, TextTask(tokenizer, text), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        INTERRUPTIONS[when](patch)
        with pytest.raises(Stop):
            compress(*arguments, source="a test", progress=False)
    assert (tmp_path / FOLDER).is_dir() and not (tmp_path / "report.json").exists()
    with pytest.raises(ConfigError, match="holds an interrupted run"):
        compress(*arguments, progress=False)
    report = compress(*arguments, source="a test", interrupted="resume", progress=False)
    _, expected = finished
    assert lasting(report) == lasting(expected)
    assert not (tmp_path / FOLDER).exists()


def test_finished_work_is_not_done_again(model, tokenizer, text, recipe, tmp_path):
    arguments = (model, recipe, TextTask(tokenizer, text), tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        stop_after_measuring("finercut", patch)
        with pytest.raises(Stop):
            compress(*arguments, progress=False)
    before = json.loads((tmp_path / FOLDER / "run.json").read_text())["measured"]
    with pytest.MonkeyPatch.context() as patch:
        stop_after_saving(2, patch)  # one pass of fireq is saved; the search would save twice
        report = compress(*arguments, interrupted="resume", progress=False)
    assert [dataclasses.asdict(row) for row in report.rows[:2]] == list(before.values())


@pytest.mark.parametrize("what", ["recipe", "model", "text"])
def test_another_job_is_not_resumed(model, tokenizer, text, recipe, tmp_path, what):
    given = {"recipe": recipe, "model": model, "text": text}
    said = {"recipe": "recipe", "model": "model", "text": "data"}
    with pytest.MonkeyPatch.context() as patch:
        stop_in(measure, "quality", patch)
        with pytest.raises(Stop):
            run(given, tokenizer, tmp_path)
    changed = {
        "recipe": parse_recipe(RECIPE.replace("remove = 2", "remove = 1")),
        "model": jax.tree.map(lambda leaf: leaf * 2, model),
        "text": dataclasses.replace(text, train=text.train + b"x"),
    }
    with pytest.raises(ConfigError, match=f"was begun with another {said[what]}: "):
        run(given | {what: changed[what]}, tokenizer, tmp_path, interrupted="resume")


def run(given, tokenizer, out, **options):
    """The job of a dict of its inputs."""
    inputs = given["model"], given["recipe"], TextTask(tokenizer, given["text"])
    return compress(*inputs, out, progress=False, **options)


def tamper_with_weights(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4096:] = bytes(4096)
    file.write_bytes(content)


def tamper_with_sidecar(folder):
    content = files.read_json(folder / "ffnlab.json")
    for said in content["by_block"].values():
        said.pop("kv_format", None)
    files.write_json(folder / "ffnlab.json", content)


def tamper_with_a_bit(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4] ^= 1  # the last bit of a mantissa
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("tamper", "said"),
    [
        (tamper_with_weights, "parameters are not those that were written"),
        (tamper_with_a_bit, "1 parameters are not those that were written, the first "),
        (tamper_with_sidecar, "loaded again, the model scores"),
    ],
)
def test_the_check_sees_a_file_that_is_not_what_was_written(
    model, tokenizer, text, recipe, tmp_path, monkeypatch, tamper, said
):
    save = export.save

    def tampered(model, folder, **options):
        said = save(model, folder, **options)
        tamper(folder)
        return said

    monkeypatch.setattr(export, "save", tampered)
    with pytest.raises(FormatError, match=said):
        compress(model, recipe, TextTask(tokenizer, text), tmp_path, progress=False)
    assert not (tmp_path / "report.json").exists()
    assert (tmp_path / FOLDER).is_dir()


def test_all_that_does_not_fit_is_said_at_once(model, tokenizer, text, tmp_path):
    recipe = parse_recipe(
        """
        [calibration]
        tokens = 4096
        window = 1024
        batch = 4
        [evaluation]
        tokens = 0
        window = 256
        [[stage]]
        transform = "finercut"
        remove = 9
        [[stage]]
        transform = "finercut"
        remove = 7
        [[stage]]
        transform = "fireq"
        top_k = 50
        """
    )
    short = Text(text.train[:100], text.held_out[:100], "little", "-")
    with pytest.raises(ConfigError) as caught:
        compress(model, recipe, TextTask(tokenizer, short), tmp_path / "out", progress=False)
    said = str(caught.value)
    assert said.startswith("recipe does not fit the model or the data:\n")
    for problem in (
        "stage 1: window = 1024 is longer than the model's context of 512 tokens",
        "stage 1 (finercut 1): remove=9",
        "stage 2 (finercut 2): remove=7",
        "stage 3 (fireq): top_k=50",
        "little has 100 tokens to calibrate on",
        "little has 100 held-out tokens",
    ):
        assert f"\n  - {problem}" in said
    assert said.count("\n  - ") == 8
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_does_not_belong(tokenizer, text, recipe, tmp_path, key):
    small = Decoder(dataclasses.replace(CONFIG, vocab=64), key=key)
    with pytest.raises(ConfigError, match=r"ids 0\.\.63: they do not belong together"):
        compress(small, recipe, TextTask(tokenizer, text), tmp_path, progress=False)


def test_a_stage_that_breaks_the_model_is_named(
    model, tokenizer, text, recipe, tmp_path, monkeypatch
):
    def broken(stage):
        return Transform(
            name="broken",
            init=lambda model: None,
            observe=None,
            rewrite=lambda model, stats: jax.tree.map(lambda x: x * np.float32("nan"), model),
        )

    monkeypatch.setattr(Stage, "build", broken)
    quantizing = dataclasses.replace(recipe, stages=recipe.stages[1:])
    with pytest.raises(NumericalError, match="fireq: the mean loss on held-out text is nan"):
        compress(model, quantizing, TextTask(tokenizer, text), tmp_path, progress=False)


def test_a_transform_that_occurs_twice_has_numbers():
    recipe = parse_recipe(
        '[[stage]]\ntransform = "finercut"\nremove = 1\n'
        '[[stage]]\ntransform = "fireq"\n[[stage]]\ntransform = "finercut"\nremove = 1'
    )
    assert labels_of(recipe) == ["finercut 1", "fireq", "finercut 2"]


def test_matplotlib_is_asked_for_before_the_work(
    model, tokenizer, text, recipe, tmp_path, monkeypatch
):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"ffnlab\[run\]"):
        compress(model, recipe, TextTask(tokenizer, text), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()
