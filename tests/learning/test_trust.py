"""LAMB and LARS: NumPy and optax in float64, lengths of steps, invariances, stacks, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab.compat import make_mesh
from ffnlab.errors import ConfigError
from ffnlab.learning import lamb, lars, scale_by_trust_ratio, sqrt_batch_schedule
from ffnlab.learning.optimizers.trust import matrices, stacked
from ffnlab.models import Decoder, DecoderConfig, stack, unstack

B1, B2, EPS, DECAY, RATE = 0.9, 0.99, 1e-6, 0.01, 0.02


def everything(params):
    return jax.tree.map(lambda _: True, params)


def draws(steps, seed=0):
    random = np.random.default_rng(seed)
    return [{"w": random.normal(size=(5, 3)), "b": random.normal(size=3)} for _ in range(steps)]


def follow(optimizer, params, gradients, update=None):
    """The parameters after each step."""
    state, update, found = optimizer.init(params), update or jax.jit(optimizer.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


def numpy_lamb(x, gradients, b2=B2, decay=DECAY):
    """Algorithm 2 of the paper, in NumPy."""
    m = v = np.zeros_like(x)
    for t, g in enumerate(gradients, 1):
        m, v = B1 * m + (1 - B1) * g, b2 * v + (1 - b2) * g * g
        u = m / (1 - B1**t) / (np.sqrt(v / (1 - b2**t)) + EPS) + decay * x
        x = x - RATE * np.linalg.norm(x) / np.linalg.norm(u) * u
    return x


def test_lamb_is_the_paper_s_and_optax_s():
    gradients, start = draws(20), draws(1, seed=1)[0]
    with jax.enable_x64(True):
        ours = lamb(RATE, B1, B2, EPS, DECAY, decayed=everything)
        theirs = optax.lamb(RATE, B1, B2, EPS, weight_decay=DECAY)
        params = jax.tree.map(jnp.asarray, start)
        found = [follow(optimizer, params, gradients)[-1] for optimizer in (ours, theirs)]
        for name, x in start.items():
            expected = numpy_lamb(x, [g[name] for g in gradients])
            assert found[0][name].dtype == np.float64
            np.testing.assert_allclose(found[0][name], expected, atol=1e-12, rtol=0)
            np.testing.assert_allclose(found[0][name], found[1][name], atol=1e-12, rtol=0)


def test_defaults_are_the_authors_also_where_eps_counts():
    """Gradients as small as eps: without it, or under the root, the direction is another one."""
    start, small = draws(1, seed=1)[0]["w"], [1e-6 * g["w"] for g in draws(5)]
    with jax.enable_x64(True):
        found = follow(lamb(RATE), {"w": jnp.asarray(start)}, [{"w": g} for g in small])[-1]
        wanted = numpy_lamb(start, small, b2=0.999, decay=0.0)
        np.testing.assert_allclose(found["w"], wanted, atol=1e-12, rtol=0)
        start = jnp.asarray(start)
        found = follow(lars(RATE), {"w": start}, [{"w": g} for g in small])[-1]
        same = follow(lars(RATE, 0.9, 0.0), {"w": start}, [{"w": g} for g in small])[-1]
        np.testing.assert_array_equal(found["w"], same["w"])


def test_lars_is_the_paper_s():
    x, m = draws(1, seed=1)[0]["w"], np.zeros((5, 3))
    with jax.enable_x64(True):
        optimizer = lars(RATE, B1, DECAY)
        found = follow(optimizer, {"w": jnp.asarray(x)}, [{"w": g["w"]} for g in draws(20)])[-1]
        for g in draws(20):
            m = B1 * m + (1 - B1) * (g["w"] + DECAY * x)
            x = x - RATE * np.linalg.norm(x) / np.linalg.norm(m) * m
        np.testing.assert_allclose(found["w"], x, atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [lamb, lars])
def test_a_step_is_as_long_as_the_rate_says(make):
    """Card, point 3: without decay, to 1e-6."""
    with jax.enable_x64(True):
        params = {"w": jnp.asarray(draws(1, seed=1)[0]["w"])}
        path = follow(make(RATE), params, [{"w": g["w"]} for g in draws(8)])
    for before, after in zip([params, *path[:-1]], path, strict=True):
        length = np.linalg.norm(after["w"] - before["w"])
        assert length == pytest.approx(RATE * np.linalg.norm(before["w"]), rel=1e-6)


SCALED = lamb(RATE, eps=1e-12)
SCALED_UPDATE = jax.jit(SCALED.update)


@given(scale=st.floats(-2, 2).map(lambda e: 10.0**e))
@settings(max_examples=20)
def test_the_scale_of_gradients_does_not_matter(scale):
    params = {"w": jnp.asarray(draws(1, seed=1)[0]["w"], jnp.float32)}
    gradients = [{"w": np.float32(g["w"])} for g in draws(5)]
    larger = [{"w": np.float32(scale) * g["w"]} for g in gradients]
    a, b = (follow(SCALED, params, gs, SCALED_UPDATE)[-1]["w"] for gs in (gradients, larger))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bounds_clip_the_weights_norm():
    update, params = {"w": jnp.full((2, 2), 0.5)}, {"w": jnp.full((2, 2), 3.0)}  # norms 1 and 6
    for bounds, ratio in {None: 6.0, (0.0, 2.0): 2.0, (9.0, 10.0): 9.0}.items():
        scale = scale_by_trust_ratio(bounds)
        found, _ = scale.update(update, scale.init(params), params)
        np.testing.assert_allclose(found["w"], 0.5 * ratio, rtol=1e-6)


def test_zero_weights_move_and_zero_gradients_do_not():
    zero, ones = {"w": jnp.zeros((2, 2))}, {"w": jnp.ones((2, 2))}
    (moved,) = follow(lamb(RATE), zero, [ones])
    np.testing.assert_allclose(moved["w"], -RATE, rtol=1e-4)  # ratio 1, Adam's first step
    for params in (zero, ones):
        (still,) = follow(lamb(RATE), params, [zero])
        np.testing.assert_array_equal(still["w"], params["w"])


def test_left_out_leaves_take_adam_s_step():
    params = jax.tree.map(jnp.float32, draws(1, seed=1)[0])
    gradients = [jax.tree.map(jnp.float32, g) for g in draws(6)]
    found = follow(lamb(RATE, B1, B2, EPS, DECAY), params, gradients)[-1]
    adam = follow(optax.adam(RATE, B1, B2, EPS), params, gradients)[-1]
    np.testing.assert_allclose(found["b"], adam["b"], rtol=1e-6)
    assert np.abs(found["w"] - adam["w"]).max() > 1e-2


def test_bfloat16_norms_are_summed_in_float32():
    size = 4096  # 4096 ones sum to 256 in bfloat16
    params, update = ({"w": jnp.full((size, 1), x, jnp.bfloat16)} for x in (2.0, 1.0))
    scale = scale_by_trust_ratio()
    found, _ = scale.update(update, scale.init(params), params)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(found["w"]), 2.0)


CONFIG = DecoderConfig(vocab=16, width=8, hidden=8, layers=2, heads=1, kv_heads=1, head_dim=8)


def test_stacked_layers_have_a_ratio_each(key):
    model = Decoder(CONFIG, key=key)
    model = jax.tree.map(lambda x: x * (1 + x.size), model)  # layers of unlike norms
    gradient = jax.tree.map(lambda x: jnp.sin(x * 1e3), model)
    optimizer = lamb(RATE, weight_decay=DECAY)

    def stepped(model, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(model), model)
        return optax.apply_updates(model, updates)

    alone, together = stepped(model, gradient), unstack(stepped(stack(model), stack(gradient)))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_matrices_are_told_from_stacked_vectors(key):
    model = Decoder(CONFIG, key=key)
    for form in (model, stack(model)):
        found = zip(
            *(jax.tree.leaves(x) for x in (form, matrices(form), stacked(form))), strict=True
        )
        for leaf, is_matrix, axes in found:
            assert is_matrix == (leaf.ndim - axes == 2)
    assert sum(jax.tree.leaves(stacked(stack(model)))) == 9, "7 maps and 2 norms of the block"


def test_shards_take_the_same_way(key):
    mesh = make_mesh((4,), ("data",))
    shards = NamedSharding(mesh, PartitionSpec("data"))
    params = {"w": jax.random.normal(key, (8, 4))}
    gradients = [{"w": jax.random.normal(jax.random.key(i), (8, 4))} for i in range(5)]
    whole = follow(lamb(RATE), params, gradients)[-1]
    cut = follow(lamb(RATE), jax.device_put(params, shards), jax.device_put(gradients, shards))[-1]
    assert cut["w"].sharding.is_equivalent_to(shards, 2)
    np.testing.assert_allclose(whole["w"], cut["w"], atol=1e-6)


def test_rates_for_larger_batches():
    for batch, peak, rise in ((512, 5 / 8e3, 10), (32768, 5e-3, 640)):
        rate = sqrt_batch_schedule(batch, 3200)
        assert (
            float(rate(rise)) == pytest.approx(peak, rel=1e-6) == float(max(map(rate, (0, rise))))
        )
        assert float(rate(3200)) == pytest.approx(0, abs=1e-9)
    longest, peak = sqrt_batch_schedule(10**6, 100), 5 / 8e3 * np.sqrt(10**6 / 512)
    for step in (50, 100):  # warm-up fills the run at most
        assert float(longest(step)) == pytest.approx(peak * step / 100, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lamb(0.1, b1=1.0), "b1=1.0"),
        (lambda: lamb(0.1, b2=-0.1), "b2=-0.1"),
        (lambda: lars(0.1, b1=2.0), "b1=2.0"),
        (lambda: lamb(0.1, bounds=(2.0, 1.0)), "low <= high"),
        (lambda: sqrt_batch_schedule(0, 10), "batch=0"),
        (lambda: sqrt_batch_schedule(8, 10, base_rate=-1.0), "base_rate=-1.0"),
    ],
)
def test_bad_options(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_bad_updates():
    scale, state = scale_by_trust_ratio(), optax.EmptyState()
    with pytest.raises(ValueError, match="params=None"):
        scale.update({"w": jnp.ones(2)}, state, None)
    with pytest.raises(ValueError, match=r"\['w'\] has dtype int32"):
        scale.update({"w": jnp.ones(2, jnp.int32)}, state, {"w": jnp.ones(2, jnp.int32)})
