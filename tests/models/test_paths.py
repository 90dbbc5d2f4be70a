"""The ensemble of paths in a trunk: what it is equal to, its gradients, what has none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.opening import format_of
from ffnlab.layers import Block, Context, EnsembleScale, Join, LayerInputs
from ffnlab.models import ViT, ViTConfig, trunk
from ffnlab.models.paths import path_names, sizes_of, with_ensemble
from ffnlab.structure import share
from ffnlab.testing import batches, equal, tiny, tiny_encoder

IMAGES = jax.random.uniform(jax.random.key(1), (3, 8, 8, 1))


def vit(pool="mean", layers=3, **more) -> ViT:
    """A vision transformer of width 8."""
    config = ViTConfig((8, 8), 4, 8, 12, layers, 2, channels=1, classes=3, pool=pool, **more)
    return ViT(config, key=jax.random.key(0))


def weighed(model, seed=4, width=None):
    """The model with weights of its paths that differ, one of them 0."""
    n = len(path_names(model))
    shape = (n,) if width is None else (n, width)
    kept = np.ones(n)
    kept[1] = 0
    scale = jax.random.uniform(jax.random.key(seed), shape)
    return with_ensemble(model, EnsembleScale(kept, scale))


FORMS = {
    "token": lambda: vit("token", 2),
    "stacked": lambda: models.stack(vit()),
    "recomputed": lambda: models.remat(models.stack(vit()), "nothing"),
    "decoder": tiny,
    "decoder, stacked": lambda: models.stack(tiny()),
    "decoder, cut": lambda: models.remove(tiny(), [1, 2]),
}


@functools.cache
def form(name):
    """A model that has paths, in one of its forms, with its input."""
    return FORMS[name](), batches()[0] if "decoder" in name else IMAGES


run = jax.jit(lambda model, x: model(x))
SLOW = ("recomputed", "decoder", "decoder, cut")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in FORMS]
)
def test_weights_of_one_change_nothing(name):
    model, x = form(name)
    n = len(path_names(model))
    ones = with_ensemble(model, EnsembleScale(np.ones(n), jnp.ones((n, model.config.width))))
    np.testing.assert_allclose(run(ones, x), run(model, x), atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "layers"), [pytest.param("list", 12, marks=pytest.mark.slow), ("stack", 2)]
)
def test_equal_in_float64(shape, layers):
    with jax.enable_x64(True):
        model = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), vit(layers=layers))
        model = models.stack(model) if shape == "stack" else model
        h = jax.random.normal(jax.random.key(2), (2, 5, 8), jnp.float64)
        context = Context({}, {None: None})
        ones = EnsembleScale(np.ones(2 * layers + 1), jnp.ones((2 * layers + 1, 8)))
        both = jax.jit(lambda layers, ensemble: trunk.run(layers, h, context, ensemble=ensemble)[0])
        plain, found = (both(model.layers, ensemble) for ensemble in (None, ones))
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("token", "recomputed")),
        "decoder, stacked",
    ],
)
def test_gradients_are_those_of_the_unrolled_sum(name):
    """Of all parameters and of the weights, against sums whose derivative jax takes itself."""
    model, x = form(name)
    model = weighed(model, width=model.config.width)
    trained, fixed = tree.trained(model)

    def unrolled(trained):
        model = tree.combine(trained, fixed)
        _, outputs = model.run(x, branches=True)
        start = model.embed_images(x) if isinstance(model, ViT) else model.embed_tokens(x)
        parts = jnp.concatenate([start[None], outputs.branches.reshape(-1, *start.shape)])
        e = model.ensemble(parts)
        y = model.output(model.norm(e)) if isinstance(model, ViT) else model.logits(e)
        return jnp.sum(jnp.sin(y))

    direct = lambda trained: jnp.sum(jnp.sin(tree.combine(trained, fixed)(x)))  # noqa: E731
    step = jax.tree.map(jnp.ones_like, trained)

    @jax.jit
    def both(trained):
        _, slope = jax.jvp(direct, (trained,), (step,))
        return *(jax.value_and_grad(f)(trained) for f in (direct, unrolled)), slope

    (value, found), (wanted, expected), slope = both(trained)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), found, expected
    )
    assert np.abs(found.ensemble.scale[...]).min(axis=1)[2:].min() > 0
    total = sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(expected))
    np.testing.assert_allclose(slope, total, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name", [pytest.param("token", marks=pytest.mark.slow), "decoder, stacked"]
)
def test_components_keep_their_bits_while_weights_change(name):
    model, x = form(name)
    both = jax.jit(lambda m: (m.run(x, branches=True), m(x)))
    (h, first), y = both(weighed(model, 4))
    (other, second), z = both(weighed(model, 5))
    np.testing.assert_array_equal(first.branches, second.branches)
    assert np.abs(h - other).max() > 1e-3 and np.abs(y - z).max() > 1e-5


def test_blocks_of_an_ensemble_are_captured():
    """What they saw and gave, though the ensemble takes their branches apart."""
    model = weighed(vit("token", 2))
    output, seen = tree.capture(model, lambda path, node: isinstance(node, Block), IMAGES)
    np.testing.assert_array_equal(output, model(IMAGES))
    assert list(seen) == ["layers[0]", "layers[1]"]
    first, second = seen.values()
    np.testing.assert_array_equal(first.output[0], second.input[0])
    added = sum(branch for branch in first.output[2].branches)
    np.testing.assert_allclose(first.input[0] + added, first.output[0], atol=1e-6)


def test_leaving_out_of_the_ensemble_is_not_leaving_out_of_the_features():
    model, x = form("decoder")
    kept = np.ones(7)
    kept[1] = 0  # unit 0, of which the others then know
    gates = jnp.ones((3, 2)).at[0, 0].set(0)
    of_head = run(with_ensemble(model, EnsembleScale(kept)), x)
    of_all = jax.jit(lambda m: m(x, inputs=LayerInputs(gates=gates)))(model)
    assert np.abs(of_head - of_all).max() > 1e-3
    # The last unit feeds no other: there the two are one.
    last = np.ones(7)
    last[6] = 0
    gates = jnp.ones((3, 2)).at[2, 1].set(0)
    of_head = run(with_ensemble(model, EnsembleScale(last)), x)
    of_all = jax.jit(lambda m: m(x, inputs=LayerInputs(gates=gates)))(model)
    np.testing.assert_allclose(of_head, of_all, atol=1e-5)


@pytest.mark.parametrize("shape", ["list", pytest.param("stack", marks=pytest.mark.slow)])
def test_generation_with_a_cache_is_that_without(shape):
    model, tokens = weighed(tiny(), width=16), batches()[0][:, :5]
    model = models.stack(model) if shape == "stack" else model
    whole, cache = run(model, tokens), model.init_cache(2, 5)
    extend = jax.jit(lambda m, t, c: m.extend(t, c))
    for i in range(5):
        logits, cache = extend(model, tokens[:, i : i + 1], cache)
        np.testing.assert_allclose(logits[:, 0], whole[:, i], atol=2e-5)


@pytest.mark.parametrize("name", [pytest.param("stacked", marks=pytest.mark.slow), "decoder, cut"])
def test_only_the_native_format_says_it(name, tmp_path):
    model, x = form(name)
    assert type(model).ensemble is None and "ensemble" not in vars(model)
    model = weighed(model, width=model.config.width)
    assert format_of(model) == "ffnlab"
    with pytest.raises((ConfigError, FormatError), match="ensemble.kept has no place"):
        models.save(model, tmp_path / "other")
    models.save(model, tmp_path / "m", format="ffnlab")
    back = models.load(tmp_path / "m")
    assert equal(back, model)
    np.testing.assert_array_equal(run(back, x), run(model, x))


def block_with(join) -> Block:
    """A block whose second sublayer joins the stream otherwise."""
    old = tiny().layers[0]
    return Block(old.attn_norm, old.attn, old.ffn_norm, old.ffn, joins=(Join(), join))


def of_blocks(join):
    """A decoder of such blocks."""
    model = tiny()
    model.layers = nnx.List([block_with(join)])
    return model


ONES = EnsembleScale(np.ones(7))


@pytest.mark.parametrize(
    ("make", "ensemble", "message"),
    [
        (lambda: of_blocks(Join(norm="after")), ONES, r"after the sum \(post-norm\)"),
        (lambda: of_blocks(Join(residual=False)), ONES, "has no residual"),
        (lambda: vit(stages=(1, 2)), ONES, "stages of several widths"),
        (tiny_encoder, ONES, "a ViT or a Decoder"),
        (lambda: models.pipeline(tiny(), stages=3, microbatches=3), ONES, "models.unpipeline"),
        (lambda: transform.apply(share(repeats=(3,)), tiny())[0], ONES, "structure.expand"),
        (tiny, EnsembleScale(np.ones(6)), "has 6 paths; 3 layers of 2 sublayers are 7"),
        (tiny, EnsembleScale(np.ones(7), jnp.ones((7, 8))), "the width is 16"),
    ],
)
def test_models_without_such_paths_are_refused(make, ensemble, message):
    with pytest.raises(ConfigError, match=message):
        with_ensemble(make(), ensemble)


def test_a_trunk_refuses_what_came_about_otherwise():
    model = with_ensemble(tiny(), ONES)
    with pytest.raises(ConfigError, match="stages of a pipeline hand on one stream"):
        models.pipeline(model, stages=3, microbatches=3)(batches()[0])
    with pytest.raises(ConfigError, match="share blocks"):
        transform.apply(share(repeats=(3,)), model)[0](batches()[0])
    model.layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
    with pytest.raises(ConfigError, match="only a Block"):
        sizes_of(model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["list", "stack"])
def test_training_with_weights_takes_a_tenth_more_memory_at_most(shape):
    """Bytes of a step beside its arguments, of 6 layers of width 32 and 64 digits."""
    config = ViTConfig((8, 8), 2, 32, 128, 6, 4, channels=1, classes=10, pool="mean")
    plain = ViT(config, key=jax.random.key(0))
    model = with_ensemble(plain, EnsembleScale(np.ones(13), jnp.ones((13, 32))))
    x = jax.random.uniform(jax.random.key(1), (64, 8, 8, 1))

    def step(model):
        trained, fixed = tree.trained(model)
        loss = lambda part: jnp.mean(tree.combine(part, fixed)(x) ** 2)  # noqa: E731
        return jax.tree.map(lambda a, b: a - 0.1 * b, trained, jax.grad(loss)(trained))

    def temporary(model):
        model = models.stack(model) if shape == "stack" else model
        return jax.jit(step).lower(model).compile().memory_analysis().temp_size_in_bytes

    assert temporary(model) <= 1.1 * temporary(plain)


@pytest.mark.slow
def test_narrower_streams_take_their_weights_along():
    model, kept = weighed(tiny(), width=16), np.arange(16) % 3 > 0
    small = models.narrow(model, {"embed": kept})
    assert small.ensemble.scale.shape == (7, int(kept.sum()))
    tokens = batches()[0]
    want = run(models.masked(model, {"embed": kept.astype(np.float32)}), tokens)
    np.testing.assert_allclose(run(small, tokens), want, atol=1e-4)
