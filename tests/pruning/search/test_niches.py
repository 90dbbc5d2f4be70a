"""Survival over reference directions, against pymoo and by what it promises."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from ffnlab.pruning.search import hypervolume
from ffnlab.pruning.search.niches import (
    associated,
    directions,
    energy,
    nadir,
    niched,
    onto_simplex,
    simplex_grid,
)
from ffnlab.pruning.search.nsga2 import Domain, Operators, algorithm, evolution
from ffnlab.pruning.search.standing import ranks


@pytest.mark.parametrize("case", range(4))
def test_official_scaling_and_niches(official, case):
    points = official[f"many{case}"]
    np.testing.assert_allclose(nadir(points), official[f"nadir{case}"], rtol=1e-9)
    niche, distance = associated(points, nadir(points), official["directions"])
    np.testing.assert_allclose(distance, official[f"distance{case}"], rtol=1e-7, atol=1e-12)
    assert niche.tolist() == official[f"niche{case}"].tolist()


def test_directions_have_no_more_energy_than_the_official_ones(official):
    ours, theirs = directions(20, 3), official["directions"]
    assert ours.shape == (20, 3) and (ours >= 0).all()
    np.testing.assert_allclose(ours.sum(axis=1), 1.0, rtol=1e-12)
    assert energy(ours)[0] <= energy(theirs)[0] + 0.02
    assert np.array_equal(ours, directions(20, 3))
    assert directions(1, 2).tolist() == [[1.0, 0.0]]
    # In two dimensions the ends are taken, and the rest lie between them almost evenly.
    line = np.sort(directions(5, 2)[:, 0])
    np.testing.assert_allclose(line, np.linspace(0, 1, 5), atol=0.03)


def test_the_gradient_of_the_energy_is_that_of_its_values():
    points = np.random.default_rng(0).dirichlet(np.ones(3), 6)
    value, slope = energy(points)
    apart = [np.linalg.norm(points[i] - points[j]) ** -6 for i in range(6) for j in range(i)]
    assert value == pytest.approx(np.log(np.sum(apart)), rel=1e-12)
    for at in ((0, 0), (3, 2), (5, 1)):
        step = np.zeros_like(points)
        step[at] = 1e-6
        found = (energy(points + step)[0] - energy(points - step)[0]) / 2e-6
        assert slope[at] == pytest.approx(found, rel=1e-5)


def test_simplex():
    grid = simplex_grid(2, 3)
    assert sorted(grid.tolist()) == sorted(
        [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0.5, 0, 0.5], [0, 0.5, 0.5]]
    )
    points = np.array([[0.6, 0.6, 0.0], [2.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.9, 0.4, -3.0]])
    expected = [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.75, 0.25, 0.0]]
    np.testing.assert_allclose(onto_simplex(points), expected, atol=1e-12)


@hypothesis.settings(max_examples=30)
@hypothesis.given(size=st.integers(1, 34), seed=st.integers(0, 2**32 - 1), on_grid=st.booleans())
def test_whole_fronts_survive_and_niches_fill_evenly(size, seed, on_grid):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 4, (30, 3)).astype(float) if on_grid else rng.random((30, 3))
    to = simplex_grid(2, 3)
    rows, standing = niched(points, size, rng, to)
    assert len(rows) == len(set(rows.tolist())) == min(size, 30)
    rank = ranks(points)
    assert standing.rank.tolist() == rank[rows].tolist() == sorted(rank[rows].tolist())
    gone = np.setdiff1d(np.arange(30), rows)
    if not len(gone):
        return
    last = rank[rows].max()
    assert rank[gone].min() >= last
    # Nobody of the last front stays out of a niche that has two fewer than one it filled up.
    pool = np.flatnonzero(rank <= last)
    niche, distance = associated(points[pool], nadir(points), to)
    counts = np.bincount(standing.niche, minlength=6)
    filled = standing.niche[standing.rank == last]
    for i, out in enumerate(pool):
        if out not in rows:
            assert counts[niche[i]] >= counts[filled].max() - 1
    # The first to come into an empty niche is the nearest to its direction.
    before = np.bincount(standing.niche[standing.rank < last], minlength=6)
    for place in set(filled.tolist()):
        if before[place] == 0:
            here = [
                distance[i] for i, p in enumerate(pool) if niche[i] == place and rank[p] == last
            ]
            chosen = standing.second[(standing.niche == place) & (standing.rank == last)]
            assert chosen.min() == min(here)


def dtlz2(x):
    """A front that is an eighth of a sphere (Deb et al., 2002)."""
    far = 1 + ((x[:, 2:] - 0.5) ** 2).sum(axis=1)
    a, b = (x[:, 0] * np.pi / 2, x[:, 1] * np.pi / 2)
    parts = [np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)]
    return far[:, None] * np.stack(parts, axis=1)


def reached(seed: int, generations: int) -> float:
    rng = np.random.default_rng(seed)
    of = algorithm(3, 50)._replace(operators=Operators(1.0, 30.0, 0.9))
    within = Domain(np.zeros(7), np.ones(7), lambda x: x)
    going = evolution(dtlz2, rng.random((50, 7)), within, of, rng)
    for _ in range(generations):
        found = next(going)
    return hypervolume(found.points, (1.1, 1.1, 1.1))


@pytest.mark.slow
def test_three_objectives_end_where_pymoo_does(official):
    volumes = [reached(seed, 60) for seed in range(3)]
    print("DTLZ2", volumes, "pymoo", official["dtlz2"])
    assert np.mean(volumes) >= official["dtlz2"].mean() - 0.02


def test_three_objectives_improve():
    assert reached(0, 1) < 0.3 < 0.55 < reached(0, 15)
