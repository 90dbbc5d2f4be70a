"""The rule of a search: what learns from which rows, budgets, what is kept and found, bad input."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.layers.batch_norm import Moments
from ffnlab.learning import members
from ffnlab.losses import labelled, next_token
from ffnlab.models import ResNet, ResNetConfig, removed
from ffnlab.models.cost import multiply_adds
from ffnlab.pruning import TASOptions, tas
from ffnlab.pruning.tas.network import Seen, most_likely, with_candidates, with_moments
from ffnlab.pruning.tas.rule import authors
from ffnlab.pruning.tas.sites import sites_of
from ffnlab.quantization import nearest
from ffnlab.testing import batches, tiny

pytestmark = pytest.mark.standard_promotion  # optax's Adam mixes its counter with floats
KEY = jax.random.key(0)
EXAMPLE = jax.ShapeDtypeStruct((1, 6), jnp.float32)
SGD = optax.sgd(0.1)


def rows(seed, count=8, width=6):
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, width)).astype(np.float32)
    return x, random.integers(0, 3, count)


def searching(**options):
    given = {"example": EXAMPLE, "steps": 20, "options": TASOptions(**options)}
    return tas(labelled, SGD, **given)


def net():
    return MLP((6, 10, 10, 3), key=KEY)


def taken(rule, batch, state=None):
    state = rule.init(net(), KEY) if state is None else state
    return rule.step(state, batch)


def leaves(tree):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


@pytest.fixture(scope="module")
def rule():
    return searching(strength=20.0, rate=0.05)


def test_weights_learn_from_the_first_rows_and_sizes_from_the_others(rule):
    one, _ = taken(rule, (rows(0), rows(1)))
    other, _ = taken(rule, (rows(0), rows(2)))
    third, _ = taken(rule, (rows(3), rows(1)))
    assert same(one.model, other.model) and not same(one.model, third.model)
    assert not same(one.architecture, other.architecture)


def test_sizes_follow_the_weights_of_the_same_step(rule):
    """The loss of the others is asked of the weights after their step."""
    one, _ = taken(rule, (rows(0), rows(1)))
    third, _ = taken(rule, (rows(3), rows(1)))
    assert not same(one.architecture, third.architecture)


def test_sizes_come_into_the_budget_and_stay_known(rule):
    """The network of the last step that met it is what is found, whatever came after."""
    state, batch = None, (rows(0), rows(1))
    state, _ = taken(rule, batch)
    ratios = []
    for _ in range(19):
        before = state.met
        before, kept = int(before), leaves(state.kept)
        state, metrics = rule.step(state, batch)
        ratio = float(metrics["ratio"])
        ratios.append(ratio)
        is_met = 0.45 - 1e-6 <= ratio <= 0.5 + 1e-6
        assert int(state.met) == before + is_met
        if is_met or before == 0:
            assert same(state.kept, state.architecture)
        else:
            assert same(kept, state.kept)
    assert int(state.met) > 0, ratios
    found = rule.finished(state)
    share = multiply_adds(lambda m, x: m(x), found, EXAMPLE) / multiply_adds(
        lambda m, x: m(x), net(), EXAMPLE
    )
    assert 0.45 <= share <= 0.5
    x = jnp.asarray(rows(4)[0])
    np.testing.assert_allclose(found(x), rule.predict(state, x), rtol=1e-5, atol=1e-5)


def test_a_budget_that_was_never_met_is_said():
    rule = searching(target=0.3, slack=0.0, strength=0.0, depth=False)
    state = rule.init(net(), KEY)
    with pytest.warns(UserWarning, match=r"no step of the search met target=0\.3"):
        rule.finished(state)


def test_the_temperature_falls_with_the_steps(rule):
    state, metrics = taken(rule, (rows(0), rows(1)))
    assert float(metrics["tau"]) == pytest.approx(5.0)
    _, metrics = rule.step(state._replace(step=jnp.int32(20)), (rows(0), rows(1)))
    assert float(metrics["tau"]) == pytest.approx(0.1)


@pytest.mark.slow
def test_members_search_at_targets_of_their_own():
    make = lambda target: searching(target=target, strength=50.0, rate=0.1)  # noqa: E731
    rule = members(make, 2, vary={"target": [0.8, 0.3]})
    state = rule.init(jax.vmap(lambda k: MLP((6, 10, 10, 3), key=k))(jax.random.split(KEY)), KEY)
    for _ in range(12):
        state, metrics = rule.step(state, (rows(0), rows(1)))
    sites = sites_of(net())
    widths = jax.vmap(lambda a: most_likely(sites, a).widths)(state.architecture)
    sizes = (np.asarray(widths) * sites.channels).sum((1, 2))
    assert sizes[0] > sizes[1]
    assert np.isfinite(float(metrics["worst"]))


@pytest.mark.slow
def test_a_residual_network_keeps_a_norm_for_each_size():
    config = ResNetConfig((2, 2), (4, 6), 3, channels=2, image=(4, 4))
    model, example = ResNet(config, key=KEY), jax.ShapeDtypeStruct((1, 4, 4, 2), jnp.float32)
    rule = tas(labelled, SGD, example=example, steps=10, options=TASOptions(target=0.9, slack=0.9))
    state = rule.init(model, KEY)
    random = np.random.default_rng(0)
    batch = random.random((6, 4, 4, 2), np.float32), random.integers(0, 3, 6)
    for _ in range(3):
        state, metrics = rule.step(state, (batch, batch))
    means = np.asarray(state.model.stem.norm.mean[...])
    moved = np.any(means != 0, axis=1)
    assert means.shape[0] == len(sites_of(model).widths[0].choices)
    assert 2 <= moved.sum() <= len(moved)
    assert rule.model(state).stem.norm.mean[...].shape == (4,)
    found = rule.finished(state)
    want = rule.predict(state, batch[0])
    np.testing.assert_allclose(found(batch[0]), want, rtol=1e-4, atol=1e-5)
    counted = multiply_adds(lambda m, x: m(x), found, example)
    whole = multiply_adds(lambda m, x: m(x), model, example)
    assert counted < whole and float(metrics["ratio"]) <= 0.9 + 1e-6


def test_a_norm_of_one_size_moves_once_a_pass():
    """A width of one candidate has it twice in its pair."""
    model = ResNet(ResNetConfig((1,), (4,), 3, channels=2, image=(4, 4)), key=KEY)
    sites = sites_of(model, ratios=(1.0,), depth=False)
    whole = with_candidates(model, sites)
    moments = Moments(jnp.float32(9), jnp.arange(4.0), jnp.full(4, 2.0))
    seen = {"stem.norm": Seen(jnp.zeros(2, jnp.int32), moments)}
    found = with_moments(whole, seen).stem.norm
    want = model.stem.norm.statistics(moments)
    np.testing.assert_allclose(found.mean[...], want["mean"][None], rtol=1e-6)
    np.testing.assert_allclose(found.variance[...], want["variance"].settle(1)[None], rtol=1e-6)


def test_packed_weights_are_refused_before_the_first_step():
    packed, _ = transform.apply(nearest(format="int8", group=None), net())
    with pytest.raises(ConfigError, match=r"maps\[0\] is a Int8; only a Dense is searched"):
        searching().init(packed, KEY)


@pytest.mark.slow
def test_a_decoder_is_searched_by_its_next_tokens():
    tokens = batches()
    rule = tas(
        next_token,
        SGD,
        example=jax.ShapeDtypeStruct((1, 11), jnp.int32),
        steps=10,
        options=TASOptions(target=0.7, strength=50.0, rate=0.1, slack=0.2),
    )
    state = rule.init(tiny(), KEY)
    for _ in range(10):
        state, metrics = rule.step(state, (tokens[0], tokens[1]))
    assert int(state.met) and np.isfinite(float(metrics["bits"]))
    found = rule.finished(state)
    want = rule.predict(state, tokens[0])
    np.testing.assert_allclose(found(tokens[0]), want, rtol=1e-4, atol=1e-5)
    assert removed(found) or found.config.hiddens or found.config.hidden < 32


def test_bad_input():
    for name, value, told in (
        ("target", 0.0, "target=0.0 must be above 0"),
        ("target", -1.0, "must be above 0"),
        ("target", 1.5, "target=1.5 is a share of the whole network, at most 1"),
        ("strength", -1.0, "strength=-1.0 must be at least 0"),
        ("rate", -1.0, "rate=-1.0 must be at least 0"),
        ("slack", -0.1, "slack=-0.1 must be at least 0"),
        ("low", 0.0, "low=0.0 and high=5.0: 0 < low <= high"),
        ("high", 0.05, "low=0.1 and high=0.05"),
        ("ratios", (0.0, 1.0), r"must be one or more numbers in \(0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=told):
            TASOptions(**{name: value})
    with pytest.raises(ConfigError, match="steps=0 must be at least 1"):
        tas(example=EXAMPLE, steps=0)
    rule = searching(target=0.05)
    least = 3 * (6 + 3) / (60 + 100 + 30)  # one hidden map of three channels
    with pytest.raises(ConfigError, match=f"target=0.05 is below {least:.4f}"):
        rule.init(net(), KEY)
    searching(target=least).init(net(), KEY)
    state = jax.eval_shape(searching().init, net(), KEY)
    for batch in (rows(0), (rows(0),), (rows(0), rows(1), rows(2)), (rows(0), rows(1, width=5))):
        with pytest.raises(ConfigError, match="a batch of a search is a pair"):
            rule.check(state, batch)
    rule.check(state, (rows(0), rows(1, count=3)))


def test_options_are_the_authors():
    assert dataclasses.asdict(TASOptions()) == {
        "target": 0.5,
        "slack": 0.05,
        "strength": 2.0,
        "ratios": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        "depth": True,
        "tied": True,
        "rate": 1e-3,
        "decay": 1e-3,
        "high": 5.0,
        "low": 0.1,
    }


def test_the_rule_has_the_authors_optimizer_where_none_is_given():
    """SGD with Nesterov momentum .9 and decay 5e-4; the rate falls from .1 to 0 by a cosine."""
    of = authors(4)
    given = of.init(jnp.ones(1))
    memory = tas(example=EXAMPLE, steps=4).init(net(), KEY).optimizer
    wanted = jax.eval_shape(lambda m: of.init(tree.trained(m)[0]), net())
    assert jax.tree.structure(memory) == jax.tree.structure(wanted)
    trace = 0.0
    for step in range(3):
        update, given = of.update(jnp.full(1, 2.0), given, jnp.ones(1))
        slope = 2.0 + 5e-4
        trace = 0.9 * trace + slope
        rate = 0.1 * (1 + np.cos(np.pi * step / 4)) / 2
        np.testing.assert_allclose(update, -rate * (slope + 0.9 * trace), rtol=1e-5)
