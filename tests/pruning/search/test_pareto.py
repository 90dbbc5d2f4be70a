"""Fronts and hypervolumes, against brute force and what pymoo computes."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.pruning.search import best_within, front, hypervolume, knee
from ffnlab.pruning.search.pareto import dominates


def cells(points: np.ndarray, reference: np.ndarray) -> float:
    """The volume counted cell by cell of the grid that all coordinates make."""
    columns = zip(points.T, reference, strict=True)
    edges = [np.unique([*column[column < r], r]) for column, r in columns]
    lower = np.stack(np.meshgrid(*(e[:-1] for e in edges), indexing="ij"), -1)
    sizes = np.stack(np.meshgrid(*map(np.diff, edges), indexing="ij"), -1).prod(-1)
    return sum(
        sizes[at]
        for at in np.ndindex(sizes.shape)
        if any((point <= lower[at]).all() for point in points)
    )


def is_dominated(point, points) -> bool:
    return any(all(a <= b for a, b in zip(o, point, strict=True)) and tuple(o) != tuple(point)
               for o in points)  # fmt: skip


POINTS = st.tuples(st.integers(1, 3), st.integers(0, 7), st.integers(0, 2**32 - 1))


@hypothesis.settings(max_examples=40)
@hypothesis.given(drawn=POINTS, on_grid=st.booleans())
def test_hypervolume_is_that_of_all_cells(drawn, on_grid):
    m, n, seed = drawn
    rng = np.random.default_rng(seed)
    points = rng.integers(-2, 4, (n, m)) / 2.0 if on_grid else rng.normal(size=(n, m))
    reference = rng.integers(0, 3, m).astype(float)
    expected = cells(points, reference) if n else 0.0
    assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@hypothesis.settings(max_examples=40)
@hypothesis.given(drawn=POINTS)
def test_the_front_is_what_nothing_dominates(drawn):
    m, n, seed = drawn
    points = np.random.default_rng(seed).integers(0, 4, (n, m)).astype(float)
    rows = front(points)
    found = points[rows].tolist()
    expected = {tuple(p) for p in points.tolist() if not is_dominated(p, points.tolist())}
    assert {tuple(p) for p in found} == expected and len(found) == len(expected)
    assert found == sorted(found)
    above = dominates(points, points)
    for i, j in np.ndindex(above.shape):
        a, b = points[i].tolist(), points[j].tolist()
        assert above[i, j] == (a != b and is_dominated(b, [a]))


@pytest.mark.parametrize("case", range(5))
def test_official_hypervolumes_and_fronts(official, case):
    points = official[f"points{case}"]
    volume = hypervolume(points, np.full(points.shape[1], 1.1))
    assert volume == pytest.approx(float(official[f"volume{case}"]), rel=1e-12)
    assert np.array_equal(points[front(points)], official[f"front{case}"])


def test_known_volumes():
    # The front of ZDT1 is f2 = 1 - sqrt(f1): the volume below (1.1, 1.1) is .01 + .2 + 2/3.
    f1 = np.linspace(0, 1, 20001)
    whole = hypervolume(np.stack([f1, 1 - np.sqrt(f1)], axis=1), (1.1, 1.1))
    assert whole == pytest.approx(0.2 + 0.01 + 2 / 3, abs=1e-4)
    assert hypervolume(np.array([[1.0, 1.0, 1.0], [0.0, 2.0, 2.5]]), (3.0, 3.0, 3.0)) == 8.5
    assert hypervolume(np.array([[3.0, 0.0]]), (3.0, 3.0)) == 0.0  # on the reference
    assert hypervolume(np.array([[2.0], [1.5]]), (3.0,)) == 1.5
    assert hypervolume(np.zeros((0, 3)), (1.0, 1.0, 1.0)) == 0.0


def test_more_points_never_make_it_smaller():
    rng = np.random.default_rng(0)
    points = rng.random((40, 3))
    grown = [hypervolume(points[:n], (1.0, 1.0, 1.0)) for n in range(41)]
    assert (np.diff(grown) >= -1e-15).all() and grown[-1] > grown[1] > 0


def test_knee_is_the_scaled_nearest_and_on_the_front():
    points = np.array([[0.0, 1000.0], [0.4, 900.0], [0.3, 100.0], [1.0, 0.0], [0.31, 101.0]])
    assert knee(points) == 2
    assert knee(np.array([[2.0], [1.0], [1.0]])) == 1
    assert knee(np.array([[1.0, 5.0], [1.0, 5.0]])) == 0  # no range
    with pytest.raises(ConfigError, match="no rows"):
        knee(np.zeros((0, 2)))


def test_best_within_limits():
    points = np.array([[0.1, 9.0, 1.0], [0.2, 5.0, 2.0], [0.2, 4.0, 3.0], [0.9, 1.0, 0.0]])
    names = ("loss", "macs", "ms")
    assert best_within(points, names, {}) == 0
    assert best_within(points, names, {"macs": 5.0}) == 2
    assert best_within(points, names, {"macs": 5.0, "ms": 2.0}) == 1
    with pytest.raises(ConfigError, match=r"no point found is within; .* {'macs': 1.0}"):
        best_within(points, names, {"macs": 0.5})
    with pytest.raises(ConfigError, match="'mac' is no objective; did you mean 'macs'"):
        best_within(points, names, {"mac": 0.5})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_objectives_must_be_finite_and_one_to_three(value):
    points = np.ones((3, 2))
    points[1, 1] = value
    for call in (front, knee, lambda p: hypervolume(p, (2.0, 2.0))):
        with pytest.raises(ConfigError, match="objectives of point 1 are .*, not finite"):
            call(points)
        with pytest.raises(ConfigError, match="4 objectives; one to 3"):
            call(np.ones((2, 4)))
    for reference in ((2.0,), (2.0, value)):
        with pytest.raises(ConfigError, match="must be a finite number for each of the 2"):
            hypervolume(np.ones((1, 2)), reference)
