"""A dense model as a mixture computes the same, and learns more."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform
from ffnlab.errors import ConfigError
from ffnlab.layers import GatedFFN, MoE
from ffnlab.learning import backprop
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.quantization import nearest
from ffnlab.routing import upcycle
from ffnlab.testing import batches, tiny, tiny_encoder
from ffnlab.weights import Int4

CLOSE = {"atol": 2e-5, "rtol": 1e-4}  # float32, of logits of about one
forward = jax.jit(lambda model, tokens: model(tokens))


def applied(model, **options):
    return transform.apply(upcycle(**options), model, [])[0]


@functools.cache
def routed():
    return applied(tiny(), experts=4, seed=1)


def test_the_mixture_computes_what_the_dense_model_did():
    model, tokens = tiny(), batches()[0]
    assert all(isinstance(block.ffn, MoE) for block in routed().layers)
    np.testing.assert_allclose(forward(routed(), tokens), forward(model, tokens), **CLOSE)
    routers = [block.ffn.router.weight.dense() for block in routed().layers]
    assert not np.array_equal(routers[0], routers[1])
    again = applied(tiny(), experts=4, seed=2)
    assert not np.array_equal(again.layers[0].ffn.router.weight.dense(), routers[0])


def test_unnormalized_weights_are_another_function():
    new, tokens = applied(tiny(), experts=4, normalize=False), batches()[0]
    assert not np.allclose(forward(new, tokens), forward(tiny(), tokens), atol=1e-2)


def test_some_layers_with_biases_in_their_format():
    config = dataclasses.replace(tiny().config, mlp_bias=True)
    model = Decoder(config, key=jax.random.key(0))
    leaves, structure = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    drawn = [x + 0.1 * n for x, n in zip(leaves, noise, strict=True)]
    model = jax.tree.unflatten(structure, drawn)
    model, _ = transform.apply(nearest(group=8), model, [])
    new = applied(model, experts=3, layers=(0, 2))
    kinds = [type(block.ffn) for block in new.layers]
    assert kinds == [MoE, GatedFFN, MoE] and new.config.ffns == ("mixture", "gated", "mixture")
    assert isinstance(new.layers[0].ffn.experts.up.weight, Int4)
    tokens = batches()[0]
    np.testing.assert_allclose(forward(new, tokens), forward(model, tokens), atol=1e-3)  # w4a8 sums


def test_it_is_a_mixtral_that_is_saved_and_loaded(tmp_path):
    assert routed().config.family == "mixtral"
    models.save(routed(), tmp_path / "m")
    back = models.load(tmp_path / "m")
    assert back.config == routed().config
    tokens = batches()[0]
    np.testing.assert_array_equal(forward(back, tokens), forward(routed(), tokens))


@pytest.mark.slow
def test_training_makes_experts_and_routers_differ():
    rule = backprop(optimizer=optax.adam(1e-2))
    state = rule.init(routed(), jax.random.key(0))
    losses = []
    for _ in range(3):
        state, metrics = rule.step(state, batches()[0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    ffn, before = rule.model(state).layers[0].ffn, routed().layers[0].ffn
    w = ffn.experts.up.weight.dense()
    assert jnp.abs(w[0] - w[1]).max() > 1e-3
    assert jnp.abs(ffn.router.weight.dense() - before.router.weight.dense()).max() > 1e-3


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (tiny, {"layers": (3,)}, r"layers \[3\] have no dense FFN to copy; .* are \[0, 1, 2\]"),
        (tiny, {"layers": ()}, "have no dense FFN to copy"),
        (routed, {}, "have no dense FFN to copy"),
        (tiny_encoder, {}, "model is a Encoder; a Decoder is accepted"),
    ],
)
def test_what_cannot_be_upcycled(model, options, message):
    with pytest.raises(ConfigError, match=message):
        applied(model(), **options)


def test_unlike_ffns_and_bad_sizes():
    config = DecoderConfig(**{**vars(tiny().config), "ffns": ("gated", "plain", "gated")})
    model = Decoder(config, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="2 kinds and sizes; name layers of one"):
        applied(model)
    assert applied(model, layers=(1,)).config.mixture.gated is False
    with pytest.raises(ConfigError, match="k=9 of experts=8"):
        upcycle(k=9)
