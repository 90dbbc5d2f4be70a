"""Methods from outside: what a file may name, what is imported when, and every refusal."""

import sys

import pytest

from ffnlab.errors import ConfigError
from ffnlab.outside import Methods
from ffnlab.recipes import METHODS, parse_recipe
from ffnlab.transform import Transform

MODULE = '''
"""Methods."""
from ffnlab.transform import Transform

NUMBER = 3

def half(*, keep: float = 0.5, names: tuple[str, ...] = (), key: object = None):
    """Halves.

    Args:
      keep: fraction kept.
    """
    if keep > 1:
        raise ValueError(f"keep={keep} is more than all")
    return Transform(f"half {keep}", lambda model: (), None, lambda model, stats: model)

def needy(*, count: int): return half()
def hungry(model, *, count: int = 1): return half()
def nothing(): return None
def failing(): return {}["no such key"]
class Inner:
    half = staticmethod(half)
'''
MODULES = {
    "methods_of_mine": MODULE,
    "methods_broken": "raise RuntimeError('no GPU here\\nand more')",
    "methods_exiting": "import sys; sys.exit('a script')",
    "methods_lacking": "import nowhere_to_be_found",
}


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the path with some modules, which are forgotten afterwards."""
    for name, text in MODULES.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in MODULES:
        sys.modules.pop(name, None)


def register(folder, lines, package="mine", group="ffnlab.transforms"):
    """Makes a folder look like the one that a package with entry points was installed into."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n" + "\n".join(lines))


def stage(name, options=""):
    return f'[[stage]]\ntransform = "{name}"\n{options}'


def test_a_recipe_names_a_factory(modules):
    recipe = parse_recipe(stage("methods_of_mine:half", "keep = 1\nnames = ['a']"))
    (found,) = recipe.stages
    assert dict(found.options) == {"keep": 1.0, "names": ("a",)}
    assert found.build().name == "half 1.0"
    recorded = recipe.as_json()["stages"][0]
    assert recorded["transform"] == "methods_of_mine:half"
    assert recorded["options"] == {"keep": 1.0, "names": ["a"]}
    digest = parse_recipe(stage("methods_of_mine:Inner.half", "keep = 1\nnames = ['a']")).digest()
    assert digest != recipe.digest() == parse_recipe(recipe_text(recorded)).digest()
    assert parse_recipe(stage("ffnlab.pruning.finercut:finercut", "remove = 1")).stages[0].build()


def recipe_text(recorded):
    return stage(
        recorded["transform"], "\n".join(f"{k} = {v}" for k, v in recorded["options"].items())
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere_at_all:half", "no module 'nowhere_at_all'; install its package, or set PYTHON"),
        ("methods_of_mine.inner:half", "no module 'methods_of_mine.inner'; "),
        ("methods_lacking:half", "importing methods_lacking failed: No module named 'nowhere_to"),
        ("methods_broken:half", "importing methods_broken failed: RuntimeError: no GPU here"),
        ("methods_exiting:half", "importing methods_exiting failed: SystemExit: a script"),
        ("methods_of_mine:halve", "methods_of_mine has no 'halve'; did you mean 'half'?"),
        ("methods_of_mine:Inner.halve", "has no 'Inner.halve'; did you mean 'half'?"),
        ("methods_of_mine:NUMBER", "'methods_of_mine:NUMBER' is int, and cannot be called"),
        ("methods_of_mine:nothing", "'methods_of_mine:nothing' returns NoneType; a Transform is"),
        ("methods_of_mine:failing", "'methods_of_mine:failing': KeyError: 'no such key'"),
        ("methods_of_mine:needy", "stage 1 (methods_of_mine:needy): count is missing; it takes"),
        ("methods_of_mine:hungry", "needs 'model', which a file cannot give"),
        ("methods_of_mine", "unknown transform 'methods_of_mine'; there are: adapter, "),
        ("methods_of_mine:", "unknown transform 'methods_of_mine:'"),
        ("methods of mine:half", "unknown transform"),
        ("..methods_of_mine:half", "unknown transform"),
        ("os:system(1)", "unknown transform"),
    ],
)
def test_what_cannot_be_had_says_why(modules, name, said):
    with pytest.raises(ConfigError, match="1 problem\n") as caught:
        parse_recipe(stage(name))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("keeep = 1", "unknown option 'keeep'; did you mean 'keep'?; it takes"),
        ("keeep = 1", "keep: number (default 0.5)"),
        ("key = 1", "unknown option 'key'"),
        ("keep = 'all'", "keep = 'all'; expected number"),
        ("keep = 2", "keep=2.0 is more than all"),
    ],
)
def test_its_options_are_checked_as_ours_are(modules, options, said):
    with pytest.raises(ConfigError, match=r"stage 1 \(methods_of_mine:half\): ") as caught:
        parse_recipe(stage("methods_of_mine:half", options))
    assert said in str(caught.value)


def test_a_module_in_the_working_directory_is_not_found_and_the_message_says_how(
    modules, tmp_path, monkeypatch
):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "methods_here.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    with pytest.raises(ConfigError, match=r"methods_here.py is in the .*: set PYTHONPATH=\."):
        parse_recipe(stage("methods_here:half"))


def test_packages_register_names(modules):
    lines = ["halved = methods_of_mine:half", "broken = methods_broken:half [extra]", "bad = a b"]
    register(modules, lines)
    assert parse_recipe(stage("halved", "keep = 0.25")).stages[0].build().name == "half 0.25"
    assert {"halved", "broken"} < set(METHODS.names())
    for name, said in {
        "broken": r"'broken' of mine \(methods_broken:half \[extra\]\): importing methods_broken",
        "bad": "'ab' is not spelled",
        "halfed": "did you mean 'halved'",
    }.items():
        with pytest.raises(ConfigError, match=said):
            parse_recipe(stage(name))
    assert "methods_broken" not in sys.modules


def test_a_name_of_ours_stays_ours(modules):
    register(modules, ["finercut = methods_of_mine:half"])
    assert METHODS.names().count("finercut") == 1
    with pytest.warns(UserWarning, match="that of mine .methods_of_mine:half. is refused"):
        assert parse_recipe(stage("finercut", "remove = 1")).stages[0].build().name == "finercut"
    assert "methods_of_mine" not in sys.modules


def test_a_name_that_two_packages_register_is_nobodys(modules):
    register(modules, ["halved = methods_of_mine:half"])
    register(modules, ["halved = methods_of_mine:half"], "copy")
    assert parse_recipe(stage("halved")).stages[0].build()
    register(modules, ["halved = methods_of_mine:nothing"], "other")
    with pytest.raises(ConfigError, match="registered more than once, by .*other"):
        parse_recipe(stage("halved"))


def test_a_check_imports_nothing(modules):
    register(modules, ["halved = methods_of_mine:half"])
    for name in ("halved", "methods_of_mine:half", "nowhere_at_all:half"):
        METHODS.check(name)
    assert "methods_of_mine" not in sys.modules
    with pytest.raises(ConfigError, match="unknown transform 'other'"):
        METHODS.check("other")


def test_what_the_caller_fills_in_is_no_option():
    def make(rate: float, /, loss: int = 0, *, keep: float = 0.5) -> Transform: ...

    own = {"make": make}
    methods = Methods("rule", "ffnlab.none", Transform, own, frozenset({"loss", "other"}), 1)
    assert list(methods.options("make")) == ["keep"]
    assert methods.takes("make") == {"loss"}
