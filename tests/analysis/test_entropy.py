"""Plug-in entropies, codes and kernels: against plain loops, closed forms and their invariants."""

import collections
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.analysis import (
    Cells,
    Kernels,
    entropy,
    information,
    joint_states,
    mixture_entropy,
    mutual_information,
)
from ffnlab.analysis.edges import adaptive_codes, edges_of, fixed_codes
from ffnlab.errors import ConfigError, NumericalError


def counted(rows):
    """H in nats, by a table of what rows are."""
    counts = np.array(list(collections.Counter(map(tuple, np.asarray(rows).tolist())).values()))
    p = counts / counts.sum()
    return -(p * np.log(p)).sum()


def told(rows, labels):
    """H(T) - sum_y p(y) H(T | y), by tables."""
    rows, labels = np.asarray(rows), np.asarray(labels)
    inside = [(labels == y).mean() * counted(rows[labels == y]) for y in set(labels.tolist())]
    return counted(rows) - sum(inside)


codes = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=n, max_size=n),
        st.lists(st.integers(0, 1), min_size=n, max_size=n),
    )
)


@given(codes)
def test_states_are_counted_as_in_a_table(drawn):
    rows, labels = (np.array(part) for part in drawn)
    states = joint_states(rows)
    assert entropy(states) == pytest.approx(counted(rows), abs=1e-12)
    found = mutual_information(states, labels)
    assert found == pytest.approx(told(rows, labels), abs=1e-12)
    assert -1e-12 <= found <= min(entropy(states), entropy(labels)) + 1e-12
    turned = joint_states(rows[:, [2, 0, 1]])
    assert entropy(turned) == pytest.approx(entropy(states), abs=1e-12)


@pytest.mark.parametrize(("width", "cells"), [(1, 2), (3, 30), (13, 31), (40, 33), (3, 300)])
def test_states_are_exact_at_any_width(width, cells):
    """One unit apart, in a place that a hash or a product of powers may lose."""
    random = np.random.default_rng(width)
    rows = random.integers(0, cells, (64, width))
    rows[32:] = rows[:32]
    rows[40:, -1] = (rows[40:, -1] + 1) % cells  # 24 of the copies differ in one unit
    labels = random.integers(0, 3, 64)
    inputs = np.arange(64) // 2
    found = jax.jit(information, static_argnums=2)(rows, labels, cells, inputs)
    assert float(found.y) == pytest.approx(told(rows, labels), abs=1e-5)
    assert float(found.x) == pytest.approx(told(rows, inputs), abs=1e-5)
    assert float(information(rows, labels, cells).x) == pytest.approx(counted(rows), abs=1e-5)
    assert len(set(joint_states(rows).tolist())) == len({tuple(row) for row in rows.tolist()})


def test_members_are_measured_at_once():
    rows = np.random.default_rng(0).integers(0, 30, (4, 50, 14))
    labels = np.arange(50) % 2
    found = jax.vmap(lambda codes: information(codes, labels, 30))(jnp.asarray(rows))
    for i in range(4):
        assert float(found.x[i]) == pytest.approx(counted(rows[i]), abs=1e-5)


# Codes.


def test_a_fixed_grid_is_numpys():
    values = np.random.default_rng(0).uniform(-1.2, 1.2, (50, 3)).astype(np.float32)
    values[0] = [-1, 0, 1]
    edges = np.linspace(-1, 1, 30, dtype=np.float32)
    np.testing.assert_allclose(edges_of(-1.0, 1.0, 30), edges, atol=1e-7)
    np.testing.assert_array_equal(fixed_codes(values, edges), np.digitize(values, edges))


def by_definition(values, bins, low):
    """EBAB by its sentence: edges of the sorted distinct values, then `numpy.digitize`."""
    distinct = np.unique(values)
    distinct = distinct[distinct != np.float32(low)]
    if not len(distinct):
        return np.digitize(values, [low])
    picked = [distinct[int(k * len(distinct) / bins)] for k in range(bins)]
    return np.digitize(values, [low, *picked, distinct[-1]])


@given(
    st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.25, 1.0, 2.0, 5.0, 7.5]), min_size=20, max_size=20),
    st.integers(1, 9),
)
def test_an_adaptive_grid_is_its_definition(values, bins):
    values = np.array(values, np.float32)[:, None]
    found = adaptive_codes(values, bins, 0.0)
    np.testing.assert_array_equal(found, by_definition(values, bins, 0.0))
    assert found.max() < bins + 3


def test_cells_of_an_adaptive_grid_hold_as_many_distinct_values():
    values = np.random.default_rng(1).normal(size=(2500, 4)).astype(np.float32)
    found = np.asarray(adaptive_codes(values, 30, -10.0))
    np.testing.assert_array_equal(found, by_definition(values, 30, -10.0))
    distinct = np.unique(values)
    cells = collections.Counter(np.asarray(adaptive_codes(distinct[:, None], 30, -10.0))[:, 0])
    held = sorted(cells.values())[1:]  # but the last value, which is alone
    assert held[-1] - held[0] <= 1


def test_an_adaptive_grid_sees_the_order_alone():
    values = np.maximum(np.random.default_rng(2).normal(size=(300, 4)), 0).astype(np.float32)
    labels = np.arange(300) % 2
    own = Cells(30, 0.0, adaptive=True)
    before = own(values, labels)
    for change in (lambda v: v * 1000, lambda v: np.sqrt(v) * 7):
        after = own(change(values).astype(np.float32), labels)
        assert (float(before.x), float(before.y)) == (float(after.x), float(after.y))
    grid = Cells(30, 0.0, 3.0)
    assert float(grid(values, labels).x) != float(grid(values * 0.1, labels).x)


def test_one_cell_leaves_which_units_are_on():
    values = np.maximum(np.random.default_rng(3).normal(size=(4096, 3)), 0).astype(np.float32)
    found = Cells(1, 0.0, adaptive=True)(values, np.zeros(4096, int))
    assert float(found.x) / math.log(2) == pytest.approx(3, abs=0.02)
    assert float(found.y) == pytest.approx(0, abs=1e-5)


# Kernels.


def by_loops(values, v, bound):
    n, d = values.shape
    v, shift = (v, 0) if bound == "upper" else (4 * v, d / 2 * math.log(1 / 4))
    square = ((values[:, None] - values) ** 2).sum(-1)
    inner = np.exp(-square / (2 * v)).mean(1) * (2 * math.pi * v) ** (-d / 2)
    return d / 2 + shift - np.log(inner).mean()


@pytest.mark.parametrize("bound", ["lower", "upper"])
@pytest.mark.parametrize("n", [7, 600])
def test_kernels_are_sums_over_pairs(bound, n):
    values = np.random.default_rng(4).normal(size=(n, 3)).astype(np.float32)
    found = mixture_entropy(values, 0.1, bound=bound)
    assert float(found) == pytest.approx(by_loops(values.astype(float), 0.1, bound), rel=1e-4)
    labels = np.arange(n) % 2
    told = Kernels(2, 0.1, bound)(values, labels)
    parts = [by_loops(values[labels == y].astype(float), 0.1, bound) for y in (0, 1)]
    shares = [(labels == y).mean() for y in (0, 1)]
    want = by_loops(values.astype(float), 0.1, bound) - np.dot(shares, parts)
    assert float(told.y) == pytest.approx(want, abs=2e-4)


def test_rows_far_from_zero_are_told_apart_by_no_more_than_there_are():
    """I(X;T) was 10.1 bits of 300 rows at v = 0.001, whose ceiling is 8.2."""
    values = (100 + np.random.default_rng(0).normal(size=(300, 10))).astype(np.float32)
    labels = np.arange(300) % 2
    for v in (1e-2, 1e-3):
        want = by_loops(values.astype(float), v, "upper") - 5 * (math.log(2 * math.pi * v) + 1)
        found = float(Kernels(2, v)(values, labels).x)
        assert found == pytest.approx(want, abs=1e-3)
        assert found <= math.log(300) + 1e-4


def test_bounds_of_a_normal_are_those_of_the_card():
    """In bits of I(X;T), 800 rows of a standard normal in two dimensions."""
    values = np.random.default_rng(0).normal(size=(800, 2)).astype(np.float32)
    labels = np.zeros(800, int)
    for v, (upper, lower) in {1e-3: (9.24, 8.44), 0.1: (4.65, 2.77)}.items():
        found = [
            Kernels(1, v, bound)(values, labels).x / math.log(2) for bound in ("upper", "lower")
        ]
        assert [float(f) for f in found] == pytest.approx([upper, lower], abs=0.1)
        assert found[1] <= found[0] <= math.log2(800)


def test_kernels_that_follow_do_not_see_the_scale():
    values = np.random.default_rng(5).normal(size=(300, 2)).astype(np.float32)
    labels = np.arange(300) % 2
    kept = Kernels(2, 0.05, adaptive=True)
    fixed = Kernels(2, 0.01)
    assert float(kept(values, labels).x) == pytest.approx(
        float(kept(values / 10, labels).x), abs=1e-4
    )
    lost = fixed(values, labels).x - fixed(values / 10, labels).x
    assert float(lost) / math.log(2) > 2
    assert float(kept(np.ones((9, 2), np.float32), np.arange(9) % 2).x) == pytest.approx(
        0, abs=1e-5
    )


def test_labels_that_a_jitted_function_closes_over_are_checked():
    """They are known, and what jax computes of them is not."""
    values = jnp.asarray(np.random.default_rng(0).standard_normal((20, 2)), jnp.float32)
    labels = jnp.arange(20) % 2
    found = jax.jit(lambda v: Kernels(2, 0.1)(v, labels))(values)
    assert float(found.y) == pytest.approx(float(Kernels(2, 0.1)(values, labels).y), abs=1e-5)
    with pytest.raises(ConfigError, match="labels are 0 to 1; classes=1"):
        jax.jit(lambda v: Kernels(1, 0.1)(v, labels))(values)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: joint_states(np.array([[-1]])), "codes has -1"),
        (lambda: joint_states(np.zeros((0, 2), int)), r"codes has shape \(0, 2\)"),
        (lambda: mutual_information(np.zeros(3, int), np.zeros(4, int)), "states has 3 rows"),
        (lambda: information(np.zeros((2, 1), int), np.zeros(2, int), 1), "cells=1"),
        (lambda: edges_of(1.0, 0.0, 30), "low=1.0 must lie below"),
        (lambda: information(np.full((2, 1), 2), np.zeros(2, int), 2), "codes are 2 to 2"),
        (
            lambda: information(np.zeros((2, 0), int), np.zeros(2, int), 2),
            r"codes has shape \(2, 0",
        ),
        (lambda: Cells(5, high=math.inf), "high=inf, which is finite"),
        (lambda: Cells(5, math.nan, adaptive=True), "low=nan must be finite"),
        (lambda: edges_of(0.0, math.inf, 5), "both be finite"),
        (lambda: mixture_entropy(np.ones((2, 1), np.float32), -1.0), "variance=-1.0 must be"),
        (lambda: mixture_entropy(np.ones((2, 0), np.float32), 1.0), r"values has shape \(2, 0\)"),
        (lambda: Kernels(2, math.inf), "variance=inf must be positive and finite"),
        (lambda: Cells(1), "bins=1"),
        (lambda: Cells(0, adaptive=True), "bins=0"),
        (lambda: Cells(5, 2.0, 1.0), "low=2.0 must lie below"),
        (lambda: Kernels(0), "classes=0"),
        (lambda: Kernels(2)(np.ones((3, 1), np.float32), np.arange(3)), "labels are 0 to 2"),
        (lambda: Kernels(2, 0.0), "variance=0.0"),
        (lambda: Kernels(2, 1.0, "middle"), "bound='middle'"),
        (lambda: mixture_entropy(np.ones((2, 1), np.float32), 1.0, bound="no"), "bound='no'"),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


@pytest.mark.parametrize("estimate", [Cells(5), Cells(5, adaptive=True), Kernels(2)])
def test_what_is_no_layer_or_no_class_of_each_row_is_named(estimate):
    values, labels = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])
    for layer, says in (
        ((values, labels[:1]), r"labels is int64\[1\]; a whole number for each of the 4 rows"),
        ((values[:, :0], labels), r"values has shape \(4, 0\)"),
        ((values, labels, labels[:3]), r"inputs is int64\[3\]"),
        ((values, labels, labels * 2**40), "inputs has numbers of 2.31 and more"),
    ):
        with pytest.raises(ConfigError, match=says):
            estimate(*layer)
    with pytest.raises((ConfigError, TypeError), match="labels"):
        estimate(values, labels + 0.2)
    with pytest.raises(NumericalError, match="values has NaN or infinity"):
        estimate(values * np.nan, labels)
