"""Attention of rows that lie on several devices against loops, and against one device."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab.data import PackedBatches
from ffnlab.errors import ConfigError
from ffnlab.layers import AttentionSpec
from ffnlab.layers.attention import ring
from ffnlab.layers.attention.attention import alone, attend
from ffnlab.layers.attention.ring_order import from_zigzag, ring_of, to_zigzag
from ffnlab.layers.attention.spec import seen
from ffnlab.learning import backprop
from ffnlab.losses import packed_next_token
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.models.cost import multiply_adds
from ffnlab.parallel import make_step, on, parse_mesh, place_batch, shard
from tests.layers.test_attention import brute

ATOL = 1e-5  # of float32 sums of up to 48 terms of size 1, in another order
B, HD = 2, 3


def operands(t, heads, kv):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (B, t, n, HD)) for k, n in zip(keys, (heads, kv, kv), strict=True)]


def spec_of(heads, kv, **changes):
    return dataclasses.replace(AttentionSpec(heads, kv, HD, None), **changes)


def texts(t):
    """Of a row of three texts and padding, and of one of two."""
    first, second = t // 4 + 1, t // 2 - 1
    return np.stack(
        [np.repeat([1, 2, 3, 0], [first, second, 2, t - first - second - 2]), np.arange(t) // 3 + 1]
    )


def sees_of(t, spec, segments=None):
    """[b, t, t] which keys are seen, as a decoder says it."""
    found = np.broadcast_to(seen(jnp.arange(t), jnp.arange(t), spec), (B, t, t))
    if segments is None:
        return found
    return found & (segments[:, :, None] == segments[:, None]) & (segments[:, :, None] > 0)


def value_and_gradient(function, q, k, v, counted):
    """What counts of the output, and the gradient of a sum of it with signs."""

    def loss(q, k, v):
        y = jnp.where(counted[:, :, None, None], function(q, k, v), 0)
        return (y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)).sum(), y

    grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    (_, y), gradient = grad(q, k, v)
    return y, gradient


def check(mesh, heads, kv, t, *, packed=False, masked=False, **changes):
    """A mesh finds what loops find, and has the gradients of one device."""
    spec, (q, k, v) = spec_of(heads, kv, **changes), operands(t, heads, kv)
    segments = texts(t) if packed else None
    sees = sees_of(t, spec, segments)
    if masked:  # every query sees itself
        drawn = np.asarray(jax.random.bernoulli(jax.random.key(1), 0.5, (t, t)))
        sees = sees & (drawn | np.eye(t, dtype=bool))
    counted = sees.any(-1)
    mask = jnp.asarray(sees)[:, None] if packed or masked else None
    told = None if segments is None else jnp.asarray(segments)
    _, wanted = value_and_gradient(lambda *x: alone(*x, mask, spec), q, k, v, counted)
    with on(parse_mesh(mesh)):
        over = lambda *x: attend(*x, mask, spec, segments=told)  # noqa: E731
        y, found = value_and_gradient(over, q, k, v, counted)
    somewhere = sees | ~counted[:, :, None]
    looped = brute(*(np.asarray(x, np.float64) for x in (q, k, v)), somewhere, cap=spec.softcap)
    np.testing.assert_allclose(y, np.where(counted[:, :, None, None], looped, 0), atol=ATOL)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=ATOL)


def test_heads_that_divide_are_exchanged():
    """Four devices share the two heads of keys."""
    check("sp=4", 4, 2, 8, softcap=2.0)


@pytest.mark.parametrize("block", [2, 128])
def test_a_ring_in_zigzag_order_knows_caps_windows_and_texts(monkeypatch, block):
    """Parts of 3 queries in blocks of 2, and whole."""
    monkeypatch.setattr(ring, "BLOCK", block)
    if block == 2:
        check("dp=2,sp=4", 3, 1, 24, packed=True, window=17, softcap=2.0)
    else:
        check("tp=2,sp=3", 4, 1, 18)


def test_a_ring_of_windows_meets_its_neighbours_alone():
    check("sp=8", 4, 2, 32, window=6)


def test_a_ring_takes_any_mask():
    check("sp=4", 4, 2, 12, masked=True, causal=False)


SLOWLY = [
    ("sp=8", 4, 2, 32, {}),
    ("sp=2", 1, 1, 8, {}),
    ("sp=7", 2, 2, 28, {}),
    ("tp=2,sp=2", 4, 1, 16, {}),
    ("tp=3,sp=2", 4, 2, 8, {}),
    ("tp=2,sp=4", 4, 2, 16, {}),
    ("fsdp=2,sp=4", 3, 3, 32, {"softcap": 2.0}),
    ("sp=4", 4, 2, 32, {"window": 1}),
    ("sp=4", 4, 2, 32, {"window": 9}),
    ("sp=4", 4, 2, 32, {"window": 30}),
    ("sp=8", 4, 4, 32, {"causal": False}),
    ("sp=4", 4, 4, 32, {"causal": False}),
    ("sp=8", 4, 2, 32, {"causal": False, "window": 6}),
    ("sp=4", 4, 2, 32, {"packed": True}),
    ("sp=4", 4, 2, 32, {"packed": True, "window": 5}),
    ("dp=2,sp=4", 4, 2, 32, {"masked": True, "softcap": 2.0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "heads", "kv", "t", "changes"), SLOWLY)
def test_every_kind_of_attention_equals_one_device(mesh, heads, kv, t, changes):
    check(mesh, heads, kv, t, **changes)


@pytest.mark.slow
def test_gradients_of_gradients():
    spec, (q, k, v) = spec_of(3, 1), operands(16, 3, 1)

    def bent(attention):
        inner = jax.grad(lambda q: jnp.sin(attention(q, k, v, None, spec)).sum())
        return jax.grad(lambda q: (inner(q) ** 2).sum())

    wanted = jax.jit(bent(alone))(q)
    with on(parse_mesh("sp=4")):
        found = jax.jit(bent(attend))(q)
    np.testing.assert_allclose(found, wanted, atol=10 * ATOL)  # sums of sums


def test_a_query_that_sees_nothing_finds_nothing():
    spec, (q, k, v) = spec_of(3, 3, causal=False), operands(8, 3, 3)
    mask = jnp.ones((1, 1, 8, 8), bool).at[0, 0, 5].set(False)

    def total(q, k, v):
        y = attend(q, k, v, mask, spec)
        return (y**2).sum(), y

    with on(parse_mesh("sp=2")):
        (_, y), gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))(q, k, v)
    assert (y[:, 5] == 0).all() and (y[:, 4] != 0).all()
    assert all(jnp.isfinite(leaf).all() for leaf in gradient) and (gradient[0][:, 5] == 0).all()


def test_keys_of_another_length_are_left_to_the_compiler():
    spec, (q, k, v) = spec_of(4, 2), operands(12, 4, 2)
    mask = jnp.asarray(sees_of(12, spec)[:1, None, -5:])
    with on(parse_mesh("sp=4")):
        found = jax.jit(lambda q: attend(q, k, v, mask, spec))(q[:, -5:])
    np.testing.assert_allclose(found, alone(q[:, -5:], k, v, mask, spec), atol=ATOL)


@pytest.mark.parametrize(
    ("heads", "t", "message"),
    [
        (4, 15, r"attention over 15 tokens: sp=4 cuts a row in 4 .*; use rows of 12 or 16 tokens"),
        (3, 12, r"attention over 12 tokens: sp=4 cuts a row in 8 .*; use rows of 8 or 16 tokens"),
        (3, 7, r"attention over 7 tokens: sp=4 cuts a row in 8 .*; use rows of 8 tokens"),
    ],
)
def test_lengths_that_do_not_divide(heads, t, message):
    q, k, v = operands(t, heads, heads)
    with on(parse_mesh("sp=4")), pytest.raises(ConfigError, match=message):
        attend(q, k, v, None, spec_of(heads, heads))


# ---------------------------------------------------------------- orders


def order(n, t=64, **changes):
    return ring_of(("sp",), n, t, spec_of(1, 1, **changes), masked=False)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_every_pair_that_causality_leaves_is_met_once(n):
    """And nothing else is computed, by any device."""
    found = order(n)
    assert found.zigzag
    for own in range(n):
        met = []
        for source in [None, *(s for s in range(n) if s != own)]:
            pairs = found.pairs(jnp.int32(own), None if source is None else jnp.int32(source))
            held = [own if source is None else source]
            held += [2 * n - 1 - held[0]]
            for i, j, number, key_number in zip(*map(np.asarray, pairs), strict=True):
                assert number == (own, 2 * n - 1 - own)[i] and key_number == held[j]
                met.append((int(number), int(key_number)))
        wanted = [(a, b) for a in (own, 2 * n - 1 - own) for b in range(2 * n) if b <= a]
        assert sorted(met) == sorted(wanted) and len(met) == 2 * n + 1


@pytest.mark.parametrize("n", [2, 3, 8])
def test_rows_go_to_their_zigzag_places_and_back(n):
    whole = jnp.arange(2 * n).reshape(n, 2, 1)
    found = order(n)
    there = jax.vmap(lambda x: to_zigzag(found, x), axis_name="sp")(whole)
    np.testing.assert_array_equal(there[..., 0], [(d, 2 * n - 1 - d) for d in range(n)])
    again = jax.vmap(lambda x: from_zigzag(found, x), axis_name="sp")(there)
    np.testing.assert_array_equal(again, whole)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_causal_work_is_even(n):
    """The largest share of unmasked scores of a device is at most 1.05 of the mean."""
    t = 16 * n
    sees = np.tril(np.ones((t, t)))
    rows = np.arange(t).reshape(2 * n, -1)
    loads = [sees[rows[[d, 2 * n - 1 - d]].ravel()].sum() for d in range(n)]
    assert max(loads) <= 1.05 * np.mean(loads)
    uneven = [sees[rows[[2 * d, 2 * d + 1]].ravel()].sum() for d in range(n)]
    assert max(uneven) > 1.4 * np.mean(uneven), "it would not be so in the order of the row"


def test_windows_and_orders_are_chosen_by_what_they_cost():
    assert [(o.zigzag, o.turns) for o in (order(8), order(8, window=9), order(8, window=10))] == [
        (True, 8),
        (False, 2),
        (False, 3),
    ]
    assert order(8, window=1).turns == 1
    assert order(8, window=60).zigzag and not order(8, causal=False).zigzag
    assert order(8, causal=False, window=3).turns == 8, "both sides are seen"


@pytest.mark.parametrize("heads", [3, 4])
def test_devices_share_the_products(heads):
    """By heads a device has its share of what one computes, by a ring of what causality leaves."""
    n, t = 4, 32
    given, spec = operands(t, heads, 1), spec_of(heads, 1)
    with on(parse_mesh(f"sp={n}")):
        adds = multiply_adds(lambda *x: attend(*x, None, spec), *given)
    if heads == 4:
        assert adds * n == multiply_adds(lambda *x: alone(*x, None, spec), *given)
    else:
        assert adds == (2 * n + 1) * (t // (2 * n)) ** 2 * 2 * B * heads * HD


# ---------------------------------------------------------------- programs


@functools.cache
def program(mesh_text, heads, kv, t, *, packed=False, gradient=True, hd=16, **changes):
    """Attention of one row, cut along sp, as compiled."""
    spec = dataclasses.replace(AttentionSpec(heads, kv, hd, None), **changes)
    mesh = parse_mesh(mesh_text)
    place = NamedSharding(mesh, PartitionSpec(None, "sp"))
    q, k, v = (
        jax.ShapeDtypeStruct((1, t, n, hd), jnp.float32, sharding=place) for n in (heads, kv, kv)
    )
    segments = jax.ShapeDtypeStruct((1, t), jnp.int32, sharding=place)

    def run(q, k, v, segments):
        return attend(q, k, v, None, spec, segments=segments if packed else None)

    with on(mesh):
        step = jax.grad(lambda *x: run(*x).sum(), (0, 1, 2)) if gradient else run
        return jax.jit(step).lower(q, k, v, segments).compile()


@pytest.mark.parametrize(("heads", "kind"), [(4, "all-to-all"), (3, "collective-permute")])
def test_no_device_gathers_keys(heads, kind):
    text = program("sp=4", heads, 1, 16).as_text()
    assert f" {kind}(" in text and " all-gather(" not in text
    other = {"all-to-all", "collective-permute"} - {kind}
    assert f" {other.pop()}(" not in text


MEMORY = [
    pytest.param(
        *(8, 2, True, {}),
        marks=pytest.mark.xfail(
            not jax.__version__.startswith("0.10."),
            strict=True,
            reason="wanted, and missed: 1224, 633 and 456 MB on 2, 4 and 8 devices: 151 MB of "
            "masks, which heads share on a CPU, are kept from the forward pass to the gradient",
        ),
    ),
    (8, 2, True, {"softcap": 5.0}),
    (8, 8, True, {"causal": False}),
    (3, 1, True, {}),
    (3, 1, False, {}),
    (3, 1, True, {"packed": True}),
    (3, 1, False, {"packed": True}),
    pytest.param(
        *(8, 2, True, {"window": 1024}),
        marks=pytest.mark.xfail(
            strict=True, reason="wanted, and missed: 54, 47 and 24 MB on 2, 4 and 8 devices"
        ),
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "kv", "gradient", "changes"), MEMORY)
def test_memory_falls_with_the_devices(heads, kv, gradient, changes):
    """At least 1.6 times for each doubling, at 8,192 tokens.

    Not asked of a forward pass by heads: it is the one-device attention of a CPU, whose masks of
    whole rows do not depend on the heads.
    """
    used = [
        program(f"sp={n}", heads, kv, 8192, gradient=gradient, **changes)
        .memory_analysis()
        .temp_size_in_bytes
        for n in (2, 4, 8)
    ]
    assert all(a >= 1.6 * b for a, b in zip(used[:-1], used[1:], strict=True)), used


# ---------------------------------------------------------------- models

CONFIG = DecoderConfig(vocab=64, width=16, hidden=32, layers=2, heads=3, kv_heads=1, head_dim=8)


def batches(position):
    """Packed rows of 33 tokens: the model reads 32."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 64, n).astype(np.int32) for n in (9, 20, 5, 31, 14, 40, 3) * 8]
    return PackedBatches(documents, batch=4, length=32, seed=0)(position)


def losses(mesh_text, steps, config=CONFIG):
    rule, mesh = backprop(packed_next_token, optax.adam(3e-3)), parse_mesh(mesh_text)
    state = shard(rule.init(Decoder(config, key=jax.random.key(0)), jax.random.key(1)), mesh)
    step, found = make_step(rule, mesh), []
    for position in range(steps):
        state, metrics = step(state, place_batch(batches(position), mesh))
        found.append(float(metrics["loss"]))
    return found, step, state


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["sp=8", "dp=2,sp=4", "fsdp=2,sp=2,tp=2"])
def test_packed_rows_are_learned_as_on_one_device(mesh):
    config = dataclasses.replace(CONFIG, heads=4, kv_heads=2, windows=(None, 5), attn_softcap=5.0)
    np.testing.assert_allclose(
        losses(mesh, 20, config)[0], losses("dp=1", 20, config)[0], atol=1e-5
    )


@pytest.mark.slow
def test_a_step_of_packed_rows_gathers_no_keys_and_makes_no_mask():
    """Nothing as large as the keys of whole rows is gathered, nor [t, t] of them told apart."""
    _, step, state = losses("dp=2,sp=4", 1)
    text = step.trace(state, place_batch(batches(0), step.mesh)).lower().compile().as_text()
    for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", text):
        assert np.prod([int(n) for n in shape.split(",") if n]) < 2 * 32 * 8, shape
    assert "pred[2,32,32]" not in text and "pred[2,1,32,32]" not in text
