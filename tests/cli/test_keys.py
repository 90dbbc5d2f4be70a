"""`--keys`: every key of a training file and of a recipe, as the files' own readers know them."""

import dataclasses
import inspect
import tomllib

import pytest

from ffnlab.cli.inputs.data_kinds import DATA_KINDS
from ffnlab.cli.keys import recipe_keys, training_keys
from ffnlab.cli.main import main
from ffnlab.cli.training import TrainConfig
from ffnlab.formats import KINDS
from ffnlab.formats.huggingface.ropes import Rope
from ffnlab.models import DecoderConfig
from ffnlab.parallel import from_table
from ffnlab.recipes import TRANSFORMS, factory, parse_recipe

SIZES = {"vocab": 8, "width": 8, "hidden": 8, "layers": 1, "heads": 1, "kv_heads": 1, "head_dim": 8}
TABLES = {
    "": ("rule", "start", "transform", "trainable", "loss"),
    "[model.rope]": tuple(field.name for field in dataclasses.fields(Rope)),
    "[model.local_rope]": tuple(field.name for field in dataclasses.fields(Rope)),
}


# None unless given; and of other kinds than the decoder.
LEFT_OUT = tuple(
    f"[model.{name}" for name in ("local_rope", "mixture", "audio", "preprocess", "target", "spec")
)


def test_every_key_of_a_training_file_has_a_line():
    sections = {section.head: section for section in training_keys(TrainConfig)}
    for table in dataclasses.fields(TrainConfig):
        if table.name in ("model", "run", "data", "optimizer", "extension"):
            several = {"model": {k: v.config for k, v in KINDS.items()}, "data": DATA_KINDS}
            for i, (name, kind) in enumerate(several.get(table.name, {"": table.type}).items()):
                names = {field.name for field in dataclasses.fields(kind)}
                head = f"[{table.name}]" + (f'\nkind = "{name}"' if i else "")
                found = {key.name for key in sections[head].keys}
                inner = {"rope", "local_rope", "mixture", "audio", "preprocess", "options"}
                inner |= {"target", "spec"} if name == "hypernet" else set()
                assert found == names - inner
    assert {head: tuple(k.name for k in sections[head].keys) for head in TABLES} == TABLES
    text = next(key for key in sections["[data]"].keys if key.name == "text")
    assert text.meaning.endswith("is scored: to choose settings on), or files."), "three lines long"
    assert {"[rule_options]", "[optimizer.options]"} <= sections.keys()
    for section in sections.values():
        assert section.meaning and all(key.meaning and key.kind for key in section.keys)


def test_defaults_are_what_the_reader_takes():
    """A file of all defaults, as they are printed, is the file without them."""
    lines = []
    for section in training_keys(TrainConfig):
        is_left_out = section.head.startswith(LEFT_OUT)
        is_needed = not is_left_out and "kind = " not in section.head
        is_needed &= section.head not in lines  # another kind of model has a rope of its own
        lines += [section.head] if is_needed else []
        given = [(key.name, key.default) for key in section.keys if is_needed]
        lines += [f"{name} = {value}" for name, value in given if value not in ("", "required")]
        lines += [f"{n} = {SIZES.get(n, 1)}" for n, value in given if value == "required"]
    whole = from_table(tomllib.loads("\n".join(lines)), TrainConfig)
    assert whole == from_table({"model": SIZES, "run": {"steps": 1}}, TrainConfig)


def test_a_table_that_may_be_left_out_can_be_written():
    table = {"model": SIZES | {"local_rope": {"theta": 5}, "windows": [4]}, "run": {"steps": 1}}
    expected = DecoderConfig(**SIZES, local_rope=Rope(5.0), windows=(4,))
    assert from_table(table, TrainConfig).model == expected


def test_every_key_of_a_recipe_has_a_line():
    sections = {section.head: section for section in recipe_keys()}
    for name in TRANSFORMS:
        section = sections[f'[[stage]]\ntransform = "{name}"']
        named = {key.name for key in section.keys}
        assert named <= inspect.signature(factory(name)).parameters.keys()
        assert section.meaning and all(key.meaning and key.kind for key in section.keys)
        with pytest.raises(ValueError, match="unknown option 'nosuch'") as refusal:
            parse_recipe(f"{section.head}\nnosuch = 1")
        listed = [line.split(":")[0].strip() for line in str(refusal.value).splitlines()[2:]]
        known = [key.name for key in section.keys] or ["(none)"]
        assert listed[: len(known)] == known, "what the reader itself lists"
    assert {key.name for key in sections["[calibration]"].keys} == {
        *("tokens", "window", "batch", "samples")
    }


def test_printed_in_80_columns(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    for command, key in (("train", "checkpoint_every"), ("compress", "post_rope")):
        assert main([command, "--keys"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.split()[:1] == [key] for line in lines)
        assert all(len(line.rstrip()) <= 80 for line in lines)
    assert not list(tmp_path.iterdir())
