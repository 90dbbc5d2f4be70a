"""Members against runs of their own: models, keys, numbers, batches, chunks, groups, meshes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab.data import ArrayBatches
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.learning import (
    NoPropNet,
    NoPropOptions,
    PairLoss,
    backprop,
    counter_current,
    gradient_noise,
    labelled,
    members,
    noprop,
)
from ffnlab.learning.members import member
from ffnlab.parallel import LoopOptions, parse_mesh, train
from ffnlab.testing import counted
from tests.often import often

# A batched product sums in another order than a single one: float32, a few steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-6}


def mlp(key):
    return MLP((5, 8, 4), key=key, bias=False)


def net(key):
    return NoPropNet(5, 4, hidden=6, blocks=2, key=key)


def noisy(eta):
    noise = gradient_noise(eta, key=jax.random.key(5))
    return backprop(labelled, optax.chain(noise, optax.sgd(0.1)))


def dropped(model, batch, moment):
    x, y = batch
    keep = jax.random.bernoulli(moment.key, 0.5, x.shape)
    return labelled(lambda x: model(x * keep), (x, y))


CASES = {
    "backprop": (lambda rate: backprop(labelled, optax.adam(rate)), [1e-2, 1e-3, 3e-3], mlp),
    "gradient_noise": (noisy, [0.0, 0.01, 0.1], mlp),
    "counter_current": (lambda scale: counter_current(PairLoss(scale=scale)), [0.5, 1.0, 2.0], mlp),
    "noprop": (lambda eta: noprop(NoPropOptions(eta=eta)), [0.1, 0.2, 0.4], net),
    "drawing": (
        lambda rate: backprop(dropped, optax.sgd(rate), informed=True),
        [0.1, 0.1, 0.2],
        mlp,
    ),
}


def batches(shared=True):
    random = np.random.default_rng(0)
    x, y = random.normal(size=(24, 5)), random.integers(0, 4, 24)
    source = ArrayBatches((x.astype(np.float32), y.astype(np.int32)), 6)
    if shared:
        return source
    return lambda at: jax.tree.map(lambda *rows: np.stack(rows), *map(source, range(at, at + 3)))


def models(network, key, n=3):
    return jax.vmap(network)(jax.random.split(key, n))


def values_of(make, values):
    name = make.__code__.co_varnames[0]
    return {name: values}, [{name: value} for value in values]


@pytest.mark.parametrize("name", often(CASES, *(name for name in CASES if name != "noprop")))
def test_a_member_is_a_run_of_its_own(key, name):
    make, values, network = CASES[name]
    vary, single = values_of(make, values)
    rule, start, source = members(make, 3, vary=vary), models(network, key), batches()
    state = rule.init(start, key)
    losses = []
    for position in range(3):
        state, metrics = rule.step(state, source(position))
    for i in range(3):
        alone = make(**single[i])
        mine = alone.init(member(start, i), jax.random.fold_in(key, i))
        for position in range(3):
            mine, found = alone.step(mine, source(position))
        losses.append(float(found["loss"]))
        pairs = zip(
            jax.tree.leaves(rule.model(state)), jax.tree.leaves(alone.model(mine)), strict=True
        )
        for a, b in pairs:
            np.testing.assert_allclose(a[i], b, **CLOSE)
        x = source(9)[0]
        np.testing.assert_allclose(rule.predict(state, x)[i], alone.predict(mine, x), **CLOSE)
    assert len({round(loss, 6) for loss in losses}) == 3, "members differ"
    np.testing.assert_allclose(metrics["loss"], np.mean(losses), **CLOSE)
    np.testing.assert_allclose(metrics["worst"], max(losses), **CLOSE)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_chunks_are_all_at_once(key, chunk, shared):
    make = functools.partial(members, lambda: backprop(labelled, optax.adam(1e-2)), 3)
    ends = []
    for rule in (make(shared_batch=shared), make(shared_batch=shared, chunk=chunk)):
        state = rule.init(models(mlp, key), key)
        for position in range(2):
            rule.check(state, batches(shared)(position))
            state, metrics = rule.step(state, batches(shared)(position))
        inputs = batches(shared)(5)[0]
        ends.append((rule.model(state), rule.predict(state, inputs), metrics))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    if not shared:
        one = backprop(labelled, optax.adam(1e-2))
        state = one.init(member(models(mlp, key), 2), key)
        for position in range(2):
            state, _ = one.step(state, batches()(position + 2))
        for a, b in zip(*map(jax.tree.leaves, (ends[0][0], state.model)), strict=True):
            np.testing.assert_allclose(a[2], b, **CLOSE)


def test_members_are_the_same_however_many_there_are(key):
    ends = []
    for n in (2, 3):
        rule = members(lambda: noprop(), n)
        start = jax.tree.map(lambda leaf, n=n: leaf[:n], models(net, key))
        state, _ = rule.step(rule.init(start, key), batches()(0))
        ends.append(rule.model(state))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b[:2], **CLOSE)


@pytest.mark.parametrize(("mesh", "together"), [("", 4), ("dp=2", 1), ("dp=2", 4)])
def test_members_train_in_groups_and_on_meshes(key, mesh, together):
    rule = members(
        lambda rate: backprop(labelled, optax.sgd(rate)), 3, vary={"rate": [0.1, 0.2, 0.3]}
    )
    run = functools.partial(
        train, rule, models(mlp, key), batches(), 5, key=key, options=LoopOptions(log_every=2)
    )
    wanted = run()
    found = run(mesh=parse_mesh(mesh) if mesh else None, together=together)
    for a, b in zip(
        *map(jax.tree.leaves, (rule.model(found.state), rule.model(wanted.state))), strict=True
    ):
        np.testing.assert_allclose(a, b, **CLOSE)
    assert found.metrics.keys() == {"loss", "worst", "accuracy", "gradient_norm"}


def test_a_second_step_compiles_nothing(key):
    rule = members(lambda rate: backprop(labelled, optax.sgd(rate)), 2, vary={"rate": [0.1, 0.2]})
    state, _ = rule.step(rule.init(models(mlp, key, 2), key), batches()(0))
    with counted() as count:
        rule.step(state, batches()(1))
    assert count.programs == 0


def test_labels_of_each_member_are_checked(key):
    for shared in (True, False):
        rule = members(counter_current, 3, shared_batch=shared)
        state = rule.init(models(mlp, key), key)
        x, y = batches(shared)(0)
        rule.check(jax.eval_shape(lambda state=state: state), (x, y))
        bad = y.copy()
        bad[-1, ...] = 4
        with pytest.raises(ValueError, match="0 to 3 are there"):
            rule.check(state, (x, bad))


def test_refusals(key):
    make = lambda eta: noprop(NoPropOptions(eta=eta))  # noqa: E731
    for options, message in (
        ({"n": 0}, "n=0 must be at least 1"),
        ({"n": 2, "chunk": 0}, "chunk=0 must be at least 1"),
        ({"n": 2, "vary": {"eta": [0.1]}}, r"vary\['eta'\] has shape \(1,\); each of 2 members"),
        ({"n": 2, "vary": {"eta": [0.1, -1.0]}}, r"eta=-1.0 must be positive"),
        ({"n": 2}, r"vary=\[\]: make is not called with these: missing .* 'eta'"),
        ({"n": 2, "vary": {"beta": [0.1, 1.0]}}, r"vary=\['beta'\]: make is not called with"),
    ):
        with pytest.raises(ConfigError, match=message):
            members(make, **options)
    rule = members(lambda: backprop(labelled), 3)
    with pytest.raises(ConfigError, match=r"model: .*w.* has shape \(2, 5, 8\); a model of 3"):
        rule.init(models(mlp, key, 2), key)
    with pytest.raises(ConfigError, match=r"jax.vmap\(make_model\)"):
        jax.eval_shape(rule.init, {"w": jnp.float32(0)}, key)
