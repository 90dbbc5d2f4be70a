"""Every system of routing as users take it further: rewritten, saved, read, generated from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.models import adapters
from ffnlab.pruning import finercut
from ffnlab.quantization import fireq, nearest
from ffnlab.routing import (
    duo,
    lora_experts,
    mixed,
    sharpened,
    switch_head,
    top2_head,
    upcycle,
    with_routers,
)
from ffnlab.testing import batches, equal, tiny, tiny_encoder


def updated(seed: int) -> models.Decoder:
    """The tiny decoder with low-rank updates."""
    return transform.apply(adapters.lora(rank=2, seed=seed), tiny())[0]


SYSTEMS = {
    "duo": lambda: transform.chain(duo(ratio=8, skip=True), with_routers()),
    "lora-mixer": lambda: mixed([updated(1), updated(2)]),
    "lora-mixer, fresh": lambda: lora_experts(experts=2, rank=2),
    "mixture": lambda: upcycle(experts=3, k=2),
}


def made(name: str) -> models.Decoder:
    """The tiny decoder as a system has it."""
    model, _ = transform.apply(SYSTEMS[name](), tiny())
    return sharpened(model, k=1) if name.startswith("lora") else model


@pytest.mark.parametrize("name", SYSTEMS)
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


@pytest.mark.parametrize("name", SYSTEMS)
def test_routers_are_left_as_they_are(name):
    small, _ = transform.apply(nearest(format="int4", group=8), made(name), batches())
    before = dict(routers(made(name)))
    after = dict(routers(small))
    assert before.keys() == after.keys() and before
    for path, router in before.items():
        assert equal(after[path], router), path


HEADS = {
    "top-2 head": lambda: top2_head(experts=3, hidden=8),
    "Switch head": lambda: switch_head(experts=2, hidden=8, layers=2, heads=2),
}


@pytest.mark.parametrize("name", HEADS)
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
