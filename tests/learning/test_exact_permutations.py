"""Exact permutations: closed forms beside linear algebra, ensembles beside closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab.data import Labelled
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.learning.exact_permutations.closed_form import (
    KERNELS,
    ensemble_size,
    last_layer,
    moments,
    ntk,
    safe_threshold,
)
from ffnlab.learning.exact_permutations.ensemble import (
    averaged,
    basis,
    binary_inputs,
    by_inputs,
    decided,
    exact_permutations,
    kernel_of,
    networks,
    one_hot_squares,
    permuted_bits,
)
from ffnlab.parallel import train

# Closed forms.


def by_algebra(k, ones, kernel):
    """Mean and variance of all outputs by the regression on the basis itself, P the identity."""
    x = (np.arange(k) < ones) / np.sqrt(ones)
    matrix = np.vectorize(kernel)(np.eye(k))
    row = np.vectorize(kernel)(x)
    weights = np.linalg.solve(matrix, row)
    q = np.vectorize(last_layer)(np.eye(k)) / k
    seen = np.vectorize(last_layer)(x) / k
    return weights, last_layer(1.0) / k + weights @ q @ weights - 2 * weights @ seen


@pytest.mark.parametrize("name", [*KERNELS, "cosine"])
def test_moments_are_those_of_linear_algebra(name):
    kernel = KERNELS.get(name, lambda u: 0.3 + u + 0.5 * u**3)
    for k in range(1, 13):
        for ones in range(1, k + 1):
            mean, variance = by_algebra(k, ones, kernel)
            found = moments(k, ones, kernel)
            np.testing.assert_allclose(mean[:ones], found.on, rtol=0, atol=1e-10)
            np.testing.assert_allclose(mean[ones:], found.off, rtol=0, atol=1e-10)
            assert found.variance == pytest.approx(variance, rel=0, abs=1e-10)


def test_kernels_are_expectations():
    """By integration over the angle of a normal vector in the plane of both inputs."""
    angle = np.linspace(0, 2 * np.pi, 200_001)[:-1]
    for u in (-1.0, -0.4, 0.0, 0.7, 1.0):
        one, other = np.cos(angle), np.cos(angle - np.arccos(u))
        relus = np.maximum(one, 0) * np.maximum(other, 0)
        both = (one > 0) & (other > 0)
        # E r^2 = 2 for a normal vector in the plane.
        assert last_layer(u) == pytest.approx(2 * relus.mean(), abs=1e-5)
        assert ntk(u) == pytest.approx(2 * relus.mean() + u * both.mean(), abs=1e-4)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_signs_and_cuts_for_all_sizes(kernel):
    """On above zero, off below it between two ones and k - 1, training inputs exact."""
    for k in range(1, 65):
        found = [moments(k, m, kernel) for m in range(1, k + 1)]
        assert found[0].on == pytest.approx(1) and found[0].variance == pytest.approx(0, abs=1e-12)
        assert found[0].off == pytest.approx(0, abs=1e-12)
        assert all(each.on > 0 for each in found)
        assert all(each.off < -1e-6 for each in found[1 : k - 1])
        cut = safe_threshold(k, kernel)
        assert all(each.off < cut < each.on for each in found[: k - 1]) and cut < found[-1].on
        assert min(each.on for each in found) == pytest.approx(found[-1].on)
        assert cut == pytest.approx(found[-1].on / 2), "half of the least"


def test_the_card_s_figures():
    """Means and ensembles at two ones; .02 is a safe cut up to k = 30."""
    known = {5: (0.5606, -0.0146), 10: (0.5654, -0.0099), 30: (0.5710, -0.0043)}
    for k, means in known.items():
        assert moments(k, 2)[:2] == pytest.approx(means, abs=5e-5)
    assert moments(5, 2, last_layer)[:2] == pytest.approx((0.6017, -0.0395), abs=5e-5)
    assert moments(30, 2, last_layer)[:2] == pytest.approx((0.6324, -0.0088), abs=5e-5)
    assert moments(5, 2).variance == pytest.approx(1.32e-2, abs=5e-5)
    sizes = [ensemble_size(k, 2) for k in (5, 10, 20, 30)]
    np.testing.assert_allclose(sizes, [483, 619, 964, 1341], atol=1)
    sizes = [ensemble_size(k, 2, last_layer) for k in (5, 10, 20, 30)]
    np.testing.assert_allclose(sizes, [64, 107, 201, 303], atol=1)
    assert moments(30, 30).on == pytest.approx(0.046, abs=5e-4) and 0.02 < moments(30, 30).on


def test_the_size_bounds_the_chance():
    """k outputs of N networks miss the cut by the normal tail less often than delta."""
    from scipy import stats

    for k, ones, delta in ((5, 2, 0.1), (10, 3, 0.01)):
        size, found = ensemble_size(k, ones, last_layer, delta=delta), moments(k, ones, last_layer)
        spread = np.sqrt(found.variance / size)
        chance = ones * stats.norm.cdf(-found.on / spread)
        chance += (k - ones) * stats.norm.cdf(found.off / spread)
        assert chance < delta
    assert ensemble_size(5, 1, threshold=0.02) == 1, "no less than one, where nothing varies"
    exact = [ensemble_size(5, m, last_layer, threshold=0.02, inputs=31.0) for m in range(1, 6)]
    assert max(exact) == 54, "a computation of its own"
    assert ensemble_size(5, 2, inputs=31.0) == 908, "log(5 * 31 / .1) in place of log(5 / .1)"
    more = ensemble_size(8, 2, delta=0.1, threshold=0.02, inputs=2.0**8 - 1)
    assert more > ensemble_size(8, 2, delta=0.1, threshold=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(5, 0), "ones=0 of inputs of length k=5: an input of zeros has no dir"),
        (lambda: moments(5, 6), "ones=6 .*1 to k=5 are accepted"),
        (lambda: moments(0, 1), "k=0: inputs have a length of at least 1"),
        (lambda: moments(5, True), "k=5 and ones=True must be whole numbers"),
        (lambda: moments(5, 2, lambda u: 1.0 if u > 0.5 else 0.0), "not positive definite with t"),
        (lambda: moments(5, 2, lambda u: np.nan if 0 < u < 1 else u), "not positive definite with"),
        (lambda: ntk(1.5), "u=1.5 is no cosine"),
        (lambda: last_layer(np.nan), "u=nan is no cosine"),
        (lambda: safe_threshold(0), "k=0: inputs have a length of at least 1"),
        (lambda: ensemble_size(5, 2, inputs=np.inf), "inputs=inf be at least 1 and finite"),
        (lambda: ensemble_size(5, 2, threshold=np.nan), "threshold=nan does not part the means"),
        (
            lambda: permuted_bits(np.eye(3, dtype=int), [0, 0, 1]),
            r"permutation=\[0, 0, 1\] is none",
        ),
        (
            lambda: permuted_bits(np.eye(3, dtype=int), [0, 1]),
            r"shape \(3, 3\): permutation is of 2",
        ),
        (lambda: permuted_bits(np.full((1, 2), 2), [0, 1]), "rows of 0 and 1 are accepted"),
        (lambda: binary_inputs(np.array([["a", "b"]])), "rows of 0 and 1 are accepted"),
        (lambda: kernel_of("standard", 3, 0), "width=0 must be at least 1"),
        (lambda: moments(5, 2, lambda u: 1.0), "kernel has 1.0 at cosine 1 and 1.0 at 0"),
        (lambda: ensemble_size(5, 2, delta=1.0), r"delta=1.0 must lie in \(0, 1\)"),
        (lambda: ensemble_size(5, 2, inputs=0.5), "inputs=0.5 be at least 1"),
        (lambda: ensemble_size(5, 1, threshold=0.0), "threshold=0.0 does not part the means 1.0"),
        (lambda: ensemble_size(5, 5, threshold=0.9), "threshold=0.9 does not part the means"),
        (lambda: basis([0, 0, 1]), r"permutation=\[0, 0, 1\] is none; each of 0 to 2 is needed"),
        (lambda: basis([]), r"permutation=\[\] is none"),
        (lambda: basis(np.array([0.0, 1.0])), r"permutation=\[0.0, 1.0\] is none"),
        (lambda: binary_inputs(np.array([[1, 0], [0, 0]])), "row 1 is zero, which has no"),
        (lambda: binary_inputs(np.array([[2, 0]])), "rows of 0 and 1 are accepted"),
        (lambda: decided(np.ones((1, 2)), 0.0), "threshold=0.0 must be positive"),
        (lambda: kernel_of("mup", 3, 4), "parametrization='mup' is not one of"),
        (lambda: exact_permutations(3, 0, 2), "width=0 must be at least 1"),
        (lambda: exact_permutations(3, 4, 0), "n=0 must be at least 1"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ConfigError, match=message):
        call()


def test_outputs_that_are_no_numbers_decide_nothing():
    with pytest.raises(NumericalError, match="outputs are no finite numbers"):
        decided(np.array([[1.0, np.nan]]), 0.02)


def test_batches_that_are_refused(key):
    rule = exact_permutations(3, 8, 2)
    state = jax.eval_shape(rule.init, networks(3, 8, 2, key), key)
    rule.check(state, basis([2, 0, 1]))
    with pytest.raises(ValueError, match="batch is a ndarray; inputs and classes"):
        rule.check(state, np.eye(3, dtype=np.float32))
    with pytest.raises(ValueError, match="batch has inputs of shape .*the 3 basis vectors"):
        rule.check(state, Labelled(np.ones((3, 3), np.float32), np.arange(3)))
    with pytest.raises(ValueError, match=r"permutation=\[0, 0, 1\] is none"):
        rule.check(state, Labelled(np.eye(3, dtype=np.float32), np.array([0, 0, 1])))


# Inputs and decisions.


@given(st.permutations(range(6)), st.integers(1, 63))
def test_bits_follow_the_permutation(permutation, number):
    bits = np.array([[number >> i & 1 for i in range(6)]])
    matrix = np.stack([np.eye(6)[to] for to in permutation], axis=1)  # column i is P e_i
    np.testing.assert_array_equal(permuted_bits(bits, permutation)[0], matrix @ bits[0])
    x, y = basis(permutation)
    np.testing.assert_array_equal(permuted_bits(x, permutation).argmax(1), y)
    np.testing.assert_allclose(np.linalg.norm(binary_inputs(bits)), 1, rtol=1e-6)


def test_averages_grow_by_one_network():
    outputs = np.random.default_rng(0).normal(size=(4, 2, 3))
    for n in range(1, 5):
        np.testing.assert_allclose(averaged(outputs)[n - 1], outputs[:n].mean(0))


# Networks.


def test_descent_by_inputs_is_that_of_the_ntk_parametrization(key):
    """Three steps of the weights as the parametrization has them: variance 1, scaled forwards."""
    k, width, rate = 3, 8, 0.7
    net, batch = jax.tree.map(lambda leaf: leaf[0], networks(k, width, 1, key)), basis([1, 2, 0])
    x, y = jax.tree.map(jnp.asarray, batch)
    raw = [net.maps[0].weight.dense() * np.sqrt(k), net.maps[1].weight.dense() * np.sqrt(width)]

    def forward(raw, x):
        return jax.nn.relu(x @ raw[0] / np.sqrt(k)) @ raw[1] / np.sqrt(width)

    optimizer = optax.chain(by_inputs(), optax.sgd(rate))
    memory = optimizer.init(net)
    of_raw = jax.jit(jax.grad(lambda raw: one_hot_squares(lambda x: forward(raw, x), (x, y))[0]))
    of_net = jax.jit(jax.grad(lambda net: one_hot_squares(net, (x, y))[0]))
    for _ in range(3):
        raw = [w - rate * g for w, g in zip(raw, of_raw(raw), strict=True)]
        updates, memory = optimizer.update(of_net(net), memory, net)
        net = optax.apply_updates(net, updates)
    np.testing.assert_allclose(net(x), forward(raw, x), atol=1e-6)


def test_the_mean_empirical_kernel_is_the_limit_s(key):
    """At any width, of both parametrizations, from Jacobians; at width 8 both layers count."""
    k, width, count = 4, 8, 4000
    nets = networks(k, width, count, key)
    x = jnp.asarray(binary_inputs(np.array([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0]])))
    jacobian = jax.jit(jax.vmap(jax.jacobian(lambda net: net(x)[:, 0])))(nets)
    parts = (m.weight.w.reshape(count, 3, -1) for m in jacobian.maps)
    products = [np.einsum("cid,cjd->ij", part, part) / count for part in map(np.asarray, parts)]
    cosines = np.asarray(x @ x.T, float)
    for name, scales in (("ntk", (1 / k, 1 / width)), ("standard", (1.0, 1.0))):
        found = k * sum(scale * part for scale, part in zip(scales, products, strict=True))
        wanted = np.vectorize(kernel_of(name, k, width))(cosines)
        # Standard errors of these means are up to 1.7 %.
        np.testing.assert_allclose(found, wanted, rtol=0.05)


def learned(permutation, width, count, steps, key, **options):
    """Outputs of an ensemble for all inputs, [count, 2^k - 1, k], and the inputs' bits."""
    k = len(permutation)
    rule, batch = exact_permutations(k, width, count, **options), basis(permutation)
    start = networks(k, width, count, key)
    outcome = train(rule, start, lambda position: batch, steps, key=key, together=20)
    bits = np.array(list(itertools.product((0, 1), repeat=k)))[1:]
    return np.asarray(rule.predict(outcome.state, binary_inputs(bits))), bits, outcome


def test_a_small_ensemble_learns_its_basis_and_follows_the_permutation(key):
    """Training ends at the basis; another permutation of outputs permutes what is learned."""
    permutation = [2, 0, 1]
    outputs, bits, outcome = learned(permutation, 256, 6, 60, key, chunk=3)
    assert outcome.metrics["worst"] < 1e-8
    single = bits.sum(1) == 1
    wanted = permuted_bits(bits, permutation)
    np.testing.assert_allclose(outputs[:, single], np.stack([wanted[single]] * 6), atol=1e-3)
    means = averaged(outputs)[-1]
    assert means[wanted].min() > 0.2  # at k = 3 the least mean of a 1 is .40, its spread .06


def test_one_output_and_one_input(key):
    outputs, _, _ = learned([0], 16, 2, 40, key)
    np.testing.assert_allclose(outputs, 1, atol=1e-3)
    assert decided(averaged(outputs)[-1], safe_threshold(1)).all()


@pytest.mark.slow
@pytest.mark.parametrize(("parametrization", "kernel"), [("ntk", ntk), ("standard", last_layer)])
def test_finite_ensembles_have_the_moments(parametrization, kernel, key):
    """500 networks of width 2048 at k = 5: mean within .01, variance within 15 %."""
    outputs, bits, outcome = learned(
        [3, 0, 4, 1, 2], 2048, 500, 200, key, parametrization=parametrization
    )
    assert outcome.metrics["worst"] < 1e-10
    pairs, wanted = bits.sum(1) == 2, permuted_bits(bits, [3, 0, 4, 1, 2])
    outputs, wanted, known = outputs[:, pairs], wanted[pairs], moments(5, 2, kernel)
    assert outputs[:, wanted].mean() == pytest.approx(known.on, abs=0.01)
    assert outputs[:, ~wanted].mean() == pytest.approx(known.off, abs=0.01)
    variance = outputs.var(0).mean()
    assert variance == pytest.approx(known.variance, rel=0.15)


@pytest.mark.slow
@pytest.mark.parametrize(("k", "count"), [(5, 100), (8, 200)])
def test_all_inputs_are_right(k, count, key):
    """.02 is a safe cut: every one of the 2^k - 1 inputs comes out exactly."""
    permutation = np.random.default_rng(k).permutation(k)
    outputs, bits, _ = learned(permutation, 2048, count, 200, key)
    found = decided(averaged(outputs)[-1], 0.02)
    assert (found == permuted_bits(bits, permutation)).all()
