"""`ffnlab train` on a permutation: what it learns from, how it is scored, what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.cli.inputs.permutation import load_permutation
from ffnlab.cli.train import run
from ffnlab.cli.training import TrainConfig, read_training, rule_of
from ffnlab.errors import ConfigError
from ffnlab.formats import load
from ffnlab.learning.exact_permutations.closed_form import safe_threshold
from ffnlab.learning.exact_permutations.ensemble import binary_inputs
from ffnlab.parallel import from_table

RUN = {"steps": 60, "log_every": 60, "dtype": "float32"}
NTK = {"name": "ffnlab.learning.exact_permutations.ensemble:ntk_sgd", "rate": 5.0}
NTK |= {"clip": 0.0}
THREE = {"kind": "permutation", "length": 3, "permutation": 1}


def settings(**change):
    model = {"kind": "mlp", "sizes": [3, 64, 3], "bias": False}
    table = {"model": model, "data": THREE, "optimizer": NTK, "run": RUN}
    return from_table(table | change, TrainConfig)


def test_a_network_learns_its_basis(tmp_path):
    record = run(settings(), tmp_path / "run")
    network, to = load(tmp_path / "run" / "model"), record["data"]["permutation"].split(",")
    np.testing.assert_allclose(network(jnp.eye(3)), np.eye(3)[list(map(int, to))], atol=1e-3)
    bits = np.array([[n >> i & 1 for i in range(3)] for n in range(1, 8)])
    means = np.asarray(network(jnp.asarray(binary_inputs(bits))))
    wanted = np.stack([np.eye(3)[list(map(int, to))][row == 1].sum(0) for row in bits]) > 0
    right = ((means > safe_threshold(3)) == wanted).all(1).mean()
    assert record["held_out_accuracy"] == pytest.approx(right) and record["data"]["held_out"] == 7
    assert record["inputs"] == 60 * 3


def test_long_inputs_are_drawn_and_none_is_zero():
    long = load_permutation(settings(data=THREE | {"length": 12}).data)
    assert long.bits.shape == (1024, 12) and (long.bits.sum(1) > 0).all()
    assert rule_of(read_training("permutation")).name == "backprop"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": THREE | {"length": 0}}, "length=0 must be at least 1"),
        ({"data": THREE | {"permutation": -1}}, "seed=-1 must lie in"),
        ({"rule": "counter_current"}, "'counter_current' learns classes; a permutation is learn"),
        ({"model": {"kind": "convnet", "channels": [1, 2], "classes": 3}}, "reads images or rec"),
    ],
)
def test_a_file_that_does_not_fit_together(change, message):
    with pytest.raises(ConfigError, match=message):
        settings(**change)


def test_a_network_of_another_size(tmp_path):
    with pytest.raises(ConfigError, match=r"sizes=\[4, 3\]: a permutation of length=3 has 3 in"):
        run(settings(model={"kind": "mlp", "sizes": [4, 3]}), tmp_path / "run")
