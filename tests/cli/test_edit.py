"""`ffnlab edit`: what it prints and writes, and what it refuses."""

import json

import jax
import numpy as np
import pytest

from ffnlab import models
from ffnlab.cli.main import main
from ffnlab.editing import load_deltas, with_deltas
from ffnlab.formats import Tokenizer
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.testing import equal

CONFIG = DecoderConfig(
    256, 16, 24, layers=2, heads=2, kv_heads=1, head_dim=8, max_positions=64, bos=0, eos=(0,)
)
FACTS = """
[[fact]]
subject = "json"
prompt = "x\\nimport {}"
new = " as "
old = "\\n"
paraphrases = ["import sys\\nimport {}"]
neighbours = ["import os"]

[[fact]]
subject = "json"
prompt = "x\\nimport {}, "
new = "re"
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a random model, facts and a text."""
    models.save(Decoder(CONFIG, key=jax.random.key(1)), tmp_path / "small")
    Tokenizer.bytes().save(tmp_path / "small")
    (tmp_path / "facts.toml").write_text(FACTS)
    (tmp_path / "text.txt").write_text("import os\nimport sys\nprint(os)\n" * 60)
    return tmp_path


def said(place, *more: str) -> int:
    """Exit status of the command with small sizes, where no others are given."""
    options = {"facts": f"{place}/facts.toml", "text": f"{place}/text.txt", "out": f"{place}/out"}
    options |= {"tokens": "128", "window": "32", "steps": "2", "preserve": "5"}
    given = [part for k, v in options.items() if f"--{k}" not in more for part in (f"--{k}", v)]
    return main(["edit", f"{place}/small", *given, *more])


def test_a_model_is_edited_and_judged(place, capsys):
    assert said(place, "--layers", "0", "1", "--prefixes", "# A.\n", "--fluency", "4") == 0
    out, err = capsys.readouterr()
    assert "efficacy/after" in out and "fluency/before" in out
    assert "bits_per_byte/after" in out
    assert "ffnlab edit: warning: " in err and "share all text up to the end" in err
    new, old = models.load(place / "out" / "model"), models.load(place / "small")
    assert Tokenizer.load(place / "out" / "model").encode("a") == [97]
    deltas = load_deltas(place / "out" / "deltas.safetensors", old)
    assert set(deltas) == {f"layers[{i}].ffn.down" for i in range(2)}
    assert equal(with_deltas(old, deltas), new) and not equal(new, old)
    report = json.loads((place / "out" / "report" / "report.json").read_text())
    assert report["rows"][0]["prompt"] == "x\\nimport json" and len(report["rows"]) == 2
    assert report["rows"][0]["wanted"] == " as "
    assert report["about"]["layers"] == ["layers[0].ffn.down", "layers[1].ffn.down"]
    assert (place / "out" / "report" / "report.png").stat().st_size > 1000
    assert np.isfinite(report["figures"]["bits_per_byte/after"])


def test_what_is_refused_before_any_work(place, capsys, monkeypatch):
    def work(*args, **options):
        raise AssertionError("the model was run")

    monkeypatch.setattr("ffnlab.transform.calibrate", work)
    (place / "facts.toml").write_text(FACTS.replace("{}, ", "{}"))  # two answers to one prompt
    assert said(place) == 2
    assert "facts contradict each other" in capsys.readouterr().err
    (place / "facts.toml").write_text("[[fact]]\nsubject = 3")
    assert said(place) == 2
    assert "fact 1" in capsys.readouterr().err
    (place / "facts.toml").write_text(FACTS)
    assert said(place, "--layers", "7") == 2
    assert "the model has layers 0..1" in capsys.readouterr().err
    alone = ["--prefixes", "# A.\n"]
    for more, problem in (
        (["--fluency", "60"], "is to go on with 60"),
        (["--fluency", "-1"], "fluency=-1"),
        (["--window", "0"], "window=0"),
        (["--tokens", "8"], "tokens=8"),
        (["--rate", "inf"], "rate=inf"),
        (["--out", f"{place}/text.txt/there"], "text.txt is no folder"),
    ):
        assert said(place, *alone, *more) == 2
        assert problem in capsys.readouterr().err
    (place / "facts.toml").write_text(FACTS.replace("x\\n", "x" * 30))
    assert said(place) == 2
    assert "the model's own prefixes have 21" in capsys.readouterr().err
    (place / "facts.toml").write_text(FACTS.replace("import sys", "import sys" * 6))
    assert said(place, *alone) == 2  # a paraphrase that the model has no room for
    assert "the model has a context of 64" in capsys.readouterr().err
    assert not (place / "out").exists()
