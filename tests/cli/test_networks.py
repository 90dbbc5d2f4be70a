"""`ffnlab train` of a metanetwork: what it learns from, how it is scored, what it is good for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import formats, transform
from ffnlab.cli.inputs.networks import load_networks
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, rule_of
from ffnlab.cli.work import work_of
from ffnlab.data import digits
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.models import ConvNet, MetaNetworkConfig
from ffnlab.parallel import from_table
from ffnlab.pruning import corrected, group_penalty, meta_prune

RUN = {"steps": 6, "log_every": 3, "checkpoint_every": 3, "dtype": "float32"}
MODEL = {"kind": "meta", "nodes": 1, "edges": 1, "layers": 1, "width": 4, "ratio": 0.5}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Three nets of digits, drawn, and one of another kind, each in a directory."""
    folder = tmp_path_factory.mktemp("nets")
    for i in range(3):
        formats.save(MLP((64, 5, 10), key=jax.random.key(i)), folder / f"{i}", format="ffnlab")
    convnet = ConvNet((1, 2, 2, 2), 10, key=jax.random.key(0))
    formats.save(convnet, folder / "conv", format="ffnlab")
    formats.save(MetaNetworkConfig(1, 1).make(key=jax.random.key(0)), folder / "m", format="ffnlab")
    return folder


def settings(nets, **data):
    places = {"networks": [str(nets / "0"), str(nets / "1")], "held_out": [str(nets / "2")]}
    table = {"model": MODEL, "data": {"kind": "networks", "batch": 400} | places | data}
    table["optimizer"] = {"rate": 1e-2, "warmup": 0}
    return from_table(table | {"run": RUN}, TrainConfig)


def test_a_metanetwork_is_trained_scored_and_used(nets, tmp_path):
    of = settings(nets)
    record = run(of, tmp_path / "run")
    network = formats.load(tmp_path / "run" / "model")
    assert network.config == MetaNetworkConfig(1, 1, 1, 4, 0.5)
    held, test = formats.load(nets / "2"), digits()[1]
    new = corrected(network, held)
    right = np.asarray(new(jnp.asarray(test.x))).argmax(-1) == test.y
    assert record["held_out_accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    share = float(group_penalty(new) / group_penalty(held))
    assert record["held_out_penalty"] == pytest.approx(share, rel=1e-4)
    assert record["inputs"] == 6 * 1437 and record["data"]["train"] == 1437
    assert f"{nets / '2'} sha256" in record["data"]
    small, _ = transform.apply(
        meta_prune(metanetwork=str(tmp_path / "run" / "model"), speed_up=2.0), held
    )
    assert small.sizes[1] < 5


def test_lessons_are_whole_batches_of_each_network_in_turns(nets):
    of = settings(nets)
    data = load_networks(of.data, of.model)
    batches = data.batches(of)
    assert [batches(i) is data.lessons[i % 2] for i in range(4)] == [True] * 4
    x, y = data.lessons[0].batches
    assert x.shape == (3, 479, 64) and y.shape == (3, 479) and data.lessons[0].rows == 1437
    np.testing.assert_array_equal(x.reshape(-1, 64), digits()[0].x)
    assert len(data.scored) == 1
    both = load_networks(settings(nets, held_out=[]).data, of.model)
    assert len(both.scored) == 2
    model = jax.eval_shape(lambda key: of.model.make(key=key), jax.random.key(0))
    work, net = work_of(of, model), 64 * 5 + 5 * 10  # products of the net for a row
    assert work.flops > 6 * net and work.items(0) == 1437
    assert rule_of(of).name == "backprop"


def test_what_does_not_fit(nets):
    for data, said in (
        ({"networks": [str(nets / "conv")]}, "a model of layout 'convnet' has 5 and 9"),
        ({"networks": [str(nets / "m")]}, "m holds a model of kind 'meta'; accepted here: 'mlp'"),
        ({"batch": 2000}, "batch=2000: digits has 1437 rows to learn from"),
    ):
        of = settings(nets, **data)
        with pytest.raises(ConfigError, match=said):
            load_networks(of.data, of.model)
    for data, said in (
        ({"networks": []}, r"networks=\[\], reg=0.003, alpha=16.0: a directory or more"),
        ({"reg": -1.0}, "reg=-1.0"),
        ({"alpha": 0.5}, "alpha=0.5"),
        ({"batch": 0}, "batch=0 must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            settings(nets, **data)
    table = {"model": MODEL, "data": {"kind": "networks", "networks": ["x"]}}
    with pytest.raises(ConfigError, match="microbatches=2: a network is one batch, which is not"):
        from_table(table | {"run": RUN | {"microbatches": 2}}, TrainConfig)
    with pytest.raises(ConfigError, match="kind 'meta' reads networks: set kind in"):
        from_table({"model": MODEL, "data": {"kind": "images"}, "run": RUN}, TrainConfig)
