"""A batch in parts is the whole batch: unequal counts, empty parts, meshes, steps left out."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ffnlab.data import PackedBatches
from ffnlab.errors import ConfigError
from ffnlab.learning import backprop, packed_next_token
from ffnlab.learning.accumulate import accumulated, cut_rows
from ffnlab.parallel import make_step, parse_mesh, place_batch, shard, skip_bad_steps
from ffnlab.testing import tiny

# Sums of a few float32 terms in another order.
CLOSE = {"rtol": 2e-5, "atol": 1e-6}


def counted(model, batch):
    """A mean over the entries that count: of w x, where the row says how many of its x do."""
    x, sizes = batch
    counts = jnp.arange(x.shape[1]) < sizes[:, None]
    count = counts.sum()
    mean = jnp.sum(model["w"] * x * counts) / count  # NaN over nothing
    return mean, {"twice": 2 * mean, "count": count}


@functools.partial(jax.jit, static_argnums=2)
def in_parts(model, batch, parts):
    """Mean, metrics and gradient of `counted`."""

    def measured(model, part):
        mean, metrics = counted(model, part)
        return mean, (metrics, {})

    evaluate = jax.value_and_grad(measured, has_aux=True)
    (value, (metrics, _)), gradient = accumulated(lambda b, _: evaluate(model, b), batch, parts)
    return (value, metrics), gradient


@example([0] * 6, 2)
@example([0, 0, 0, 2, 0, 3], 3)
@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.sampled_from([1, 2, 3, 6]))
def test_parts_weigh_what_they_count(sizes, parts):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    counts = np.arange(3) < np.array(sizes)[:, None]
    model = {"w": jnp.float32(0.5)}
    (value, metrics), gradient = in_parts(model, (jnp.asarray(x), jnp.asarray(sizes)), parts)
    if sum(sizes) == 0:
        assert parts == 1 or (float(value), float(gradient["w"])) == (0, 0)
        return
    wanted = (x * counts).sum() / counts.sum()
    np.testing.assert_allclose(gradient["w"], wanted, **CLOSE)
    np.testing.assert_allclose(value, 0.5 * wanted, **CLOSE)
    np.testing.assert_allclose(metrics["twice"], wanted, **CLOSE)
    assert metrics["count"] == sum(sizes) and metrics["count"].dtype == jnp.int32


def uneven() -> PackedBatches:
    """Eight rows of eleven tokens and one, in documents of unequal lengths."""
    random = np.random.default_rng(0)
    documents = [random.integers(0, 64, size) for size in (2, 2, 12, 1, 1, 9, 3, 2, 2, 2, 11, 1)]
    return PackedBatches(documents * 4, 8, 11)


def packed_step(key, batch, *, parts=1, mesh=None):
    """Model and metrics after one step of plain SGD from `tiny`."""
    rule = backprop(packed_next_token, optax.sgd(1.0), microbatches=parts)
    state = rule.init(tiny(key), key)
    if mesh is None:
        state, metrics = rule.step(state, jax.tree.map(jnp.asarray, batch))
    else:
        step = make_step(rule, mesh)
        state, metrics = step(shard(state, mesh), place_batch(batch, mesh))
    assert state.step == 1
    return state.model, metrics


@pytest.mark.parametrize(
    ("parts", "mesh"), [(2, None), (4, None), (1, "dp=4"), (2, "dp=4"), (4, "dp=2,tp=2")]
)
def test_packed_rows_of_unequal_counts_are_one_step(key, parts, mesh):
    batch = uneven()(0)
    counts = (batch.segments[:, 1:] == batch.segments[:, :-1]) & (batch.segments[:, 1:] > 0)
    by_part = counts.sum(1).reshape(-1, 4).sum(0)
    assert len(set(by_part.tolist())) > 1, "else a mean of means would do"
    wanted, whole = packed_step(key, batch)
    found, metrics = packed_step(
        key, batch, parts=parts, mesh=None if mesh is None else parse_mesh(mesh)
    )
    assert metrics.keys() == whole.keys() and metrics["count"] == counts.sum()
    for name in whole:
        np.testing.assert_allclose(metrics[name], whole[name], rtol=2e-5)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_norm_is_that_of_the_whole_gradient(key):
    loss = lambda model, x: (jnp.mean(model["w"] * x), {})  # noqa: E731
    rule = backprop(loss, optax.sgd(0.1), microbatches=2)
    _, metrics = rule.step(rule.init({"w": jnp.float32(1)}, key), jnp.array([3.0, -3.0]))
    assert metrics["gradient_norm"] == 0, "parts of norm 3 each, in opposite directions"


def test_a_bad_part_leaves_out_the_step_and_nothing_else(key):
    loss = lambda model, x: (jnp.mean(model["w"] * x), {})  # noqa: E731
    rule = skip_bad_steps(backprop(loss, optax.sgd(1.0), microbatches=2))
    state, skipped = rule.init({"w": jnp.float32(0)}, key), []
    for x in ([1, 1], [float("nan"), 2], [3, 3], [4, 4], [5, 5]):
        state, metrics = rule.step(state, jnp.array(x, jnp.float32))
        skipped.append(float(metrics["skipped"]))
    assert state.model["w"] == -13 and state.step == 4
    assert skipped == [0, 1, 0, 0, 0]


def test_rows_stay_where_they_are():
    mesh, batch = parse_mesh("dp=4"), np.arange(16)[:, None]
    with jax.set_mesh(mesh):
        cut = jax.jit(lambda b: cut_rows(b, 2)[0])
        text = cut.lower(place_batch(batch, mesh)).compile().as_text()
        found = cut(place_batch(batch, mesh))
    np.testing.assert_array_equal(found[..., 0], [range(0, 16, 2), range(1, 16, 2)])
    assert not re.search(r"all-to-all|all-gather|collective-permute", text)


def test_parts_that_do_not_divide_are_named(key):
    with pytest.raises(ConfigError, match="microbatches=0 must be at least 1"):
        backprop(microbatches=0)
    rule = backprop(microbatches=3)
    state = rule.init(tiny(key), key)
    with pytest.raises(ConfigError, match="batch: microbatches=3 do not divide 8 rows"):
        rule.step(state, jnp.ones((8, 5), jnp.int32))
    with pytest.raises(ConfigError, match=r"batch\['b'\]: microbatches=2 do not divide 0 rows"):
        cut_rows({"a": jnp.ones(4), "b": jnp.ones((0, 3))}, 2)
    with pytest.raises(ConfigError, match="microbatches=2: nothing in the batch has rows"):
        cut_rows({"scale": jnp.float32(1)}, 2)
    with jax.set_mesh(parse_mesh("dp=4")), pytest.raises(ConfigError, match="batch: axis 'batch'"):
        jax.jit(lambda b: cut_rows(b, 4)[0]).lower(jnp.ones((8, 2)))
