"""Quantizing encoders: only scalings that leave the function as it is; LoRA around their maps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.models.calibration import given
from ffnlab.quantization import fireq, nearest
from ffnlab.quantization.targets import inside_blocks
from ffnlab.testing import equal, tiny_encoder
from ffnlab.weights import Dense, Int4, LoRA

TOKENS = np.asarray(jax.random.randint(jax.random.key(1), (3, 7), 0, 64), np.int32)
VALID = np.arange(7) < np.array([7, 4, 5])[:, None]
BATCH = {"tokens": TOKENS, "valid": VALID}
FORMS = {
    "bert": {},
    "post-norm, gated, rotary": {"gated": True, "positions": "rotary"},
    "pre-norm, gated, rotary": {"gated": True, "positions": "rotary", "norm": "before"},
    "pre-norm, plain": {"norm": "before"},
}
SCALED = {  # what changes in a block where nothing is rounded: exactly what may
    "bert": {"attn.v", "attn.o"},
    "post-norm, gated, rotary": {
        *("attn.q", "attn.k", "attn.v", "attn.o", "attn.post_scale"),
        *("ffn.up", "ffn.down"),
    },
    "pre-norm, gated, rotary": {
        *("attn.q", "attn.k", "attn.v", "attn.o", "attn.post_scale"),
        *("ffn.up", "ffn.down", "ffn.gate", "ffn_norm"),
    },
    "pre-norm, plain": {"attn.v", "attn.o"},
}
run = jax.jit(lambda model, batch: model(**batch))
# Of beta and alpha that scale at this size; otherwise all scales are 1.
SCALES = {"alpha": 0.5, "beta": 0.5, "top_k": 1, "group": 8}


@functools.cache
def encoder(form):
    """Random weights with biases that matter."""
    model = tiny_encoder(**FORMS[form])
    leaves, treedef = jax.tree.flatten(model)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    noise = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noise)


def difference(a, b):
    gap = jnp.abs(run(a, BATCH) - run(b, BATCH))
    return float(gap[VALID].max())


@pytest.mark.parametrize("form", FORMS)
def test_fireq_scales_what_it_may_and_nothing_else(form):
    model = encoder(form)
    step = fireq(weights=False, activations=None, kv=None, query=None, **SCALES)
    new, _ = transform.apply(step, model, [BATCH], progress=False)
    assert difference(new, model) < 1e-4  # logits of order 5, float32
    old, found = (dict(tree.walk(m.layers[1])) for m in (model, new))
    modules = {"attn_norm", "ffn_norm", "ffn.up", "ffn.down", "ffn.gate"}
    modules |= {f"attn.{part}" for part in ("q", "k", "v", "o", "post_scale")}
    changed = {name for name in modules if not equal(old.get(name), found.get(name))}
    assert changed == SCALED[form]
    if "ffn_norm" in changed:
        assert not equal(old["ffn_norm.bias"], found["ffn_norm.bias"])
    assert not equal(old["attn.v.b"], found["attn.v.b"])
    assert equal(old["attn.o.b"], found["attn.o.b"])


def test_fireq_does_not_look_at_padding():
    model, step = encoder("post-norm, gated, rotary"), fireq(**SCALES)
    other = BATCH | {"tokens": np.where(VALID, TOKENS, 63 - TOKENS)}
    longer = {name: np.pad(array, ((0, 0), (0, 2))) for name, array in BATCH.items()}
    want = step.observe(step.init(model), model, BATCH)
    found = step.observe(step.init(model), model, other)
    assert equal((found.norms, found.absmax), (want.norms, want.absmax))
    found = step.observe(step.init(model), models.stack(model), longer)
    for a, b in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(want[:2]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)  # other orders of sums
    bare = given(TOKENS, model)
    assert int(step.observe(step.init(model), model, bare.args[0]).tokens) == TOKENS.size


def test_fireq_quantizes_a_bert_as_well_as_its_grid_allows():
    """W4A8 with scaled channels is no worse than 1.5 of rounding to the nearest, in mean square."""
    model = encoder("bert")
    new, stats = transform.apply(fireq(group=8, kv=None, query=None), model, [BATCH])
    assert stats.norms == {}
    assert all(isinstance(node.weight, Int4) for node in _maps(new).values())
    assert isinstance(new.transform.dense.weight, Dense)
    plain, _ = transform.apply(nearest(group=8, activations="e4m3"), model, [])
    want = run(model, BATCH)[VALID]
    ours, theirs = (float(jnp.mean((run(m, BATCH)[VALID] - want) ** 2)) for m in (new, plain))
    assert 0 < ours < 1.5 * theirs < 0.1 * float(jnp.var(want))
    stacked, _ = transform.apply(fireq(group=8, kv=None, query=None), models.stack(model), [BATCH])
    assert equal(models.unstack(stacked), new)


def _maps(model):
    return tree.select(model, inside_blocks)


@pytest.mark.parametrize("format", ["int4", "int8", "float8"])
def test_nearest_takes_encoders_in_either_form(format):
    model, step = encoder("bert"), nearest(format=format, group=8)
    new, _ = transform.apply(step, model, [])
    stacked, _ = transform.apply(step, models.stack(model), [])
    assert equal(models.unstack(stacked), new)
    for path, linear in _maps(model).items():
        found = _maps(new)[path]
        assert equal(found.bias, linear.bias)
        gap = jnp.abs(found.weight.dense() - linear.weight.dense()).max()
        assert 0 < gap < 0.2 * jnp.abs(linear.weight.dense()).max()


@pytest.mark.parametrize("base", ["dense", "int4"])
def test_lora_around_a_selected_map_begins_at_the_model_and_trains_alone(base):
    model = encoder("bert")
    if base == "int4":
        model, _ = transform.apply(nearest(group=8), model, [])
    keys = iter(jax.random.split(jax.random.key(3), 6))
    chosen = inside_blocks & (tree.at("layers[*].attn.q") | tree.at("layers[*].attn.v"))
    lora = tree.map_at(
        model,
        chosen,
        lambda linear: linear.replace(LoRA.init(linear.weight, 2, next(keys))),
        expect=6,
    )
    assert difference(lora, model) < 1e-5
    trained, frozen = tree.partition(
        lora, lambda path, _: ".w.value." in path and path.endswith((".a", ".b"))
    )
    loss = lambda part: jnp.mean(run(tree.combine(part, frozen), BATCH) ** 2)  # noqa: E731
    before, grads = jax.jit(jax.value_and_grad(loss))(trained)
    after = loss(jax.tree.map(lambda x, g: x - 0.1 * g, trained, grads))
    assert float(after) < float(before)


def test_batches_that_an_encoder_does_not_take_are_named():
    model, step = encoder("bert"), fireq(**SCALES)
    stats = step.init(model)
    for batch, told in (
        ({"tokens": TOKENS, "mask": VALID}, "'mask'.*'valid'"),
        ({"valid": VALID}, "one of .*tokens.* is needed"),
        ({"tokens": TOKENS, "valid": VALID[:2]}, "rows"),
        ({}, "a batch of"),
    ):
        with pytest.raises(ConfigError, match=told):
            step.observe(stats, model, batch)
