"""Heads of Robust QA against the authors' classes, a loop over tokens, and what must hold."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Context, LayerInputs, MoESpec, TokenFacts, routers
from ffnlab.layers.balance import counts, load_balance
from ffnlab.learning import backprop
from ffnlab.losses import routed, span
from ffnlab.models.calibration import called
from ffnlab.pruning import finercut
from ffnlab.routing import evaluated, switch_head, top2_head
from ffnlab.testing import equal, tiny, tiny_encoder
from ffnlab.weights import Dense
from tests.hashed import hashed

EXPECTED = np.load(Path(__file__).parents[1] / "fixtures/robust_qa/expected.npz")
D, E, HIDDEN, HEADS = 8, 4, 12, 2
SHAPE = (3, 20, D)
X = hashed("x", SHAPE, 1.5)
CAPACITIES = {"roomy": 4.0, "tight": 1.25, "least": 0.5}
# float32 on both sides, sums in another order.
ATOL = 2e-6


def param(values, like):
    """A Param of the values, with the axes of another."""
    made = Dense(jnp.asarray(values)) if hasattr(like.get_value(), "matmul") else values
    return nnx.Param(jax.tree.map(jnp.asarray, made), axes=like.axes)


def linear(module, name, *, torch_order=True):
    """A map whose matrix, and bias where it has one, are those of a name."""
    new = tree.copy(module)
    shape = module.weight.shape
    w = hashed(f"{name}.weight", shape[::-1]).T if torch_order else hashed(name, shape)
    new.w = param(w, module.w)
    if module.b is not None:
        new.b = nnx.data(param(hashed(f"{name}.bias", (shape[-1],), 0.3), module.b))
    return new


@functools.cache
def top2_layer(policy, capacity):
    """The mixture of the fixture."""
    made, _ = transform.apply(
        top2_head(experts=E, hidden=HIDDEN, policy=policy, capacity=capacity),
        tiny_encoder(width=D, head_dim=2),
    )
    moe = made.layers[-1].ffn
    moe.router = linear(moe.router, "gate.w_gating", torch_order=False)
    moe.experts.up.w = param(hashed("experts.w1", (E, D, HIDDEN)), moe.experts.up.w)
    moe.experts.down.w = param(hashed("experts.w2", (E, HIDDEN, D)), moe.experts.down.w)
    return moe


def switched(moe, name):
    """A Switch layer with the weights of a name."""
    new = tree.copy(moe)
    new.router = linear(moe.router, f"{name}.switch")
    for ours, theirs in (("up", "linear1"), ("down", "linear2")):
        each = getattr(new.experts, ours)
        _, d_in, d_out = jax.tree.leaves(each.weight)[0].shape
        names = [f"{name}.experts.{e}.{theirs}" for e in range(E)]
        each.w = param(np.stack([hashed(f"{n}.weight", (d_out, d_in)).T for n in names]), each.w)
        biases = np.stack([hashed(f"{n}.bias", (d_out,), 0.3) for n in names])
        each.b = nnx.data(param(biases, each.b))
    return new


@functools.cache
def switch_model(**options):
    """An encoder with one Switch block."""
    head = switch_head(experts=E, hidden=HIDDEN, layers=1, heads=HEADS, **options)
    return transform.apply(head, tiny_encoder(width=D, head_dim=2))[0]


def combined(routing):
    """[b, t, e] the weight of each token's experts."""
    one_hot = jax.nn.one_hot(routing.chosen, routing.experts) * routing.weight[..., None]
    return np.asarray(one_hot.sum(-2))


@pytest.mark.parametrize("capacity", CAPACITIES)
@pytest.mark.parametrize("policy", ["all", "none", "threshold", "random"])
def test_the_top_2_mixture_is_the_authors(policy, capacity, monkeypatch):
    drawn = jnp.asarray(hashed("drawn", SHAPE[:2]) / 2 + 0.5)[..., None]
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape: drawn.reshape(shape))
    inputs = LayerInputs(key=jax.random.key(0))
    moe = top2_layer(policy, CAPACITIES[capacity])
    y, routing = moe(jnp.asarray(X), None, inputs)
    wanted = lambda name: EXPECTED[f"top2.{policy}.{capacity}.{name}"]  # noqa: E731
    np.testing.assert_allclose(combined(routing), wanted("combine"), atol=ATOL)
    np.testing.assert_allclose(y, wanted("y"), atol=ATOL)
    loss = load_balance(routing, choices=1, per_sequence=True)
    np.testing.assert_allclose(loss, wanted("loss"), rtol=1e-6)
    used = wanted("used")  # [b, e, slots]
    by_sequence = jax.vmap(counts)(routing)
    np.testing.assert_array_equal(by_sequence, used.sum(-1))


@pytest.mark.parametrize("kind", ["scaled", "straight"])
def test_the_switch_layer_is_the_authors(kind):
    model = switch_model(straight=kind == "straight")
    moe = switched(model.layers[-1].ffn, "switch")

    def value(x):
        y, routing = moe(x)
        return (y * hashed("dy", SHAPE)).sum(), (y, routing)

    dx, (y, routing) = jax.grad(value, has_aux=True)(jnp.asarray(X))
    wanted = {n: EXPECTED[f"switch.{kind}.{n}"] for n in ("y", "counts", "p", "top", "dx")}
    np.testing.assert_allclose(y, wanted["y"], atol=ATOL)
    np.testing.assert_allclose(dx, wanted["dx"], atol=1e-5)  # through the softmax too
    np.testing.assert_array_equal(counts(routing), wanted["counts"])
    np.testing.assert_allclose(routing.scores.sum((0, 1)), wanted["p"], rtol=1e-5)
    np.testing.assert_allclose(routing.scores.max(-1).ravel(), wanted["top"], rtol=1e-5)
    theirs = E * (wanted["counts"] / 60 * wanted["p"] / 60).sum()
    np.testing.assert_allclose(load_balance(routing), theirs, rtol=1e-5)


def test_a_switch_block_is_the_authors():
    block = tree.copy(switch_model().layers[-1])
    for ours, theirs in (("q", "q_lin"), ("k", "k_lin"), ("v", "v_lin"), ("o", "out_lin")):
        setattr(block.attn, ours, linear(getattr(block.attn, ours), f"block.attn.{theirs}"))
    block.ffn = switched(block.ffn, "block.feed_forward")
    for ours, theirs in (("attn_norm", "norm_self_attn"), ("ffn_norm", "norm_ff")):
        norm = tree.copy(getattr(block, ours))
        scale, bias = (hashed(f"block.{theirs}.{n}", (D,), 0.3) for n in ("weight", "bias"))
        norm.scale, norm.bias = param(scale + 1, norm.scale), param(bias, norm.bias)
        setattr(block, ours, norm)
    valid = np.arange(SHAPE[1]) < np.array([[20], [13], [17]])
    mask = jnp.broadcast_to(jnp.asarray(valid)[:, None, None], (3, 1, 20, 20))
    h, _, outputs = block(jnp.asarray(X), Context({}, {None: mask}))  # padding is routed there
    np.testing.assert_allclose(h, EXPECTED["block.y"], rtol=1e-5, atol=1e-5)  # values up to 7
    np.testing.assert_array_equal(counts(outputs.reports["ffn"]), EXPECTED["block.counts"])


def by_hand(moe, x, valid=None):
    """The mixture token by token in float64: first choices queue before second ones."""
    spec = moe.spec
    w = {n: np.asarray(getattr(moe.experts, n).weight.dense(), np.float64) for n in ("up", "down")}
    act = lambda h: np.where(h > 0, h, 0.01 * h)  # noqa: E731
    out, kept = np.zeros(x.shape), np.zeros((*x.shape[:2], spec.k), bool)
    limit = max(spec.least, int(spec.capacity * x.shape[1] * spec.k / spec.experts))
    for b in range(len(x)):
        logits = np.asarray(x[b], np.float64) @ np.asarray(moe.router.weight.dense(), np.float64)
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        best, taken = np.argsort(-p, axis=1)[:, : spec.k], [0] * spec.experts
        for j in range(spec.k):
            for i in range(x.shape[1]):
                e, weight = best[i, j], p[i, best[i, j]] / p[i, best[i]].sum()
                if valid is not None and not valid[b, i]:
                    continue
                if (
                    j
                    and spec.second == "none"
                    or j
                    and spec.second == "threshold"
                    and weight <= 0.2
                ):
                    continue
                if taken[e] < limit:
                    taken[e] += 1
                    kept[b, i, j] = True
                    out[b, i] += weight * (act(x[b, i] @ w["up"][e]) @ w["down"][e])
    return out, kept


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 99),
    policy=st.sampled_from(["all", "none", "threshold"]),
    capacity=st.sampled_from([0.25, 1.0, 4.0]),
    padded=st.booleans(),
)
def test_it_is_first_come_first_served(seed, policy, capacity, padded):
    x = np.asarray(jax.random.normal(jax.random.key(seed), (2, 12, D)))
    valid = np.arange(12) < np.array([[12], [5]]) if padded else None
    moe = top2_layer(policy, capacity)
    facts = TokenFacts(valid=None if valid is None else jnp.asarray(valid))
    y, routing = moe(jnp.asarray(x), Context({}, {}, tokens=facts))
    expected, kept = by_hand(moe, x, valid)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(routing.kept, kept)
    total = combined(routing).sum(-1)
    assert (total <= 1 + 1e-6).all()
    if policy == "all":
        np.testing.assert_allclose(total[kept.all(-1)], 1, rtol=1e-6)
    if capacity == E:
        assert kept[..., 0].sum() == (24 if valid is None else 17), "nothing is dropped"


def test_balance_is_1_where_even_and_e_where_collapsed():
    even = routers.softmax_top_k(jnp.tile(20.0 * jnp.eye(E), (2, 3, 1)), 2)
    collapsed = routers.softmax_top_k(jnp.tile(jnp.array([50.0, 0, 0, 0]), (2, 8, 1)), 2)
    for options in ({"choices": 1, "per_sequence": True}, {"choices": 1}):
        np.testing.assert_allclose(load_balance(even, **options), 1, rtol=1e-6)
        np.testing.assert_allclose(load_balance(collapsed, **options), E, rtol=1e-6)


@pytest.mark.parametrize("keyed", [False, True])
def test_tokens_beyond_a_switch_layers_capacity_pass_scaled(keyed):
    moe = switched(switch_model(capacity=0.5).layers[-1].ffn, "switch")
    inputs = LayerInputs(key=jax.random.key(3) if keyed else None)
    y, routing = moe(jnp.asarray(X), None, inputs)
    whole, asked = switched(switch_model().layers[-1].ffn, "switch")(jnp.asarray(X))
    limit = int(0.5 * 60 / E)
    counted = np.asarray(counts(asked))
    np.testing.assert_array_equal(counts(routing), np.minimum(counted, limit))
    kept = np.asarray(routing.kept[..., 0])
    np.testing.assert_allclose(y[kept], whole[kept], atol=ATOL)
    p = np.asarray(asked.weight[..., 0])
    np.testing.assert_allclose(y[~kept], (p[..., None] * X)[~kept], atol=ATOL)
    chosen = np.asarray(asked.chosen[..., 0]).ravel()
    first = np.array([(chosen[:i] == e).sum() < limit for i, e in enumerate(chosen)])
    assert (first == kept.ravel()).all() != keyed, "the batch is one queue, or drawn from"


def test_experts_that_begin_alike_are_one():
    alike, apart = (switch_model(alike=a).layers[-1].ffn.experts for a in (True, False))
    for leaf in jax.tree.leaves(alike):
        np.testing.assert_array_equal(leaf, jnp.broadcast_to(leaf[:1], leaf.shape))
    assert not np.allclose(apart.up.weight.dense()[0], apart.up.weight.dense()[1])


TOKENS = jax.random.randint(jax.random.key(3), (2, 12), 0, 64)
HEAD_OPTIONS = {"experts": 2, "hidden": 8}
HEADS_OF = {
    "top2": functools.partial(top2_head, **HEAD_OPTIONS),
    "switch": functools.partial(switch_head, **HEAD_OPTIONS, layers=2, heads=2),
}


@functools.cache
def headed(name):
    """The tiny encoder with a head."""
    return transform.apply(HEADS_OF[name](seed=1), tiny_encoder())[0]


@pytest.mark.parametrize("name", HEADS_OF)
def test_the_encoder_below_is_left_as_it_was(name):
    model, bare = headed(name), tiny_encoder()
    assert equal(list(model.layers)[:3], list(bare.layers)) and equal(model.embed, bare.embed)
    assert model.config.head == "span" and model.transform is None and model.head_bias is None
    h = bare.hidden(TOKENS)
    context = Context({}, {None: None})
    for block in list(model.layers)[3:]:
        h = block(h, context)[0]
    h = h if model.norm is None else model.norm(h)
    np.testing.assert_allclose(model(TOKENS), model.head(h), atol=1e-5)
    assert (model.norm is None) == (name == "top2")


@pytest.mark.parametrize("name", HEADS_OF)
def test_padding_alone_and_a_nan_are_no_one_elses_business(name):
    model = headed(name)
    loss = routed(lambda m, b: span(lambda x: called(m, x), b), balance=1.0)
    nothing = {"tokens": TOKENS, "valid": jnp.zeros(TOKENS.shape, bool)}
    found, metrics = loss(model, (nothing, np.zeros((2, 2), np.int32)))
    assert np.isfinite(found) and metrics["balance"] == 0
    moe = model.layers[-1].ffn
    x = jax.random.normal(jax.random.key(0), (2, 6, 16))
    y, routing = moe(x.at[0, 2, 0].set(jnp.nan))
    assert (np.asarray(routing.chosen[0, 2]) == moe.spec.experts).all() and (y[0, 2] == 0).all()
    assert np.isfinite(np.asarray(y)).all()


def test_evaluation_has_more_room_and_draws_nothing():
    model = transform.apply(top2_head(experts=4, hidden=8), tiny_encoder())[0]
    found = evaluated(model).layers[-1].ffn.spec
    assert (found.capacity, found.second) == (1.0, "threshold")  # 2.0 over two choices
    assert model.layers[-1].ffn.spec.second == "random", "the argument is left as it was"
    assert equal(evaluated(headed("switch")), headed("switch"))
    with pytest.raises(ConfigError, match="capacity=0"):
        evaluated(model, capacity=0.0)


def test_finercut_leaves_what_has_no_residual():
    model = headed("top2")
    cut, stats = transform.apply(finercut(remove=6, protect=None), model, [TOKENS])
    assert models.removed(cut) == [0, 1, 2, 3, 4, 5, 6] and cut.layers[3].ffn is not None


def test_it_learns_with_what_it_draws():
    """The loss gives every layer a key; of the same key the step is the same."""
    model = headed("top2")
    loss = routed(
        lambda m, b: span(lambda x: called(m, x), b),
        balance=1.0,
        choices=1,
        per_sequence=True,
        keyed=True,
    )
    rule = backprop(loss, optax.adam(1e-2), informed=True)
    batch = {"tokens": TOKENS}, np.array([[3, 4], [5, 5]], np.int32)
    state = rule.init(model, jax.random.key(0))
    losses = []
    for _ in range(12):
        state, metrics = rule.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 1 and np.isfinite(losses).all()


BAD = {
    "experts=0": lambda: top2_head(experts=0),
    "capacity=0": lambda: top2_head(capacity=0.0),
    "capacity=-1": lambda: switch_head(capacity=-1.0),
    "second='most' is not one of": lambda: top2_head(policy="most"),
    "threshold=0": lambda: top2_head(threshold=0.0),
    "k=1 of experts=0": lambda: switch_head(experts=0),
    "layers=0": lambda: switch_head(layers=0),
    "model is a Decoder; an Encoder": lambda: transform.apply(top2_head(), tiny()),
    "route already": lambda: transform.apply(switch_head(), headed("top2")),
    "heads=3 does not divide the width 16": lambda: transform.apply(
        switch_head(heads=3), tiny_encoder()
    ),
    "queue='row' is not one of": lambda: MoESpec(2, 1, 4, queue="row"),
    "drop='best' is not one of": lambda: MoESpec(2, 1, 4, drop="best"),
    "least=0": lambda: MoESpec(2, 1, 4, least=0),
    "straight: with k=2": lambda: MoESpec(2, 2, 4, normalize=False, straight=True),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    with pytest.raises(ConfigError, match=message):
        BAD[message]()
