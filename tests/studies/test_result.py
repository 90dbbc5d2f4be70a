"""What every study returns: checked, printed, and written whole or not at all."""

import dataclasses
import json

import numpy as np
import pytest
from rich.console import Console

from ffnlab.errors import ConfigError
from ffnlab.storage.files import unsealed
from ffnlab.studies import result as result_module
from ffnlab.studies.result import PICTURE_LIMIT, Claim, Result, versions

CLAIM = Claim("a [bold]claim[/bold]", "-", "1.5 nats", True, "measured", seeds=1)
OTHER = dataclasses.replace(CLAIM, claim="another", holds=False)


def result(**changes) -> Result:
    fields = {
        "slug": "demo",
        "title": "A demo",
        "settings": {"width": np.int64(8), "layers": (1, 2)},
        "seed": 3,
        "quick": True,
        "seconds": 1.25,
        "claims": [CLAIM, OTHER],
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
        "seeds": 1,
        "timed": False,
    }
    assert found["quick"] is True and found["sources"] == {}
    assert unsealed(found, "it")["claims"] == found["claims"]
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
    claims = [Claim(words, words, words, True, words, seeds=1)]
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
        ({"claims": [CLAIM, dataclasses.replace(CLAIM, holds=False)]}, "is there twice"),
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


def test_a_claim_over_several_seeds_gives_their_spread():
    for seeds, basis in ((0, "nothing drawn"), (1, "one seed"), (3, "3 seeds")):
        spread = dataclasses.replace(CLAIM, ours="0.5 ± 0.1", seeds=seeds)
        assert spread.basis == basis and dataclasses.replace(spread, timed=True).basis == (
            f"{basis}, timed"
        )
    for ours in ("0.5 ± 0.1", "a 0.500 (0.400 to 0.600)", "gap -.02 (-.03 to -.01)"):
        assert dataclasses.replace(CLAIM, ours=ours, seeds=2).ours == ours
    for ours in ("0.5", "down to the ground", "3 of 4"):
        with pytest.raises(ConfigError, match="over 2 seeds; it takes mean and spread"):
            dataclasses.replace(CLAIM, ours=ours, seeds=2)
    with pytest.raises(ConfigError, match="seeds=-1"):
        dataclasses.replace(CLAIM, seeds=-1)


def smooth(side):
    """A picture that takes bytes for each of its pixels: no two beside each other are alike."""
    values = np.random.default_rng(0).random((side, side))
    return lambda figure: figure.subplots().imshow(values, interpolation="bilinear")


def test_pictures_lose_resolution_until_they_are_small_enough(tmp_path):
    result(pictures={"small": smooth(2), "large": smooth(4)}).write(tmp_path)
    width = {}
    for stem in ("small", "large"):
        png = (tmp_path / f"{stem}.png").read_bytes()
        assert len(png) <= PICTURE_LIMIT
        width[stem] = int.from_bytes(png[16:20], "big")
    assert width["small"] == 960 and width["large"] == 640  # 90 kB at 120 dpi, 73 at 100, 51 at 80


def test_a_picture_that_stays_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(result_module, "PICTURE_LIMIT", 1000)
    with pytest.raises(ConfigError, match="picture 'line' has .* at 40 dpi; at most 1,000 bytes"):
        result().write(tmp_path)
    assert not list(tmp_path.iterdir())
