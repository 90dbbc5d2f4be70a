"""Columns that can be undone: what is rebuilt, gradients against autodiff, and ConvNeXt blocks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Column, ColumnSpec, ConvNeXt, Level, drop_path
from ffnlab.layers.reversible import reversible
from ffnlab.layers.stacking import run_stack, stack_modules, unstack_modules

SPEC = ColumnSpec((6, 7, 8), (1, 2, 1), gamma=0.7, drop=0.3)
FLAT = ColumnSpec((5, 6), (1, 1), gamma=0.7, drop=0.3)
COLUMNS = 5


def grids(seed, dtype=jnp.float32, spec=SPEC):
    """x, and features of levels of 8 x 4, 4 x 2 and 2 x 1 places."""
    keys = jax.random.split(jax.random.key(seed), 1 + len(spec.widths))
    x, *c = (
        jax.random.normal(key, (2, 8 // n, 4 // n, d), dtype)
        for key, n, d in zip(keys, (1, 1, 2, 4), (spec.widths[0], *spec.widths), strict=False)
    )
    return x, tuple(c)


@functools.cache
def columns(dtype=jnp.float32, spec=SPEC):
    make = jax.jit(jax.vmap(lambda key: Column(spec, key=key, dtype=dtype)))
    return unstack_modules(make(jax.random.split(jax.random.key(9), COLUMNS)), COLUMNS)


def far(found, wanted):
    """The norm of the difference of two trees' leaves over that of the second, the most of all."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    least = 1e-30  # of the gradients of a block that all examples skip
    return max(float(np.linalg.norm(a - b) / max(np.linalg.norm(b), least)) for a, b in pairs)


@functools.partial(jax.jit, static_argnums=5)
def both_ways(column, x, c, g, key, is_keyed):
    """What a column gives, autodiff's gradients, and what undoing it gives."""
    key = key if is_keyed else None
    new, pull = jax.vjp(lambda column, x, c: column(x, c, key=key), column, x, c)
    return new, pull(g), column.undo(x, new, g, key=key)


@pytest.mark.parametrize("is_keyed", [False, True])
def test_undone_it_gives_what_it_read_and_autodiffs_gradients(is_keyed):
    x, c = grids(0)
    _, g = grids(1)
    key = jax.random.key(2)
    _, (of_column, of_x, of_c), found = both_ways(columns()[0], x, c, g, key, is_keyed)
    assert far(found.c, c) < 1e-5
    assert far((found.of_x, found.of_c), (of_x, of_c)) < 1e-5
    assert far(found.of_column, of_column) < 1e-5
    assert jax.tree.structure(found.of_column) == jax.tree.structure(columns()[0])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 99), st.floats(0.125, 2), st.booleans())
def test_any_alpha_is_undone(seed, alpha, is_negative):
    x, c = grids(seed)
    value = jnp.float32(-alpha if is_negative else alpha)
    column = tree.map_at(
        columns()[0],
        tree.at("alphas[*]"),
        lambda p: p.replace(jnp.full_like(p.get_value(), value)),
    )
    _, _, found = both_ways(column, x, c, grids(seed)[1], jax.random.key(0), False)
    # Rounding is divided by alpha, and a level reads the rebuilt one above: three times in all.
    assert far(found.c, c) < 1e-5 / min(alpha, 1) ** 3


def test_a_column_is_what_the_formula_says():
    """Up reads the column before, down this one's new level; every other place is doubled."""
    column, (x, c) = columns()[0], grids(3)
    found = column(x, c)
    levels, alpha = column.levels, [a[...] for a in column.alphas]
    doubled = lambda y: np.kron(np.asarray(y), np.ones((1, 2, 2, 1)))  # noqa: E731
    up = doubled(levels[0].up_norm(levels[0].up(c[1])))
    want = [levels[0].blocks[0](x + up.astype(np.float32)) + alpha[0] * c[0]]
    down = levels[1].down_norm(levels[1].down(want[0]))
    y = down + doubled(levels[1].up_norm(levels[1].up(c[2]))).astype(np.float32)
    want.append(levels[1].blocks[1](levels[1].blocks[0](y)) + alpha[1] * c[1])
    y = levels[2].down_norm(levels[2].down(want[1]))
    want.append(levels[2].blocks[0](y) + alpha[2] * c[2])
    assert far(found, want) < 1e-5
    assert levels[2].up is None and levels[0].down is None


@functools.partial(jax.jit, static_argnums=4)
def gradients(stacked, x, c, keys, every):
    """Of a sum of what five columns give, rebuilt, or by autodiff (every = 0)."""

    def cost(stacked, x, c):
        if every:
            c = reversible(stacked, x, c, save_every=every, keys=keys)
        else:
            c, _ = run_stack(stacked, c, lambda m, c, key: (m(x, c, key=key), None), xs=keys)
        return sum(jnp.sum(jnp.sin(grid)) for grid in c)

    return jax.grad(cost, (0, 1, 2))(stacked, x, c)


@pytest.mark.slow
def test_a_scan_of_columns_has_autodiffs_gradients_in_float64():
    """Whatever is kept, blocks skipped alike; of 2 the first group is smaller."""
    with jax.enable_x64(True):
        stacked = stack_modules(columns(jnp.float64, FLAT))
        x, c = grids(4, jnp.float64, FLAT)
        keys = jax.random.split(jax.random.key(5), COLUMNS)
        want = gradients(stacked, x, c, keys, 0)
        for every in (2, COLUMNS + 3):
            assert far(gradients(stacked, x, c, keys, every), want) < 1e-11
        others = jax.random.split(jax.random.key(6), COLUMNS)
        assert far(gradients(stacked, x, c, others, 2), want) > 1e-3, "the keys count"


def test_eight_columns_are_undone_in_float64():
    with jax.enable_x64(True):
        x, c = grids(7, jnp.float64, FLAT)
        run = jax.jit(lambda column, x, c: column(x, c))
        new, made = c, (columns(jnp.float64, FLAT) * 2)[:8]
        for column in made:
            new = run(column, x, new)
        undo = jax.jit(lambda column, x, new: column.undo(x, new, new).c)
        for column in reversed(made):
            new = undo(column, x, new)
        assert far(new, c) < 1e-9


def test_features_between_columns_stay_float32():
    column = Column(SPEC, key=jax.random.key(0), dtype=jnp.bfloat16)
    x, c = grids(0)
    new = jax.eval_shape(column, x.astype(jnp.bfloat16), c)
    assert {grid.dtype for grid in new} == {jnp.dtype(jnp.float32)}
    first = Column(SPEC, first=True, key=jax.random.key(0))
    assert len(first.alphas) == 0 and all(level.up is None for level in first.levels)


def test_examples_skip_blocks_more_the_later_these_are():
    assert ColumnSpec((1, 1), (2, 1), drop=0.4).drops(0) == [0.0, 0.2]
    assert [SPEC.drops(i) for i in range(3)] == [
        [0.0],
        pytest.approx([0.1, 0.2]),
        [pytest.approx(0.3)],
    ]
    x = jnp.ones((2000, 1, 3))
    y = np.asarray(drop_path(x, 0.25, jax.random.key(0)))
    kept = y[:, 0, 0] > 0
    assert np.all(y == np.where(kept, np.float32(1 / 0.75), 0)[:, None, None])
    assert abs(kept.mean() - 0.75) < 0.04 and drop_path(x, 0.25, None) is x
    block = ConvNeXt(3, 6, key=jax.random.key(0), gamma=1.0, drop=0.5)
    image = jax.random.normal(jax.random.key(1), (32, 2, 2, 3))
    skipped = np.all(np.asarray(block(image, key=jax.random.key(2)) == image), axis=(1, 2, 3))
    assert 0 < skipped.sum() < 32 and not np.all(block(image) == image, axis=(1, 2, 3)).any()


def test_what_is_refused():
    with pytest.raises(ConfigError, match="size=2 must be odd"):
        ConvNeXt(3, 6, key=jax.random.key(0), size=2)
    with pytest.raises(ConfigError, match=r"drop=1.0 must lie in \[0, 1\)"):
        Level(SPEC._replace(drop=1.0), 2, key=jax.random.key(0))
