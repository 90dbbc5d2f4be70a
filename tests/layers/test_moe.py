"""The mixture of experts against a loop over tokens and experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import tree, weights
from ffnlab.errors import ConfigError
from ffnlab.layers import ACTIVATIONS, Block, Context, MoE, MoESpec, RMSNorm, TokenFacts, balance
from ffnlab.models.cost import multiply_adds
from ffnlab.quantization.nearest import to_int4
from tests.contracts import input_of

ATOL = 1e-5  # float32 sums in another order
SPEC = MoESpec(experts=4, k=2, hidden=8, shared=6)
D = 16


@functools.cache
def moe(**changes):
    """A small mixture with biases, whose experts and router are not alike."""
    spec = dataclasses.replace(SPEC, **changes)
    layer = MoE(D, spec, key=jax.random.key(0), bias=True)
    biases = jax.tree.map(lambda x: x if x.ndim > 2 else x + 0.1 * input_of(x.shape), layer.experts)
    layer.experts = biases
    return layer


def facts_of(valid):
    return Context({}, {}, tokens=TokenFacts(valid=valid))


def loop(layer, x, valid=None):
    """Token by token and expert by expert, in float64."""
    spec, experts = layer.spec, layer.experts
    a = lambda v: np.asarray(v, np.float64)  # noqa: E731
    dense = lambda m: a(m.weight.dense())  # noqa: E731
    act = lambda v: a(ACTIVATIONS[experts.activation](jnp.asarray(v, jnp.float32)))  # noqa: E731

    def expert(e, row):
        up = row @ dense(experts.up)[e] + a(experts.up.bias)[e]
        if experts.gate is None:
            h = act(up)
        else:
            h = act(row @ dense(experts.gate)[e] + a(experts.gate.bias)[e]) * up
        return h @ dense(experts.down)[e] + a(experts.down.bias)[e]

    out = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:-1]):
        row = a(x[at])
        if valid is None or valid[at]:
            logits = row @ dense(layer.router)
            p = np.exp(logits - logits.max())
            p = p / p.sum()
            best = np.argsort(-p)[: spec.k]
            total = p[best].sum() if spec.normalize else 1.0
            out[at] = sum(p[e] / total * expert(e, row) for e in best)
    shared = 0 if layer.shared is None else layer.shared(x)
    return out + a(shared)


@pytest.mark.parametrize(
    "changes", [{}, {"gated": False, "shared": None}, {"k": 1, "normalize": False}]
)
@pytest.mark.parametrize("tokens", [3, 40])  # rows one by one, and in blocks
def test_it_is_the_loop(changes, tokens):
    layer, x = moe(**changes), input_of((2, tokens, D))
    y, routing = jax.jit(lambda m, x: m(x))(layer, x)
    np.testing.assert_allclose(y, loop(layer, x), atol=ATOL)
    assert routing.chosen.shape == (2, tokens, layer.spec.k)
    assert int(balance.counts(routing).sum()) == 2 * tokens * layer.spec.k


def test_order_and_padding_do_not_matter():
    layer, x = moe(), input_of((2, 9, D))
    y = layer(x)[0]
    order = jax.random.permutation(jax.random.key(1), 9)
    np.testing.assert_allclose(layer(x[:, order])[0], y[:, order], atol=ATOL)
    valid = jnp.arange(9) < jnp.array([[9], [4]])
    noise = jnp.where(valid[..., None], x, 100.0)
    z, routing = layer(noise, facts_of(valid))
    np.testing.assert_allclose(z[valid], y[valid], atol=ATOL)
    np.testing.assert_allclose(z[~valid], layer.shared(noise)[~valid], atol=ATOL)
    assert int(balance.counts(routing).sum()) == 2 * 13


def test_a_nan_reaches_no_other_token():
    layer, x = moe(shared=None), input_of((1, 9, D))
    y, routing = layer(x.at[0, 3, 0].set(jnp.nan))
    assert (y[0, 3] == 0).all() and int(balance.unrouted(routing)) == 1
    others = np.arange(9) != 3
    np.testing.assert_allclose(y[0, others], layer(x)[0][0, others], atol=ATOL)


def test_capacity_is_of_a_sequence_and_never_exceeded():
    layer, x = moe(capacity=0.75), input_of((3, 8, D))
    y, routing = layer(x)
    limit = int(0.75 * 8 * 2 / 4)
    for b in range(3):
        one = jax.tree.map(lambda leaf, b=b: leaf[b], routing)
        assert balance.counts(one).max() <= limit
    assert not routing.kept.all()
    whole = moe(capacity=4.0)
    np.testing.assert_allclose(whole(x)[0], moe()(x)[0], atol=ATOL)
    lost = ~routing.kept.any(-1)
    np.testing.assert_allclose(y[lost], layer.shared(x)[lost], atol=ATOL)


def test_gradients_of_the_router_are_finite_differences():
    layer, x = moe(), input_of((1, 5, D))
    where = input_of((1, 5, D))

    def loss(w):
        new = tree.replace(layer, {"router": layer.router.replace(weights.Dense(w))})
        return (new(x)[0] * where).sum()

    w, step = layer.router.weight.dense(), 1e-2
    gradient = jax.grad(loss)(w)
    for i, e in [(0, 0), (3, 1), (7, 2), (15, 3)]:
        ends = [loss(w.at[i, e].add(s * step)) for s in (1, -1)]
        # float32 loses three digits of the difference, the step squared two.
        np.testing.assert_allclose(
            (ends[0] - ends[1]) / (2 * step), gradient[i, e], rtol=0.02, atol=2e-3
        )
    assert jnp.abs(gradient).min() > 0


FORMATS = {
    "int4": lambda w: to_int4(weights.Dense(w), group=8, scales="float32"),
    "low rank": lambda w: weights.LowRank.truncate(w, 3),
    "lora": lambda w: dataclasses.replace(
        weights.LoRA.init(weights.Dense(w), 2, jax.random.key(1)), b=0.1 * input_of((2, w.shape[1]))
    ),
}


@pytest.mark.parametrize("format", FORMATS)
def test_experts_of_any_format_are_those_of_their_dense_matrices(format):
    layer, x = moe(), input_of((2, 20, D))
    convert = lambda linear: linear.replace(  # noqa: E731
        jax.vmap(FORMATS[format])(linear.weight.dense())
    )
    parts = {f"experts.{n}": convert(getattr(layer.experts, n)) for n in ("gate", "up", "down")}
    new = tree.replace(layer, parts)
    np.testing.assert_allclose(new(x)[0], loop(new, x), atol=1e-4)
    assert not np.allclose(new(x)[0], layer(x)[0], atol=1e-2)
    adds = multiply_adds(lambda m: m(x)[0], new)
    assert 2 * adds == 40 * new.flops_per_token()


def test_a_block_reports_the_routing():
    norm, x = RMSNorm(D), input_of((1, 4, D))
    block = Block(None, None, norm, moe())
    h, _, outputs = block(x, facts_of(None))
    y, routing = moe()(norm(x))
    np.testing.assert_allclose(h, x + y, atol=ATOL)
    np.testing.assert_array_equal(outputs.reports["ffn"].chosen, routing.chosen)


def test_it_costs_its_router_its_experts_and_what_is_shared():
    layer = moe()
    expected = 2 * (D * 4 + 2 * 3 * D * 8 + 3 * D * 6)
    assert layer.flops_per_token() == expected
    assert layer.flops_per_token(0.5) == expected - 2 * 3 * D * 8
    adds = multiply_adds(lambda m, x: m(x)[0], layer, input_of((2, 9, D)))
    assert 2 * adds == 18 * expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": 5}, "k=5 of experts=4"),
        ({"experts": 0}, "k=2 of experts=0"),
        ({"hidden": 0}, "hidden=0 and shared=6 must be positive"),
        ({"shared": 0}, "hidden=8 and shared=0 must be positive"),
        ({"capacity": 0.0}, "capacity=0.0 must be positive"),
        ({"capacity": float("inf")}, "capacity=inf must be positive, or None for no limit"),
        ({"score": "tanh"}, r"score='tanh' is not one of \['sigmoid', 'softmax'\]"),
    ],
)
def test_bad_sizes(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SPEC, **changes)
