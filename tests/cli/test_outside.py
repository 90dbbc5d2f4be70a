"""Rules and optimizers from outside in training files; and nothing that a model brings is run."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models
from ffnlab.cli.main import main
from ffnlab.cli.train import TrainConfig, run
from ffnlab.cli.training import rule_of
from ffnlab.errors import ConfigError
from ffnlab.learning import OptimizerConfig, make_optimizer, rate_at
from ffnlab.parallel import from_table, read_config, to_table
from ffnlab.storage.files import write_json
from tests.parallel import launch
from tests.test_outside import register

MODULE = '''
"""A rule and an optimizer."""
import jax
import optax
from ffnlab.learning import backprop
from ffnlab.rule import Rule

def signs(loss, *, size: float = 0.01, depth: int = 1) -> Rule:
    """Steps of one size against the gradient's sign.

    Args:
      size: of a step.
    """
    return backprop(loss, optax.sign_sgd(size))

def alone(*, size: float = 0.01) -> Rule:
    """A rule that takes nothing of the run."""
    return signs(lambda model, batch: (model(batch.tokens[:, :-1]).mean() ** 2, {}), size=size)

def made(rate, *, size: float = 0.01) -> Rule:
    """A rule, which is no optimizer."""
    return alone(size=size)

def plain(rate, momentum: float = 0.0, *, nesterov: bool = False):
    """SGD.

    Args:
      momentum: of the past.
    """
    return optax.sgd(rate, momentum, nesterov)
'''
TRAP = "import pathlib; pathlib.Path(__file__).with_name('sprung').touch()\ndef rule(): ..."


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder on the path with a module of methods, and one that nobody may import."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "rules_of_mine.py").write_text(MODULE)
    (folder / "rules_trap.py").write_text(TRAP)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in ("rules_of_mine", "rules_trap"):
        sys.modules.pop(name, None)
    assert not (folder / "sprung").exists(), "a file of a model ran code"


@pytest.fixture
def settings(tmp_path) -> TrainConfig:
    """A run of four steps, without what only our rules and optimizers take."""
    file = launch.write_config(tmp_path, 4)
    text = file.read_text().replace("microbatches = 2\n", "")
    file.write_text(text[: text.index("[optimizer]")] + text[text.index("[run]") :])
    return read_config(file, TrainConfig)


def changed(settings, **tables) -> TrainConfig:
    return from_table(to_table(settings) | tables, TrainConfig)


def test_a_run_by_a_rule_from_outside_is_resumed(modules, settings, tmp_path):
    out = tmp_path / "run"
    mine = {"rule": "rules_of_mine:signs", "rule_options": {"size": 0.5}}
    whole = run(changed(settings, **mine), tmp_path / "whole")
    run_of = to_table(settings)["run"]
    run(changed(settings, **mine, run=run_of | {"steps": 2}), out)
    for file in (out / "run.json", out / "model" / "training.json"):
        recorded = json.loads(file.read_text())
        assert mine.items() <= recorded.get("config", recorded.get("recipe")).items()
    for other in ({}, mine | {"rule_options": {"size": 0.25}}):
        with pytest.raises(ConfigError, match="started with another config"):
            run(changed(settings, **other), out, resume=True)
    sys.modules.pop("rules_of_mine")
    resumed = run(changed(settings, **mine), out, resume=True)
    assert resumed["held_out_bits_per_byte"] == whole["held_out_bits_per_byte"]


def test_rules_that_packages_register_are_named_and_listed(modules, settings, capsys):
    lines = ["signs = rules_of_mine:signs", "lost = nowhere_to_be_found:rule"]
    register(modules, lines, group="ffnlab.rules")
    register(modules, ["plain = rules_of_mine:plain"], "more", group="ffnlab.optimizers")
    assert rule_of(changed(settings, rule="signs")).name == "backprop"
    with pytest.raises(ConfigError, match="'lost' of mine .*no module 'nowhere_to_be_found'"):
        rule_of(changed(settings, rule="lost"))
    assert main(["train", "--keys"]) == 0
    said = capsys.readouterr().out
    for line in ('rule = "signs"', 'rule = "lost"', 'name = "plain"', "[optimizer.options]"):
        assert line in said
    rows = [line.split() for line in said.splitlines()]
    assert ["size", "number", "0.01", "of", "a", "step."] in rows
    assert ["momentum", "number", "0.0", "of", "the", "past."] in rows
    assert "no module 'nowhere_to_be_found'" in " ".join(said.split())


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"rule": "rules_of_mine:sign"}, "has no 'sign'; did you mean 'signs'?"),
        ({"rule": "rules_of_mine:jax"}, "is module, and cannot be called"),
        ({"rule": "rules_of_mine:plain"}, "needs 'rate', which a file cannot give"),
        ({"rule": "rules_nowhere:rule"}, "no module 'rules_nowhere'"),
        ({"rule_options": {"trainable": 1}}, r"\[rule_options\]: unknown option 'trainable'"),
        (
            {"rule": "rules_of_mine:signs", "rule_options": {"sise": 1, "depth": 1.5}},
            r"(?s)depth = 1.5; expected integer.*'sise'; did you mean 'size'.*size: number",
        ),
        (
            {"rule": "rules_of_mine:alone", "optimizer": {"rate": 0.1}},
            r"\[optimizer\] is set, but rule 'rules_of_mine:alone' takes no optimizer",
        ),
        ({"optimizer": {"options": {"b1": 0.5}}}, "options={'b1': 0.5}, but adamw takes none"),
        (
            {"optimizer": {"name": "rules_of_mine:plain", "b1": 0.5}},
            "b1=0.5 is of our optimizers; rules_of_mine:plain takes what stands in its options",
        ),
        (
            {"optimizer": {"name": "rules_of_mine:plain", "options": {"moment": 0.5}}},
            r"\[optimizer.options\]: unknown option 'moment'; did you mean 'momentum'",
        ),
        (
            {"optimizer": {"name": "rules_of_mine:made"}},
            "optimizer 'rules_of_mine:made' returns Rule; a GradientTransformation is needed",
        ),
        ({"optimizer": {"name": "optax:sdg"}}, "optax has no 'sdg'; did you mean 'sgd'"),
        ({"rule_options": 3}, "rule_options=3 is not of type table"),
    ],
)
def test_refused_before_anything_is_done(modules, settings, tmp_path, tables, said):
    with pytest.raises(ConfigError, match=said):
        run(changed(settings, **tables), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [("compute", "bfloat16", "loss"), ("microbatches", 2, "microbatches")],
)
def test_what_a_rule_has_no_use_for_is_refused(modules, settings, key, value, takes):
    run_of = to_table(settings)["run"] | {key: value}
    with pytest.raises(ConfigError, match=f"{key}=.* takes no {takes}"):
        rule_of(changed(settings, rule="rules_of_mine:alone", run=run_of))


def test_an_optimizer_from_outside_takes_the_rate_and_its_options(modules):
    settings = {"rate": 0.5, "warmup": 2, "clip": 0.0}
    config = OptimizerConfig("optax:adam", **settings, options={"b1": 0.5, "nesterov": True})
    found = make_optimizer(config, 10)
    wanted = optax.adam(rate_at(config, 0.5, 10), b1=0.5, nesterov=True)
    params = {"w": jnp.ones(3)}
    states = [found.init(params), wanted.init(params)]
    for step in range(4):
        gradient = {"w": jnp.arange(3.0) - step}
        ours, states[0] = found.update(gradient, states[0], params)
        theirs, states[1] = wanted.update(gradient, states[1], params)
        np.testing.assert_array_equal(ours["w"], theirs["w"])


def test_nothing_that_a_run_folder_or_a_model_names_is_imported(
    modules, settings, tmp_path, capsys
):
    out = tmp_path / "run"
    run(settings, out)
    trap = {"rule": "rules_trap:rule", "optimizer": {"name": "rules_trap:rule"}}
    for file in (out / "run.json", out / "model" / "training.json"):
        table = json.loads(file.read_text())
        table.get("config", table.get("recipe")).update(trap)
        write_json(file, table)
    with pytest.raises(ConfigError, match="started with another config"):
        run(settings, out, resume=True)
    extra = {"format": "ffnlab", "version": 1, "blocks": 1, "windows": None, "removed": []}
    said = {"layers[0].ffn.up": {"stored": "rules_trap:rule"}}
    write_json(out / "model" / "ffnlab.json", extra | {"by_block": {}, "linears": said})
    models.load(out / "model")
    (tmp_path / "a.txt").write_text("the cat sat on the mat; " * 9)
    assert main(["eval", str(out / "model"), "--text", str(tmp_path / "a.txt")]) == 0
    capsys.readouterr()
    assert "rules_trap" not in sys.modules


def test_a_plan_looks_where_training_looks(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rules_here.py").write_text(MODULE)
    file = tmp_path / "tiny.toml"
    file.write_text('rule = "rules_here:signs"\n' + file.read_text())
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", ".")])
    plan = __import__("ffnlab.cli.plan", fromlist=["plan"])
    with pytest.raises(ConfigError, match=r"rules_here.py is in the .*: set PYTHONPATH=\."):
        plan.plan(file, mesh="dp=1")
