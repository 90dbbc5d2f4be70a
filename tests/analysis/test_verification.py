"""Verdicts against full enumeration and an exact program; safe only with a proof."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.analysis import Cube, Grid, least_margin, verify
from ffnlab.analysis.bounds import linear_bounds
from ffnlab.analysis.intervals import interval_bounds
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.layers import MLP


def network(seed, sizes=(2, 16, 16, 2)):
    """A ReLU network whose classes meet within the unit square."""
    with jax.enable_x64(True):
        net = MLP(sizes, key=jax.random.key(seed), dtype=jnp.float64)
        center = net(jnp.full(sizes[0], 0.5, jnp.float64))
        net.maps[-1].b[...] = -center + jnp.linspace(0.02, 0.0, sizes[-1])
    return net


@functools.cache
def of(net):
    """A function of it, one for all that is asked."""
    return lambda x: net(x)


def logits(net, points):
    with jax.enable_x64(True):
        return np.asarray(jax.vmap(net)(jnp.asarray(points)))


NET = network(0)


@pytest.mark.parametrize("seed", range(6))
def test_a_grid_is_decided_by_all_its_points(seed):
    random = np.random.default_rng(seed)
    for _ in range(10):
        x, step = random.uniform(size=2), float(random.uniform(0.01, 0.2))
        grid = Grid(x, (0, 1), step, 2)
        found = verify(of(NET), grid)
        moves = itertools.product(range(-2, 3), repeat=2)
        points = np.clip([x + step * np.array(move) for move in moves], 0, 1)
        assert {tuple(p) for p in grid.points(0, 25)} == {tuple(p) for p in points}
        classes = logits(NET, points).argmax(1)
        is_safe = bool((classes == found.label).all())
        assert found.status == ("safe" if is_safe else "unsafe")
        if found.witness is not None:
            assert any(np.array_equal(found.witness, point) for point in points)
            assert logits(NET, found.witness[None])[0].argmax() == found.other != found.label
        else:
            assert found.proof == "enumeration" and found.points == 25


@pytest.mark.parametrize("bounds", ["lines", "intervals"])
def test_a_cube_is_decided_as_by_an_exact_program(bounds):
    """HiGHS gives the least margin; a witness is one, and safe is never said where it is not."""
    random, seen = np.random.default_rng(7), set()
    for _ in range(12):
        x, radius = random.uniform(0.2, 0.8, size=2), float(random.choice([0.02, 0.05, 0.1]))
        cube = Cube(x, radius)
        found = verify(of(NET), cube, bounds=bounds)
        exact = least_margin(NET, *cube.ends, found.label)
        seen.add(found.status)
        assert found.status in ("safe", "unsafe")
        assert (exact.margin > 0) == (found.status == "safe")
        if found.witness is not None:
            low, high = cube.ends
            assert np.all(found.witness >= low) and np.all(found.witness <= high)
            values = logits(NET, found.witness[None])[0]
            assert values[found.label] <= np.delete(values, found.label).max()
    assert seen == {"safe", "unsafe"}


def test_the_program_is_exact():
    """No point of a fine grid has a lower margin, its own point has that margin."""
    net = network(3, (2, 8, 3))
    low, high = np.array([0.3, 0.2]), np.array([0.6, 0.7])
    for label in range(3):
        found = least_margin(net, low, high, label)
        axes = [np.linspace(a, b, 101) for a, b in zip(low, high, strict=True)]
        points = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
        values = logits(net, points)
        margins = values[:, label] - np.delete(values, label, axis=1).max(1)
        assert margins.min() >= found.margin - 1e-7
        assert margins.min() == pytest.approx(found.margin, abs=0.05)
        at = logits(net, found.point[None])[0]
        assert at[label] - np.delete(at, label).max() == pytest.approx(found.margin, abs=1e-6)


def test_more_of_a_region_is_never_safer():
    random = np.random.default_rng(11)
    rank = {"unsafe": 0, "safe": 1}
    for _ in range(10):
        x = random.uniform(0.2, 0.8, size=2)
        small, more = (verify(of(NET), Grid(x, (0, 1), 0.05, n)) for n in (1, 3))
        finer = verify(of(NET), Grid(x, (0, 1), 0.025, 2))
        one = verify(of(NET), Grid(x, (0,), 0.05, 1))
        assert rank[more.status] <= rank[small.status] <= rank[one.status]
        assert rank[finer.status] <= rank[small.status]


def test_entries_that_do_not_move_stay():
    x = np.array([0.4, 0.6, 0.1])
    low, high = Cube(x, 0.2, (0, 2)).ends
    np.testing.assert_allclose(low, [0.2, 0.6, 0.0])
    np.testing.assert_allclose(high, [0.6, 0.6, 0.3])
    grid = Grid(x, (2,), 0.2, 1)
    np.testing.assert_allclose(grid.points(0, 3)[:, 2], [0.0, 0.1, 0.3])


def test_what_takes_too_many_cells_is_unknown():
    """A margin of .1 that no bound sees in a wide cell: products are taken apart."""
    hidden = lambda x: jnp.stack([0.1 + x[0] * x[0] - x[0] * x[0], 0.0 * x[0]])  # noqa: E731
    cube = Cube(np.array([0.5]), 0.4)
    found = verify(hidden, cube, most_cells=4)
    assert found.status == "unknown" and "4 cells" in found.proof and found.witness is None
    assert verify(hidden, cube).status == "safe"


def test_a_margin_of_nothing_is_not_safe():
    """Ties, everywhere or at one end: unsafe where a point has it, else never safe."""
    tied = lambda x: jnp.stack([x[0], x[0]])  # noqa: E731
    assert verify(tied, Cube(np.array([0.5]), 0.1)).status == "unsafe"
    at_the_end = lambda x: jnp.stack([1.0 - x[0], 0.0 * x[0]])  # noqa: E731
    found = verify(at_the_end, Cube(np.array([0.5]), 0.5), label=0)
    assert found.status != "safe"


def test_a_model_that_changed_is_asked_anew():
    """A program of the same module may not keep its old weights."""
    net, grid = network(5), Grid(np.array([0.5, 0.5]), (0,), 0.001, 1)
    assert verify(net, grid).label == 0
    with jax.enable_x64(True):
        net.maps[-1].b[...] = net.maps[-1].b[...] + jnp.array([-1.0, 1.0])
    assert verify(net, grid).label == 1
    assert verify(net, Cube(grid.x, 0.001)).label == 1


def test_what_rounds_is_not_proved():
    """Bounds are of exact arithmetic; weights in float32 are exact in float64."""
    cube = Cube(np.array([0.5, 0.5]), 0.01)
    rounded = lambda x: NET(x.astype(jnp.float32)).astype(jnp.float64)  # noqa: E731
    with pytest.raises(ConfigError, match="rounds what it is given to float32"):
        verify(rounded, cube)
    assert verify(rounded, Grid(cube.x, (0,), 0.01, 1)).points == 3
    assert verify(MLP((2, 4, 2), key=jax.random.key(1)), cube).status in ("safe", "unsafe")


def test_another_label_may_be_asked_for():
    found = verify(of(NET), Grid(np.array([0.5, 0.5]), (0,), 0.01, 1), label=0)
    other = verify(of(NET), Grid(np.array([0.5, 0.5]), (0,), 0.01, 1), label=1)
    assert {found.status, other.status} >= {"unsafe"} and other.label == 1


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: Grid(np.ones(2), (0,), 0.0, 1), "step=0.0"),
        (lambda: Grid(np.ones(2), (0,), 0.1, 0), "count=0"),
        (lambda: Grid(np.ones(2), (0, 0), 0.1, 1), r"dims=\[0, 0\]"),
        (lambda: Grid(np.ones(2), (2,), 0.1, 1), r"dims=\[2\]"),
        (lambda: Grid(np.ones(2), (), 0.1, 1), r"dims=\(\)"),
        (lambda: Grid(np.ones(2), (True, False), 0.1, 1), r"dims=\[True, False\]"),
        (lambda: Grid(np.ones(2), (0,), np.inf, 1), "step=inf"),
        (lambda: Grid(np.ones(0), (0,), 0.1, 1), r"x is float64\[0\]"),
        (lambda: least_margin(NET, np.zeros(3), np.ones(3), 0), r"low \(3,\) and high \(3,\)"),
        (lambda: least_margin(NET, np.ones(2), np.zeros(2), 0), "low must not exceed high"),
        (lambda: interval_bounds(jnp.tanh, jnp.ones(2), jnp.zeros(2)), "low must not exceed high"),
        (lambda: linear_bounds(jnp.tanh, jnp.ones(2), jnp.zeros(2)), "low must not exceed high"),
        (lambda: Grid(np.full(2, 1.5), (0,), 0.1, 1), "x lies in 1.5"),
        (lambda: Grid(np.full(2, np.nan), (0,), 0.1, 1), "finite"),
        (lambda: Cube(np.ones(2), 0.0), "radius=0.0"),
        (lambda: Cube(np.ones(2), 0.1, (5,)), r"dims=\[5\]"),
        (lambda: verify(of(NET), Grid(np.ones(2), (0, 1), 0.1, 9), most_points=99), "361 points"),
        (lambda: verify(of(NET), Cube(np.ones(2), 0.1), bounds="no"), "bounds='no'"),
        (lambda: verify(of(NET), Cube(np.ones(2), 0.1), label=2), "label=2"),
        (lambda: verify(lambda x: x.sum(), Cube(np.ones(2), 0.1)), "one input"),
        (lambda: least_margin(NET, np.zeros(2), np.ones(2), 5), "label=5"),
        (lambda: least_margin(NET, np.zeros(2), np.ones(2), 0, seconds=0.0), "seconds=0.0"),
        (
            lambda: least_margin(
                MLP((2, 2), key=jax.random.key(0), activation="tanh"), np.zeros(2), np.ones(2), 0
            ),
            "'tanh'",
        ),
    ],
)
def test_bad_arguments_are_named(call, says):
    with pytest.raises(ConfigError, match=says):
        call()


def test_a_logit_that_is_no_number_proves_nothing():
    bad = lambda x: jnp.stack([x[0] / 0, x[0] * jnp.nan])  # noqa: E731
    with pytest.raises(NumericalError, match="NaN"):
        verify(bad, Cube(np.array([0.5]), 0.1))
