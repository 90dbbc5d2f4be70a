"""NoProp: the algebra of its diffusion, locality of its blocks, its three kinds, what it learns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from ffnlab import tree
from ffnlab.data import ArrayBatches, gaussian_clusters
from ffnlab.errors import ConfigError
from ffnlab.learning import LearnedSchedule, NoPropNet, NoPropOptions, noprop
from ffnlab.learning.noprop import core
from ffnlab.learning.noprop.rule import block_losses, continuous, predicted
from ffnlab.weights import Dense

ETA = 0.1
levels = st.lists(st.floats(0.02, 0.98), min_size=2, max_size=8, unique=True).map(sorted)


@given(levels.filter(lambda a: min(np.diff(a)) > 1e-3))
def test_steps_keep_the_marginals(abar):
    with jax.enable_x64(True):
        abar = jnp.asarray(abar)
        a, b, c = core.posterior(abar)
        np.testing.assert_allclose(a + b * jnp.sqrt(abar[:-1]), jnp.sqrt(abar[1:]), atol=1e-10)
        np.testing.assert_allclose(b**2 * (1 - abar[:-1]) + c, 1 - abar[1:], atol=1e-10)
        assert (core.weights_of(abar) > 0).all()


def test_the_cosine_schedule_is_the_authors():
    """From .01 to .99; halfway in the middle, where it is steepest."""
    with jax.enable_x64(True):
        found = core.cosine(jnp.array([0.0, 0.25, 0.5, 1.0]))
    quarter = 0.01 + 0.98 * (1 - np.sqrt(0.5)) / 2
    np.testing.assert_allclose(found, [0.01, quarter, 0.5, 0.99], atol=1e-12)


def test_a_step_is_the_product_of_gaussians():
    """q(z_t | z_{t-1}, y) from q(z_t | y) and q(z_{t-1} | z_t), by brute force on a grid."""
    low, high, u, seen = 0.2, 0.55, 0.7, -0.4
    alpha = low / high  # z_{t-1} = sqrt(alpha) z_t + sqrt(1 - alpha) noise
    density = lambda z: (  # noqa: E731
        stats.norm.pdf(z, np.sqrt(high) * u, np.sqrt(1 - high))
        * stats.norm.pdf(seen, np.sqrt(alpha) * z, np.sqrt(1 - alpha))
    )
    moment = lambda k: integrate.quad(lambda z: z**k * density(z), -9, 9)[0]  # noqa: E731
    mean = moment(1) / moment(0)
    a, b, c = (float(x[0]) for x in core.posterior(jnp.array([low, high])))
    assert a * u + b * seen == pytest.approx(mean, rel=1e-5)
    assert c == pytest.approx(moment(2) / moment(0) - mean**2, rel=1e-4)


def test_oracle_blocks_end_in_the_last_distribution(key):
    """With u_hat = u the chain's z_T has the moments of q(z_T | y)."""
    u, abar, n = jnp.array([1.0, -0.5]), core.cosine(jnp.linspace(0, 1, 11)), 40_000
    first, *rest = jax.random.split(key, 11)
    z = core.sample(jnp.broadcast_to(u, (n, 2)), abar[0], first)
    for a, b, c, k in zip(*core.posterior(abar), rest, strict=True):
        z = a * u + b * z + jnp.sqrt(c) * jax.random.normal(k, z.shape)
    error = float(jnp.sqrt((1 - abar[-1]) / n))
    assert np.abs(z.mean(0) - jnp.sqrt(abar[-1]) * u).max() < 3.5 * error
    np.testing.assert_allclose(z.var(0), 1 - abar[-1], rtol=3.5 * np.sqrt(2 / n))


def test_divergence_from_noise_is_the_integral():
    mean, variance = np.sqrt(0.3) * 0.8, 0.7
    q = stats.norm(mean, np.sqrt(variance))
    found, _ = integrate.quad(lambda z: q.pdf(z) * (q.logpdf(z) - stats.norm.logpdf(z)), -9, 9)
    ours = core.kl_to_noise(jnp.array([0.8]), jnp.float32(0.3))
    assert float(ours) == pytest.approx(found, rel=1e-4)


def error_of_flow(abar, steps):
    """How far Heun's method ends from where the flow towards a constant ends."""
    with jax.enable_x64(True):
        u, z = jnp.array([1.0, 0.0]), jnp.array([0.3, -1.2])
        first, last = abar(jnp.array([0.0, 1.0]))
        gain = jnp.sqrt((1 - last) / (1 - first))
        exact = jnp.sqrt(last) * u + gain * (z - jnp.sqrt(first) * u)
        found = core.heun(lambda t, z: core.flow_field(abar, t, z, u), z, steps)
        return float(jnp.abs(found - exact).max())


@pytest.mark.parametrize(("steps", "error"), [(50, 1.5e-3), (200, 1e-4), (1000, 5e-6)])
def test_the_flow_ends_where_it_must(steps, error):
    assert 0 < error_of_flow(core.cosine, steps) < error


HIDDEN = 3
entries = st.floats(-6, 6)


def shaped(low, span, slope, units):
    """A schedule of given parameters, in float64."""
    schedule = jax.tree.map(
        lambda p: p.astype(float), LearnedSchedule(HIDDEN, key=jax.random.key(0))
    )
    named = {"low": low, "span": span, "slope": slope}
    named |= dict(zip(("into", "bias", "out"), np.reshape(units, (3, HIDDEN)), strict=True))
    for name, value in named.items():
        getattr(schedule, name).set_value(jnp.asarray(value, float))
    return schedule


@settings(max_examples=12)
@given(st.tuples(entries, entries, entries, st.lists(entries, min_size=9, max_size=9)))
def test_a_learned_schedule_rises_between_its_ends_whatever_is_learned(parameters):
    low, span, _, units = parameters
    with jax.enable_x64(True):
        schedule = shaped(*parameters)
        t = jnp.linspace(0.0, 1.0, 41)
        abar = schedule(t)
        assert (jnp.diff(abar) > 0).all()
        last, first = 1 / (1 + np.exp(low)), 1 / (1 + np.exp(low + np.log1p(np.exp(span))))
        np.testing.assert_allclose(abar[jnp.array([0, -1])], [first, last], rtol=1e-12)
        # The closed form in NumPy, and the slope of the signal-to-noise ratio by differences.
        soft, (into, bias, out) = lambda x: np.log1p(np.exp(x)), np.reshape(units, (3, HIDDEN))

        def ratio(t):
            unit = lambda t: 1 / (1 + np.exp(-soft(into) * t - bias))  # noqa: E731
            m = lambda t: soft(parameters[2]) * t + soft(out) @ unit(t)  # noqa: E731
            share = (m(t) - m(0.0)) / (m(1.0) - m(0.0))
            return np.exp(-low - soft(span) * (1 - share))

        for at in (0.1, 0.5, 0.9):
            slope = jax.grad(lambda t: core.snr(schedule(t)))(at)
            assert slope == pytest.approx((ratio(at + 1e-5) - ratio(at - 1e-5)) / 2e-5, rel=1e-5)
        levels = tuple(map(float, abar))
    core.check_schedule(np.asarray(levels))


def test_a_learned_schedule_starts_straight_in_the_logit_between_the_cosine_s_ends(key):
    t = jnp.linspace(0.0, 1.0, 21)
    found = LearnedSchedule(key=key)(t)
    np.testing.assert_allclose(
        found[jnp.array([0, -1])], core.cosine(t)[jnp.array([0, -1])], rtol=1e-5
    )
    straight = jnp.interp(
        t, jnp.array([0.0, 1.0]), jnp.log(found / (1 - found))[jnp.array([0, -1])]
    )
    assert jnp.abs(jnp.log(found / (1 - found)) - straight).max() < 1.0  # of 9.2 in all


@pytest.mark.parametrize(("steps", "error"), [(50, 1e-2), (200, 6e-4), (1000, 3e-5)])
def test_the_flow_of_a_learned_schedule_ends_where_it_must(key, steps, error):
    with jax.enable_x64(True):
        schedule = jax.tree.map(lambda p: p.astype(float), LearnedSchedule(key=key))
    assert 0 < error_of_flow(schedule, steps) < error


def test_a_schedule_is_trained_with_the_rest(batch, key):
    """Every parameter of it has a finite gradient other than zero, and a step moves it."""
    model = network(key, blocks=None, schedule=LearnedSchedule(HIDDEN, key=key))
    options = NoPropOptions("continuous", 1.0, integration=20)
    loss = lambda schedule: continuous(options, fixed(model, schedule), batch, key)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(model.schedule)
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all() and np.any(leaf != 0)
    rule = noprop(options, optax.adam(1e-2))
    state = rule.init(model, key)
    losses = []
    for _ in range(60):
        state, metrics = rule.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    before, after = model.abar(jnp.float32(0.5)), state.model.abar(jnp.float32(0.5))
    assert abs(float(after - before)) > 1e-3
    assert np.isfinite(rule.predict(state, batch[0])).all()


def fixed(model, schedule):
    """The network with another schedule."""
    changed = tree.copy(model)
    changed.schedule = schedule
    return changed


def test_inference_follows_the_schedule(batch, key):
    schedule = LearnedSchedule(HIDDEN, key=key)
    model = network(key, blocks=None, schedule=schedule)
    options = NoPropOptions("continuous", 1.0, integration=7)
    model.out = model.out.replace(Dense(jnp.eye(4)))  # the map to scores starts at zero
    found = predicted(options, model, batch[0], key)
    z, h = jax.random.normal(jax.random.split(key)[0], (9, 4)), 1 / 7

    def field(t, z):
        level, slope = jax.value_and_grad(schedule)(jnp.float32(t))
        guess = jax.nn.softmax(model.blocks(batch[0], z, jnp.full(9, t, jnp.float32)))
        return slope / (2 * (1 - level)) * (guess / jnp.sqrt(level) - z)

    for i in range(7):
        first = field(i * h, z)
        z = z + h / 2 * (first + field((i + 1) * h, z + h * first))
    np.testing.assert_allclose(found, z, rtol=1e-3, atol=1e-4)


def network(key, **options):
    return NoPropNet(5, 4, key=key, **({"hidden": 6, "blocks": 3} | options))


@pytest.fixture
def batch(key):
    return jax.random.normal(key, (9, 5)), jnp.arange(9) % 4


def test_blocks_learn_alone(key, batch):
    model, abar = network(key), core.cosine(jnp.linspace(0, 1, 4))
    losses = lambda model: block_losses(model, *batch, abar, key, ETA)[0]  # noqa: E731
    across = jax.jit(jax.jacobian(losses))(model)
    for leaf in jax.tree.leaves(across.blocks):  # [loss of block, block, …]
        for i in range(3):
            for j in range(3):
                assert np.any(leaf[i, j]) == (i == j)
    assert not np.any(jax.tree.leaves(across.out)[0])


def test_a_block_gets_the_same_gradient_without_the_others(key, batch):
    model, abar = network(key), core.cosine(jnp.linspace(0, 1, 4))
    total = lambda model: block_losses(model, *batch, abar, key, ETA)[0].sum()  # noqa: E731
    together = jax.jit(jax.grad(total))(model).blocks

    def alone(block, t):
        u = model.of_class(batch[1])
        z = core.sample(u, abar[t - 1], jax.random.fold_in(key, t))
        error = jnp.sum((model.guess(block(batch[0], z)) - u) ** 2, axis=-1).mean()
        return 0.5 * 3 * ETA * (core.snr(abar[t]) - core.snr(abar[t - 1])) * error

    for t in range(1, 4):
        block = jax.tree.map(lambda leaf, t=t: leaf[t - 1], model.blocks)
        expected = jax.jit(jax.grad(lambda b, t=t: alone(b, t)))(block)
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a[t - 1], b, rtol=1e-5, atol=1e-6)


KINDS = {
    "discrete": ({}, {}),
    "noisy": ({"noisy": True}, {}),
    "continuous": ({"kind": "continuous", "eta": 1.0, "integration": 30}, {"blocks": None}),
    "learned schedule": (
        {"kind": "continuous", "eta": 1.0, "integration": 30},
        {"blocks": None, "schedule": True},
    ),
    "flow": (
        {"kind": "flow", "eta": 1.0, "integration": 30},
        {"blocks": None, "velocity": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns(kind):
    options, shape = KINDS[kind]
    if "schedule" in shape:
        shape = shape | {"schedule": LearnedSchedule(8, key=jax.random.key(2))}
    data = gaussian_clusters(0, train=600, test=200, classes=4, per_class=2, width=16, noise=0.5)
    model = NoPropNet(16, 4, key=jax.random.key(0), **({"hidden": 32, "blocks": 4} | shape))
    rule = noprop(NoPropOptions(**options), optax.adamw(1e-2))
    batches = ArrayBatches(data[0], 100)
    state = rule.init(model, jax.random.key(1))
    for position in range(200):
        state, metrics = rule.step(state, batches(position))
    x, y = jnp.asarray(data[1].x), data[1].y
    assert np.mean(np.argmax(rule.predict(state, x), -1) == y) > 0.9, metrics
    np.testing.assert_array_equal(state.model.embed.get_value().w, np.eye(4))


def test_a_learned_embedding_moves_and_does_not_collapse(batch, key):
    rule = noprop()
    state = rule.init(network(key, embedding=3), key)
    before = np.asarray(state.model.table)
    for _ in range(100):
        state, _ = rule.step(state, batch)
    table = np.asarray(state.model.table)
    apart = np.linalg.norm(table[:, None] - table[None], axis=-1)[~np.eye(4, dtype=bool)]
    assert np.abs(table - before).max() > 1e-3 and apart.min() > 0.1


def test_prototypes_are_fixed_and_may_be_inputs(batch, key):
    table = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
    rule = noprop()
    state, _ = rule.step(rule.init(network(key, embedding=table), key), batch)
    np.testing.assert_array_equal(state.model.table, table)


def test_inference_is_the_written_formula(key, batch):
    model, x = network(key), batch[0]
    start, _ = jax.random.split(key)
    z = jax.random.normal(start, (9, 4))
    steps = core.posterior(core.cosine(jnp.linspace(0, 1, 4)))
    for t, (a, b, _) in enumerate(zip(*steps, strict=True)):
        block = jax.tree.map(lambda leaf, t=t: leaf[t], model.blocks)
        z = a * jax.nn.softmax(block(x, z)) + b * z
    found = predicted(NoPropOptions(), model, x, key)
    np.testing.assert_allclose(found, model.out(z), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("noisy", [False, True])
def test_ten_blocks_classify_clusters(noisy):
    """The card's third point."""
    from ffnlab.studies.classify import accuracy, learned

    rows, test = gaussian_clusters(0)
    model, rule = NoPropNet(64, 10, key=jax.random.key(0)), noprop(NoPropOptions(noisy=noisy))
    assert accuracy(rule, learned(rule, model, rows, batch=128, steps=620), test) >= 0.97


def test_refusals(key, batch):
    for bad, message in (
        ({"kind": "ct"}, "kind='ct'"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"integration": 0}, "integration=0"),
        ({"abar": (0.5,)}, "T >= 1"),
        ({"abar": (0.1, 0.1)}, "rise strictly"),
        ({"abar": (0.5, 0.2)}, "rise strictly"),
        ({"abar": (0.0, 0.5)}, "inside"),
        ({"abar": (0.5, 1.0)}, "inside"),
    ):
        with pytest.raises(ConfigError, match=message):
            NoPropOptions(**bad)
    for bad in ({"blocks": 0}, {"hidden": 0}, {"embedding": np.zeros((3, 2), np.float32)}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            network(key, **bad)
    for options, shape, message in (
        ({"kind": "flow"}, {}, "does not fit a network of a stack"),
        ({}, {"blocks": None}, "one block that takes the time"),
        ({"abar": (0.1, 0.5)}, {}, "3 blocks need 4"),
        ({"kind": "flow"}, {"blocks": None, "embedding": 3}, "3 outputs, not 4"),
        ({}, {"schedule": LearnedSchedule(key=key)}, "'discrete' learns no schedule"),
        (
            {"kind": "flow"},
            {"blocks": None, "velocity": True, "schedule": LearnedSchedule(key=key)},
            "'flow' learns no schedule",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            noprop(NoPropOptions(**options)).init(network(key, **shape), key)
    with pytest.raises(ConfigError, match="hidden=0"):
        LearnedSchedule(0, key=key)
    rule = noprop()
    with pytest.raises(ValueError, match="; 0 to 3 are there"):
        rule.check(rule.init(network(key), key), (batch[0], np.full(9, 4)))
