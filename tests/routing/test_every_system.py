"""Every system of routing as users take it further: rewritten, saved, generated from, trained.

What `test_pal` has of a model that hears is left out here: it is rewritten without its sounds.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, transform, tree
from ffnlab.cli.inputs.reading import by_name
from ffnlab.errors import ConfigError, SelectionError
from ffnlab.layers import MoE
from ffnlab.learning import backprop
from ffnlab.losses import Moment, masked, next_token, routed, span
from ffnlab.models import AudioInput, adapters
from ffnlab.parallel import parse_mesh, train
from ffnlab.pruning import finercut
from ffnlab.quantization import fireq, nearest
from ffnlab.routing import (
    Sounds,
    budgeted,
    by_task,
    duo,
    lora_experts,
    mixed,
    pal,
    sharpened,
    specialized,
    switch_head,
    top2_head,
    untie,
    upcycle,
    with_routers,
)
from ffnlab.testing import batches, equal, tiny, tiny_encoder
from tests.often import often


def updated(seed: int) -> models.Decoder:
    """The tiny decoder with low-rank updates."""
    return transform.apply(adapters.lora(rank=2, seed=seed), tiny())[0]


SYSTEMS = {
    "duo": lambda: transform.chain(duo(ratio=8, skip=True), with_routers()),
    "lora-mixer": lambda: mixed([updated(1), updated(2)]),
    "lora-mixer, fresh": lambda: lora_experts(experts=2, rank=2),
    "mixture": lambda: upcycle(experts=3, k=2),
    "mixture-of-transformers": lambda: untie(starts=(32,), copies="drawn", norm="output"),
}


def made(name: str) -> models.Decoder:
    """The tiny decoder as a system has it."""
    model, _ = transform.apply(SYSTEMS[name](), tiny())
    return sharpened(model, k=1) if name.startswith("lora") else model


@pytest.mark.parametrize("name", often(SYSTEMS, "mixture", "duo"))
def test_it_is_pruned_quantized_saved_and_generated_from(name, tmp_path):
    model = made(name)
    cut, _ = transform.apply(finercut(remove=1), model, batches())
    small, _ = transform.apply(fireq(group=8, top_k=1, kv=None, query=None), cut, batches())
    packed = sum(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(small))
    assert packed > 5, "matrices of the blocks are packed"
    models.save(small, tmp_path / "small", format="ffnlab")
    read = models.load(tmp_path / "small")
    assert equal(read, small)
    stacked = models.stack(read)
    x = batches()[0]
    np.testing.assert_allclose(stacked(x), read(x), rtol=1e-4, atol=1e-5)
    (found,) = models.generate(read, [[1, 2, 3]], max_tokens=3).lists()
    logits = stacked(jnp.array([[1, 2, 3, *found]]))  # each token is the best after those before
    assert found == logits[0, 2:5].argmax(-1).tolist()


@pytest.mark.parametrize("name", [name for name in SYSTEMS if name != "mixture-of-transformers"])
def test_routers_are_left_as_they_are(name):
    small, _ = transform.apply(nearest(format="int4", group=8), made(name), batches())
    before = dict(routers(made(name)))
    after = dict(routers(small))
    assert before.keys() == after.keys() and before
    for path, router in before.items():
        assert equal(after[path], router), path


def test_systems_are_not_put_on_what_they_do_not_take():
    """What has been rewritten before is refused by name, and never misread."""
    first = upcycle(experts=2, k=1, layers=(0,), normalize=False)
    mixed_once, _ = transform.apply(first, tiny())
    with pytest.raises(ConfigError, match="a model has one kind of them"):
        transform.apply(upcycle(experts=2, k=1, layers=(1, 2)), mixed_once)
    again, _ = transform.apply(upcycle(experts=2, k=1, layers=(1, 2), normalize=False), mixed_once)
    assert all(isinstance(block.ffn, MoE) for block in again.layers)
    updates = lora_experts(experts=2, rank=2, where=tree.at("layers**.ffn.*"))
    inside, _ = transform.apply(updates, tiny())
    with pytest.raises(ConfigError, match="no dense FFN to copy"):
        transform.apply(upcycle(experts=2), inside)
    with pytest.raises(ConfigError, match="of linear maps, which are accepted"):
        transform.apply(duo(ratio=8), inside)
    apart, _ = transform.apply(untie(starts=(32,)), tiny())
    for way in ("prepended", "attended"):
        with pytest.raises(ConfigError, match="rows of sound have none"):
            transform.apply(pal.connect(AudioInput((3,), (way,))), apart)
    few, _ = transform.apply(untie(starts=(32,), parts=("ffn",)), tiny())
    transform.apply(pal.connect(AudioInput((3,), ("attended",))), few)
    others = tree.at("layers[1].ffn") | tree.at("layers[2].ffn")
    chosen, _ = transform.apply(duo(ratio=8, where=others), mixed_once)
    chosen, _ = transform.apply(with_routers(), chosen)
    with pytest.raises(ConfigError, match="mixtures, which have no big branch"):
        budgeted(0.5)(chosen, jnp.asarray(texts(0)), Moment(jnp.int32(0), jax.random.key(0)))


@pytest.mark.slow
def test_a_loss_of_mixers_looks_at_their_routers_alone():
    """Beside a mixture it is what it is without its router, and padding has no part in it."""
    model, _ = transform.apply(upcycle(experts=4, k=2, layers=(0,)), tiny())
    with pytest.raises(SelectionError):
        specialized()(model, jnp.asarray(texts(0)))
    both, _ = transform.apply(lora_experts(experts=2, rank=2), model)
    nats, metrics = specialized(balance=1.0)(both, jnp.asarray(texts(0)))
    assert np.isfinite(nats) and metrics["entropy"] <= np.log(2) + 1e-6
    encoder, _ = transform.apply(lora_experts(experts=2, rank=2), tiny_encoder())
    tokens = texts(0)[:, :8]
    loss = specialized(by_name(masked), balance=1.0)

    def told(more):
        filled = jnp.pad(tokens, ((0, 0), (0, more)))
        valid = jnp.arange(filled.shape[1]) < 8
        given = {"tokens": filled, "valid": jnp.broadcast_to(valid, filled.shape)}
        return loss(encoder, (given, jnp.pad(tokens, ((0, 0), (0, more)), constant_values=-1)))[1]

    for name in ("entropy", "share"):
        np.testing.assert_allclose(told(8)[name], told(0)[name], rtol=1e-5)
    with pytest.raises(ConfigError, match=r"task \(1,\): one for each of 4 rows"):
        by_task()(made("lora-mixer, fresh"), (jnp.asarray(texts(0)), np.zeros(1, int)))


HEADS = {
    "top-2 head": lambda: top2_head(experts=4, hidden=8),
    "Switch head": lambda: switch_head(experts=2, hidden=8, layers=2, heads=2),
}


@pytest.mark.parametrize("name", often(HEADS, "top-2 head"))
def test_a_span_head_on_an_encoder_is_pruned_quantized_and_saved(name, tmp_path):
    model, _ = transform.apply(HEADS[name](), tiny_encoder())
    cut, _ = transform.apply(finercut(remove=2), model, batches())
    small, _ = transform.apply(fireq(group=8), cut, batches())
    assert sum(leaf.dtype == np.uint8 for leaf in jax.tree.leaves(small)) > 5
    before, after = dict(routers(cut)), dict(routers(small))
    assert before and all(equal(after[path], router) for path, router in before.items())
    models.save(small, tmp_path / "small", format="ffnlab")
    read = models.load(tmp_path / "small")
    assert equal(read, small)
    x = batches()[0]
    assert read(x).shape == (*x.shape, 2)
    np.testing.assert_allclose(models.stack(read)(x), read(x), rtol=1e-4, atol=1e-5)


def routers(model):
    """Every router by path."""
    return [(p, n) for p, n in tree.walk(model) if p.endswith(".router")]


def windows(position):
    """Rows of text, and where in each an answer is."""
    tokens = texts(position)
    return {"tokens": tokens}, np.sort(tokens[:, :2] % 12, 1)


def texts(position):
    """Four rows of tokens, others at each position."""
    return np.asarray(jax.random.randint(jax.random.key(position), (4, 12), 0, 64))


def sounds(position):
    """Texts and what is heard with them."""
    features = np.asarray(jax.random.normal(jax.random.key(position), (4, 5, 3)))
    return Sounds((features,)), texts(position)


# The model, its loss, whether that is informed, and batches.
LEARNING = {
    "duo": (SYSTEMS["duo"], budgeted(0.3, steps=4), True, texts),
    "lora-mixer": (SYSTEMS["lora-mixer"], specialized(), False, texts),
    "mixture": (lambda: upcycle(experts=4, k=2), routed(z=0.1), False, texts),
    "mixture-of-transformers": (
        SYSTEMS["mixture-of-transformers"],
        next_token,
        False,
        texts,
    ),
    "pal": (
        lambda: pal.connect(AudioInput((3,), ("prepended",), start=1)),
        pal.heard(next_token),
        False,
        sounds,
    ),
    "top-2 head": (HEADS["top-2 head"], routed(by_name(span)), False, windows),
    "Switch head": (HEADS["Switch head"], routed(by_name(span)), False, windows),
}


@pytest.mark.parametrize("name", often(LEARNING, "mixture"))
def test_it_is_trained_on_a_mesh_of_experts_and_resumed(name, tmp_path):
    make, loss, informed, rows = LEARNING[name]
    model, _ = transform.apply(make(), tiny_encoder() if name in HEADS else tiny())
    model = models.stack(model) if name != "pal" else model
    rule = backprop(loss, optax.sgd(0.1), informed=informed)

    def run(steps, mesh="dp=2,ep=2", **options):
        placed = parse_mesh(mesh, devices=jax.devices()[: 4 if "," in mesh else 1])
        found = train(rule, model, rows, steps, key=jax.random.key(1), mesh=placed, **options)
        return jax.device_get(jax.tree.leaves(rule.model(found.state)))

    whole = run(3)
    run(1, folder=tmp_path)
    resumed = run(3, folder=tmp_path, resume=True)
    for one, other in zip(whole, resumed, strict=True):
        np.testing.assert_array_equal(one, other)
    for before, one, other in zip(jax.tree.leaves(model), whole, run(3, "dp=1"), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)  # float32 sums in another order
        assert before.shape == one.shape
    assert not equal(jax.tree.leaves(model), whole)
