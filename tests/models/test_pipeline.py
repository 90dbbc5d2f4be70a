"""Pipelines of a decoder: the same bits in every form, the same outputs, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, testing, transform
from ffnlab.errors import ConfigError
from ffnlab.layers import LayerInputs
from ffnlab.models import Decoder, DecoderConfig, account
from ffnlab.models.units import units
from ffnlab.quantization import nearest
from ffnlab.routing import upcycle

SMALL = {"vocab": 23, "width": 8, "hidden": 12, "heads": 2, "kv_heads": 1, "head_dim": 4}
TOKENS = jax.random.randint(jax.random.key(3), (4, 5), 0, SMALL["vocab"])


@functools.cache
def decoder(layers: int = 4, windows: tuple | None = None) -> Decoder:
    return Decoder(DecoderConfig(layers=layers, windows=windows, **SMALL), key=jax.random.key(0))


def quantized() -> Decoder:
    return transform.apply(nearest(format="int4", group=4), decoder())[0]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


SLOWLY = [pytest.param(decoder, marks=pytest.mark.slow)]  # others look at more


@pytest.mark.parametrize("make", [quantized, lambda: decoder(8, (2, None) * 4), *SLOWLY])
def test_forms_hold_the_same_bits(make):
    model = make()
    found = models.pipeline(model, stages=2, microbatches=2, repeats=2)
    assert_same(models.unpipeline(found), model)
    assert_same(models.stack(models.unpipeline(found)), models.stack(model))
    assert_same(models.pipeline(models.stack(model), stages=2, microbatches=2, repeats=2), found)
    assert_same(models.pipeline(found, stages=4, microbatches=4), in_four(model))
    assert account.parameters(found) == account.parameters(model)
    assert account.flops_per_token(found, 5) == account.flops_per_token(model, 5)


def in_four(model: Decoder) -> Decoder:
    return models.pipeline(model, stages=4, microbatches=4)


def test_layers_stand_in_the_order_of_the_model():
    """Layer (r S + s) n + i is at [s, r, i]."""
    model = decoder(8)
    found = models.pipeline(model, stages=2, microbatches=2, repeats=2).layers
    up = found.period[0].ffn.up.weight
    axes = found.period[0].ffn.up.w.axes
    assert axes == ("stages", "repeats", "layers", "embed", "mlp") and found.periods == 2
    for layer, block in enumerate(model.layers):
        (r, s), i = divmod(layer // 2, 2), layer % 2
        np.testing.assert_array_equal(up.w[s, r, i], block.ffn.up.weight.w)


def test_segments_positions_gates_and_branches_go_with_their_rows():
    model = decoder(8, (2, None) * 4)
    segments = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 1, 1], [1, 2, 2, 3, 3], [0, 1, 1, 1, 2]])
    positions = jnp.arange(20).reshape(4, 5) % 7
    inputs = LayerInputs(gates=jax.random.uniform(jax.random.key(5), (8, 2)))

    @jax.jit
    def run(model):
        options = {"segments": segments, "positions": positions, "inputs": inputs}
        return model.run(TOKENS, branches=True, **options)

    wanted = run(models.stack(model))
    found = run(models.pipeline(model, stages=2, microbatches=4, repeats=2))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_mixture_reports_where_every_token_goes():
    model, _ = transform.apply(upcycle(experts=4), decoder())
    run = jax.jit(lambda model: model.run(TOKENS)[1].reports["ffn"])
    found = run(models.pipeline(model, stages=2, microbatches=2))
    for a, b in zip(found, run(models.stack(model)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:microbatches=2 are fewer")
def test_an_encoder_has_stages_too():
    model, tokens = testing.tiny_encoder(), jnp.arange(20).reshape(4, 5)
    run = jax.jit(lambda model: model(tokens, valid=tokens % 7 > 0))
    found = run(models.pipeline(model, stages=3, microbatches=2))
    np.testing.assert_allclose(found, run(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3, "microbatches": 3}, "stages=3 x repeats=1 do not divide the 4 layers$"),
        ({"stages": 2, "microbatches": 2, "repeats": 4}, "stages=2 x repeats=4 do not divide"),
        ({"stages": 0, "microbatches": 2}, "stages=0 must be at least 1"),
        ({"stages": 2, "microbatches": 0}, "microbatches=0 must be at least 1"),
    ],
)
def test_stages_that_do_not_divide_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        models.pipeline(decoder(), **options)


def test_layers_that_are_alike_only_in_periods_are_told():
    with pytest.raises(ConfigError, match="the 8 layers, which are alike only 2 by 2"):
        models.pipeline(decoder(8, (2, None) * 4), stages=8, microbatches=8)


def test_fewer_microbatches_than_stages_are_warned_of():
    with pytest.warns(UserWarning, match="microbatches=1 are fewer than stages=4: .* 75%"):
        models.pipeline(decoder(), stages=4, microbatches=1)


def test_what_a_pipeline_cannot_do_says_what_can():
    found = models.pipeline(decoder(), stages=2, microbatches=2)
    with pytest.raises(ConfigError, match=r"no cache to generate with; models\.unpipeline"):
        found.init_cache(1, 8)
    with pytest.raises(ConfigError, match=r"no cache to generate with; models\.unpipeline"):
        found.extend(TOKENS, decoder().init_cache(4, 8))
    for change in (models.stack, units):
        with pytest.raises(ConfigError, match=r"stages of a pipeline; models\.unpipeline\(model\)"):
            change(found)
    with pytest.raises(ConfigError, match=r"not pipelined; models\.pipeline\(model, stages="):
        models.unpipeline(decoder())
    with pytest.raises(ConfigError, match="MLP; a Decoder or an Encoder can be pipelined"):
        models.pipeline(models.MLPConfig((2, 2)).make(key=jax.random.key(0)), **TWO)
    with pytest.raises(ConfigError, match="microbatches=2 do not divide the 3 rows"):
        found(TOKENS[:3])


TWO = {"stages": 2, "microbatches": 2}
