"""DANN: the authors' shallow algorithm, closed forms of the gradient, which loss moves which part.

`tests/fixtures/dann/record.py` ran the authors' class once; its figures are `official.npz`.
"""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ffnlab import models, tree
from ffnlab.data import ArrayBatches, Labelled, Zipped, moons
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, BatchNorm, Linear, measured, reverse_gradient
from ffnlab.learning import (
    adversarial,
    backprop,
    dann,
    domain_classifier,
    features_of,
    labelled,
    members,
    shallow_dann,
)
from ffnlab.learning.dann.rule import Players, strength_at
from ffnlab.learning.dann.shallow import Weights, with_weights
from ffnlab.losses import Moment
from ffnlab.parallel import LoopOptions, parse_mesh, train

GLOROT = jax.nn.initializers.glorot_uniform()
NOW = Moment(jnp.int32(0), jax.random.key(0))


def shallow_net(key, sizes=(4, 5, 3), dtype=jnp.float32):
    return MLP(sizes, key=key, activation="sigmoid", init=GLOROT, dtype=dtype)


def two_domains(source=6, target=4, width=5, classes=4, seed=0):
    """A batch of unequal domains."""
    random = np.random.default_rng(seed)
    x, t = (random.normal(size=(n, width)).astype(np.float32) for n in (source, target))
    return Labelled(x, random.integers(0, classes, source).astype(np.int32)), t + np.float32(1)


# Gradient reversal.


def test_reversal_is_the_identity_and_turns_the_gradient(key):
    x, g = jax.random.normal(key, (2, 3, 4))
    for f in (reverse_gradient, jax.jit(reverse_gradient), jax.vmap(reverse_gradient, (0, None))):
        y, back = jax.vjp(f, x, 0.3)
        np.testing.assert_array_equal(y, x)
        of_x, of_strength = back(g)
        np.testing.assert_array_equal(of_x, -jnp.float32(0.3) * g)
        assert of_strength == 0


def test_reversal_twice_in_a_graph_and_in_a_scan():
    """d/dx of (a branch as it is + a reversed one + one reversed twice), and of 3 reversals."""
    both = lambda x: x**2 + reverse_gradient(x, 0.5) ** 2 + twice(x) ** 2  # noqa: E731
    twice = lambda x: reverse_gradient(reverse_gradient(x, 2.0), 3.0)  # noqa: E731
    assert float(jax.grad(both)(3.0)) == 6 * (1 - 0.5 + 6.0)
    in_scan = lambda x: jax.lax.scan(  # noqa: E731
        lambda c, s: (reverse_gradient(c, s), None), x, jnp.array([1.0, 2.0, 0.5])
    )[0]
    assert jax.grad(in_scan)(3.0) == -1.0
    assert jax.grad(reverse_gradient)(3.0, 0.0) == 0


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf"), jnp.ones(2)])
def test_a_strength_that_is_none(strength):
    for make in (
        lambda: reverse_gradient(jnp.ones(2), strength),
        lambda: dann(strength=strength),
        lambda: shallow_dann(strength=strength),
    ):
        with pytest.raises(
            ConfigError, match=rf"strength={re.escape(str(strength))} must be a finite number"
        ):
            make()


def test_the_schedule_rises_from_zero():
    p = np.linspace(0, 1, 50)
    found = np.array([float(strength_at(x)) for x in p])
    assert found[0] == 0 and found[-1] == pytest.approx(0.9999, abs=1e-4)
    assert (np.diff(found) > 0).all()
    np.testing.assert_allclose(found, np.tanh(5 * p), atol=1e-6)  # the same function
    for wrong in (-0.01, 1.01, float("nan")):
        with pytest.raises(ConfigError, match=rf"progress={wrong} must lie in 0\.\.1"):
            strength_at(wrong)


# The shallow algorithm.


@pytest.fixture(scope="module")
def official(fixtures):
    """What the authors' class learned, and the script that ran it."""
    folder = fixtures / "dann"
    spec = importlib.util.spec_from_file_location("record", folder / "record.py")
    record = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(record)
    return record, np.load(folder / "official.npz")


@pytest.mark.parametrize("name", ["one pass", "three passes", "no adversary"])
def test_the_shallow_algorithm_is_the_authors(official, name, key):
    record, found = official
    strength, passes = record.CASES[name]
    (x, y, target), (W, V, chosen) = record.rows(), record.stream(passes)
    with jax.enable_x64(True):
        rule = shallow_dann(rate=record.RATE, strength=strength)
        state = rule.init(shallow_net(key, (4, record.HIDDEN, 3), jnp.float64), key)
        zeros = np.zeros(record.HIDDEN), np.zeros(3), np.zeros(record.HIDDEN), np.zeros(())
        drawn = Weights(W.T, zeros[0], V.T, zeros[1], *zeros[2:])
        state = with_weights(state, jax.tree.map(jnp.asarray, drawn))
        for rows in chosen:
            batch = (x, y), target[rows]
            rule.check(state, batch)
            state, metrics = rule.step(state, batch)
        first, last = state.model.maps
        ours = {"W": first.weight.dense().T, "b": first.bias, "V": last.weight.dense().T}
        ours |= {"c": last.bias, "U": state.domain.weight.dense()[:, 0], "d": state.domain.bias[0]}
        for part, value in ours.items():
            np.testing.assert_allclose(value, found[f"{name}.{part}"], rtol=0, atol=1e-12)
        scores = rule.predict(state, jnp.asarray(target))
        np.testing.assert_array_equal(scores.argmax(-1), found[f"{name}.classes"])
        hidden = jax.nn.sigmoid(first(jnp.asarray(target)))
        is_target = np.asarray(state.domain(hidden))[:, 0] < 0
        np.testing.assert_array_equal(is_target, found[f"{name}.domain"])
    assert int(state.step) == passes and float(metrics["loss"]) > 0


def test_figures_of_the_shallow_algorithm_are_those_before_its_step(key):
    """Nats of a row's class, and of its domain with 1 for the source, of one row of either."""
    rule, (x, t) = shallow_dann(strength=0.5), np.float32([[[1, -2]], [[0.5, 3]]])
    state = rule.init(shallow_net(key, (2, 3, 4)), key)
    W, b, V, c = (
        np.asarray(part)
        for linear in state.model.maps
        for part in (linear.weight.dense(), linear.bias)
    )
    U, d = np.float32([2, -1, 0.5]), np.float32(0.3)
    state = with_weights(state, Weights(*map(jnp.asarray, (W, b, V, c, U, d))))
    _, metrics = rule.step(state, ((x, np.int32([2])), t))
    hidden = [1 / (1 + np.exp(-(row[0] @ W + b))) for row in (x, t)]
    scores, (mine, other) = hidden[0] @ V + c, (h @ U + d for h in hidden)
    assert metrics["loss"] == pytest.approx(np.log(np.exp(scores).sum()) - scores[2], rel=1e-5)
    nats = np.log1p(np.exp(-mine)) + np.log1p(np.exp(other))
    assert metrics["domain"] == pytest.approx(nats / 2, rel=1e-5)


def test_networks_that_the_shallow_algorithm_is_not_of(key):
    rule = shallow_dann()
    for network in (
        MLP((4, 5, 3), key=key),
        MLP((4, 5, 5, 3), key=key, activation="sigmoid"),
        MLP((4, 5, 3), key=key, activation="sigmoid", bias=False),
    ):
        with pytest.raises(ConfigError, match="model is an MLP of sizes .* one hidden layer"):
            rule.init(network, key)
    with pytest.raises(ConfigError, match="rate=0.0 must be positive"):
        shallow_dann(rate=0.0)


# The deep form.


def in_float64(model, batch):
    """Cross-entropy in the dtype of the logits."""
    nats = optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1])
    return nats.mean(), {}


@pytest.mark.parametrize("scaled", ["features", "everything"])
def test_the_gradient_is_the_closed_form(key, scaled):
    """All matrices in NumPy, for 6 rows of the source and 4 of the target."""
    strength = 0.7
    sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731
    with jax.enable_x64(True):
        (x, y), t = two_domains()
        x, t = x.astype(float), t.astype(float)
        network = shallow_net(key, (5, 3, 4), jnp.float64)
        domain = MLP((3, 1), key=key, dtype=jnp.float64)
        loss = adversarial(strength, scaled=scaled, loss=in_float64)
        batch = jax.tree.map(jnp.asarray, ((x, y), t))
        of_players = lambda players: loss(players, batch, NOW)[0]  # noqa: E731
        found = jax.jit(jax.grad(of_players))(Players(network, domain))
        W, b = network.maps[0].weight.dense(), network.maps[0].bias
        V, c = network.maps[1].weight.dense(), network.maps[1].bias
        U = domain.maps[0].weight.dense()[:, 0]
        W, b, V, c, U = (np.asarray(leaf) for leaf in (W, b, V, c, U))
        h, there = sigmoid(x @ W + b), sigmoid(t @ W + b)
        e = np.exp(h @ V + c)
        e = (e / e.sum(1, keepdims=True) - np.eye(4)[y]) / len(x)
        # d/d logit of the domain: o for a row of the source, o - 1 for one of the target.
        o, p = sigmoid(h @ U) / len(x), (sigmoid(there @ U) - 1) / len(t)
        back, whole = strength, strength if scaled == "everything" else 1.0
        mine = (e @ V.T - back * np.outer(o, U)) * h * (1 - h)
        others = -back * np.outer(p, U) * there * (1 - there)
        wanted = {
            "network.maps[0].w": x.T @ mine + t.T @ others,
            "network.maps[0].b": mine.sum(0) + others.sum(0),
            "network.maps[1].w": h.T @ e,
            "network.maps[1].b": e.sum(0),
            "domain.maps[0].w": whole * (h.T @ o + there.T @ p)[:, None],
            "domain.maps[0].b": whole * (o.sum() + p.sum())[None],
        }
        ours = jax.tree.leaves(tree.select(found, tree.where(lambda p, n: p in wanted)))
        for value, (path, known) in zip(ours, sorted(wanted.items(), key=order), strict=True):
            np.testing.assert_allclose(value, known, rtol=0, atol=1e-12, err_msg=path)


def order(item):
    """The order of a dictionary's leaves: by path."""
    return item[0]


def norms(gradient):
    """Norms of a gradient by part: features, what reads the classes, what reads the domain."""
    features, label = gradient.network.maps
    return [float(optax.tree.norm(part)) for part in (features, label, gradient.domain)]


@pytest.mark.parametrize("scaled", ["features", "everything"])
def test_which_loss_moves_which_part(key, scaled):
    """From the derivatives of the rule's own losses: the label's never reaches the domain's part,
    the domain's never that of the label, and the features feel the domain reversed.
    """
    (x, y), t = jax.tree.map(jnp.asarray, two_domains())
    players = Players(MLP((5, 3, 4), key=key), MLP((3, 1), key=key))
    reversed_loss = adversarial(0.5, scaled=scaled)
    of = lambda name: lambda p: reversed_loss(p, ((x, y), t), NOW)[1][name]  # noqa: E731
    features, label, domain = norms(jax.jit(jax.grad(of("label")))(players))
    assert features > 0 and label > 0 and domain == 0
    found = jax.jit(jax.grad(of("domain")))(players)
    features, label, domain = norms(found)
    assert features > 0 and label == 0 and domain > 0

    def plain(players):
        """The loss of the domains, nothing reversed."""
        h = [jax.nn.relu(players.network.maps[0](part)) for part in (x, t)]
        logits = [players.domain(part)[:, 0] for part in h]
        return (jax.nn.softplus(logits[0]).mean() + jax.nn.softplus(-logits[1]).mean()) / 2

    straight, back = jax.jit(jax.grad(plain))(players), 0.5 if scaled == "features" else 1.0
    pairs = zip(
        *map(jax.tree.leaves, (found.network.maps[0], straight.network.maps[0])), strict=True
    )
    for ours, theirs in pairs:
        np.testing.assert_allclose(ours, -back * theirs, atol=1e-7)
    for ours, theirs in zip(*map(jax.tree.leaves, (found.domain, straight.domain)), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_the_domain_is_right_where_a_high_logit_is_the_target(key):
    """A share of each domain, and both count half."""
    (x, y), t = jax.tree.map(jnp.asarray, two_domains(source=6, target=4))
    network = MLP((5, 3, 4), key=key)
    first = domain_classifier(0)(network.maps[1], key)
    assert not np.any(first.maps[0].weight.dense()), "a logistic regression begins at zero"
    tells = MLP((3, 1), key=key)
    players = Players(network, tells)
    metrics = adversarial(0.5)(players, ((x, y), t), NOW)[1]
    here, there = (np.asarray(tells(features_of(network, part))) for part in (x, t))
    expected = ((here < 0).mean() + (there > 0).mean()) / 2
    assert metrics["domain_accuracy"] == pytest.approx(expected) and expected != 0.5
    assert metrics["accuracy"] == pytest.approx((network(x).argmax(-1) == y).mean())


def test_lambda_rises_over_the_ramp(key):
    """Halfway the features get tanh(2.5) of what they get at the end; afterwards all of it."""
    players = Players(MLP((5, 3, 4), key=key), MLP((3, 1), key=key))
    batch, loss = jax.tree.map(jnp.asarray, two_domains()), adversarial(2.0, ramp=10)

    @jax.jit
    def of_features(step):
        of_domain = lambda p: loss(p, batch, Moment(step, key))[1]["domain"]  # noqa: E731
        return jax.grad(of_domain)(players).network.maps[0].weight.dense()

    start, half, end, after = map(of_features, jnp.array([0, 5, 10, 30]))
    assert (start == 0).all() and np.abs(end).max() > 0
    np.testing.assert_allclose(half, np.tanh(2.5) / np.tanh(5) * end, rtol=1e-5)
    np.testing.assert_array_equal(after, end)


def test_without_a_target_it_is_backpropagation_bit_for_bit(key):
    """As it trains the MLP that learning rules are compared by."""
    batches = [two_domains(seed=i)[0] for i in range(3)]
    ours, usual = dann(optax.adam(1e-2), strength=0.0), backprop(labelled, optax.adam(1e-2))
    states = [rule.init(MLP((5, 8, 4), key=key), key) for rule in (ours, usual)]
    for batch in batches:
        ours.check(states[0], batch)
        states = [rule.step(s, batch)[0] for rule, s in zip((ours, usual), states, strict=True)]
    models = ours.model(states[0]), usual.model(states[1])
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)


class Parts(nnx.Module):
    """Three parts of one's own: features with a norm, a label that is no linear map."""

    def __init__(self, key):
        self.body = Linear(5, 3, key=key, axes=("embed", "mlp"))
        self.norm = BatchNorm(3, axis="mlp")
        self.label = MLP((3, 6, 4), key=key)

    def features(self, x):
        return jnp.tanh(self.norm(self.body(x)))

    def __call__(self, x):
        return self.label(self.features(x))


class Opinion(nnx.Module):
    """A domain classifier of one's own, [n, 3] -> [n]."""

    def __init__(self, key):
        self.w = nnx.Param(jax.random.normal(key, (3,)), axes=("mlp",))

    def __call__(self, features):
        return features @ self.w[...]


def test_any_parts_and_norms_by_the_moments_of_each_domain(key):
    """The loss by hand, each domain normalized by its own moments, and the running statistics of
    both together.
    """
    network, batch = Parts(key), two_domains(source=6, target=3)
    (x, y), t = jax.tree.map(jnp.asarray, batch)
    rule = dann(optax.sgd(0.0), reader="label", domain=lambda reader, key: Opinion(key))
    state = rule.init(network, key)
    domain = jax.tree.map(jnp.copy, state.model.domain)  # the step donates it
    after, metrics = rule.step(state, ((x, y), t))
    (scores, _), (f, _), (g, _) = (
        measured(Called(network, name), z)
        for name, z in (("__call__", x), ("features", x), ("features", t))
    )
    label = float(labelled(lambda _: scores, (x, y))[0])
    nats = float(jax.nn.softplus(domain(f)).mean() + jax.nn.softplus(-domain(g)).mean())
    assert float(metrics["label"]) == pytest.approx(label, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(label + nats, rel=1e-5)
    rows = np.asarray(network.body(jnp.concatenate([x, t])))
    norm = rule.model(after).norm
    np.testing.assert_allclose(norm.mean[...], 0.1 * rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(norm.variance[...], 0.9 + 0.1 * rows.var(0), rtol=1e-5)


class Called(nnx.Module):
    """A method of a network as a module's call."""

    def __init__(self, network, name):
        self.network, self.name = network, name

    def __call__(self, x):
        return getattr(type(self.network), self.name)(self.network, x)


@pytest.mark.parametrize(
    ("network", "shape", "width"),
    [
        (lambda key: models.ConvNet((2, 3, 5), 4, key=key), (4, 4, 2), 5),
        (
            lambda key: models.ResNet(models.ResNetConfig((1,), (6,), 4, channels=2), key=key),
            (4, 4, 2),
            6,
        ),
        (
            lambda key: models.ViT(
                models.ViTConfig((4, 4), 2, 8, 12, 1, 2, channels=2, classes=4), key=key
            ),
            (4, 4, 2),
            8,
        ),
    ],
)
def test_kinds_of_model_are_trained_as_they_are(network, shape, width, key):
    random = np.random.default_rng(0)
    x, t = (random.random((n, *shape), np.float32) for n in (4, 2))
    batch, rule = ((x, np.arange(4) % 4), t), dann(domain=domain_classifier(0))
    state = rule.init(network(key), key)
    assert state.model.domain.maps[0].weight.shape == (width, 1)
    rule.check(state, batch)
    after, metrics = jax.eval_shape(rule.step, state, batch)
    assert [a.shape for a in jax.tree.leaves(after)] == [a.shape for a in jax.tree.leaves(state)]
    assert metrics["domain"].shape == () and rule.model(state).__class__ is type(network(key))
    assert jax.eval_shape(rule.predict, state, x).shape == (4, 4)
    assert jax.eval_shape(features_of, state.model.network, jnp.asarray(x)).shape == (4, width)


# Batches.

PLAIN = functools.partial(MLP, (5, 8, 4))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (np.ones((4, 5)), "batch is a ndarray; "),
        ((np.ones((4, 5)), np.ones((4, 5))), "no target, or a source without classes"),
        ((np.ones((4, 5)), np.zeros(4, int)), "no target, or a source without classes"),
        (((np.ones((4, 5)), np.zeros(4, int)), np.ones((0, 5))), "target has no rows"),
        (((np.ones((0, 5)), np.zeros(0, int)), np.ones((2, 5))), "source has no rows"),
        (((np.ones((4, 5)), np.zeros(3, int)), np.ones((2, 5))), r"4 rows and classes of shape"),
        (((np.ones((4, 5)), np.full(4, 4)), np.ones((2, 5))), "y has classes from 4 to 4; 0 to 3"),
        (((np.ones((4, 5)), np.zeros(4, int)), np.ones((2, 6))), r"target has inputs of shape \(6"),
        (
            ((np.ones((4, 5)), np.zeros(4, int)), (np.ones((2, 5)), np.zeros(2, int))),
            "target has several parts: give its inputs alone",
        ),
        (((np.ones((4, 5)),), np.ones((4, 5))), "source has 1 parts"),
        (((np.ones((4, 5)), np.full(4, 0.5)), np.ones((2, 5))), "y is float64; classes are whole"),
        (((None, np.zeros(4, int)), np.ones((2, 5))), "source has no rows"),
    ],
)
def test_batches_that_are_refused(batch, message, key):
    rule = dann()
    state = jax.eval_shape(rule.init, PLAIN(key=key), key)
    with pytest.raises(ValueError, match=message):
        rule.check(state, batch)


def test_options_that_are_refused(key):
    with pytest.raises(ConfigError, match="scaled='both' is not one of"):
        dann(scaled="both")
    with pytest.raises(ConfigError, match="ramp=-1 must be at least 0"):
        dann(ramp=-1)
    with pytest.raises(ConfigError, match="hidden=-1 must be at least 0"):
        domain_classifier(-1)
    with pytest.raises(ConfigError, match="a Parts has no head; reader="):
        dann().init(Parts(key), key)
    with pytest.raises(ConfigError, match=r"selects \['maps\[0\]', 'maps\[1\]'\]; one module"):
        dann(reader="maps[*]").init(PLAIN(key=key), key)
    with pytest.raises(ConfigError, match="a MLP reads the features and has no weight"):
        dann(reader="label").init(Parts(key), key)
    wide = dann(domain=lambda reader, key: MLP((8, 2), key=key))
    with pytest.raises(ValueError, match=r"domain gives \(6, 2\) for 6 rows of features"):
        wide.step(wide.init(PLAIN(key=key), key), two_domains())
    shallow = shallow_dann()
    state = shallow.init(shallow_net(key, (5, 3, 4)), key)
    with pytest.raises(ValueError, match="source has 6 rows, target 4; equal numbers"):
        shallow.check(state, two_domains())
    with pytest.raises(ValueError, match=r"source \(6, 4\); the network takes \[n, 5\]"):
        shallow.check(state, two_domains(target=6, width=4))


# The common loop.


def of_moons(rows=8):
    source, target = moons()
    return Zipped(ArrayBatches(source, rows), ArrayBatches(target.x, rows // 2))


def arrays(state):
    keyless = state._replace(key=None)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(keyless)]


def test_the_loop_resumes_groups_and_cuts_it(key, tmp_path):
    """Resumed bit for bit; in groups and on two devices up to rounding."""
    run = functools.partial(train, dann(optax.sgd(0.1)), MLP((2, 6, 2), key=key), of_moons())
    often = LoopOptions(log_every=0, checkpoint_every=3)
    whole = run(7, key=key)
    run(3, key=key, folder=tmp_path / "run", options=often)
    resumed = run(7, key=key, folder=tmp_path / "run", options=often, resume=True)
    for a, b in zip(arrays(whole.state), arrays(resumed.state), strict=True):
        np.testing.assert_array_equal(a, b)
    for more in ({"together": 3}, {"mesh": parse_mesh("dp=2")}):
        other = run(7, key=key, **more)
        for a, b in zip(arrays(whole.state), arrays(other.state), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=7e-6)


def test_members_differ_by_lambda(key):
    keys = jax.random.split(key, 2)
    make = lambda strength: dann(optax.sgd(0.1), strength=strength)  # noqa: E731
    rule, batches = members(make, 2, vary={"strength": [0.0, 3.0]}), of_moons()
    start = jax.vmap(lambda k: MLP((2, 6, 2), key=k))(keys)
    state = rule.init(start, key)
    rule.check(state, batches(0))
    for i in range(3):
        state, _ = rule.step(state, batches(i))
    for i, strength in enumerate((0.0, 3.0)):
        one = make(strength)
        alone = one.init(MLP((2, 6, 2), key=keys[i]), jax.random.fold_in(key, i))
        for j in range(3):
            alone, _ = one.step(alone, batches(j))
        mine = jax.tree.map(lambda leaf, i=i: leaf[i], state)
        for a, b in zip(arrays(mine), arrays(alone), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_parts_of_a_batch_are_the_batch(key):
    batch, states = two_domains(), []
    for parts in (1, 2):
        rule = dann(optax.sgd(0.1), microbatches=parts)
        states.append(rule.step(rule.init(PLAIN(key=key), key), batch)[0])
    for a, b in zip(*map(arrays, states), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
