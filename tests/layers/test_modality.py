"""Modules with a copy for each modality: the authors' code, three ways against each other, and
what cannot be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import checkify

from ffnlab.errors import ConfigError
from ffnlab.layers import (
    FFN,
    Attention,
    AttentionSpec,
    Block,
    Blocks,
    Context,
    EveryCopy,
    GatedFFN,
    Join,
    LayerNorm,
    Linear,
    Modalities,
    RMSNorm,
    TokenFacts,
)
from ffnlab.layers.grouped import group
from ffnlab.layers.modality import alone, grouped, modality_of, through
from ffnlab.models.cost import multiply_adds
from ffnlab.testing import equal
from ffnlab.weights import Dense
from tests.contracts import input_of
from tests.fixtures.mixture_of_transformers import record

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32 sums in another order
GRADIENT = {"rtol": 1e-4, "atol": 1e-4}  # of sums over a block, of size 10
EXPECTED = "tests/fixtures/mixture_of_transformers/expected.npz"
WAYS = {
    "sorted in each": lambda m, e: None,
    "sorted once": group,
    "every": lambda m, e: EveryCopy(),
}


def given_of(name):
    """Gaussian numbers of a shape, by name."""
    return jnp.asarray(record.drawn(name, record.ROWS, record.TOKENS, record.WIDTH))


def theirs(parameters: dict) -> Block:
    """The authors' block of parameters with an axis of modalities: norms after sublayers."""
    maps = {
        name: grouped([linear(w) for w in parameters[name]])
        for name in ("q", "k", "v", "o", "gate", "up", "down")
    }
    norms = {
        name: grouped([norm(scale) for scale in parameters[name]])
        for name in ("attn_norm", "ffn_norm", "q_norm", "k_norm")
    }
    spec = AttentionSpec(record.HEADS, record.HEADS, record.HEAD, rope=None)
    attention = Attention(spec, record.WIDTH, key=jax.random.key(0))
    for name in ("q", "k", "v", "o"):
        setattr(attention, name, maps[name])
    attention.q_norm, attention.k_norm = nnx.data(norms["q_norm"]), nnx.data(norms["k_norm"])
    ffns = [GatedFFN(8, 20, key=jax.random.key(0)) for _ in parameters["up"]]
    ffn = grouped(ffns)
    for name in ("gate", "up", "down"):
        setattr(ffn, name, maps[name])
    after = (Join(norm="output"), Join(norm="output"))
    return Block(norms["attn_norm"], attention, norms["ffn_norm"], ffn, joins=after)


def linear(w) -> Linear:
    """A map of a matrix [in, out]."""
    layer = Linear(*w.shape, key=jax.random.key(0), axes=("embed", "mlp"))
    return layer.replace(Dense(jnp.asarray(w)))


def norm(scale) -> RMSNorm:
    """An RMSNorm with a gain."""
    layer = RMSNorm(len(scale), eps=record.EPS)
    layer.scale = nnx.Param(jnp.asarray(scale), axes=("embed",))
    return layer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", record.MODALITIES)
def test_the_authors_ffn_attention_and_block(count, way):
    """Values, and gradients of every copy: those of one without tokens are zero."""
    expected, drawn = np.load(EXPECTED), record.parameters(count)
    modality = jnp.array(record.MODALITIES[count])
    facts = TokenFacts(modality, order=WAYS[way](modality, count))
    context, x = Context({}, {None: None}, tokens=facts), given_of("x")

    @jax.jit
    def run(parameters, x):
        block = theirs(parameters)
        attn = through(block.attn_norm, block.attn(x, context)[0], facts)
        ffn = through(block.ffn_norm, through(block.ffn, x, facts), facts)
        return block(x, context)[0], attn, ffn

    y, attn, ffn = run(drawn, x)
    for name, value in {"y": y, "attn": attn, "ffn": ffn}.items():
        np.testing.assert_allclose(value, expected[f"{count}.{name}"], **CLOSE)
    loss = jax.jit(jax.grad(lambda p, x: (run(p, x)[0] * given_of("dy")).sum(), (0, 1)))
    gradients, d_x = loss(drawn, x)
    np.testing.assert_allclose(d_x, expected[f"{count}.d_x"], **GRADIENT)
    for name, value in gradients.items():
        np.testing.assert_allclose(value, expected[f"{count}.d_{name}"], **GRADIENT)
        if count == 4:
            np.testing.assert_array_equal(value[2], 0.0)


def makers():
    """What has a form of copies, drawn by a key."""
    bias = {"bias": True}
    return {
        "linear": lambda k: biased(Linear(8, 6, key=k, axes=("embed", "mlp"), **bias)),
        "ffn": lambda k: biased(FFN(8, 12, key=k)),
        "gated": lambda k: biased(GatedFFN(8, 12, key=k, **bias)),
        "rms": lambda k: scaled(RMSNorm(8), k),
        "layer": lambda k: scaled(LayerNorm(8), k),
    }


def biased(module):
    """A module whose biases are not zero."""
    return jax.tree.map(lambda x: x if x.ndim > 1 else x + input_of(x.shape), module)


def scaled(module, key):
    """A norm whose gains are not one."""
    return jax.tree.map(lambda x: x + jax.random.normal(key, x.shape), module)


@functools.cache
def copied(kind: str, count: int = 3):
    """(modules, the one of copies)."""
    made = [makers()[kind](k) for k in jax.random.split(jax.random.key(0), count)]
    return made, grouped(made)


@pytest.mark.parametrize("kind", makers())
def test_copies_are_put_together_and_taken_apart(kind):
    modules, whole = copied(kind)
    for i, module in enumerate(modules):
        one = alone(whole, i)
        assert equal(one, module) and type(one) is type(module)
    assert whole.groups == 3
    axes = {v.axes[0] for v in jax.tree.leaves(whole, is_leaf=lambda n: isinstance(n, nnx.Param))}
    assert axes == {"expert"}


@pytest.mark.parametrize("kind", makers())
@settings(max_examples=8, deadline=None)
@given(ids=st.lists(st.integers(0, 2), min_size=10, max_size=10))
def test_each_token_goes_through_its_own_copy_whatever_the_way(kind, ids):
    modules, whole = copied(kind)
    modality, x = jnp.array(ids).reshape(2, 5), input_of((2, 5, 8))
    expected = np.stack(
        [
            [modules[m](x[b, t][None])[0] for t, m in enumerate(row)]
            for b, row in enumerate(modality.tolist())
        ]
    )
    for way in WAYS.values():
        facts = TokenFacts(modality, order=way(modality, 3))
        np.testing.assert_allclose(through(whole, x, facts), expected, **CLOSE)
    same = jnp.broadcast_to(modality[:1], modality.shape)
    blocks = Blocks(tuple((m, 1) for m in ids[:5]))
    np.testing.assert_allclose(
        through(whole, x, TokenFacts(order=blocks)), through(whole, x, TokenFacts(same)), **CLOSE
    )


@pytest.mark.parametrize("kind", makers())
def test_gradients_are_the_same_whatever_the_way(kind):
    _, whole = copied(kind)
    x, modality = input_of((2, 5, 8)), jnp.array([[0, 0, 2, 2, 2]] * 2)
    ways = [*(way(modality, 3) for way in WAYS.values()), Blocks(((0, 2), (2, 3)))]

    def loss(module, x, order):
        return (through(module, x, TokenFacts(modality, order=order)) ** 3).sum()

    found = [jax.jit(jax.grad(loss, (0, 1)))(whole, x, order) for order in ways]
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    for leaf in jax.tree.leaves(found[0][0]):
        assert not np.asarray(leaf[1]).any() and np.isfinite(leaf).all(), "a copy without tokens"
        assert np.abs(leaf[0]).max() > 1e-3


def test_a_copy_without_tokens_may_hold_anything():
    _, whole = copied("gated")
    broken = jax.tree.map(lambda leaf: leaf.at[1].set(jnp.nan), whole)
    modality, x = jnp.array([[0, 2, 2, 0, 2]] * 2), input_of((2, 5, 8))
    for way in WAYS.values():
        facts = TokenFacts(modality, order=way(modality, 3))
        np.testing.assert_array_equal(through(broken, x, facts), through(whole, x, facts))


def test_relabelled_modalities_with_their_copies_change_nothing():
    modules, whole = copied("gated")
    x, modality = input_of((2, 5, 8)), jnp.array([[0, 1, 2, 1, 0], [2, 2, 1, 0, 1]])
    order = [2, 0, 1]
    moved = grouped([modules[i] for i in order])
    renamed = jnp.argsort(jnp.array(order))[modality]
    np.testing.assert_allclose(
        through(moved, x, TokenFacts(renamed)), through(whole, x, TokenFacts(modality)), **CLOSE
    )


def test_work_is_that_of_one_copy_but_where_all_run():
    modules, whole = copied("gated")
    x, modality = input_of((2, 64, 8)), jnp.zeros((2, 64), int)

    def work(order):
        call = lambda m, x: through(m, x, TokenFacts(modality, order=order))  # noqa: E731
        return multiply_adds(call, whole, x)

    dense = multiply_adds(lambda m, x: m(x), modules[0], x)
    assert work(None) == dense == work(Blocks(((0, 32), (2, 32))))
    assert work(EveryCopy()) == 3 * dense


def test_other_modules_need_no_facts():
    module, x = copied("gated")[0][0], input_of((2, 5, 8))
    np.testing.assert_array_equal(through(module, x, None), module(x))


def test_what_cannot_be_is_refused():
    modules, whole = copied("linear")
    x = input_of((2, 5, 8))
    for facts in (None, TokenFacts(), TokenFacts(order=EveryCopy())):
        with pytest.raises(ConfigError, match="of the tokens is not known"):
            through(whole, x, facts)
    for wrong in (3, -1):
        with pytest.raises(ConfigError, match=f"modality {wrong} of 1 tokens has no copy"):
            through(whole, x, TokenFacts(jnp.zeros((2, 5), int).at[1, 2].set(wrong)))
        with pytest.raises(ConfigError, match=f"modality {wrong} of 1 tokens has no copy"):
            Modalities(jnp.array([0, wrong]), 3)
    for blocks in (((0, 4),), ((0, 2), (3, 3)), ((0, 2), (-1, 3))):
        with pytest.raises(ConfigError, match="blocks="):
            through(whole, x, TokenFacts(order=Blocks(blocks)))
    for bad in (
        [],
        [modules[0], copied("ffn")[0][0]],
        [modules[0], Linear(8, 5, key=jax.random.key(0), axes=("a", "b"))],
    ):
        with pytest.raises(ConfigError, match="no form of copies|differ"):
            grouped(bad)


def test_masks_are_a_partition():
    masks = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 1, 1], [1, 0, 1]]], bool)
    np.testing.assert_array_equal(modality_of(masks), [[0, 1, 1], [1, 0, 1]])
    np.testing.assert_array_equal(modality_of(list(masks)), modality_of(masks))
    for change, said in (
        (True, "1 tokens are in several, 0"),
        (False, "0 tokens are in several, 1"),
    ):
        wrong = masks.copy()
        wrong[:, 1, 2] = change
        with pytest.raises(ConfigError, match=said):
            modality_of(wrong)
        error, _ = jax.jit(checkify.checkify(modality_of))(jnp.asarray(wrong))
        assert "no partition" in error.get()
    one = np.ones(3, bool)
    plain = getattr(modality_of, "__wrapped__", modality_of)  # without the tests' own checks
    for odd in ([], masks[:0], [one, one[:2]], masks.astype(float), [one * np.nan]):
        with pytest.raises(ConfigError, match="masks are .*; bool of one shape, for each modality"):
            plain(odd)
    error, found = jax.jit(checkify.checkify(modality_of))(jnp.asarray(masks))
    assert error.get() is None and found.tolist() == [[0, 1, 1], [1, 0, 1]]


def test_a_table_tells_the_modality_and_the_order():
    table = Modalities(jnp.array([0, 1, 1, 0]), 2)
    tokens = jnp.array([[0, 1, 3], [2, 9, 0]])
    facts = table.told(tokens, TokenFacts(valid=jnp.ones((2, 3), bool)))
    assert facts.modality.tolist() == [[0, 1, 0], [1, 0, 0]] and facts.valid.all()
    np.testing.assert_array_equal(facts.order.order, group(facts.modality, 2).order)
    own = jnp.ones((2, 3), int)
    assert table.told(tokens, TokenFacts(own)).modality is own, "the caller knows better"
    assert table.told(None, TokenFacts()).modality is None
    with pytest.raises(ConfigError, match="modality 2 of 6 tokens"):
        table.told(tokens, TokenFacts(own + 1))
    error, _ = jax.jit(checkify.checkify(lambda m: table.told(None, TokenFacts(m)).order))(own + 1)
    assert "no copy" in error.get()
    same = tokens[:1]
    blocks = TokenFacts(order=Blocks(((0, 1), (1, 1), (0, 1))))
    assert table.told(same, blocks).order is blocks.order
    with pytest.raises(ConfigError, match="not the modalities of the tokens"):
        table.told(tokens, blocks)
    with pytest.raises(ConfigError, match="of 2 tokens, the rows of 3"):
        table.told(tokens, TokenFacts(order=Blocks(((0, 2),))))
