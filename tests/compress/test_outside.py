"""A transform from outside in a recipe: found again after an interruption, and reported."""

import sys

import pytest

from ffnlab.compress import TextTask, compress, job, read_report
from ffnlab.compress.state import FOLDER
from ffnlab.recipes import parse_recipe
from tests.compress.conftest import RECIPE

MODULE = """
import jax
import jax.numpy as jnp
from ffnlab import transform, tree
from ffnlab.layers import Linear
from ffnlab.models import Decoder
from ffnlab.weights import Dense

def damp(*, by: float = 0.5) -> transform.Transform:
    largest = jax.jit(lambda stats, model, batch: jnp.maximum(stats, batch.max()))
    maps = tree.of_type(Linear) & tree.at("layers[0].**")
    def rewrite(model, stats):
        factor = 1 - by * stats / 1000
        return tree.map_at(model, maps, lambda m: m.replace(Dense(m.weight.dense() * factor)))
    return transform.Transform("damp", lambda model: jnp.int32(0), largest, rewrite)
"""
STAGE = '[[stage]]\ntransform = "damping_of_mine:damp"\nby = 0.25\n'


def stopped(*arguments, **options):
    raise KeyboardInterrupt


def test_a_job_goes_on_with_a_transform_from_outside(model, tokenizer, text, tmp_path, monkeypatch):
    (tmp_path / "damping_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    recipe = parse_recipe(RECIPE[: RECIPE.index("[[stage]]")] + STAGE)
    out = tmp_path / "out"

    def run(**options):
        return compress(model, recipe, TextTask(tokenizer, text), out, progress=False, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(job, "export", stopped)
        run()
    kept = {path.name for path in (out / FOLDER).iterdir()}
    assert kept == {"run.json", "01-damping_of_mine.damp.npz"}, "a name that every system takes"
    sys.modules.pop("damping_of_mine", None)
    report = run(interrupted="resume")
    sys.modules.pop("damping_of_mine", None)
    assert [row.stage for row in report.rows] == ["original", "damping_of_mine:damp"]
    (stage,) = read_report(out / "report.json").recipe["stages"]
    assert stage["transform"] == "damping_of_mine:damp" and stage["options"] == {"by": 0.25}
    assert "damping_of_mine" not in sys.modules, "reading a report imports nothing"
