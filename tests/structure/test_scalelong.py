"""ScaleLong as a transform: what of a U-ViT stays, what changes, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.models import UViT, UViTConfig
from ffnlab.structure import scalelong
from ffnlab.testing import equal, tiny

CONFIG = UViTConfig((8, 8), 2, 8, 16, 4, 2, channels=1)
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))


@functools.cache
def uvit():
    return UViT(CONFIG, key=jax.random.key(0))


def made(**options):
    return transform.apply(scalelong(**options), uvit())[0]


def test_a_model_gets_another_scaling_and_nothing_else():
    new = made(method="constant", kappa=0.7)
    assert new.config == dataclasses.replace(CONFIG, scaling="constant", kappa=0.7)
    assert equal(new, tree.copy(UViT(new.config, key=jax.random.key(0))))
    assert new.scaling.factors(2) == (0.7, 1.0)
    back, _ = transform.apply(scalelong(method="original"), new)
    np.testing.assert_array_equal(back(IMAGES), uvit()(IMAGES))
    one = made(method="constant", kappa=1.0)
    np.testing.assert_array_equal(one(IMAGES), uvit()(IMAGES))
    assert np.abs(new(IMAGES) - uvit()(IMAGES)).max() > 1e-6
    stacked, _ = transform.apply(scalelong(kappa=0.7), models.stack(uvit()))
    assert equal(models.unstack(stacked), new)


def test_gates_are_drawn_by_the_seed():
    one, same, other = (made(method="apart", seed=seed) for seed in (1, 1, 2))
    assert equal(one, same) and not equal(one, other) and len(one.scaling.gates) == 2
    assert len(made(method="learned").scaling.gates) == 1


def test_what_does_not_fit_is_refused():
    for options, said in (
        ({"method": "half"}, "method='half' is not one of"),
        ({"kappa": 0.0}, r"kappa=0.0 must lie in \(0, 1\]"),
        ({"kappa": 1.1}, "kappa=1.1"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            scalelong(**options)
    with pytest.raises(ConfigError, match="model is a Decoder; a UViT is accepted"):
        transform.apply(scalelong(), tiny())
    small = UViT(dataclasses.replace(CONFIG, image=(4, 4)), key=jax.random.key(0))
    with pytest.raises(ConfigError, match="at least 16 tokens"):
        transform.apply(scalelong(method="learned"), small)
    assert jnp.isfinite(transform.apply(scalelong(), small)[0](IMAGES[:, :4, :4])).all()
