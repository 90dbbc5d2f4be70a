"""The dense model of equal files: measured beside a compressed one, and what is recorded of it."""

import dataclasses
import hashlib
import json

import jax
import pytest

from ffnlab import models, tree, weights
from ffnlab.compress import Rival, Row, Verdict, embedded_rival, measure, rival, second_texts
from ffnlab.compress.report import size, versus
from ffnlab.compress.rival import record
from ffnlab.compress.text import held_out
from ffnlab.errors import ConfigError, FormatError
from ffnlab.models import Decoder
from tests.compress.conftest import CONFIG
from tests.compress.test_report import EXPORT, REPORT

ROW = Row("fireq", {"perplexity": 5.0, "bits_per_byte": 2.3}, 1, 1, 1, 1.0, 1.0, 1.0, 0.0)


@pytest.fixture
def package(tmp_path, monkeypatch, tokenizer):
    """The package's folder with a small dense model, without a record of second texts."""
    monkeypatch.setattr(rival.resources, "files", lambda package: tmp_path)
    folder = tmp_path / "embedded_small"
    models.save(Decoder(CONFIG, key=jax.random.key(8)), folder)
    tokenizer.save(folder)
    (folder / "training.json").write_text("{}")
    (tmp_path / "embedded").mkdir()
    return tmp_path


@pytest.fixture
def recorded(package, recipe, text):
    """Writes the record of a second text."""

    def write(**changes):
        verdicts = [vars(Verdict(name, "x", 2.0, 2.1, False, "then")) for name in ("one", "two")]
        content = {"recipe": recipe.as_json(), "text": text.as_json(), "verdicts": verdicts}
        file = package / "embedded" / "equal_bytes.json"
        file.write_text(json.dumps(content | changes))

    write()
    return write


def bits(model, text, tokenizer, recipe):
    """Bits per byte, as the job measures them."""
    samples = held_out(text, tokenizer, recipe.evaluation, 256)
    return measure.quality(weights.prepare(model), samples, 4).bits_per_byte


@pytest.mark.parametrize("compressed", [1.0, 20.0])
def test_both_models_are_measured_on_every_text(
    recorded, package, model, tokenizer, text, recipe, tmp_path, compressed
):
    other = tmp_path / "letters" / "abc.txt"
    other.parent.mkdir()
    other.write_bytes(b"the quick brown fox \xc3\xa9\n" * 20)
    row = dataclasses.replace(ROW, scores={"bits_per_byte": compressed})
    found = embedded_rival(text, recipe, second_texts([other]))(model, row)
    dense = models.load(package / "embedded_small")
    first, second = found.verdicts
    assert first.compressed == compressed and first.text == "sums"
    assert first.dense == bits(dense, text, tokenizer, recipe)
    assert first.wins == (first.dense < compressed)
    assert first.sha256 == text.as_json()["held_out_sha256"]
    (whole,) = second_texts([other])
    assert whole.held_out == other.read_bytes() and second.text == "letters/abc.txt"
    assert second.sha256 == hashlib.sha256(other.read_bytes()).hexdigest()
    assert second.compressed == bits(model, whole, tokenizer, recipe)
    assert second.dense == bits(dense, whole, tokenizer, recipe)
    assert second.dense != second.compressed and second.note == "measured now"
    assert second.wins == (second.dense < second.compressed)


def test_what_is_loaded_is_counted(recorded, package, model, text, recipe):
    found = embedded_rival(text, recipe)(model, ROW)
    folder = package / "embedded_small"
    names = {f.name for f in folder.iterdir()} - {"training.json"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert found.file_bytes == sum((folder / name).stat().st_size for name in names)
    assert found.nbytes == tree.nbytes(models.load(folder))


def test_the_record_stands_beside_the_job_that_it_is_of(recorded, model, text, recipe, pruning):
    def notes(recipe, text):
        return [v.note for v in embedded_rival(text, recipe)(model, ROW).verdicts]

    assert notes(recipe, text) == ["measured now", "then"]
    assert notes(pruning, text) == ["measured now"]  # another model came out
    assert notes(recipe, dataclasses.replace(text, split="another")) == ["measured now"]


@pytest.mark.parametrize("changes", [{"verdicts": 3}, {"text": None}, {"verdicts": [{}, {}]}])
def test_a_damaged_record_is_named(recorded, text, recipe, changes):
    recorded(**changes)
    with pytest.raises(FormatError, match="equal_bytes.json"):
        embedded_rival(text, recipe)


def test_a_text_that_is_too_short_is_refused_before_any_work(recorded, text, recipe, tmp_path):
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(ConfigError, match="short.txt has 2 held-out tokens"):
        embedded_rival(text, recipe, second_texts([tmp_path / "short.txt"]))


def test_the_record_is_made_from_a_report(tmp_path):
    verdicts = (
        Verdict("modules", "ab", 1.5, 1.6, False, "measured now"),
        Verdict("articles", "cd", 2.5, 2.4, True, "measured now"),
    )
    beside = Rival(2_700_000, 4_900_000, verdicts, "trained as long")
    versions = {"python": "3.11.7", "jax": "0.10.2"}
    report = dataclasses.replace(REPORT, rival=beside, versions=versions)
    report.write(tmp_path / "report.json")
    found = json.loads(json.dumps(record(tmp_path / "report.json")))
    assert found["compressed"] == {"nbytes": 2_700_000, "file_bytes": 5_000_000}
    assert found["dense"]["file_bytes"] == 4_900_000 and found["text"] == report.data
    assert [v["sha256"] for v in found["verdicts"]] == ["ab", "cd"]
    assert found["verdicts"][1]["wins"] and "Python 3.11.7" in found["verdicts"][1]["note"]
    dataclasses.replace(report, rival=dataclasses.replace(beside, verdicts=verdicts[:1])).write(
        tmp_path / "report.json"
    )
    with pytest.raises(FormatError, match="no second text"):
        record(tmp_path / "report.json")


def test_every_verdict_is_said_with_its_winner():
    verdicts = (
        Verdict("modules", "ab", 1.5, 1.6, False, "measured now"),
        Verdict("articles", "cd", 2.5, 2.4, True, "recorded"),
    )
    said = versus(Rival(2_700_000, 4_900_000, verdicts, "trained as long"), EXPORT)
    assert "4.90 MB of files, the compressed model 5.00 MB; trained as long" in said
    assert "modules (measured now): 1.500 compressed, 1.600 dense: the compressed model" in said
    assert "articles (recorded): 2.500 compressed, 2.400 dense: the dense model wins" in said


def test_the_shipped_rival_is_of_equal_files_and_trained_alike():
    """Its files come to at most those of the recorded compressed model, within two percent."""
    from importlib import resources

    from ffnlab.storage.files import read_json

    package = resources.files("ffnlab")
    found = read_json(package / "embedded" / "equal_bytes.json")
    ours, theirs = found["compressed"]["file_bytes"], found["dense"]["file_bytes"]
    assert rival.files_of_rival() == theirs and 0.98 * ours <= theirs <= ours, size(ours)
    large, small = (
        read_json(package / name / "training.json") for name in ("embedded", "embedded_small")
    )
    assert large["text"] == small["text"] and large["tokens"] == small["tokens"]
    assert all(v["wins"] == (v["dense"] < v["compressed"]) for v in found["verdicts"])
    rates = small["tuning"]["validation_bits_per_byte"]
    best = min(rates, key=rates.get)
    assert float(best) == small["recipe"]["optimizer"]["rate"] and len(rates) >= 3
    assert float(best) not in (min(map(float, rates)), max(map(float, rates)))
