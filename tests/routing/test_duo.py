"""Duo-LLM: the transform, and the losses of its two trainings."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform, tree
from ffnlab.data import Packed
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import ByChoice, LayerInputs
from ffnlab.learning import backprop, next_token
from ffnlab.losses import Moment
from ffnlab.routing import ROUTERS, budgeted, duo, random_choices, with_routers
from ffnlab.testing import batches, equal, tiny, tiny_encoder

MOMENT = Moment(jnp.int32(4), jax.random.key(5))


def made(**options: object) -> models.Decoder:
    """The tiny decoder as a duo."""
    return transform.apply(duo(ratio=8, **options), tiny())[0]


def routed(**options: object) -> models.Decoder:
    """With routers."""
    return transform.apply(with_routers(seed=1), made(**options))[0]


def test_the_big_branch_is_the_model_that_was_there():
    model, x = made(skip=True), batches()[0]
    np.testing.assert_array_equal(model(x), tiny()(x))
    layer = model.layers[1].ffn
    assert equal(layer.branches[0], tiny().layers[1].ffn) and layer.choices == 3
    assert layer.branches[1].up.weight.shape == (16, 4)
    drawn = [np.asarray(block.ffn.branches[1].up.weight.w) for block in model.layers]
    assert np.abs(drawn[0] - drawn[1]).max() > 0.1, "each layer draws its own"
    std = np.std([block.ffn.branches[1].down.weight.w for block in model.layers])
    assert std == pytest.approx((2 * 3) ** -0.5 * 4**-0.5, rel=0.2)


def test_part_of_the_layers_can_choose():
    model = made(where=tree.at("layers[1].ffn"))
    assert [isinstance(block.ffn, ByChoice) for block in model.layers] == [False, True, False]


@pytest.mark.parametrize("compiled", [False, True])
def test_choices_are_drawn_for_each_token_and_layer(compiled):
    """The loss is that of the choices which its key draws; brute force, layer by layer."""
    model, batch = made(), batches()[0]
    loss = random_choices((0.25, 0.75))
    nats, metrics = (jax.jit(loss) if compiled else loss)(model, batch, MOMENT)
    p = jnp.array([0.25, 0.75])
    choice = jax.random.choice(MOMENT.key, 2, (3, 2, 11), p=p)
    assert (choice[:, :, 0] != choice[:, :, 1]).any() and (choice[0] != choice[1]).any()
    expected, _ = next_token(lambda x: model(x, inputs=LayerInputs(choice=choice)), batch)
    assert float(nats) == pytest.approx(float(expected), rel=1e-6)
    other = loss(model, batch, MOMENT._replace(key=jax.random.key(6)))[0]
    assert abs(float(other - nats)) > 1e-5 and metrics["bits"] > nats


def test_both_branches_learn_from_random_choices():
    rule = backprop(random_choices(), optax.sgd(0.1), informed=True)
    before, state = made(), rule.init(made(), jax.random.key(0))
    state, _ = rule.step(state, batches()[0])
    for block, old in zip(state.model.layers, before.layers, strict=True):
        for branch, was in zip(block.ffn.branches, old.ffn.branches, strict=True):
            assert not np.array_equal(branch.up.weight.w, was.up.weight.w)


def test_the_budget_is_of_all_layers_of_a_sequence_together():
    model, batch = routed(), batches()[0]
    soft = 0.5
    loss = budgeted(0.3, alpha=2.0, temperatures=(soft, soft))
    nats, metrics = loss(model, batch, MOMENT)
    # By hand: the stream through the blocks, the router on each normed input.
    probabilities, logits = by_hand(model, batch[:, :-1], soft)
    big = np.stack(probabilities)[..., 0]
    cost = ((big.mean((0, 2)) - 0.3) ** 2).mean()
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()
    assert float(metrics["budget_cost"]) == pytest.approx(cost, rel=1e-4)
    assert float(metrics["big"]) == pytest.approx(big.mean(), rel=1e-5)
    assert float(nats) == pytest.approx(float(plain) + 2 * cost, rel=1e-5)
    assert np.abs(big.mean((1, 2)) - big.mean()).max() > 1e-3, "layers differ"


def by_hand(model, tokens, soft):
    """(P of each layer, logits) of a soft choice, without the layers' own code."""
    probabilities, bare = [], models.unstack(model)
    h = bare.embed_tokens(tokens)
    for i in range(len(bare.layers)):
        attention = jax.tree.map(lambda leaf: leaf, bare)
        block = bare.layers[i].without("ffn")
        attention.layers = type(bare.layers)([block])
        h = attention.hidden(embeddings=h)
        x, layer = bare.layers[i].ffn_norm(h), bare.layers[i].ffn
        p = jax.nn.softmax(layer.router(x) / soft, axis=-1)
        probabilities.append(np.asarray(p))
        h = h + sum(p[..., c, None] * branch(x) for c, branch in enumerate(layer.branches))
    return probabilities, bare.logits(h)


def test_padding_is_not_in_the_budget():
    model, (tokens, _) = routed(), batches()
    segments = jnp.ones_like(tokens).at[1, 6:].set(0)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    loss = budgeted(0.0, temperatures=(1.0, 1.0))
    found = loss(model, Packed(tokens, segments, positions), MOMENT)[1]["budget_cost"]
    rows = [tokens[:1], tokens[1:, :7]]  # the second without its padding
    alone = [float(loss(model, row, MOMENT)[1]["budget_cost"]) for row in rows]
    assert float(found) == pytest.approx(np.mean(alone), rel=1e-4)


def test_routers_alone_learn_and_reach_their_budget():
    model = models.stack(routed())
    rule = backprop(
        budgeted(0.2, alpha=50.0, temperatures=(1.0, 0.5), steps=20),
        optax.adam(0.05),
        trainable=ROUTERS,
        informed=True,
    )
    state = rule.init(model, jax.random.key(0))
    for _ in range(40):
        state, metrics = rule.step(state, batches()[0])
    assert float(metrics["big"]) == pytest.approx(0.2, abs=0.05)
    changed = tree.map_at(state.model, tree.of_type(ByChoice), lambda m: m.branches[0])
    before = tree.map_at(model, tree.of_type(ByChoice), lambda m: m.branches[0])
    assert equal(changed, before), "all but the routers stays"


def test_a_temperature_falls_geometrically_and_stays():
    """At each step the loss is that of the temperature which is due, whatever the others are."""
    model, batch = routed(), batches()[0]
    falling = budgeted(0.3, temperatures=(4.0, 1.0), steps=10)
    for step, due in ((0, 4.0), (5, 2.0), (10, 1.0), (99, 1.0)):
        found = falling(model, batch, MOMENT._replace(step=jnp.int32(step)))[0]
        expected = budgeted(0.3, temperatures=(due, due))(model, batch, MOMENT)[0]
        assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_what_cannot_be_is_refused():
    for wrong in ({"ratio": 1}, {"seed": -1}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            duo(**wrong)
    for budget, alpha in ((-0.1, 1.0), (1.1, 1.0), (0.5, -1.0)):
        with pytest.raises(ConfigError, match="budget"):
            budgeted(budget, alpha=alpha)
    for wrong in ((1.0, 2.0), (1.0, 0.0)):
        with pytest.raises(ConfigError, match="temperatures"):
            budgeted(0.5, temperatures=wrong)
    with pytest.raises(ConfigError, match="steps"):
        budgeted(0.5, steps=0)
    for wrong in ((0.5, 0.6), (-0.5, 1.5)):
        with pytest.raises(ConfigError, match="probabilities"):
            random_choices(wrong)
    with pytest.raises(ConfigError, match="2 choices"):
        random_choices((0.2, 0.3, 0.5))(made(), batches()[0], MOMENT)
    with pytest.raises(ConfigError, match="no choices"):
        random_choices()(tiny(), batches()[0], MOMENT)
    with pytest.raises(ConfigError, match="with_routers"):
        budgeted(0.5)(made(), batches()[0], MOMENT)
    with pytest.raises(ConfigError, match="choice already"):
        transform.apply(duo(), made())
    with pytest.raises(ConfigError, match="Decoder"):
        transform.apply(duo(), tiny_encoder())
    with pytest.raises(SelectionError):
        transform.apply(duo(where=tree.at("layers[9].ffn")), tiny())
    with pytest.raises(ConfigError, match="no FFN"):
        transform.apply(duo(where=tree.at("layers[0].attn")), tiny())
    with pytest.raises(ConfigError, match="no choices"):
        transform.apply(with_routers(), tiny())
    with pytest.raises(ConfigError, match="routers already"):
        transform.apply(with_routers(), routed())


def test_a_duo_is_saved_loaded_and_generates(tmp_path):
    model = routed(skip=True)
    models.save(model, tmp_path / "duo", format="ffnlab")
    loaded = models.load(tmp_path / "duo")
    assert equal(loaded, model)
    prompt = batches()[0][:1, :4]
    cache = loaded.init_cache(1, 6)
    logits, cache = loaded.extend(prompt, cache)
    one, _ = loaded.extend(jnp.array([[7]]), cache)  # a token by itself: by `lax.switch`
    whole = loaded(jnp.concatenate([prompt, jnp.array([[7]])], 1))
    np.testing.assert_allclose(jnp.concatenate([logits, one], 1), whole, rtol=1e-4, atol=1e-5)
