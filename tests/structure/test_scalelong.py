"""ScaleLong: what of a U-ViT stays and what changes, skips of other networks, bounds of linear
ones, what noise and gradients become, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ffnlab import losses, models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Conv, scale_skips
from ffnlab.learning import backprop
from ffnlab.models import UViT, UViTConfig
from ffnlab.models.stack import Stacked
from ffnlab.structure import scalelong
from ffnlab.structure.scalelong import block_gradients, noise_response
from ffnlab.testing import equal, tiny
from ffnlab.weights import Dense

CONFIG = UViTConfig((8, 8), 2, 8, 16, 4, 2, channels=1)
IMAGES = jax.random.uniform(jax.random.key(1), (2, 8, 8, 1))
TIMES = jnp.array([10.0, 700.0])
MOMENT = losses.Moment(jnp.int32(0), jax.random.key(2))


@functools.cache
def uvit():
    return UViT(CONFIG, key=jax.random.key(0))


def made(**options):
    return transform.apply(scalelong(**options), uvit())[0]


def test_a_model_gets_another_scaling_and_nothing_else():
    new = made(method="constant", kappa=0.7)
    assert new.config == dataclasses.replace(CONFIG, scaling="constant", kappa=0.7)
    assert equal(new, tree.copy(UViT(new.config, key=jax.random.key(0))))
    assert new.scaling.factors(2) == (0.7, 1.0)
    back, _ = transform.apply(scalelong(method="original"), new)
    np.testing.assert_array_equal(back(IMAGES), uvit()(IMAGES))
    one = made(method="constant", kappa=1.0)
    np.testing.assert_array_equal(one(IMAGES), uvit()(IMAGES))
    assert np.abs(new(IMAGES) - uvit()(IMAGES)).max() > 1e-6
    stacked, _ = transform.apply(scalelong(kappa=0.7), models.stack(uvit()))
    assert equal(models.unstack(stacked), new)


def test_gates_are_drawn_by_the_seed():
    one, same, other = (made(method="apart", seed=seed) for seed in (1, 1, 2))
    assert equal(one, same) and not equal(one, other) and len(one.scaling.gates) == 2
    assert len(made(method="learned").scaling.gates) == 1


def test_what_does_not_fit_is_refused():
    for options, said in (
        ({"method": "half"}, "method='half' is not one of"),
        ({"kappa": 0.0}, r"kappa=0.0 must lie in \(0, 1\]"),
        ({"kappa": 1.1}, "kappa=1.1"),
        ({"seed": -1}, "seed=-1"),
    ):
        with pytest.raises(ConfigError, match=said):
            scalelong(**options)
    with pytest.raises(ConfigError, match="model is a Decoder; a UViT is accepted"):
        transform.apply(scalelong(), tiny())
    for measure, given in ((noise_response, (TIMES, MOMENT.key)), (block_gradients, (MOMENT,))):
        with pytest.raises(ConfigError, match="model is a Decoder; a UViT is accepted"):
            measure(tiny(), IMAGES, *given)
    for size in (0.0, float("nan")):
        with pytest.raises(ConfigError, match=f"size={size} must be positive"):
            noise_response(uvit(), IMAGES, TIMES, jax.random.key(0), size=size)
    small = UViT(dataclasses.replace(CONFIG, image=(4, 4)), key=jax.random.key(0))
    with pytest.raises(ConfigError, match="at least 16 tokens"):
        transform.apply(scalelong(method="learned"), small)
    assert jnp.isfinite(transform.apply(scalelong(), small)[0](IMAGES[:, :4, :4])).all()


# A convolutional network of three levels, whose skips shrink while their channels grow.


CHANNELS = (16, 32, 64)
BY_HAND = {"original": (1, 1, 1), "root": (0.5**0.5,) * 3, "constant": (0.49, 0.7, 1)}


class ConvUNet(nnx.Module):
    """noise = net(images [b, 8, 8, 1], times [b]): the time is a second channel."""

    def __init__(self, method, *, key):
        keys = jax.random.split(key, 7)
        inner = CHANNELS[::-1]
        self.down = nnx.List(
            [
                Conv(n, m, key=k, stride=s, bias=True)
                for n, m, k, s in zip((2, *CHANNELS), CHANNELS, keys[:3], (1, 2, 2), strict=False)
            ]
        )
        self.middle = Conv(64, 64, key=keys[3], bias=True)
        self.up = nnx.List(
            [
                Conv(2 * n, m, key=k, bias=True)
                for n, m, k in zip(inner, (*inner[1:], 1), keys[4:], strict=True)
            ]
        )
        options = {"sizes": inner, "over": "channels", "key": key}
        self.scaling = scale_skips(method, kappa=0.7, **options)

    def __call__(self, x, times):
        told = jnp.broadcast_to(times[:, None, None, None] / 999, x.shape)
        h, skips = jnp.concatenate([x, told], -1), []
        for conv in self.down:
            h = jax.nn.gelu(conv(h))
            skips.append(h)
        h = jax.nn.gelu(self.middle(h))
        for conv, skip in zip(self.up, self.scaling(skips[::-1]), strict=True):
            h = jax.image.resize(h, skip.shape, "nearest")
            h = conv(jnp.concatenate([h, skip], -1))
            h = jax.nn.gelu(h) if conv is not self.up[-1] else h
        return h


@pytest.mark.parametrize("method", BY_HAND)
def test_factors_are_those_of_the_rows_that_read_a_skip(method):
    """Of a map that joins skip and stream: the same function, so that no factor is at another."""
    net = ConvUNet(method, key=jax.random.key(0))
    plain = ConvUNet("original", key=jax.random.key(0))
    for j, (n, factor) in enumerate(zip(CHANNELS[::-1], BY_HAND[method], strict=True)):
        w = plain.up[j].weight.dense().reshape(9, 2 * n, -1).at[:, n:].multiply(factor)
        plain.up[j] = plain.up[j].replace(Dense(w.reshape(18 * n, -1)))
    run = jax.jit(lambda net: net(IMAGES, TIMES))
    np.testing.assert_allclose(run(net), run(plain), atol=1e-5)


@pytest.mark.slow
def test_gates_of_a_convolutional_network_learn():
    net = ConvUNet("apart", key=jax.random.key(0))
    assert [gate.up.weight.shape for gate in net.scaling.gates] == [(4, 64), (2, 32), (1, 16)]
    rule = backprop(losses.denoising, optax.adam(3e-3), informed=True)
    state, found = rule.init(tree.copy(net), jax.random.key(0)), []
    for _ in range(30):
        state, metrics = rule.step(state, jnp.tile(IMAGES, (8, 1, 1, 1)))
        found.append(float(metrics["loss"]))
    assert np.mean(found[-5:]) < 0.9 * np.mean(found[:5])
    for new, old in zip(rule.model(state).scaling.gates, net.scaling.gates, strict=True):
        assert np.abs(new.up.b.get_value() - old.up.b.get_value()).max() > 1e-3
    with pytest.raises(ConfigError, match=r"sizes=\(64, 32, 16\) differ"):
        ConvUNet("learned", key=jax.random.key(0))


# Linear networks, of which everything is known.


def orthogonal(key, count, width):
    return jnp.linalg.qr(jax.random.normal(key, (count, width, width)))[0]


@pytest.mark.parametrize("count", [4, 16, 64])
@pytest.mark.parametrize("norm", [1.0, 0.95])
def test_linear_networks_respond_within_a_geometric_sum(count, norm):
    """h = A_i h down, h = B_j (h + kappa_j s) up, maps of norm M: |dh/dx| <= M^2N + sum of
    kappa_j M^2(N - j), which maps M I reach."""

    def response(how, down, up):
        x, skips = jnp.eye(3), []
        for a in down:
            x = a @ x
            skips.append(x)
        for b, skip in zip(up, how(skips[::-1]), strict=True):
            x = b @ (x + skip)
        return np.linalg.norm(x, 2)

    down, up = (norm * orthogonal(jax.random.key(i), count, 3) for i in (0, 1))
    plain = jnp.broadcast_to(norm * jnp.eye(3), down.shape)
    for method, kappa in (("original", 1.0), ("constant", 0.7), ("constant", 0.5)):
        how = scale_skips(method, kappa=kappa)
        factors = [kappa ** (i - 1) for i in range(1, count + 1)]  # from the outermost
        bound = norm ** (2 * count) + sum(f * norm ** (2 * i + 2) for i, f in enumerate(factors))
        assert response(how, plain, plain) == pytest.approx(bound, rel=1e-5)
        assert response(how, down, up) <= bound * (1 + 1e-5)
        if kappa < 1:
            assert bound <= 1 + norm**2 / (1 - kappa * norm**2)  # at any depth
        elif norm == 1:
            assert bound == 1 + count


@pytest.mark.parametrize("count", [4, 16, 64])
def test_energies_of_independent_skips_add_up(count):
    """The sum of skips of energy 1 that know nothing of each other has energy sum kappa_j^2."""
    skips = list(jnp.eye(count))
    energy = lambda *given, **options: jnp.sum(  # noqa: E731
        jnp.square(sum(scale_skips(*given, **options)(skips)))
    )
    assert energy("original") == count
    assert energy("root") == pytest.approx(count / 2)
    for kappa in (0.5, 0.7):
        found = energy("constant", kappa=kappa)
        assert found == pytest.approx((1 - kappa ** (2 * count)) / (1 - kappa**2), rel=1e-6)
        assert found <= 1 / (1 - kappa**2) * (1 + 1e-6)


# What noise and gradients become.


class Same(nnx.Module):
    """In place of a norm."""

    def __call__(self, x):
        return x


def test_the_response_is_the_derivative_along_the_noise():
    config = dataclasses.replace(CONFIG, depth=2, scaling="constant", kappa=0.7)
    model, key = UViT(config, key=jax.random.key(0)), jax.random.key(3)
    bare = tree.copy(model)
    bare.norm = Same()
    direction = jax.random.normal(key, IMAGES.shape)
    rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))  # noqa: E731
    along = jax.jit(lambda f, x, e: jax.jvp(f, (x,), (e,))[1])
    output = along(jax.tree_util.Partial(lambda m, x: m(x, TIMES), model), IMAGES, direction)
    stream = along(jax.tree_util.Partial(lambda m, x: m.run(x, TIMES)[0], bare), IMAGES, direction)
    found = jax.jit(noise_response)(model, IMAGES, TIMES, key)
    assert found.output == pytest.approx(rms(output) / rms(direction), rel=0.01)
    assert found.stream == pytest.approx(rms(stream) / rms(direction), rel=0.01)


def test_gradients_are_those_of_the_blocks_in_order():
    model = UViT(dataclasses.replace(CONFIG, depth=2), key=jax.random.key(0))
    loss = lambda model: losses.denoising(model, IMAGES, MOMENT)[0]  # noqa: E731
    blocks = jax.jit(jax.grad(loss))(model).layers
    want = [np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(b))) for b in blocks]
    assert np.ptp(want) > 0.1 * np.mean(want)
    for form in (model, models.stack(model)):
        found = jax.jit(block_gradients)(form, IMAGES, MOMENT)
        np.testing.assert_allclose(found, want, rtol=1e-4)


@pytest.mark.slow
def test_gradients_of_a_stack_of_periods_are_in_order():
    model = UViT(dataclasses.replace(CONFIG, depth=8), key=jax.random.key(0))
    columns = [models.stack(with_layers(model, nnx.List(model.layers[i::3]))) for i in range(3)]
    in_threes = with_layers(model, Stacked([m.layers.period[0] for m in columns], 3))
    found, want = (
        jax.jit(block_gradients)(form, IMAGES, MOMENT) for form in (in_threes, models.stack(model))
    )
    np.testing.assert_allclose(found, want, rtol=1e-4)


def with_layers(model, layers):
    new = tree.copy(model)
    new.layers = layers
    return new


@pytest.mark.slow
def test_scaled_networks_of_64_blocks_are_steadier():
    """At their start: their streams respond less to noise, and their gradients are more even."""
    config = dataclasses.replace(CONFIG, depth=64)
    drawn = models.stack(UViT(config, key=jax.random.key(0)))
    measure = jax.jit(
        lambda m: (noise_response(m, IMAGES, TIMES, MOMENT.key), block_gradients(m, IMAGES, MOMENT))
    )
    plain, norms = measure(drawn)
    assert norms.shape == (65,) and jnp.isfinite(norms).all()
    for options in ({"kappa": 0.7}, {"method": "root"}, {"method": "learned"}, {"method": "apart"}):
        response, scaled = measure(transform.apply(scalelong(**options), drawn)[0])
        assert response.stream < plain.stream
        if "kappa" in options:
            assert scaled.max() / scaled.min() < norms.max() / norms.min()
