"""Losses of models that drop: the key they are called with, terms by hand, and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.graphs import consistency, keyed
from ffnlab.losses import Moment, labelled
from ffnlab.models import GroupNetworkConfig


def test_terms_by_hand(key):
    model = GroupNetworkConfig(((2, 3),), 4, 8, drop=0.5).make(key=key)
    x, y = jax.random.normal(key, (6, 6)), jnp.array([0, -1, 3, -1, 1, -1])
    moment = Moment(jnp.int32(0), jax.random.fold_in(key, 1))
    mean, told = consistency(views=3, weight=0.6)(model, (x, y), moment)
    views = [np.asarray(model(x, key=k), np.float64) for k in jax.random.split(moment.key, 3)]
    p = [np.exp(v) / np.exp(v).sum(1, keepdims=True) for v in views]
    pseudo = np.mean(p, axis=0).argmax(1)
    known = np.flatnonzero(np.asarray(y) >= 0)
    expected = sum(-np.log(one[known, np.asarray(y)[known]]).mean() for one in p)
    expected += 0.6 * sum(-np.log(one[np.arange(6), pseudo]).mean() for one in p)
    assert float(mean) == pytest.approx(expected, rel=1e-5)
    agreed = np.mean([one.argmax(1) == pseudo for one in p])
    assert float(told["agreement"]) == pytest.approx(agreed)
    right = np.mean([(one.argmax(1) == y)[known].mean() for one in p])
    assert float(told["accuracy"]) == pytest.approx(right)


def test_a_model_is_called_with_the_key_of_the_moment(key):
    model = GroupNetworkConfig(((2, 3),), 4, 8, drop=0.5).make(key=key)
    batch = jax.random.normal(key, (6, 6)), jnp.arange(6) % 4
    moment = Moment(jnp.int32(0), jax.random.fold_in(key, 1))
    found = keyed(labelled)(model, batch, moment)
    expected = labelled(lambda x: model(x, key=moment.key), batch)
    assert float(found[0]) == float(expected[0]) != float(labelled(model, batch)[0])


def test_bad_input():
    with pytest.raises(ConfigError, match="views=0"):
        consistency(views=0)
    with pytest.raises(ConfigError, match="weight=-1"):
        consistency(weight=-1.0)
