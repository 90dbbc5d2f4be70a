"""Mixture-of-Transformers: what becomes of a decoder, and what it goes on to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import (
    FFN,
    Blocks,
    EveryCopy,
    GatedFFN,
    GroupedFFN,
    GroupedLinear,
    GroupedNorm,
    Join,
    RMSNorm,
    TokenFacts,
)
from ffnlab.layers.modality import alone
from ffnlab.learning import backprop, members, next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.models.account import flops_per_token, parameters
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import make_step, parse_mesh, place_batch, shard
from ffnlab.quantization import fireq
from ffnlab.routing import untie, upcycle
from ffnlab.routing.mixture_of_transformers import PARTS
from ffnlab.testing import batches, equal, tiny, tiny_encoder
from tests.often import often

CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order, three blocks
HALF = (32,)  # ids from 32 on are of modality 1


def made(**options) -> Decoder:
    """The tiny decoder with copies, which differ unless told else."""
    options = {"starts": HALF, "copies": "drawn"} | options
    return transform.apply(untie(**options), tiny())[0]


def normed() -> Decoder:
    """A decoder with norms of queries and keys, and biases."""
    config = DecoderConfig(
        64, 16, 32, 2, 4, 2, 4, qkv_bias=True, o_bias=True, mlp_bias=True, qk_norm=True
    )
    return Decoder(config, key=jax.random.key(1))


@pytest.mark.parametrize("parts", [*((part,) for part in PARTS), PARTS])
def test_tied_copies_are_the_dense_model(parts):
    x = batches()[0]
    model, _ = transform.apply(untie(starts=(9, 40), parts=parts), normed())
    np.testing.assert_allclose(model(x), normed()(x), rtol=0, atol=1e-6)
    copied = {
        path: node
        for path, node in tree.walk(model.layers[0])
        if isinstance(node, GroupedLinear | GroupedNorm)
    }
    places = {
        "ffn": {"ffn.gate", "ffn.up", "ffn.down"},
        "attn_qkv": {"attn.q", "attn.k", "attn.v"},
        "attn_o": {"attn.o"},
        "norms": {"attn_norm", "ffn_norm", "attn.q_norm", "attn.k_norm"},
    }
    assert copied.keys() == set().union(*(places[part] for part in parts))
    assert {node.groups for node in copied.values()} == {3}


def test_work_stays_and_parameters_multiply():
    dense, x = tiny(), batches()[0]
    shared = dense.embed.weight.dense().size + 16  # of the final norm
    for starts in ((), HALF, (20, 40)):
        model, count = made(starts=starts), len(starts) + 1
        assert multiply_adds(model, x) == multiply_adds(dense, x)
        assert flops_per_token(model, 12) == flops_per_token(dense, 12)
        assert parameters(model) - shared == count * (parameters(dense) - shared)
        if count == 1:
            np.testing.assert_array_equal(model(x), dense(x))


@pytest.mark.parametrize("stacked", often([False, True], True))
def test_the_three_ways_agree_in_values_and_gradients(stacked):
    model = made(norm="output", starts=(20, 40))
    model = models.stack(model) if stacked else model
    draw = np.random.default_rng(0)
    rows = [draw.integers(low, low + 20, (2, 4)) for low in (40, 0, 20)]
    rows = jnp.asarray(np.concatenate(rows, axis=1))

    @jax.jit
    def found(model, order):
        def loss(model):
            h, _ = model.run(rows, facts=TokenFacts(order=order))
            logits = model.logits(h)
            return (logits**2).mean(), logits

        (_, logits), slopes = jax.value_and_grad(loss, has_aux=True, allow_int=True)(model)
        return logits, [g for g in jax.tree.leaves(slopes) if g.dtype == jnp.float32]

    logits, slopes = found(model, None)
    np.testing.assert_allclose(logits, model(rows), **CLOSE)
    for order in (EveryCopy(), Blocks(((2, 4), (0, 4), (1, 4)))):
        other, others = found(model, order)
        np.testing.assert_allclose(other, logits, **CLOSE)
        for a, b in zip(others, slopes, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def test_each_token_computes_as_in_the_dense_model_of_its_modality():
    """A row of one modality, through the blocks that are its copies."""
    model = made(norm="output")
    for modality, low in enumerate((0, 32)):
        row = jnp.arange(low, low + 6)[None]
        dense = jax.tree.map(lambda leaf: leaf, tiny())
        grouped = (GroupedFFN, GroupedLinear, GroupedNorm)
        for i, block in enumerate(model.layers):
            own = jax.tree.map(lambda leaf: leaf, block)
            for path in ("attn_norm", "ffn_norm", "ffn"):
                setattr(own, path, alone(getattr(block, path), modality))
            for path in ("q", "k", "v", "o"):
                setattr(own.attn, path, alone(getattr(block.attn, path), modality))
            assert not any(isinstance(node, grouped) for _, node in tree.walk(own))
            assert own.joins == (Join(norm="output"), Join(norm="output"))
            dense.layers[i] = own
        np.testing.assert_allclose(model(row), dense(row), **CLOSE)


def test_attention_goes_over_all_modalities():
    """A logit of text depends on an image token before it, and on none behind it."""
    model, rows = made(), jnp.array([[3, 40, 50, 7]])
    h = model.embed_tokens(rows)
    facts = TokenFacts(model.modalities(rows))
    logit = lambda h, t: model.logits(model.run(embeddings=h, facts=facts)[0])[0, t, 5]  # noqa: E731
    slope = jax.grad(logit)(h, 3)
    assert np.abs(slope[0, 1]).max() > 1e-4 and np.abs(slope[0, 2]).max() > 1e-4
    slope = jax.grad(logit)(h, 1)
    assert np.abs(slope[0, 0]).max() > 1e-4 and not np.asarray(slope[0, 2:]).any()


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(table=st.lists(st.integers(0, 2), min_size=64, max_size=64), seed=st.integers(0, 9))
def test_relabelled_modalities_with_their_copies_change_nothing(table, seed):
    order = np.random.default_rng(seed).permutation(3)
    model = made(table=np.array(table), starts=None, modalities=3)
    grouped = tree.of_type(GroupedLinear, GroupedNorm)
    moved = tree.map_at(model, grouped, lambda m: jax.tree.map(lambda leaf: leaf[order], m))
    moved.modalities = type(model.modalities)(jnp.argsort(order)[jnp.array(table)], 3)
    x = batches()[0]
    np.testing.assert_allclose(moved(x), model(x), **CLOSE)


def test_copies_are_drawn_each_for_itself_and_the_first_stays():
    model, dense = made(starts=(20, 40)), tiny()
    for i, (block, old) in enumerate(zip(model.layers, dense.layers, strict=True)):
        for name in ("q", "k", "v", "o"):
            maps = [alone(getattr(block.attn, name), m).weight.w for m in range(3)]
            np.testing.assert_array_equal(maps[0], getattr(old.attn, name).weight.w)
            assert all(np.abs(a - b).max() > 0.1 for a, b in zip(maps, maps[1:], strict=False)), i
        downs = np.stack([alone(block.ffn.down, m).weight.w for m in range(3)])
        assert downs.std((1, 2)) == pytest.approx([(2 * 3) ** -0.5 * 32**-0.5] * 3, rel=0.2)
    assert not equal(made(), made(seed=1)) and equal(made(), made())


def test_norms_are_copied_with_their_kind():
    """An ungated FFN with biases and gains that are not one."""
    config = DecoderConfig(64, 16, 32, 1, 4, 2, 4, ffns=("plain",), mlp_bias=True)
    dense = Decoder(config, key=jax.random.key(0))
    gains = tree.of_type(RMSNorm)
    dense = tree.map_at(dense, gains, lambda n: jax.tree.map(lambda s: s + jnp.arange(16.0), n))
    model, _ = transform.apply(untie(starts=HALF), dense)
    assert model.layers[0].ffn.gate is None
    assert type(alone(model.layers[0].ffn, 1)) is FFN
    np.testing.assert_allclose(model(batches()[0]), dense(batches()[0]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_decoding_goes_on_where_reading_ended():
    model = made(norm="output")
    rows = batches()[0]
    cache = model.init_cache(2, 12)
    logits, cache = model.extend(rows[:, :7], cache)
    parts = [logits]
    for t in range(7, 12):
        logits, cache = model.extend(rows[:, t : t + 1], cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), model(rows), **CLOSE)


@pytest.mark.slow
def test_padding_changes_no_token():
    model, rows = made(), batches()[0]
    segments = jnp.ones_like(rows).at[:, 9:].set(0)
    np.testing.assert_allclose(model(rows, segments=segments)[:, :9], model(rows[:, :9]), **CLOSE)
    padded = jnp.concatenate([jnp.full((2, 3), 63), rows[:, :5]], 1)
    valid = jnp.arange(8) >= jnp.array([[3], [3]])
    found, _ = model.extend(padded, model.init_cache(2, 8), valid=valid)
    np.testing.assert_allclose(found[:, 3:], model(rows[:, :5]), **CLOSE)


@pytest.mark.slow
def test_it_learns_on_a_mesh_as_on_one_device():
    batch, found = np.asarray(jnp.concatenate(batches())), []
    for text in ("dp=1", "dp=2,ep=2"):
        mesh = parse_mesh(text)
        rule = backprop(next_token, optax.sgd(0.1))
        state = shard(rule.init(made(norm="output"), jax.random.key(0)), mesh)
        state, metrics = make_step(rule, mesh)(state, place_batch(batch, mesh))
        if text != "dp=1":
            placed = state.model.layers[0].attn.q.weight.w.sharding
            assert placed.spec[0] == "ep", "copies lie on devices of their own"
        found.append((jax.device_get(jax.tree.leaves(rule.model(state))), metrics["loss"]))
    for one, other in zip(*(leaves for leaves, _ in found), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)  # float32 sums in another order
    np.testing.assert_allclose(found[1][1], found[0][1], rtol=1e-5)


@pytest.mark.slow
def test_a_table_never_learns_and_copies_learn_from_their_own_tokens():
    rule = backprop(next_token, optax.adamw(1e-2, weight_decay=0.0))
    before = made()
    state = rule.init(before, jax.random.key(0))
    state, _ = rule.step(state, batches()[0] % 32)  # modality 0 alone
    assert equal(state.model.modalities, before.modalities)
    for block, old in zip(state.model.layers, before.layers, strict=True):
        for new, was in ((block.ffn.up, old.ffn.up), (block.attn.o, old.attn.o)):
            np.testing.assert_array_equal(alone(new, 1).weight.w, alone(was, 1).weight.w)
            assert np.abs(alone(new, 0).weight.w - alone(was, 0).weight.w).max() > 1e-3


@pytest.mark.slow
def test_members_learn_as_each_does_alone():
    models_ = [made(seed=seed) for seed in range(2)]
    joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models_)
    make = lambda: backprop(next_token, optax.sgd(0.1))  # noqa: E731
    rule, alone_rule = members(make, 2), make()
    state, _ = rule.step(rule.init(joined, jax.random.key(0)), batches()[0])
    one, _ = alone_rule.step(alone_rule.init(models_[1], jax.random.key(0)), batches()[0])
    for a, b in zip(jax.tree.leaves(state.model), jax.tree.leaves(one.model), strict=True):
        np.testing.assert_allclose(a[1], b, atol=1e-5)


def test_exact_scalings_of_a_quantizer_are_exact_for_copies():
    """All of FireQ's scalings with nothing rounded leave the function as it is."""
    for base in (made(), transform.apply(untie(starts=HALF), normed())[0]):
        base = jax.tree.map(lambda x: x * 1.5 if x.ndim == 3 else x, base)
        scaling = fireq(
            weights=False, activations=None, kv=None, query=None, top_k=1, alpha=0.5, beta=0.7
        )
        scaled, _ = transform.apply(scaling, base, batches())
        x = batches()[0]
        np.testing.assert_allclose(scaled(x), base(x), rtol=1e-3, atol=1e-4)
        q, old = (m.layers[0].attn for m in (scaled, base))
        assert q.post_scale is not None
        assert not equal(q.v, old.v), "values are scaled in every copy"
        moved = "k" if old.k_norm is None else "k_norm"
        assert not equal(getattr(q, moved), getattr(old, moved)), "so are keys"


def test_the_caller_may_tell_another_modality():
    model, x = made(), batches()[0]
    other = 1 - model.modalities(x)
    told = model.logits(model.run(x, facts=TokenFacts(other))[0])
    assert np.abs(told - model(x)).max() > 1e-2
    h = model.embed_tokens(x)
    given = model.run(embeddings=h, facts=TokenFacts(model.modalities(x)))[0]
    np.testing.assert_allclose(model.logits(given), model(x), **CLOSE)
    with pytest.raises(ConfigError, match="of the tokens is not known"):
        model.run(embeddings=h)
    with pytest.raises(ConfigError, match="of the tokens is not known"):
        model.extend(None, model.init_cache(2, 12), embeddings=h)
    with pytest.raises(ConfigError, match="modality 2 of 1 tokens has no copy"):
        model.run(x, facts=TokenFacts(other.at[0, 0].set(2)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "exactly one"),
        ({"starts": (3,), "table": np.zeros(64, int)}, "exactly one"),
        ({"starts": (0,)}, "ascending numbers above 0"),
        ({"starts": (5, 5)}, "ascending numbers above 0"),
        ({"table": np.array([0, -1])}, "table holds -1"),
        ({"table": np.zeros((2, 2), int)}, "integers"),
        ({"table": np.zeros(2)}, "integers"),
        ({"starts": (3, 5), "modalities": 2}, "modality 2, which has no copy"),
        ({"table": np.array([0, 4]), "modalities": 4}, "modality 4, which has no copy"),
        ({"starts": (3,), "modalities": 0}, "modalities=0"),
        ({"starts": (3,), "parts": ()}, r"parts=\(\)"),
        ({"starts": (3,), "seed": -1}, "seed=-1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        untie(**options)


def test_models_that_cannot_be_untied_are_refused():
    for model, options, said in (
        (tiny_encoder(), {}, "a Decoder is accepted"),
        (made(), {}, "copies for modalities already"),
        (tiny(), {"starts": (64,)}, "the vocabulary has 64 ids"),
        (tiny(), {"starts": None, "table": np.zeros(63, int)}, "of 63 ids, the vocabulary of 64"),
        (transform.apply(upcycle(experts=2, k=1), tiny())[0], {}, r"layers\[0\].ffn is a MoE"),
    ):
        with pytest.raises(ConfigError, match=said):
            transform.apply(untie(**{"starts": HALF} | options), model)
    config = DecoderConfig(64, 16, 32, 1, 4, 2, 4, sandwich_norms=True)
    gemma = Decoder(config, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="has norms there already"):
        transform.apply(untie(starts=HALF, norm="output"), gemma)
    both, _ = transform.apply(untie(starts=HALF), gemma)
    np.testing.assert_allclose(both(batches()[0]), gemma(batches()[0]), rtol=1e-5, atol=1e-5)
    mixture, _ = transform.apply(upcycle(experts=2, k=1), tiny())
    rest, _ = transform.apply(untie(starts=HALF, parts=("attn_o", "norms")), mixture)
    np.testing.assert_allclose(rest(batches()[0]), mixture(batches()[0]), **CLOSE)
    lost = tiny()
    lost.layers[1] = lost.layers[1].without("attn")
    made_of, _ = transform.apply(untie(starts=HALF), lost)
    assert isinstance(made_of.layers[1].ffn, GroupedFFN) and made_of.layers[1].attn is None
    narrow = tiny()
    narrow.layers[0].ffn = GatedFFN(16, 8, key=jax.random.key(0))
    with pytest.raises(ConfigError, match="differ"):
        transform.apply(untie(starts=HALF, copies="drawn"), narrow)
