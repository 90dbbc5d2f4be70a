"""What every study returns: checked, printed, and written whole or not at all."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from ffnlab.errors import ConfigError
from ffnlab.studies.result import Claim, Result, plain, versions

CLAIM = Claim("a [bold]claim[/bold]", "-", "1.5 nats", True, "measured")


def result(**changes) -> Result:
    fields = {
        "slug": "demo",
        "title": "A demo",
        "settings": {"width": np.int64(8), "layers": (1, 2)},
        "seed": 3,
        "seconds": 1.25,
        "claims": [CLAIM, dataclasses.replace(CLAIM, holds=False)],
        "table": [{"k": 1, "loss": np.float32(0.5)}, {"k": 2, "note": "late"}],
        "pictures": {"line": lambda figure: figure.subplots().plot([0, 1], [1, 0])},
    }
    return Result(**{**fields, **changes})


def test_written_json_has_what_the_readers_expect(tmp_path):
    out = tmp_path / "new" / "folder"
    first = result()
    assert first.write(out) is first
    found = json.loads((out / "result.json").read_text())
    assert found["slug"] == "demo" and found["seed"] == 3 and found["seconds"] == 1.25
    assert found["settings"] == {"width": 8, "layers": [1, 2]}
    assert found["claims"][0] == {
        "claim": "a [bold]claim[/bold]",
        "paper": "-",
        "ours": "1.5 nats",
        "holds": True,
        "evidence": "measured",
    }
    assert [claim["holds"] for claim in found["claims"]] == [True, False]
    assert found["table"] == [{"k": 1, "loss": 0.5}, {"k": 2, "note": "late"}]
    assert found["versions"] == versions() and "jax" in found["versions"]
    assert (out / "line.png").read_bytes().startswith(b"\x89PNG")
    assert found["pictures"] == ["line.png"]
    assert {file.name for file in out.iterdir()} == {"result.json", "line.png"}


def test_nothing_is_written_without_a_folder_nor_half_written(tmp_path):
    assert result().write(None).status == "1 of 2 claims hold"
    out = tmp_path / "out"
    result().write(out)
    before = (out / "result.json").read_text()

    def fail(figure):
        raise RuntimeError("no ink")

    with pytest.raises(RuntimeError, match="no ink"):
        result(seed=9, pictures={"line": fail}).write(out)
    assert (out / "result.json").read_text() == before
    assert {file.name for file in out.iterdir()} == {"result.json", "line.png"}


def test_prints_as_tables_without_reading_markup():
    text = str(result())
    assert "a [bold]claim[/bold]" in text and "1 of 2 claims hold · seed 3" in text
    assert "0.5" in text and "late" in text
    assert "note" not in str(result(table=()))


def test_no_word_is_broken_in_80_columns():
    words = "a single measurement of quantization-aware-compression over calibration-text"
    claims = [Claim(words, words, words, True, words)]
    columns = [f"bits_per_byte_{i}" for i in range(7)]
    table = [{name: i + 0.125 for i, name in enumerate(columns)}, {columns[6]: "late"}]
    console = Console(width=80, color_system=None, force_terminal=False, markup=False)
    with console.capture() as capture:
        console.print(result(claims=claims, table=table))
    said = capture.get()
    assert all(said.count(word) >= 4 for word in words.split()[1:])
    assert all(len(line) <= 80 for line in said.splitlines())
    assert [said.count(name) for name in columns] == [2, 1, 1, 1, 1, 1, 1], "two tables"
    assert all(f" {i + 0.125:.4g} " in said for i in range(7)) and "late" in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"slug": "../x"}, "names a file"),
        ({"pictures": {"a/b": print}}, "names a file"),
        ({"claims": []}, "at least one claim"),
        ({"settings": {"f": print}}, r"settings\['f'\]"),
        ({"settings": {"a": {1: 2}}}, "not a string"),
        ({"table": [{"x": {1, 2}}]}, r"table\[0\]\['x'\]"),
    ],
)
def test_bad_results(changes, message):
    with pytest.raises(ConfigError, match=message):
        result(**changes)


@pytest.mark.parametrize("field", ["claim", "paper", "ours", "evidence"])
def test_a_claim_says_everything(field):
    with pytest.raises(ConfigError, match=field):
        dataclasses.replace(CLAIM, **{field: ""})


def test_plain_values():
    value = {"a": np.arange(3), "b": [np.float64("nan"), -np.inf, np.bool_(True)], "c": None}
    assert plain(value, "x") == {"a": [0, 1, 2], "b": [None, None, True], "c": None}
    json.dumps(plain(value, "x"), allow_nan=False)
