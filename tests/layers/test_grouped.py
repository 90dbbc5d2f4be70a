"""Rows sorted by group, and layers on them, against a loop over rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import weights
from ffnlab.errors import ConfigError
from ffnlab.layers import LayerNorm, RMSNorm
from ffnlab.layers.grouped import GroupedLinear, GroupedNorm, back, group, take
from tests.contracts import input_of

ATOL = 1e-5  # float32 sums in another order


@settings(max_examples=20, deadline=None)
@given(ids=st.lists(st.integers(-1, 4), min_size=9, max_size=9))
def test_rows_go_to_their_group_and_back(ids):
    groups = group(jnp.array(ids), 4)
    x = jnp.arange(len(ids), dtype=jnp.float32)[:, None]
    rows = take(x, groups)
    expected = sorted(range(len(ids)), key=lambda i: ids[i] if 0 <= ids[i] < 4 else 4)
    assert rows[:, 0].astype(int).tolist() == expected == groups.order.tolist()
    assert groups.sizes.tolist() == [ids.count(e) for e in range(4)]
    assert groups.ids.tolist() == sorted(i if 0 <= i < 4 else 4 for i in ids)
    np.testing.assert_array_equal(back(rows, groups), x)


def test_gradients_of_taking_and_bringing_back_are_those_of_indexing():
    ids, x, g = jnp.array([[1, 0], [2, 1], [0, 5]]), input_of((3, 4)), input_of((6, 4))
    groups = group(ids, 3)
    ours = jax.grad(lambda x: (take(x, groups) * g).sum())(x)
    plain = jax.grad(lambda x: (x[groups.order // 2] * g).sum())(x)
    np.testing.assert_allclose(ours, plain, atol=ATOL)
    ours = jax.grad(lambda y: (back(y, groups) * g).sum())(g)
    np.testing.assert_allclose(ours, jax.grad(lambda y: (y[groups.inverse] * g).sum())(g))


@pytest.mark.parametrize("rows", [3, 60])  # one by one, and in blocks
def test_a_grouped_linear_is_its_maps(rows):
    linear = GroupedLinear(3, 4, 5, key=jax.random.key(0), axes=("embed", "mlp"), bias=True)
    linear.b = linear.b.replace(input_of((3, 5)))
    ids = jax.random.randint(jax.random.key(1), (rows,), 0, 4)
    groups, x = group(ids, 3), input_of((rows, 4))
    y = back(linear(take(x, groups), groups), groups)
    w, b = np.asarray(linear.weight.dense()), np.asarray(linear.bias)
    for i, e in enumerate(np.asarray(ids)):
        expected = x[i] @ w[e] + b[e] if e < 3 else 0
        np.testing.assert_allclose(y[i], expected, atol=ATOL)
    assert linear.groups == 3 and linear.w.axes == ("expert", "embed", "mlp")
    thin = jax.vmap(lambda w: weights.LowRank.truncate(w, 4))(linear.weight.dense())
    same = linear.replace(thin)(take(x, groups), groups)
    np.testing.assert_allclose(back(same, groups), y, atol=1e-4)  # of an SVD


def test_a_grouped_norm_is_its_norms():
    ids, x = jnp.array([1, 0, 2, 1]), input_of((4, 6))
    groups = group(ids, 2)
    for make in (RMSNorm, LayerNorm):
        norms = [make(6), make(6)]
        for i, norm in enumerate(norms):
            norm.scale.set_value(input_of((6,)) + i)
        grouped = GroupedNorm(norms)
        y = back(grouped(take(x, groups), groups), groups)
        for i, e in enumerate(ids.tolist()):
            expected = norms[e](x[i]) if e < 2 else x[i]
            np.testing.assert_allclose(y[i], expected, atol=ATOL)
        assert grouped.norms.scale.axes == ("expert", "embed")
    with pytest.raises(ConfigError, match="norms is empty"):
        GroupedNorm([])
