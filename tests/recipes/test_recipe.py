"""Recipes: what is accepted, and the message for everything that is not."""

import inspect

import pytest

from ffnlab import recipes
from ffnlab.errors import ConfigError
from ffnlab.recipes import Calibration, Evaluation, Recipe, Stage, parse_recipe, read_recipe
from ffnlab.transform import Transform

GOOD = """
[calibration]
tokens = 4096
window = 128

[evaluation]
tokens = 0

[[stage]]
transform = "finercut"
remove = 2
protect = "none"

[[stage]]
transform = "finercut"
rate = 1

[stage.calibration]
batch = 2
"""


def problems_of(text: str) -> list[str]:
    """The problems that the error of a recipe lists."""
    with pytest.raises(ConfigError) as caught:
        parse_recipe(text, source="mine.toml")
    head, *rest = str(caught.value).split("\n  - ")
    assert head == f"mine.toml: {len(rest)} problem{'s' if len(rest) > 1 else ''}"
    return rest


def stage(options: str, transform: str = "finercut") -> str:
    """A recipe of one stage."""
    return f'[[stage]]\ntransform = "{transform}"\n{options}'


def test_a_good_recipe_keeps_everything_it_says():
    recipe = parse_recipe(GOOD)
    assert recipe.evaluation == Evaluation(tokens=0)
    first, second = recipe.stages
    assert first == Stage("finercut", {"remove": 2, "protect": None}, Calibration(4096, 128, 8))
    assert second == Stage("finercut", {"rate": 1.0}, Calibration(4096, 128, 2))
    assert isinstance(second.options["rate"], float)
    assert [type(s.build()) for s in recipe.stages] == [Transform, Transform]


def test_the_default_recipe_is_a_recipe():
    assert recipes.default().source == "default.toml"
    assert all(isinstance(s.build(), Transform) for s in recipes.default().stages)


def test_digest_sees_what_is_asked_for_and_not_how_it_is_written():
    digest = parse_recipe(GOOD).digest()
    assert parse_recipe("# a comment\n" + GOOD, source="other").digest() == digest
    spelled_out = parse_recipe(stage("remove = 2\ndistance = 'js'"))
    assert spelled_out.digest() == parse_recipe(stage("remove = 2")).digest()
    for old, new in (("4096", "4097"), ("= 128", "= 64"), ("= 1\n", "= 0.5\n"), ("= 2", "= 3")):
        assert parse_recipe(GOOD.replace(old, new)).digest() != digest


@pytest.mark.parametrize("name", recipes.TRANSFORMS)
def test_every_transform_can_be_written_in_toml(name):
    options = recipes.options_of(name)
    parameters = inspect.signature(recipes.factory(name)).parameters.values()
    assert options or name in ("biases", "bundle", "guided", "head"), f"{name} has no options"
    for parameter in parameters:
        can_be_left_out = parameter.default is not parameter.empty
        assert parameter.name in options or can_be_left_out
    for option in options.values():
        assert str(option).startswith(f"{option.name}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no stage: write at least one [[stage]]"),
        ("stage = 3", "no stage"),
        ("stage = [1]", "no stage"),
        ("[[stage]]", 'stage 1: needs transform = "NAME"; there are: '),
        ("[[stage]]\ntransform = 1", 'stage 1: needs transform = "NAME"'),
        (stage("", "finrcut"), "stage 1: unknown transform 'finrcut'; did you mean 'finercut'?"),
        (stage("remve = 1"), "unknown option 'remve'; did you mean 'remove'?; it takes"),
        (stage("remve = 1"), "remove: integer or 'all' or 'none' (default 'none')"),
        (stage("remve = 1"), "distance: string (default 'js')"),
        (stage("remove = true"), "remove = true; expected integer or 'all' or 'none'"),
        (stage("remove = 1.5"), "remove = 1.5; expected integer or 'all' or 'none'"),
        (stage("remove = 'most'"), "remove = 'most'; expected integer or 'all' or 'none'"),
        (stage("rate = nan"), "rate = nan; expected number or 'none'"),
        (stage("rate = [0.5]"), "rate = [0.5]; expected number or 'none'"),
        (stage("remove = 1\nunits = 'heads'"), "units = 'heads'; expected 'both' or 'attention'"),
        (stage("one_shot = 1\nremove = 1"), "one_shot = 1; expected true or false"),
        (stage("distance = 3\nremove = 1"), "distance = 3; expected string"),
        (stage("remove = -1"), "stage 1 (finercut): remove=-1"),
        (stage("rate = 1.5"), "stage 1 (finercut): rate=1.5"),
        (stage("remove = 1\ndistance = 'l3'"), "stage 1 (finercut): distance='l3'"),
        (stage(""), "give exactly one of them"),
        (stage("remove = 1\ncalibration = 3"), "[stage.calibration]: must be a table"),
        (stage("remove = 1\ncalibration.window = 1"), "out of range: window = 1 (>= 2)"),
        ("calibration = 1\n" + stage("remove = 1"), "[calibration]: must be a table"),
        ("[calibration]\ntokns = 1\n" + stage("remove = 1"), "did you mean 'tokens'?"),
        ("[calibration]\ntokens = 1\n" + stage("remove = 1"), "less than one batch of 8 windows"),
        ("[calibration]\nbatch = 0\n" + stage("remove = 1"), "out of range: batch = 0 (>= 1)"),
        ("[calibration]\nbatch = 'a'\n" + stage("remove = 1"), "batch = 'a'; expected integer"),
        ("[evaluation]\nwindow = 1\n" + stage("remove = 1"), "[evaluation]: out of range: window"),
        ("[evaluation]\ntokens = 9\n" + stage("remove = 1"), "less than one window of 512"),
        ("[stages]\n" + stage("remove = 1"), "unknown entry 'stages'; did you mean 'stage'?"),
    ],
)
def test_each_mistake_has_its_message(text, said):
    assert said in "\n".join(problems_of(text))


def test_all_problems_come_at_once():
    found = problems_of(
        "thing = 1\n[calibration]\nwindow = 'a'\nbatch = 0\n"
        + stage("remove = -1\n")
        + stage("removes = 1\nunits = 'heads'\n")
        + stage("", "chees")
    )
    assert len(found) == 7


def test_text_that_is_no_toml_is_refused_with_the_place():
    with pytest.raises(ConfigError, match=r"mine.toml: not valid TOML: .*line 2"):
        parse_recipe("[[stage]]\ntransform = \n", source="mine.toml")
    with pytest.raises(ConfigError, match="not valid TOML"):
        parse_recipe("a = " + "[" * 100_000)


def test_files_are_read_with_care(tmp_path):
    path = tmp_path / "r.toml"
    with pytest.raises(FileNotFoundError):
        read_recipe(path)
    path.write_text(GOOD)
    assert read_recipe(path) == Recipe(parse_recipe(GOOD).stages, Evaluation(tokens=0), "r.toml")
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_recipe(path)
    path.write_bytes(b"#" * (1 << 20) + b"#")
    with pytest.raises(ConfigError, match="that is no recipe"):
        read_recipe(path)


def test_a_recipe_without_stages_is_no_recipe():
    with pytest.raises(ConfigError, match="at least one"):
        Recipe(())
