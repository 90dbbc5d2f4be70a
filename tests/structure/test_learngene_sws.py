"""Learngene: shared stages against the official network, descendants, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.learning import backprop
from ffnlab.losses import Taught, distilled, next_token
from ffnlab.models import Shared, ViT, ViTConfig
from ffnlab.pruning import finercut
from ffnlab.quantization import nearest
from ffnlab.structure import even_source, expand, share
from ffnlab.testing import batches, equal, tiny, tiny_encoder
from ffnlab.weights import Dense
from tests import hashed
from tests.fixtures.learngene_sws import record

CONFIG = ViTConfig((8, 8), 4, 8, 32, 4, 2, classes=5, pool="mean", eps=1e-5)
IMAGES = jnp.asarray(record.IMAGES)
TOLERANCE = 1e-5  # float32 sums in another order, outputs of about one
run = jax.jit(lambda model, x: model(x))


@functools.cache
def auxiliary():
    """A ViT of four layers in three stages."""
    model = ViT(CONFIG, key=jax.random.key(0))
    return transform.apply(share(repeats=record.SCHEDULE), model)[0]


def expanded(model, **options):
    return transform.apply(expand(**options), model)[0]


def official():
    """The auxiliary network with the official one's parameters."""
    shapes = {"mlp.fc1": (32, 8), "mlp.fc2": (8, 32), "attn.qkv": (24, 8), "attn.proj": (8, 8)}
    drawn = lambda name, shape: jnp.asarray(hashed.parameter(name, shape))  # noqa: E731
    model = tree.copy(auxiliary())

    def linear(layer, name, shape, part=slice(None)):
        w, b = drawn(f"{name}.weight", shape), drawn(f"{name}.bias", shape[:1])
        return layer.replace(Dense(w[part].reshape(len(w[part]), -1).T), b[part])

    def norm(layer, name):
        layer.scale = layer.scale.replace(drawn(f"{name}.weight", (8,)))
        layer.bias = layer.bias.replace(drawn(f"{name}.bias", (8,)))

    for s, block in enumerate(model.layers.stages):
        at = lambda part, s=s: f"blocks.block.{part}.instances.{s}"  # noqa: E731
        for ours, part in (("q", 0), ("k", 1), ("v", 2)):
            rows = slice(8 * part, 8 * part + 8)
            old = getattr(block.attn, ours)
            new = linear(old, at("attn.qkv"), shapes["attn.qkv"], rows)
            setattr(block.attn, ours, new)
        block.attn.o = linear(block.attn.o, at("attn.proj"), shapes["attn.proj"])
        block.ffn.up = linear(block.ffn.up, at("mlp.fc1"), shapes["mlp.fc1"])
        block.ffn.down = linear(block.ffn.down, at("mlp.fc2"), shapes["mlp.fc2"])
        norm(block.attn_norm, at("norm1"))
        norm(block.ffn_norm, at("norm2"))
    norm(model.norm, "norm")
    model.head = linear(model.head, "head", (5, 8))
    kernel = drawn("patch_embed.proj.weight", (8, 3, 4, 4)).transpose(2, 3, 1, 0).reshape(-1, 8)
    model.patches = model.patches.replace(Dense(kernel), drawn("patch_embed.proj.bias", (8,)))
    table = Dense(drawn("pos_embed", (1, 4, 8))[0])
    model.positions = model.positions.replace(table)
    return model


def test_the_official_network_gives_the_same(fixtures):
    with np.load(fixtures / "learngene_sws" / "expected.npz") as file:
        want, counts = file["logits"], file["counts"]
    np.testing.assert_allclose(run(official(), IMAGES), want, atol=TOLERANCE)
    for width, count in zip(record.PUBLISHED.values(), counts, strict=True):
        config = ViTConfig((224, 224), 16, width, 4 * width, 16, 12, classes=1000, pool="mean")
        model = jax.eval_shape(lambda c=config: ViT(c, key=jax.random.key(0)))
        aux = jax.eval_shape(lambda m: transform.apply(share(), m)[0], model)
        assert sum(leaf.size for leaf in jax.tree.leaves(aux)) == count


def test_a_descendant_of_the_same_map_computes_the_same_and_its_gradients_add_up():
    model = auxiliary()
    source = model.layers.source
    descendant = expanded(model, source=source)
    assert source == (0, 1, 1, 2) and len(descendant.layers) == 4
    np.testing.assert_allclose(run(descendant, IMAGES), run(model, IMAGES), atol=1e-6)

    def cost(model):
        return (model(IMAGES) ** 2).mean()

    shared, apart = (jax.jit(jax.grad(cost))(m).layers for m in (model, descendant))
    for stage in range(3):
        layers = [apart[i] for i, s in enumerate(source) if s == stage]
        total = jax.tree.map(lambda *leaves: sum(leaves), *layers)
        for one, other in zip(
            jax.tree.leaves(shared.stages[stage]), jax.tree.leaves(total), strict=True
        ):
            np.testing.assert_allclose(one, other, atol=1e-6)


@given(st.integers(1, 40), st.integers(1, 12))
def test_the_map_is_ordered_even_and_covers_all_stages(layers, stages):
    found = even_source(layers, stages)
    assert len(found) == layers and list(found) == sorted(found)
    counts = np.bincount(found, minlength=stages)
    assert counts.max() - counts.min() <= 1 and list(counts) == sorted(counts, reverse=True)
    assert layers < stages or set(found) == set(range(stages))


def test_layers_are_copies_that_may_be_donated():
    model = auxiliary()
    descendant = expanded(model, layers=6)
    step = jax.jit(lambda m: jax.tree.map(lambda x: x + 1, m), donate_argnums=0)
    first = np.asarray(descendant.layers[0].ffn.up.weight.dense()).copy()
    moved = step(jax.tree.map(jnp.copy, descendant))
    np.testing.assert_array_equal(moved.layers[0].ffn.up.weight.dense(), first + 1)
    pointers = {leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(descendant.layers)}
    assert len(pointers) == len(jax.tree.leaves(descendant.layers))
    step(descendant.layers)  # fails where two layers are one array
    assert np.isfinite(run(model, IMAGES)).all()


@pytest.mark.slow
def test_a_shared_network_is_taught_and_its_descendants_go_on(tmp_path):
    """Distillation as the authors have it; then a model like any other."""
    model = auxiliary()
    teacher = ViT(dataclasses.replace(CONFIG, layers=5), key=jax.random.key(9))
    batch = Taught(IMAGES, jnp.array([0, 1]), run(teacher, IMAGES))
    rule = backprop(distilled(weight=1.0, reduction="mean"), optax.sgd(1.0))
    state = rule.init(model, jax.random.key(0))
    losses = []
    for _ in range(5):
        state, metrics = rule.step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    learned = rule.model(state)
    assert isinstance(learned.layers, Shared) and len(learned.layers.stages) == 3
    models.save(learned, tmp_path / "aux", format="ffnlab")
    back = models.load(tmp_path / "aux")
    assert equal(back, learned) and back.layers.source == (0, 1, 1, 2)
    descendant = expanded(back, layers=6)
    models.save(descendant, tmp_path / "six", format="ffnlab")
    again = models.load(tmp_path / "six")
    assert equal(again.layers, descendant.layers) and again.config.layers == 6
    packed, _ = transform.apply(nearest(format="int8", group=None), descendant)
    cut, _ = transform.apply(finercut(remove=2), models.stack(packed), [IMAGES])
    assert len(models.removed(cut)) == 2 and np.isfinite(run(cut, IMAGES)).all()


@pytest.mark.slow
def test_decoders_and_encoders_have_stages_too():
    decoder, _ = transform.apply(share(repeats=(2, 1)), models.stack(tiny()))
    descendant = expanded(decoder, layers=5)
    assert descendant.config.layers == 5
    x = batches()[0]
    same = expanded(decoder, source=(0, 0, 1))
    np.testing.assert_allclose(decoder(x), same(x), atol=TOLERANCE)
    for model in (decoder, descendant):
        (found,) = models.generate(model, [[1, 2, 3]], max_tokens=3).lists()
        logits = model(jnp.array([[1, 2, 3, *found]]))
        assert found == logits[0, 2:5].argmax(-1).tolist()
    assert float(next_token(decoder, x)[0]) > 0
    encoder, _ = transform.apply(share(repeats=(1, 2)), tiny_encoder())
    assert expanded(encoder, layers=4)(x).shape == encoder(x).shape


def test_every_layer_of_another_model_is_a_stage():
    model = tiny()
    deep = expanded(model, layers=6)
    for k, stage in enumerate((0, 0, 1, 1, 2, 2)):
        assert equal(deep.layers[k], model.layers[stage])
    turned = expanded(models.stack(model), source=(2, 1), allow_unordered=True)
    assert equal(turned.layers[1], model.layers[1])


def test_what_has_an_entry_for_each_layer_follows_it():
    config = dataclasses.replace(tiny().config, windows=(4, None, 8))
    model = models.Decoder(config, key=jax.random.key(0))
    deep = expanded(model, source=(0, 2, 2))
    assert deep.config.windows == (4, 8, 8)
    with pytest.raises(ConfigError, match=r"layers \[1\] are built otherwise than the first"):
        transform.apply(share(repeats=(2, 1)), model)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layers": 3, "source": (0,)}, "exclude each other"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"source": ()}, r"source=\(\): one stage"),
        ({"source": (0, -1)}, r"source=\(0, -1\): one stage, from 0 on"),
        ({"source": (1, 0)}, r"source=\(1, 0\) decreases.*allow_unordered=True"),
    ],
)
def test_maps_that_are_none_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        expand(**options)


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match=r"source=\(0, 3\): the model has stages 0 to 2"):
        expanded(auxiliary(), source=(0, 3))
    for repeats in ((), (1, 0)):
        with pytest.raises(ConfigError, match="at least one layer for each stage"):
            share(repeats=repeats)
    with pytest.raises(ConfigError, match=r"repeats=\(1, 1\) are 2 layers; the model has 3"):
        transform.apply(share(repeats=(1, 1)), tiny())
    for change in (share(repeats=(1, 3)), finercut(remove=1)):
        with pytest.raises(ConfigError, match="share blocks; structure.expand gives each one"):
            transform.apply(change, auxiliary(), [IMAGES])
    with pytest.raises(ConfigError, match="layers=0 and stages=2"):
        even_source(0, 2)
    with pytest.raises(ConfigError, match="source=.*one or more of the 1 stages"):
        Shared([tiny().layers[0]], (0, 1))
    staged = dataclasses.replace(CONFIG, image=(12, 12), layers=3, stages=(2, 1))
    with pytest.raises(ConfigError, match="differ in width"):
        expanded(ViT(staged, key=jax.random.key(0)), layers=4)
