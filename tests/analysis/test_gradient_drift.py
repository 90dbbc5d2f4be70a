"""Drift and diffusion, against NumPy's mean and covariance of gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.analysis import gradient_drift
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import MLP
from ffnlab.learning import labelled
from ffnlab.losses import next_token
from ffnlab.testing import batches, tiny


def rows(key, count=5):
    keys = jax.random.split(key, count)
    return [(jax.random.normal(k, (6, 3)), jnp.arange(6) % 2) for k in keys]


def test_moments_are_numpys(key):
    net, data = MLP((3, 4, 2), key=key), rows(key)
    found = gradient_drift(labelled)(net, data)
    slope = jax.grad(lambda net, batch: labelled(net, batch)[0])
    for i in range(2):
        each = [
            np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(slope(net, batch).maps[i])])
            for batch in data
        ]
        at = found.layers[f"maps[{i}]"]
        assert at.mu == pytest.approx(np.linalg.norm(np.mean(each, 0)), rel=1e-5)
        trace = np.var(each, 0).sum()
        assert at.sigma == pytest.approx(np.sqrt(trace), rel=1e-4)
        assert at.ratio == pytest.approx(at.mu / at.sigma)
    assert found.batches == 5 and set(found.figures()) == {
        *("mu/maps[0]", "mu/maps[1]", "sigma/maps[0]", "sigma/maps[1]")
    }
    weights = gradient_drift(labelled, select="maps[*].w")(net, data)
    assert weights.layers["maps[0]"].mu < found.layers["maps[0]"].mu


def test_equal_batches_have_no_diffusion(key):
    found = gradient_drift(labelled)(MLP((3, 2), key=key), rows(key, 1) * 3)
    at = found.layers["maps[0]"]
    assert at.sigma <= 1e-6 * at.mu and at.mu > 0, "no difference of large sums"


def test_members_are_probed_side_by_side(key):
    nets = jax.vmap(lambda key: MLP((3, 4, 2), key=key))(jax.random.split(key, 3))
    probe, data = gradient_drift(labelled), rows(key)
    stats = jax.vmap(probe.init)(nets)
    for batch in data:
        stats = jax.vmap(probe.observe, (0, 0, None))(stats, nets, batch)
    one = lambda tree, i: jax.tree.map(lambda leaf: leaf[i], tree)  # noqa: E731
    for i in range(3):
        alone = probe(one(nets, i), data)
        together = probe.report(one(stats, i))
        assert together.figures() == pytest.approx(alone.figures(), rel=1e-4)


def test_stacked_models_are_taken_apart():
    probe = gradient_drift(next_token, select="layers[*].ffn.up.w")
    flat, stacked = (probe(m, batches()) for m in (tiny(), models.stack(tiny())))
    assert len(flat.layers) == 3 and flat.figures() == pytest.approx(stacked.figures(), rel=1e-3)


def test_what_cannot_be_is_said(key):
    with pytest.raises(ConfigError, match="batches: 1"):
        gradient_drift(labelled)(MLP((3, 2), key=key), rows(key, 1))
    with pytest.raises(SelectionError):
        gradient_drift(labelled, select="nothing")(MLP((3, 2), key=key), rows(key))
