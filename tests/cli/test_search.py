"""`ffnlab train` with a rule that searches: halves of the data, what is written, what follows."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.cli.inputs.data_kinds import DataConfig
from ffnlab.cli.inputs.halves import halved
from ffnlab.cli.inputs.labelled import load_labelled
from ffnlab.cli.main import main
from ffnlab.cli.train import load_data, run
from ffnlab.cli.training import TrainConfig, abstract_batch, rule_of
from ffnlab.cli.work import work_of
from ffnlab.data import digits
from ffnlab.errors import ConfigError, FFNLabError
from ffnlab.formats import load
from ffnlab.layers import MLP
from ffnlab.models import ResNet
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import from_table, parse_mesh

RUN = {"steps": 6, "log_every": 1, "dtype": "float32"}
SMALL = {"kind": "mlp", "sizes": [64, 12, 12, 10]}
DIGITS = {"kind": "images", "batch": 16}
OPTIONS = {"target": 0.6, "slack": 0.3, "strength": 50.0, "rate": 0.1}
IMAGES = {"kind": "resnet", "image": [8, 8], "channels": 1, "classes": 10}
IMAGES |= {"blocks": [2, 1], "widths": [4, 6]}


def settings(model=SMALL, data=DIGITS, options=OPTIONS, **more):
    table = {"model": model, "data": data, "run": RUN, "rule": "tas", "rule_options": options}
    return from_table(table | more, TrainConfig)


def work(model, shape):
    return multiply_adds(lambda m, x: m(x), model, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_a_search_writes_what_it_found(tmp_path, capsys):
    file, out = tmp_path / "search.toml", tmp_path / "search"
    file.write_text(
        'rule = "tas"\n[rule_options]\ntarget = 0.6\nslack = 0.3\nstrength = 50.0\nrate = 0.1\n'
        '[model]\nkind = "mlp"\nsizes = [64, 12, 12, 10]\n[data]\nkind = "images"\nbatch = 16\n'
        '[run]\nsteps = 6\nlog_every = 1\ndtype = "float32"\n'
    )
    assert main(["train", "--config", str(file), "--out", str(out), "--no-progress"]) == 0
    record = json.loads((out / "model" / "training.json").read_text())
    assert f"accuracy {record['held_out_accuracy']:.4f}" in capsys.readouterr().out
    assert record["inputs"] == 6 * 2 * 16
    found = load(out / "model")
    whole = MLP((64, 12, 12, 10), key=jax.random.key(0))
    assert isinstance(found, MLP) and found.sizes[0] == 64 and found.sizes[-1] == 10
    assert 0.3 <= work(found, (1, 64)) / work(whole, (1, 64)) <= 0.6
    test = digits()[1]
    right = (np.asarray(found(jnp.asarray(test.x))).argmax(-1) == test.y).mean()
    assert record["held_out_accuracy"] == pytest.approx(right)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"ratio", "megamacs", "architecture_loss", "tau"} <= rows[0].keys()


@pytest.mark.slow
def test_a_teacher_trains_what_was_found(tmp_path):
    run(settings(), tmp_path / "search")
    where = tmp_path / "search" / "model"
    found = load(where)
    then = {
        "start": str(where),
        "loss": "distilled",
        "loss_options": {"temperature": 4.0, "weight": 0.9},
        "data": DIGITS | {"teacher": str(where)},
        "run": RUN,
        "model": {"kind": "mlp", "sizes": found.sizes},
    }
    run(from_table(then, TrainConfig), tmp_path / "then")
    assert load(tmp_path / "then" / "model").sizes == found.sizes


def test_halves_have_no_image_in_common():
    chosen = settings()
    one, other = halved(load_labelled(chosen), chosen)(0)
    assert one.x.shape == other.x.shape == (16, 64)
    train = digits()[0].x
    place = lambda rows: {int(np.flatnonzero((train == x).all(1))[0]) for x in rows}  # noqa: E731
    assert {i % 2 for i in place(one.x)} == {0} and {i % 2 for i in place(other.x)} == {1}
    with pytest.raises(FFNLabError, match="batch=1000 must lie in"):
        large = dataclasses.replace(chosen, data=dataclasses.replace(chosen.data, batch=1000))
        halved(load_labelled(large), large)


def test_halves_of_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a" * 600 + b"b" * 600)
    (tmp_path / "b.txt").write_bytes(b"c" * 100)
    model = {"vocab": 256, "width": 8, "hidden": 10, "layers": 1, "heads": 1, "kv_heads": 1}
    data = {"text": [str(tmp_path / "a.txt")], "held_out": [str(tmp_path / "b.txt")]}
    data |= {"batch": 2, "length": 8}
    chosen = settings(model | {"head_dim": 4}, data, {"target": 0.95})
    one, other = halved(load_data(chosen), chosen)(0)
    assert one.shape == other.shape == (2, 9)
    assert set(one.ravel().tolist()) <= {0, ord("a")} and set(other.ravel()) <= {0, ord("b"), 10}
    assert isinstance(chosen.data, DataConfig)
    rule = rule_of(chosen)
    assert rule.name == "tas"
    net = jax.eval_shape(rule.init, load_model(chosen), jax.random.key(0))
    batch = abstract_batch(chosen, parse_mesh(""), 2, 8)
    rule.check(net, batch)
    assert work_of(chosen, load_model(chosen)).items(0) == 2 * 2 * 8


def load_model(chosen):
    from ffnlab.cli.training import fresh

    return jax.eval_shape(lambda key: fresh(chosen, key), jax.random.key(0))


@pytest.mark.slow
def test_a_residual_network_by_single_convolutions(tmp_path):
    """What is found is drawn anew, with shortcuts that the whole network has not."""
    model = IMAGES | {"shortcut": "projected"}
    options = OPTIONS | {"tied": False, "slack": 0.6, "target": 0.99}
    record = run(settings(model, options=options), tmp_path / "run")
    found = load(tmp_path / "run" / "model")
    assert record["finished"] and isinstance(found, ResNet)
    whole = jax.eval_shape(lambda: found)
    assert work(whole, (1, 8, 8, 1)) > 0 and found.config.sizes


def test_what_is_refused():
    for change, told in (
        ({"model": {"kind": "graph", "sizes": [2, 2]}}, "'tas' does not train a model of kind"),
        (
            {"data": {"kind": "domains"}, "model": {"kind": "mlp", "sizes": [2, 6, 2]}},
            "'tas' learns from one domain|learns from two halves of text, images or records",
        ),
        ({"options": {"targets": 0.5}}, "unknown option 'targets'; did you mean 'target'"),
        ({"options": {"target": 1.2}}, "target=1.2 is a share of the whole network"),
        ({"run": RUN | {"microbatches": 2}}, "'tas' takes no microbatches"),
    ):
        with pytest.raises(ConfigError, match=told):
            rule_of(settings(**change))
