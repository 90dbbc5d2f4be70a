"""The report: its schema, its table, and what is refused as one."""

import dataclasses
import json

import pytest

from ffnlab.compress import Export, Report, Rival, Row, Score, Verdict, read_report
from ffnlab.compress.report import FORMAT, count, size
from ffnlab.errors import FormatError

SCORES = (
    Score("perplexity", "perplexity", "less"),
    Score("bits_per_byte", "bits per byte", "less"),
)


def scored(perplexity, bits):
    """Scores of a text."""
    return {"perplexity": perplexity, "bits_per_byte": bits}


ROWS = (
    Row("original", scored(3.5, 1.81), 1_624_320, 3_300_000, 2048, 3.3e6, 900.0, 900.0, 0.0),
    Row("finercut", scored(1234.5, 1.9), 1_300_320, 2_700_000, 1600, 2.8e6, 1080.0, 900.0, 11.5),
)
IGNORED = ("int4 keys: in 7 blocks",)
EXPORT = Export("model", "dense", 5_000_000, {"config.json": "ab"}, 3.95, 4.4, IGNORED)
VERDICT = Verdict("a text", "ab", 1.9, 2.2, False, "measured now")
RIVAL = Rival(2_600_000, 4_900_000, (VERDICT,), "trained as long")
REPORT = Report(
    format=FORMAT,
    model={"source": "embedded", "layers": 8},
    recipe={"stages": [{"transform": "finercut", "options": {"remove": 2}}]},
    data={"source": "a text", "held_out_bytes": 100},
    item="token",
    scores=SCORES,
    axis="bits_per_byte",
    pace="decode tok/s",
    measured_on={"tokens": 64, "windows": 2},
    rows=ROWS,
    exports=(EXPORT,),
    rival=RIVAL,
    versions={"python": "3"},
    device="cpu",
    seconds={"load": 1.5, "finercut": 10.0},
    peak_memory=900_000_000,
)


@pytest.mark.parametrize("report", [REPORT, dataclasses.replace(REPORT, rival=None)])
def test_a_report_comes_back_from_its_file(tmp_path, report):
    report.write(tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == report


def test_every_field_is_in_the_file_and_described():
    members = REPORT.as_json()
    assert members.keys() == {field.name for field in dataclasses.fields(Report)}
    for kind in (Report, Row, Score, Export, Rival, Verdict):
        for field in dataclasses.fields(kind):
            assert f"      {field.name}: " in f"  {kind.__doc__}".replace("\n    ", "\n      ")


def test_the_table_says_figures_and_ratios():
    said = " ".join(str(REPORT).split())
    assert "1.62 M" in said and "3.30 MB" in said and "2.05 kB" in said
    assert "1.23e+03" in said and "x353" in said and "x1.05" in said
    assert "x0.8" in said and "x1.2" in said
    assert "1.900 compressed, 2.200 dense: the compressed model wins" in said
    assert "model: dense, 5.00 MB in 1 files" in said
    assert "perplexity 4.400, not 3.950; they ignore or may stumble on:" in said
    assert "- int4 keys: in 7 blocks" in said
    assert "12 s (load 1.5, finercut 10.0); peak memory 900 MB" in said


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("rows"), "an object with"),
        (lambda r: r.update(more=1), "an object with"),
        (lambda r: r.update(format="x"), "format is 'x'"),
        (lambda r: r.update(rows={}), "rows: dict instead of"),
        (lambda r: r["rows"].append(3), r"rows\[2\]: an object with"),
        (lambda r: r["rows"][0].update(parameters=1.5), r"rows\[0\]: parameters: float instead"),
        (lambda r: r["rows"][0].update(stage=None), r"rows\[0\]: stage: NoneType instead of str"),
        (lambda r: r["exports"][0].update(ignored=[1]), r"ignored\[0\]: int instead of str"),
        (lambda r: r["exports"][0]["files"].update(x=1), r"files.x: int instead of str"),
        (lambda r: r["rival"]["verdicts"][0].update(wins=1), "wins: int instead of bool"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path, change, said):
    content = json.loads(json.dumps(REPORT.as_json()))
    change(content)
    (tmp_path / "report.json").write_text(json.dumps(content))
    with pytest.raises(FormatError, match=said):
        read_report(tmp_path / "report.json")


def test_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (9.996e5, "1.00 M"), (2e16, "20000 T")],
)
def test_counts(value, said):
    assert count(value) == said
    assert size(value).startswith(said.split()[0])


def test_headings_are_those_of_the_task():
    heads = str(REPORT).splitlines()[1:4]
    for word in ("perplexity", "bits /", "cache /", "FLOPs /", "decode", "tok/s"):
        assert any(word in line for line in heads), word
    rows = tuple(dataclasses.replace(row, cache_bytes=0, scores={"accuracy": 0.5}) for row in ROWS)
    labelled = dataclasses.replace(
        REPORT,
        rows=rows,
        item="image",
        scores=(Score("accuracy", "accuracy", "more"),),
        axis="accuracy",
        pace="images/s",
        rival=None,
    )
    said = str(labelled)
    assert "accuracy" in said and "0.500" in said and "images/s" in said
    assert "cache" not in said and "perplexity" not in said.replace("perplexity 4.400", "")
    assert "other tools read it with accuracy 4.400" in said


def test_names_at_one_height_move_apart():
    from ffnlab.compress.pictures import nudges

    assert nudges([1.393, 1.526, 1.531, 1.575]) == [0, -5, 5, 0]
    assert nudges([1.0]) == [0] and nudges([1.0, 1.0, 2.0]) == [0, 0, 0]


def test_speeds_have_one_baseline_and_ratios_alone():
    """The original is measured again beside each stage: here 2174 tokens/s, not 2607."""
    first = dataclasses.replace(ROWS[0], speed=2607.0, speed_original=2607.0)
    later = dataclasses.replace(ROWS[1], speed=2391.0, speed_original=2174.0)
    said = str(dataclasses.replace(REPORT, rows=(first, later)))
    assert "2607" in said and "x1.1" in said
    assert "2391" not in said and "2174" not in said
