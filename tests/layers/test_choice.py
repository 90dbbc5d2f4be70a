"""A choice of branches, against each branch by itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import FFN, ByChoice, Context, GatedFFN, LayerInputs, Linear, TokenFacts
from ffnlab.models.account import flops_per_token
from ffnlab.models.cost import multiply_adds

CONTEXT = Context({}, {})


def choosing(key: jax.Array, *, skip: bool = False, routed: bool = False) -> ByChoice:
    """A gated FFN and a plain one of width 4."""
    keys = jax.random.split(key, 3)
    branches = [GatedFFN(4, 6, key=keys[0]), FFN(4, 2, key=keys[1])]
    router = Linear(4, 2 + skip, key=keys[2], axes=("embed", "router")) if routed else None
    return ByChoice(branches, skip=skip, router=router)


@pytest.mark.parametrize("compiled", [False, True])
def test_every_token_has_its_branch(key, compiled):
    layer, x = choosing(key, skip=True), jax.random.normal(key, (2, 5, 4))
    choice = jnp.array([[0, 1, 2, 1, 0], [2, 2, 0, 3, -1]])  # the last two choose nothing
    call = lambda x, choice: layer(x, CONTEXT, LayerInputs(choice=choice))  # noqa: E731
    y, routing = (jax.jit(call) if compiled else call)(x, choice)
    big, small = (branch(x) for branch in layer.branches)
    expected = np.where((choice == 0)[..., None], big, 0) + np.where(
        (choice == 1)[..., None], small, 0
    )
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(routing.chosen[..., 0], np.where(choice < 0, 3, choice))
    np.testing.assert_array_equal(routing.kept[..., 0], (choice >= 0) & (choice < 3))


@pytest.mark.parametrize("choice", [-1, 0, 1, 2, 3])
def test_a_token_alone_runs_one_branch(key, choice):
    layer, x = choosing(key, skip=True), jax.random.normal(key, (1, 1, 4))
    given = jnp.full((1, 1), choice)
    call = lambda x, choice: layer(x, CONTEXT, LayerInputs(choice=choice))[0]  # noqa: E731
    expected = layer.branches[choice](x) if choice in (0, 1) else jnp.zeros_like(x)
    np.testing.assert_allclose(jax.jit(call)(x, given), expected, rtol=1e-6)
    # The largest branch, not the sum of all: the others are not run.
    assert multiply_adds(call, x, given) == 3 * 4 * 6


def test_without_choice_and_router_the_first_is_taken(key):
    layer, x = choosing(key), jax.random.normal(key, (2, 3, 4))
    y, routing = layer(x, CONTEXT, LayerInputs())
    np.testing.assert_array_equal(y, layer.branches[0](x))
    assert not routing.chosen.any()


def test_a_router_decides_and_its_soft_form_is_the_mean(key):
    layer, x = choosing(key, skip=True, routed=True), jax.random.normal(key, (2, 3, 4))
    logits = np.asarray(layer.router(x), np.float64)
    y, routing = layer(x, CONTEXT, LayerInputs())
    np.testing.assert_array_equal(routing.chosen[..., 0], logits.argmax(-1))
    assert len(np.unique(routing.chosen)) > 1, "the case has more than one answer"
    given = layer(x, CONTEXT, LayerInputs(choice=routing.chosen[..., 0]))[0]
    np.testing.assert_array_equal(y, given)
    scores = np.exp(logits / 0.5) / np.exp(logits / 0.5).sum(-1, keepdims=True)
    soft, report = layer.softened(jnp.float32(0.5))(x, CONTEXT, LayerInputs())
    mean = scores[..., :1] * layer.branches[0](x) + scores[..., 1:2] * layer.branches[1](x)
    np.testing.assert_allclose(soft, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(report.scores, scores, rtol=1e-5)
    hard = layer.softened(jnp.float32(1e-4))(x, CONTEXT, LayerInputs())[0]
    np.testing.assert_allclose(hard, y, rtol=1e-5, atol=1e-6)
    back = layer.softened(jnp.float32(1e-4)).softened(None)
    np.testing.assert_array_equal(back(x, CONTEXT, LayerInputs())[0], y)


def test_the_gradient_of_a_soft_choice_reaches_the_router(key):
    layer, x = choosing(key, routed=True), jax.random.normal(key, (1, 3, 4))

    def total(w, soft):
        new = jax.tree.map(lambda leaf: leaf, layer)
        new.router = new.router.replace(type(new.router.weight)(w))
        return (new.softened(soft)(x, CONTEXT, LayerInputs())[0] ** 2).sum()

    w, soft = layer.router.weight.w, jnp.float32(0.7)
    found = jax.grad(total)(w, soft)
    step = 1e-2 * jax.random.normal(jax.random.key(1), w.shape)
    wide = (total(w + step, soft) - total(w - step, soft)) / 2
    np.testing.assert_allclose(jnp.vdot(found, step), wide, rtol=2e-3)
    assert np.abs(found).max() > 1e-3


def test_what_a_router_cannot_read_and_padding_choose_nothing(key):
    layer, x = choosing(key, routed=True), jax.random.normal(key, (1, 3, 4))
    bad = x.at[0, 1].set(jnp.nan)
    facts = TokenFacts(valid=jnp.array([[True, True, False]]))
    y, routing = layer(bad, CONTEXT._replace(tokens=facts), LayerInputs())
    np.testing.assert_array_equal(routing.chosen[0, :, 0] == 2, [False, True, True])
    assert not np.asarray(y)[0, 1:].any() and np.isfinite(y).all()


def test_the_account_takes_the_shares_of_choices(key):
    config = models.DecoderConfig(
        vocab=8, width=4, hidden=6, layers=2, heads=1, kv_heads=1, head_dim=4
    )
    model = models.Decoder(config, key=key)
    base = flops_per_token(model, 3)
    big, small = 2 * 3 * 4 * 6, 2 * 2 * 4 * 2
    for block in model.layers:
        block.ffn = choosing(key, skip=True)
    for one in (model, models.stack(model)):
        assert flops_per_token(one, 3) == base
        share = {"layers[1].ffn": (0.25, 0.5, 0.25)}
        assert flops_per_token(one, 3, zeros=share) == base - 0.75 * big + 0.5 * small


@pytest.mark.parametrize("share", [(1.0,), (0.5, 0.4), (1.5, -0.5)])
def test_shares_that_are_none_are_refused(key, share):
    with pytest.raises(ConfigError, match="share"):
        choosing(key).runs(share)


def test_what_cannot_be_a_choice_is_refused(key):
    with pytest.raises(ConfigError, match="nothing to choose"):
        ByChoice([FFN(4, 2, key=key)])
    with pytest.raises(ConfigError, match="no router"):
        choosing(key).softened(jnp.float32(1))
    with pytest.raises(ConfigError, match="3 columns for 2 choices"):
        ByChoice([FFN(4, 2, key=key)], skip=True, router=Linear(4, 3, key=key, axes=("a", "b")))
