"""Verdicts and least margins against z3, exact in rational arithmetic, of networks of few units."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.analysis import Cube, least_margin, verify
from ffnlab.layers import MLP

z3 = pytest.importorskip("z3", reason="z3 is not installed; it comes with the extra 'verify'")


def network(seed, sizes):
    """A ReLU network of short numbers, whose classes meet within the unit square."""
    net = MLP(sizes, key=jax.random.key(seed))
    net = jax.tree.map(lambda leaf: jnp.round(leaf * 16) / 16, net)
    center = net(jnp.full(sizes[0], 0.5))
    net.maps[-1].b[...] = jnp.round(-center * 16) / 16 + jnp.array([1 / 16, 0.0])
    return net


def exact(value):
    """A float as the rational number that it is."""
    part = Fraction(float(value))
    return z3.Q(part.numerator, part.denominator)


def rival_exists(net, low, high, label, margin=0.0):
    """Whether z3 finds a point of the box whose other logit is above the label's less a margin."""
    solver = z3.Solver()
    h = [z3.Real(f"x{i}") for i in range(len(low))]
    for x, a, b in zip(h, low, high, strict=True):
        solver.add(x >= exact(a), x <= exact(b))
    for depth, linear in enumerate(net.maps):
        w, b = np.asarray(linear.weight.dense()), np.asarray(linear.bias)
        h = [
            z3.Sum([exact(w[i, k]) * h[i] for i in range(len(h))]) + exact(b[k])
            for k in range(w.shape[1])
        ]
        if depth < len(net.maps) - 1:
            h = [z3.If(x > 0, x, z3.RealVal(0)) for x in h]
    solver.add(h[1 - label] >= h[label] - exact(margin))
    found = solver.check()
    assert found != z3.unknown
    return found == z3.sat


@pytest.mark.parametrize(
    ("sizes", "seed"),
    [((2, 8, 2), 0), ((2, 8, 2), 1), ((2, 4, 4, 2), 1), ((2, 4, 4, 2), 2)],  # that have both
)
def test_what_is_safe_and_unsafe_is_so_to_another_prover(sizes, seed):
    net = network(seed, sizes)
    random = np.random.default_rng(seed)
    told = []
    for radius in (1 / 64, 1 / 8, 1 / 2):
        for _ in range(3):
            x = np.round(random.random(2) * 64) / 64
            found = verify(net, Cube(x, radius))
            low, high = Cube(x, radius).ends
            assert found.status == (
                "unsafe" if rival_exists(net, low, high, found.label) else "safe"
            )
            least = least_margin(net, low, high, found.label)
            gap = 1e-4 * (1 + abs(least.margin))
            assert rival_exists(net, low, high, found.label, least.margin + gap)
            assert not rival_exists(net, low, high, found.label, least.margin - gap)
            told.append(found.status)
    assert set(told) == {"safe", "unsafe"}
