"""Adapters: what they change at once, what trains, merging, stacks, quantized bases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import learning, models, transform, tree, weights
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import Linear
from ffnlab.models import account, adapters
from ffnlab.quantization import nearest
from ffnlab.testing import batches, tiny, tiny_encoder
from ffnlab.weights import LoRA

# Another order of sums in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
MAKERS = {
    "lora": lambda: adapters.lora(rank=2),
    "adapter": lambda: adapters.adapter(bottleneck=3),
    "prompts": lambda: adapters.prompts(tokens=2),
    "biases": adapters.biases,
    "head": adapters.head,
}
run = jax.jit(lambda model, tokens: model(tokens))


def with_adapter(name, model=None):
    """A model with an adapter."""
    return transform.apply(MAKERS[name](), tiny() if model is None else model, [])[0]


def pushed(model, selector):
    """The model with all that trains in its adapter moved by a step."""
    mine, rest = tree.trained(model, selector)
    return tree.combine(
        jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), mine), rest
    )


@pytest.mark.parametrize("name", ["lora", "adapter", "biases", "head"])
def test_the_model_computes_the_same_until_it_is_trained(name):
    tokens = batches()[0]
    before, new = run(tiny(), tokens), with_adapter(name)
    np.testing.assert_allclose(run(new, tokens), before, **CLOSE)
    assert not np.allclose(run(pushed(new, adapters.TRAINS[name]), tokens), before, atol=1e-3)


@pytest.mark.parametrize("name", MAKERS)
def test_training_moves_what_the_selector_names_and_nothing_else(name):
    model, selector = with_adapter(name), adapters.TRAINS[name]
    rule = learning.backprop(learning.next_token, optax.sgd(0.5), trainable=selector)
    state = rule.init(model, jax.random.key(0))
    for batch in batches():
        state, _ = rule.step(state, batch)
    moved, _ = tree.trained(model, selector)
    names = {jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_flatten_with_path(moved)[0]}
    old, new = (jax.tree_util.tree_flatten_with_path(m)[0] for m in (model, state.model))
    changed = {
        jax.tree_util.keystr(path)
        for (path, before), (_, after) in zip(old, new, strict=True)
        if not np.array_equal(before, after)
    }
    assert changed and changed <= names
    counts = {"lora": 12, "adapter": 24, "prompts": 3, "biases": 21, "head": 1}
    inner = 2 if name == "lora" else 1
    assert len(names) == {"lora": 21 * inner}.get(name, counts[name])


@pytest.mark.parametrize("name", MAKERS)
def test_stacked_models_are_taken_in_their_form(name):
    tokens = batches()[0]
    flat, stacked = with_adapter(name), with_adapter(name, models.stack(tiny()))
    assert isinstance(stacked.layers, models.Stacked)
    back = models.unstack(stacked)
    assert jax.tree.structure(back) == jax.tree.structure(flat)
    jax.tree.map(np.testing.assert_array_equal, back, flat)
    np.testing.assert_allclose(run(stacked, tokens), run(flat, tokens), **CLOSE)


@pytest.mark.parametrize("name", ["lora", "adapter", "prompts"])
def test_quantized_bases_stay_and_the_adapter_trains(name):
    base, _ = transform.apply(nearest(format="int4", group=8), tiny(), [])
    model, selector = with_adapter(name, base), adapters.TRAINS[name]
    rule = learning.backprop(learning.next_token, optax.sgd(0.5), trainable=selector)
    state, _ = rule.step(rule.init(model, jax.random.key(0)), batches()[0])
    codes = lambda m: [w for _, w in tree.walk(m) if isinstance(w, weights.Int4)]  # noqa: E731
    for before, after in zip(codes(model), codes(state.model), strict=True):
        jax.tree.map(np.testing.assert_array_equal, before, after)
    assert len(codes(model)) == 21
    assert not np.array_equal(run(state.model, batches()[0]), run(model, batches()[0]))


def test_an_update_is_scaled_by_alpha_over_rank_and_merged_into_its_matrix():
    model, _ = transform.apply(
        adapters.lora(rank=2, alpha=3.0, where=tree.at("layers[1].ffn.up"), seed=4), tiny(), []
    )
    model = pushed(model, adapters.TRAINS["lora"])
    update = model.layers[1].ffn.up.weight
    want = tiny().layers[1].ffn.up.weight.dense() + 1.5 * update.a @ update.b
    merged = adapters.merge(model)
    np.testing.assert_allclose(merged.layers[1].ffn.up.weight.dense(), want, **CLOSE)
    tokens = batches()[0]
    np.testing.assert_allclose(run(merged, tokens), run(model, tokens), **CLOSE)
    stacked = adapters.merge(models.stack(model))
    np.testing.assert_allclose(run(stacked, tokens), run(merged, tokens), **CLOSE)
    assert jax.tree.structure(merged) == jax.tree.structure(tiny())


def test_draws_depend_on_seed_and_place_alone():
    up = tree.at("layers[0].ffn.up")
    one, same, other = (
        transform.apply(adapters.lora(rank=2, where=where, seed=seed), tiny(), [])[0]
        for where, seed in ((up, 1), (adapters.inside_blocks, 1), (up, 2))
    )
    a = lambda m: np.asarray(m.layers[0].ffn.up.weight.a)  # noqa: E731
    np.testing.assert_array_equal(a(one), a(same))
    assert not np.allclose(a(one), a(other))
    assert not np.allclose(a(same), same.layers[1].ffn.up.weight.a)


def test_prompts_are_seen_by_every_query_with_and_without_a_cache():
    model, tokens = pushed(with_adapter("prompts"), adapters.TRAINS["prompts"]), batches()[0]
    whole = run(model, tokens)
    cache, parts = model.init_cache(2, 14), []
    for start, end in ((0, 5), (5, 6), (6, 12)):
        logits, cache = model.extend(tokens[:, start:end], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-4, atol=2e-5)
    # One token alone: softmax over its own key and the two of the prompt.
    attn = model.layers[0].attn
    x = jax.random.normal(jax.random.key(0), (1, 1, 16))
    context = models.trunk.Context(
        models.trunk.angles(model.layers, jnp.zeros((1, 1), jnp.int32)), {None: None}
    )
    got, _ = attn(x, context)
    q, k, v = attn.project(x, context.angles[attn.spec.rope])
    more_k, more_v = attn.prefix.get_value()
    heads = []
    for head in range(4):
        keys = jnp.concatenate([more_k[:, head // 2], k[0, :, head // 2]])
        values = jnp.concatenate([more_v[:, head // 2], v[0, :, head // 2]])
        heads.append(jax.nn.softmax(keys @ q[0, 0, head] / 2) @ values)
    np.testing.assert_allclose(got[0, 0], attn.o(jnp.concatenate(heads)), **CLOSE)


def test_adapters_are_sublayers_that_can_be_removed_again():
    model = with_adapter("adapter")
    assert models.removed(model) == [] and len(models.units.units(model)) == 12
    bare = models.remove(pushed(model, adapters.TRAINS["adapter"]), [1, 3, 5, 7, 9, 11])
    np.testing.assert_allclose(run(bare, batches()[0]), run(tiny(), batches()[0]), **CLOSE)
    assert account.parameters(model) - account.parameters(tiny()) == 6 * (2 * 16 * 3 + 16 + 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapters.lora(rank=0), "rank=0; a whole number of at least 1"),
        (lambda: adapters.adapter(bottleneck=-1), "bottleneck=-1"),
        (lambda: adapters.adapter(activation="step"), "activation='step'"),
        (lambda: adapters.prompts(tokens=0), "tokens=0"),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("name", ["lora", "adapter", "prompts", "biases", "head"])
def test_a_second_one_is_refused_before_anything_is_made(name):
    with pytest.raises(ConfigError, match=f"^{name}: "):
        MAKERS[name]().init(with_adapter(name))


def test_what_a_model_cannot_have_is_refused():
    with pytest.raises(ConfigError, match=r"rank=9 is more than \['layers\[0\].attn.k'"):
        adapters.lora(rank=9).init(tiny())
    with pytest.raises(SelectionError, match="matches nothing"):
        adapters.lora(where=tree.at("layers[9]**")).init(tiny())
    with pytest.raises(ConfigError, match="model is a dict"):
        adapters.lora().init({})
    with pytest.raises(SelectionError, match="LoRA"):
        adapters.merge(tiny())
    rounded, _ = transform.apply(nearest(format="float8", activations="e4m3"), tiny(), [])
    with pytest.raises(ConfigError, match="rounded or cut before the matrix"):
        adapters.merge(with_adapter("lora", rounded))
    assert isinstance(with_adapter("lora", rounded).layers[0].attn.q.weight, LoRA)
    assert isinstance(tiny().layers[0].attn.q, Linear)


def test_a_tied_masked_head_of_an_encoder_becomes_its_own():
    model, tokens = tiny_encoder(), batches()[0]
    new, _ = transform.apply(adapters.head(), model, [])
    np.testing.assert_allclose(run(new, tokens), run(model, tokens), **CLOSE)
    assert new.head is not None and not new.config.tie_embeddings
    with pytest.raises(ConfigError, match="no head that is its embedding"):
        adapters.head().init(tiny_encoder(head=None))


@pytest.mark.parametrize("name", ["lora", "adapter", "prompts"])
def test_encoders_take_them_too(name):
    model, tokens = tiny_encoder(), batches()[0]
    new = with_adapter(name, model)
    if name != "prompts":
        np.testing.assert_allclose(run(new, tokens), run(model, tokens), **CLOSE)
    moved = run(pushed(new, adapters.TRAINS[name]), tokens)
    assert np.isfinite(moved).all() and not np.allclose(moved, run(model, tokens), atol=1e-3)
