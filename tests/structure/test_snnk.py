"""SNNK as transforms: what features replace, what is bundled, and the closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import FFN, FourierFeatures, KernelAdapter, KernelFFN, ReluFeatures, Statistic
from ffnlab.learning import backprop
from ffnlab.losses import labelled
from ffnlab.models import ViT, ViTConfig, account, adapters
from ffnlab.parallel import parse_mesh, shardings
from ffnlab.quantization import nearest
from ffnlab.structure import bundle, bundled, snnk, snnk_adapter
from ffnlab.structure.snnk import grown, least_squares
from ffnlab.testing import batches, equal, tiny, tiny_encoder

CONFIG = ViTConfig((4, 4), 2, 8, 32, 2, 2, channels=1, classes=3)
IMAGES = jax.random.uniform(jax.random.key(1), (3, 4, 4, 1))
BASES = {
    "vit": (lambda: ViT(CONFIG, key=jax.random.key(0)), IMAGES),
    "decoder": (tiny, batches()[0]),
    "encoder": (tiny_encoder, batches()[0]),
}


def changed(method, model, seen=()):
    return transform.apply(method, model, seen)[0]


@pytest.mark.parametrize("name", BASES)
def test_the_first_map_becomes_features_initialised_from_it(name):
    make, x = BASES[name]
    model = make()
    new = changed(snnk(features=8), model)
    before, after = model.blocks()[0].ffn, new.blocks()[0].ffn
    is_gated = name == "decoder"
    first = before.gate if is_gated else before.up
    assert isinstance(after, KernelFFN) and isinstance(after.phi, ReluFeatures)
    assert after.phi.floor == -5.0 and after.phi.count == 8
    wanted = after.phi(first.weight.dense().T).T
    np.testing.assert_allclose(after.psi.weight.dense(), wanted, atol=1e-6)
    assert equal(after.down, before.down)
    assert (after.up is None) != is_gated and (not is_gated or equal(after.up, before.up))
    g = [np.asarray(block.ffn.phi.g.get_value()) for block in new.blocks()]
    assert not np.array_equal(g[0], g[1]), "each place draws its own"
    assert equal(changed(snnk(features=8), model), new)
    assert not equal(changed(snnk(features=8, seed=1), model), new)
    assert np.isfinite(new(x)).all()
    fewer = account.parameters(model) - account.parameters(new)
    d, h = first.weight.shape
    bias = 0 if first.bias is None else h
    assert fewer == len(model.blocks()) * ((d - 8) * h + bias)


def test_layers_and_kinds_are_chosen():
    model = BASES["vit"][0]()
    new = changed(snnk(kind="gaussian", length=1.0, where=tree.at("layers[1].ffn")), model)
    assert isinstance(new.layers[0].ffn, FFN)
    assert isinstance(new.layers[1].ffn.phi, FourierFeatures)
    frequencies = new.layers[1].ffn.phi.frequencies.get_value()
    assert len(np.unique(frequencies)) == 16
    assert new.layers[1].ffn.psi.weight.shape == (32, 32)


@pytest.mark.parametrize("name", BASES)
def test_an_adapter_changes_nothing_at_first_and_alone_learns(name):
    make, x = BASES[name]
    model = make()
    new = changed(snnk_adapter(features=4), model)
    np.testing.assert_array_equal(new(x), model(x))
    own = tree.select(new, tree.of_type(KernelAdapter))
    assert len(own) == 2 * len(model.blocks())
    width = next(iter(own.values())).scale.shape[0]
    more = account.parameters(new) - account.parameters(model)
    assert more == len(own) * (4 + 1) * width
    learned, fixed = tree.trained(new, adapters.TRAINS["adapter"])
    arrays = [leaf for leaf in jax.tree.leaves(learned) if leaf is not None]
    assert sum(leaf.size for leaf in arrays) == more


def test_an_adapter_learns_its_scale_first_and_then_its_matrix():
    model = changed(snnk_adapter(features=4), BASES["vit"][0]())
    rule = backprop(labelled, optax.sgd(1.0), trainable=adapters.TRAINS["adapter"])
    state = rule.init(model, jax.random.key(0))
    batch = IMAGES, jnp.array([0, 1, 2])
    states = [jax.tree.map(jnp.copy, model)]
    for _ in range(2):
        state, _ = rule.step(state, batch)
        states.append(jax.tree.map(jnp.copy, rule.model(state)))  # the step takes its state
    a, b, c = (s.layers[0].ffn_adapter for s in states)
    assert equal(a.psi, b.psi) and not equal(b.psi, c.psi)
    assert not equal(a.scale, b.scale)
    assert equal(a.phi, c.phi) and equal(states[0].layers[0].ffn, states[2].layers[0].ffn)


def test_bundled_maps_compute_the_same_with_fewer_numbers():
    model = changed(snnk(features=8), tiny_encoder())
    x = batches()[0]
    small = changed(bundle(), model)
    np.testing.assert_allclose(small(x), model(x), atol=1e-5)
    ffn = small.blocks()[0].ffn
    assert ffn.psi is None and ffn.down.weight.shape == (8, 16)
    assert account.parameters(small) < account.parameters(model)
    biased = tree.map_at(
        model,
        tree.at("layers**.psi"),
        lambda m: m.replace(m.weight, jax.random.normal(jax.random.key(0), m.weight.shape[1:])),
    )
    np.testing.assert_allclose(changed(bundle(), biased)(x), biased(x), atol=1e-4)


def mean_square(model, target, x):
    """Of the first FFN, on what the target's first FFN sees."""
    chosen = tree.at("layers[0].ffn")
    _, seen = tree.capture(target, chosen, x)
    (call,) = seen.values()
    found = model.blocks()[0].ffn(call.input[0])
    return float(jnp.mean((found - call.output) ** 2)), call


@pytest.mark.parametrize("name", BASES)
def test_the_fit_is_the_least_squares_of_what_was_seen(name):
    make, _ = BASES[name]
    model = make()
    seen = [IMAGES, IMAGES[:, ::-1]] if name == "vit" else batches()
    new = changed(bundled(features=8, ridge=0.0), model, seen)
    ffn = new.blocks()[0].ffn
    assert isinstance(ffn, KernelFFN) and ffn.psi is None and ffn.up is None
    calls = [mean_square(new, model, x)[1] for x in seen]
    x = np.concatenate([np.asarray(c.input[0]).reshape(-1, c.input[0].shape[-1]) for c in calls])
    y = np.concatenate([np.asarray(c.output).reshape(-1, c.output.shape[-1]) for c in calls])
    phi = np.asarray(ffn.phi(jnp.asarray(x)), np.float64)
    whole = np.concatenate([phi, np.ones((len(phi), 1))], 1)
    wanted, *_ = np.linalg.lstsq(whole, y.astype(np.float64), rcond=None)
    np.testing.assert_allclose(ffn.down.weight.dense(), wanted[:-1], atol=2e-3)
    np.testing.assert_allclose(ffn.down.bias, wanted[-1], atol=2e-3)
    residual = phi @ np.asarray(ffn.down.weight.dense(), np.float64) + np.asarray(ffn.down.bias) - y
    gradient = whole.T @ residual / len(y)
    assert np.abs(gradient).max() < 1e-5


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 30),
    features=st.integers(1, 8),
    parts=st.integers(1, 4),
    ridge=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**31 - 1),
)
def test_the_closed_form_of_a_triangle(rows, features, parts, ridge, seed):
    """Of rows in parts, fewer than features too, as the normal equations in float64 have it."""
    draw = np.random.default_rng(seed)
    x, y = draw.standard_normal((rows, 3)), draw.standard_normal((rows, 2))
    g = jnp.asarray(draw.standard_normal((features, 3)), jnp.float32)
    phi = ReluFeatures(g, floor=-0.5)
    triangle = jnp.zeros((features + 3, features + 3))
    for a, b in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        if len(a):
            triangle = grown(triangle, phi, jnp.asarray(a), jnp.asarray(b))
    w, bias = least_squares(triangle, features, ridge)
    f = np.asarray(phi(jnp.asarray(x, jnp.float32)), np.float64)
    whole = np.concatenate([f, np.ones((rows, 1))], 1)
    penalty = np.diag([ridge * (f**2).sum() / features] * features + [0.0])
    wanted = np.linalg.lstsq(whole.T @ whole + penalty, whole.T @ y, rcond=None)[0]
    fit = lambda w: whole @ w  # noqa: E731
    np.testing.assert_allclose(fit(np.vstack([w, bias])), fit(wanted), atol=2e-3)


def test_more_features_fit_an_ffn_better_and_the_fit_is_better_than_the_start():
    model, seen = BASES["vit"][0](), [IMAGES]
    errors = []
    for features in (2, 8):
        new = changed(bundled(features=features), model, seen)
        errors.append(mean_square(new, model, IMAGES)[0])
    start = mean_square(changed(snnk(features=8), model), model, IMAGES)[0]
    assert errors[1] < errors[0] < start


def test_scaling_and_permuting_features_changes_nothing():
    new = changed(snnk(features=8), tiny_encoder())
    ffn, x = new.blocks()[0].ffn, jax.random.normal(jax.random.key(0), (4, 16))
    order = jax.random.permutation(jax.random.key(1), 8)
    scale = jnp.linspace(0.5, 2.0, 8)
    y = (ffn.phi(x) * scale)[:, order] @ (ffn.psi.weight.dense() / scale[:, None])[order]
    np.testing.assert_allclose(y, ffn.psi(ffn.phi(x)), atol=1e-5)


def test_the_draw_is_the_same_on_every_device_and_after_a_restore(tmp_path):
    model = changed(snnk(features=8), tiny_encoder())
    models.save(model, tmp_path / "m", format="ffnlab")
    assert equal(models.load(tmp_path / "m"), model)
    mesh = parse_mesh("dp=2", devices=jax.devices()[:2])
    placed = jax.device_put(model, shardings(model, mesh))
    for path, node in tree.select(placed, tree.of_type(Statistic)).items():
        shards = [np.asarray(s.data) for s in node.get_value().addressable_shards]
        assert len(shards) == 2, path
        np.testing.assert_array_equal(*shards)


def test_what_is_refused():
    model = tiny_encoder()
    for make in (snnk, snnk_adapter, bundled):
        for wrong, message in (
            ({"features": 0}, "features=0"),
            ({"kind": "tanh"}, "kind='tanh'"),
            ({"length": -1.0}, "length=-1.0"),
            ({"kind": "cos"}, "needs a length"),
        ):
            with pytest.raises(ConfigError, match=message):
                make(**wrong)
    with pytest.raises(ConfigError, match="ridge=-1"):
        bundled(ridge=-1.0)
    with pytest.raises(ConfigError, match="have adapters already"):
        changed(snnk_adapter(), changed(snnk_adapter(), model))
    packed = changed(nearest(format="int8", group=None), model)
    with pytest.raises(ConfigError, match="not plain matrices"):
        changed(snnk(), packed)
    with pytest.raises(SelectionError):
        changed(snnk(), changed(snnk(), model))
    with pytest.raises(SelectionError):
        changed(bundle(), model)
    with pytest.raises(SelectionError):
        changed(bundle(), changed(snnk(), tiny()))
