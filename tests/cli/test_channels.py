"""`ffnlab train` on channels: what is learned, scored and written, and what is refused."""

import jax
import numpy as np
import pytest

from ffnlab.cli.inputs.channels import load_channels
from ffnlab.cli.train import report, run
from ffnlab.cli.training import TrainConfig, batch_of, read_training, rule_of
from ffnlab.cli.work import work_of
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.graphs import allocate, cell_free_rates, precode, rates, rzf
from ffnlab.parallel import from_table

USERS = {"kind": "icgnn", "nodes": 2, "outputs": 2, "edges": 2, "layers": 1, "width": 8}
LINKS = {"kind": "icgnn", "nodes": 3, "outputs": 1, "axes": 2, "layers": 1, "width": 8}
CELL = {"kind": "cellular", "users": [2, 3], "antennas": 3, "batch": 16, "held_out": 20}
SIZES = {"points": [3, 4], "users": [2, 3], "serving": [2, 2], "antennas": [1, 2]}
FREE = {"kind": "cell_free", "batch": 8, "held_out": 10} | SIZES
RUN = {"steps": 20, "log_every": 10, "checkpoint_every": 10, "dtype": "float32"}
OPTIMIZER = {"rate": 1e-2, "warmup": 0}


def settings(model=USERS, data=CELL, **run):
    table = {"model": model, "data": data, "optimizer": OPTIMIZER, "run": RUN | run}
    return from_table(table, TrainConfig)


def test_precoding_is_learned_and_scored_as_it_is_used(tmp_path, capsys):
    of = settings()
    record = run(of, tmp_path / "run")
    net = load(tmp_path / "run" / "model", progress=False)
    data = load_channels(of.data)
    (part,) = data.held_out
    found = rates(part.h, precode(net, part.h, part.snr, 1.0, valid=part.valid)[0], 1.0)
    assert record["held_out_rate"] == pytest.approx(float(found.sum(-1).mean()), rel=1e-4)
    theirs = rates(part.h, rzf(part.h, part.snr, 1.0, valid=part.valid), 1.0).sum(-1).mean()
    assert record["baseline_rate"] == pytest.approx(float(theirs), rel=1e-5)
    shortfall = 1 - record["held_out_rate"] / record["baseline_rate"]
    assert record["held_out_shortfall"] == pytest.approx(shortfall, abs=1e-6)
    assert record["data"] == {"drawn": "cellular", "held_out": 20} and record["inputs"] == 320
    report(record, tmp_path)
    assert "bit per use of held-out channels (baseline:" in capsys.readouterr().out
    batch = data.batches(of)(0)
    assert not any((batch.h[0] == h).all() for h in part.h)  # no channel is in both
    like = batch_of(of, 16, 0)
    assert [(x.shape, x.dtype) for x in like] == [(x.shape, x.dtype) for x in batch]


def test_powers_are_learned_of_sizes_in_turns(tmp_path):
    of = settings(LINKS, FREE)
    record = run(of, tmp_path / "run")
    net = load(tmp_path / "run" / "model", progress=False)
    data = load_channels(of.data)
    found = [cell_free_rates(allocate(net, *p), *p[::2]).sum(-1) for p in data.held_out]
    assert record["held_out_rate"] == pytest.approx(np.mean(found), rel=1e-4)
    assert record["data"] == {"drawn": "cell_free", "held_out": 20}
    batches = data.batches(of)
    assert [batches(i).served.any((0, 2)).sum() for i in range(3)] == [3, 4, 3]
    like = batch_of(of, 8, 0)
    assert [(x.shape, x.dtype) for x in like] == [(x.shape, x.dtype) for x in batches(0)]
    model = jax.eval_shape(lambda key: of.model.make(key=key), jax.random.key(0))
    work = work_of(of, model)
    assert work.items(0) == 8 and work.flops > 6 * 12 * (3 * 8 + 8 * 8)  # the embedding alone
    assert rule_of(of).name == "backprop"


def test_the_presets_are_read():
    first, second = read_training("icgnn_precoding"), read_training("icgnn_power")
    assert first.data.users == (4, 6) and second.data.sizes[1] == (20, 8, 8, 2)


@pytest.mark.parametrize(
    ("model", "data", "said"),
    [
        (USERS, FREE, "kind 'icgnn' reads cellular channels"),
        (LINKS, CELL, "kind 'icgnn' reads cell-free networks"),
        (USERS | {"nodes": 3}, CELL, "model: a network of .*'nodes': 3"),
        (USERS, CELL | {"users": []}, "users=0 must be at least 1"),
        (USERS, CELL | {"antennas": 0}, "antennas=0 must be at least 1"),
        (USERS, CELL | {"snr_db": [3.0, 2.0]}, "snr_db=.* must be a lower and an upper end"),
        (USERS, CELL | {"held_out": 0}, "held_out=0 must be at least 1"),
        (LINKS, FREE | {"users": [2]}, "as many of each, one or more"),
        (LINKS, FREE | {"serving": [4, 4]}, "at most points="),
        (LINKS, FREE | {"antennas": [0, 1]}, "antennas=0 must be at least 1"),
        (USERS, {"kind": "images"}, "kind 'icgnn' reads cellular channels"),
    ],
)
def test_a_file_that_does_not_fit_together(model, data, said):
    with pytest.raises(ConfigError, match=said):
        settings(model, data)


def test_another_rule_does_not_train_it():
    with pytest.raises(ConfigError, match="does not train a model of kind 'icgnn'"):
        table = {"model": USERS, "data": CELL, "run": RUN, "rule": "counter_current"}
        from_table(table, TrainConfig)
