"""The changes themselves, the table of files, and the list of equivalent ones."""

import ast
import tomllib

import pytest

from tests.conftest import ROOT
from tests.mutation import __main__ as mutants
from tests.mutation.mutations import applied, mutations

HERE = ROOT / "tests" / "mutation"
TABLE = tomllib.loads((HERE / "table.toml").read_text())
EQUIVALENT = tomllib.loads((HERE / "equivalent.toml").read_text())
FILES = {target: tests for area in TABLE["areas"].values() for target, tests in area.items()}


def changed(source: str) -> list[str]:
    """The source with each of its changes."""
    return [applied(source.encode(), m).decode() for m in mutations(source.encode())]


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("a < b", ["a <= b"]),
        ("a <= b < c", ["a < b < c", "a <= b <= c"]),
        ("x is not y", ["x is y"]),
        ("(a) + (  # plus\n b)", ["(a) - (  # plus\n b)"]),
        ("a and b and c", ["a or b and c", "a and b or c"]),
        ("not a", ["(a)"]),
        ("x[-1]", ["x[(1)]"]),
        ("f = True, 3, 0.5, 0.0", [f"f = {x}" for x in ("False, 3, 0.5, 0.0", "True, 4, 0.5, 0.0")]
         + [f"f = True, 3, {x}" for x in ("1.0, 0.0", "0.5, 1.0")]),
        ("f(x)", ["(x)", "pass"]),
        ("y = x.astype(int)", ["y = x"]),
        ("import m\ny = m.round(x)", ["import m\ny = (x)"]),
        ("y = x.max(a)", ["y = x.min(a)"]),
        ("y = len(x), zip(x, strict=True), Thing(x)", []),
        ("y = a if b else c", ["y = a if (not b) else c"]),
        ("for x in y:\n    break", ["for x in y:\n    continue"]),
        ("x += 1", ["x -= 1", "x += 2"]),
        ("'a' + b", []),
        ("T = A | B", []),
        ('"""1 + 1"""\nx: Float[A, "2 3"]\nraise E(f"{1 + 1}")\nassert x > 1', []),
        ("@d(1)\ndef f(a: int = 1) -> 2:\n    pass", ["@d(1)\ndef f(a: int = 2) -> 2:\n    pass"]),
    ],
)  # fmt: skip
def test_what_is_changed(source, wanted):
    assert changed(source) == wanted


def test_names_hold_when_lines_move_and_tell_equal_changes_apart():
    source = "class A:\n    def f(self):\n        return 1 < 2, 1 < 3\n"
    names = [m.name for m in mutations(source.encode())]
    assert names == [
        "A.f: 1 -> 2",
        "A.f: < -> <=",
        "A.f: 2 -> 3",
        "A.f: 1 -> 2 #1",
        "A.f: < -> <= #1",
        "A.f: 3 -> 4",
    ]
    assert [m.name for m in mutations(b"import a\n\n\n" + source.encode())] == names


def test_the_table_names_files_and_tests_that_are_there():
    for target, tests in FILES.items():
        for file in (target, *tests):
            assert (ROOT / file).is_file(), file
    assert len(mutants.sample(TABLE, TABLE["share"], "")) >= 200


def test_a_draw_repeats_and_grows():
    drawn = [{job.name for job in mutants.sample(TABLE, share, "")} for share in (0.02, 0.02, 0.03)]
    assert drawn[0] == drawn[1] < drawn[2]


def test_every_equivalent_change_is_still_one():
    for name, why in EQUIVALENT.items():
        target, _, change = name.partition(": ")
        assert change in {m.name for m in mutants.changes(target)} and len(why) > 10, name


def test_every_change_of_a_file_is_python():
    target = "ffnlab/sparsity/chess_core.py"
    source = (ROOT / target).read_bytes()
    for change in mutants.changes(target):
        ast.parse(applied(source, change))


def test_a_second_run_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "BUILD", tmp_path)
    with mutants.alone(), pytest.raises(SystemExit, match="another run"), mutants.alone():
        pass
    with mutants.alone():
        pass
