"""Digests of the code that a study's figures come from: what they cover, and what changes them."""

import ast
import re

import pytest

from ffnlab.studies import STUDIES
from ffnlab.studies.ledger import sources as module
from ffnlab.studies.ledger.sources import home, imported, sources, syntax_digest

SAMPLE = '''
"""A module."""
from typing import NamedTuple

class A(NamedTuple):
    """A class."""
    x: int = 1_000  # a field

async def f(a, *, b: str = "é", **rest):
    return f"{a!r:>{b}} and {a=}" "" f"{b:.3f}{a}"
'''


def digest(text: str) -> str:
    return syntax_digest(ast.parse(text))


def test_a_digest_is_the_same_in_every_version_of_python():
    """As Python 3.11, 3.12 and 3.13 have computed it; results are compared across them."""
    assert digest(SAMPLE) == "2813bd9a1f4e5241"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("  # a field", ""),
        ('"""A class."""', '"""Another."""'),
        ('    """A class."""\n', ""),
        ("1_000", "1000"),
        ("\n\n", "\n\n\n"),
        ("a, *, b", "a,\n    *,\n    b"),
        ("\n", "\r\n"),
    ],
)
def test_what_says_nothing_changes_no_digest(old, new):
    changed = SAMPLE.replace(old, new)
    assert changed != SAMPLE and digest(changed) == digest(SAMPLE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1_000", "1_001"),
        ("1_000", "1000.0"),
        ("x: int", "x: float"),
        ("*, b", "b"),
        ('"é"', '"e"'),
        ('"é"', '""'),
        (">{b}", "<{b}"),
        ("{a!r", "{a!s"),
        ("{b:.3f}{a}", "{a}{b:.3f}"),
        (" and ", ""),
        ("NamedTuple)", "tuple)"),
        ("async ", ""),
    ],
)
def test_what_says_something_changes_it(old, new):
    changed = SAMPLE.replace(old, new)
    assert changed != SAMPLE and digest(changed) != digest(SAMPLE)


def test_an_empty_string_counts_where_it_is_an_argument():
    assert len({digest(text) for text in ('f("")', "f()", 'f("", "")', "f(0)", "f(False)")}) == 5


@pytest.mark.parametrize("slug", STUDIES)
def test_a_study_s_own_module_and_its_method_are_covered(slug):
    found, study = sources(slug), STUDIES[slug]
    assert study.module in found
    assert any(name.startswith(f"ffnlab.{study.package}.") for name in found)
    assert all(re.fullmatch("[0-9a-f]{16}", value) for value in found.values())
    parts = {name.split(".")[1] for name in found}
    assert parts <= {"studies", "bench", study.package}
    plumbing = {f"ffnlab.studies.{name}" for name in ("result", "run", "status", "table")}
    assert not plumbing & found.keys() and "ffnlab.studies" not in found


def test_helpers_of_a_study_are_covered_and_other_methods_are_not():
    assert {"ffnlab.studies.chess_measure", "ffnlab.bench.sparse"} <= sources("chess").keys()
    noise = sources("gradient-noise").keys()
    assert {"ffnlab.learning.optimizers.noise", "ffnlab.studies.tuning"} <= noise
    assert (
        not {"ffnlab.learning.noprop", "ffnlab.learning.optimizers.trust", "ffnlab.studies.lamb"}
        & noise
    )


def test_names_are_followed_to_the_module_they_come_from(tmp_path, monkeypatch):
    """Through packages that re-export, under another name too, and from inside functions."""
    for name, text in {
        "ffnlab/studies/lamb.py": "def run():\n    from ffnlab.learning import go, other as o\n",
        "ffnlab/learning/__init__.py": (
            "from ffnlab.learning.inner import start as go\nfrom ffnlab.learning.rest import rest\n"
        ),
        "ffnlab/learning/inner/__init__.py": "from ffnlab.learning.inner.deep import start\n",
        "ffnlab/learning/inner/deep.py": "import ffnlab.learning.next, ffnlab.models.own\n",
        "ffnlab/learning/next.py": "import numpy\n",
        "ffnlab/learning/other.py": "",
        "ffnlab/learning/rest.py": "",
        "ffnlab/models/own.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(module, "PARENT", tmp_path)
    covered = ["inner.deep", "next", "other"]
    assert list(sources("lamb")) == [f"ffnlab.learning.{n}" for n in covered] + [
        "ffnlab.studies.lamb"
    ]
    assert home("ffnlab.learning", "unknown") == "ffnlab.learning"
    tree = ast.parse("from ffnlab import learning\nfrom ffnlab.data import x")
    assert list(imported(tree, ["ffnlab.learning"])) == ["ffnlab.learning", "ffnlab.data.x"]
    before = sources("lamb")
    (tmp_path / "ffnlab/learning/next.py").write_text("import numpy as np\n")
    after = sources("lamb")
    assert [name for name in before if before[name] != after[name]] == ["ffnlab.learning.next"]
