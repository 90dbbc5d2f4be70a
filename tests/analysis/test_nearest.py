"""Entropies by nearest neighbours: official numbers, brute force, closed forms and invariances."""

import json
import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.analysis import (
    Cells,
    entropy,
    mixture_entropy,
    mutual_information,
    nearest_entropy,
    nearest_information,
    nearest_weights,
)
from ffnlab.errors import ConfigError
from tests.conftest import FIXTURES
from tests.fixtures.information.record import LAYERS, PAIRS, VARIANCES, layer, pairs

EXPECTED = json.loads((FIXTURES / "information" / "expected.json").read_text())


@pytest.mark.parametrize(("case", "wanted"), [*zip(PAIRS, EXPECTED["nearest"], strict=True)])
def test_estimates_are_the_authors(case, wanted):
    found = nearest_information(*pairs(*case))
    assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(("case", "wanted"), [*zip(LAYERS, EXPECTED["adaptive"], strict=True)])
def test_adaptive_cells_and_kernels_are_the_authors(case, wanted):
    seed, width, activation, bins = case
    values, y = layer(seed, width, activation)
    low = 0.0 if activation == "relu" else -1.000001
    found = np.array(Cells(bins, low, adaptive=True)(values, y)) / math.log(2)
    assert found == pytest.approx(wanted["bits"], abs=1e-5)
    for v, (upper, lower, _) in zip(VARIANCES, wanted["bounds"], strict=True):
        for bound, bits in (("upper", upper), ("lower", lower)):
            mine = float(mixture_entropy(values, v, bound=bound)) / math.log(2)
            assert mine == pytest.approx(bits, abs=1e-3)


def brute_entropy(rows, neighbours):
    """The module's formula, all distances by subtraction."""
    n, d = rows.shape
    covariance = np.cov(rows.T, bias=True).reshape(d, d)
    z = rows @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    distances = np.sort(np.linalg.norm(z[:, None] - z[None], axis=-1), axis=1)[:, 1:]
    total = 0.0
    for j, weight in enumerate(nearest_weights(neighbours, d), 1):
        psi = -np.euler_gamma + sum(1 / i for i in range(1, j))
        volume = math.pi ** (d / 2) / math.gamma(d / 2 + 1)
        density = math.exp(psi) / (volume * distances[:, j - 1] ** d * (n - 1))
        total -= weight * np.log(density).mean()
    return total + math.log(np.linalg.det(covariance)) / 2


@pytest.mark.parametrize(("width", "neighbours"), [(1, 1), (2, 5), (4, 3), (5, 5), (8, 5), (8, 9)])
def test_entropy_is_its_formula_by_brute_force(width, neighbours):
    random = np.random.default_rng(width)
    rows = random.standard_normal((150, width)) @ random.standard_normal((width, width))
    found = nearest_entropy(rows, neighbours=neighbours)
    assert found.value == pytest.approx(brute_entropy(rows, neighbours), abs=1e-8)
    assert found.error > 0


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_entropy_of_a_gaussian(width):
    random = np.random.default_rng(1)
    mix = random.standard_normal((width, width)) + 2 * np.eye(width)
    rows = random.standard_normal((5000, width)) @ mix
    wanted = width / 2 * math.log(2 * math.pi * math.e) + math.log(abs(np.linalg.det(mix)))
    assert nearest_entropy(rows).value == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("known", [0.0, 0.5, 1.0, 2.0, 5.0, 10.0])
def test_information_of_gaussians(width, known):
    random = np.random.default_rng(2)
    rho = math.sqrt(1 - math.exp(-2 * known / width))
    x, noise = random.standard_normal((2, 5000, width))
    found = nearest_information(x, rho * x + math.sqrt(1 - rho**2) * noise)
    assert found.value == pytest.approx(known, abs=0.12)


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_invertible_maps_change_what_they_must(seed, width, other, is_class):
    random = np.random.default_rng(seed)
    x, y = random.standard_normal((60, width)), random.standard_normal((60, other))
    a, b = (random.standard_normal((w, w)) + 3 * np.eye(w) for w in (width, other))
    shift = np.log(abs(np.linalg.det(a)))
    assert nearest_entropy(x @ a).value == pytest.approx(nearest_entropy(x).value + shift, abs=1e-6)
    if is_class:
        y, moved = (y[:, 0] > 0).astype(int), (y[:, 0] <= 0).astype(int) + 7
    else:
        moved = y @ b - 5
    told = nearest_information(x, y)
    assert nearest_information(1e3 * x @ a + 4, moved).value == pytest.approx(told.value, abs=1e-6)
    order = random.permutation(60)
    assert nearest_information(x[order], y[order]) == pytest.approx(told, abs=1e-9)
    assert nearest_information(y, x) == pytest.approx(told, abs=1e-9)


def test_classes_on_both_sides_are_counted():
    x = np.array([0, 0, 1, 1, 2, 2, 0, 1])
    y = np.array([[0, 1], [0, 1], [1, 1], [1, 1], [0, 0], [0, 1], [0, 1], [0, 0]])
    states = np.array([1, 1, 3, 3, 0, 1, 1, 0])
    assert nearest_information(x, y) == pytest.approx((mutual_information(x, states), 0.0))
    assert nearest_information(x == 0, x == 0).value == pytest.approx(entropy((x == 0).astype(int)))


def test_weights_meet_their_conditions():
    for neighbours, width in ((5, 8), (3, 5), (9, 12)):
        w = nearest_weights(neighbours, width)
        assert w.sum() == pytest.approx(1, abs=1e-9)
        j = np.arange(1, neighbours + 1)
        for term in range(1, width // 4 + 1):
            rise = [math.gamma(i + 2 * term / width) / math.gamma(i) for i in j]
            assert abs(w @ rise) < 1e-8 * np.abs(w * rise).max() + 1e-8
        held = {i * neighbours // width - 1 for i in range(1, width + 1)}
        assert not w[[i for i in range(neighbours) if i not in held]].any()
    assert nearest_weights(5, 8) == pytest.approx([9.9, -7.7, -7.2, -1.2, 7.3], abs=0.06)
    assert nearest_weights(4, 4).tolist() == [1, 0, 0, 0]


def test_many_dimensions_are_warned_of():
    rows = np.random.default_rng(0).standard_normal((100, 9))
    with pytest.warns(UserWarning, match="9 dimensions and 5 neighbours give weights of up to"):
        nearest_entropy(rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nearest_entropy(rows[:, :8])


def test_equal_rows_need_jitter():
    rows = np.random.default_rng(0).standard_normal((50, 2))
    rows = np.concatenate([rows, rows[:3]])
    with pytest.raises(ConfigError, match="6 of 53 rows that are equal to another"):
        nearest_entropy(rows)
    found = nearest_entropy(rows, jitter=1e-3)
    assert math.isfinite(found.value) and found == nearest_entropy(rows, jitter=1e-3)
    # Noise of a share of each column's deviation: scales do not matter.
    scaled = nearest_entropy(rows * [1.0, 100.0], jitter=1e-3)
    assert scaled.value == pytest.approx(found.value + math.log(100), abs=1e-9)
    # Both sides have noise of their own: what is equal does not become known without end.
    x = np.random.default_rng(1).standard_normal((500, 1))
    assert 1 < nearest_information(x, x, jitter=0.1).value < 4


ROWS = np.random.default_rng(0).standard_normal((20, 2))
NAN = np.where(np.arange(20)[:, None] == 3, np.nan, ROWS)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: nearest_information(ROWS, ROWS[:19]), "x has 20 rows, y 19"),
        (lambda: nearest_information(ROWS, ROWS), "x and y together: the covariance has rank 2 of"),
        (lambda: nearest_information(NAN, ROWS), "x has NaN or infinity"),
        (lambda: nearest_information(ROWS, np.arange(20) // 4), "x of class 0 has 4 rows; more"),
        (lambda: nearest_information(ROWS, np.full(20, "a")), "y is <U1; floating or whole"),
        (lambda: nearest_entropy(ROWS[:5]), "rows has 5 rows; more than neighbours=5"),
        (lambda: nearest_entropy(np.arange(40).reshape(20, 2)), "floating rows"),
        (lambda: nearest_entropy(np.zeros((20, 0))), "floating rows"),
        (lambda: nearest_entropy(np.stack([ROWS[:, 0], np.ones(20)], 1)), "rank at most 1 of 2"),
        (lambda: nearest_entropy(ROWS, neighbours=0), "neighbours=0"),
        (lambda: nearest_entropy(ROWS, jitter=-1.0), "jitter=-1.0 must be >= 0"),
        (lambda: nearest_entropy(ROWS, jitter=math.nan), "jitter=nan must be >= 0 and finite"),
        (lambda: nearest_weights(1, 8), "neighbours=1 in 8 dimensions: at least 3 are needed"),
    ],
)
def test_bad_input_is_named(call, said):
    with pytest.raises(ConfigError) as caught:
        call()
    assert said in str(caught.value)
