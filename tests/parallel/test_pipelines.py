"""Pipelines on meshes: the losses of one device, and that stages cut work, bytes and no more."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ffnlab import models, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Context, Linear
from ffnlab.learning import backprop, lamb
from ffnlab.models import Decoder, DecoderConfig, trunk
from ffnlab.parallel import (
    LoopOptions,
    abstract,
    bytes_per_device,
    make_step,
    on,
    parse_mesh,
    place_batch,
    reformed,
    shard,
    train,
)
from ffnlab.quantization import nearest
from ffnlab.storage import trees
from ffnlab.weights import Int4, LoRA
from tests.contracts_methods import RULES

CONFIG = DecoderConfig(vocab=64, width=16, hidden=32, layers=8, heads=4, kv_heads=4, head_dim=8)
STEPS = 20


def batch_at(position: int) -> np.ndarray:
    return np.random.default_rng(position).integers(0, 64, (16, 17)).astype(np.int32)


def dense(layers: int = 8) -> Decoder:
    return Decoder(dataclasses.replace(CONFIG, layers=layers), key=jax.random.key(0))


def low_rank() -> Decoder:
    """INT4 matrices, those of the FFNs with an update that trains, begun away from zero."""

    def wrap(linear: Linear) -> Linear:
        assert isinstance(linear.weight, Int4)
        update = LoRA.init(linear.weight, 2, jax.random.key(2))
        return linear.replace(dataclasses.replace(update, b=update.b + 0.01))

    model, _ = transform.apply(nearest(format="int4", group=8), dense())
    return tree.map_at(model, tree.at("layers[*].ffn.*") & tree.of_type(Linear), wrap)


def adam() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


@functools.cache
def run(make, mesh_text: str | None, shape: tuple[int, ...] = (), optimizer=adam, steps=STEPS):
    """Losses of a run on a mesh or on one device, and the model that it ends with."""
    rule, model = backprop(optimizer=optimizer()), models.stack(make())
    if shape:
        model = models.pipeline(model, **dict(zip(SIZES, shape, strict=False)))
    state, step, place = rule.init(model, jax.random.key(1)), rule.step, lambda batch: batch
    if mesh_text is not None:
        mesh = parse_mesh(mesh_text)
        state, step = shard(state, mesh), make_step(rule, mesh)
        place = lambda batch: place_batch(batch, mesh)  # noqa: E731
    found = []
    for position in range(steps):
        state, metrics = step(state, place(batch_at(position)))
        found.append(float(metrics["loss"]))
    return np.array(found), jax.device_get(models.unstack(state.model))


SIZES = ("stages", "microbatches", "repeats")
# Mesh, and S, M, R.
MIXES = [
    ("pp=2", (2, 4, 2)),
    ("pp=4", (4, 8)),
    ("pp=4", (4, 16)),
    ("pp=4", (4, 2)),
    ("pp=2", (4, 8)),
    ("pp=8", (8, 8)),
    ("dp=2,pp=4", (4, 8)),
    ("fsdp=2,pp=2,tp=2", (2, 4)),
    ("dp=2,pp=2,tp=2", (2, 4, 2)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:microbatches=2 are fewer")
@pytest.mark.parametrize(("mesh", "shape"), MIXES, ids=str)
def test_every_mix_has_the_losses_of_one_device(mesh, shape):
    np.testing.assert_allclose(run(dense, mesh, shape)[0], run(dense, None)[0], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "shape"), [MIXES[2], MIXES[7]], ids=str)
def test_quantized_weights_with_updates_learn_alike(mesh, shape):
    found, wanted = run(low_rank, mesh, shape)[0], run(low_rank, None)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)
    assert wanted[-1] < wanted[0]


PLAIN = functools.partial(optax.sgd, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "shape"), [MIXES[1], MIXES[8]], ids=str)
@pytest.mark.parametrize("make", [dense, low_rank])
def test_gradients_are_those_of_one_device(make, mesh, shape):
    """A step at rate 1 is the gradient."""
    found, wanted = run(make, mesh, shape, PLAIN, 1)[1], run(make, None, (), PLAIN, 1)[1]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_optimizer_that_looks_at_layers_finds_them_in_stages():
    """LAMB has a ratio for each layer, and neither it nor decay is for norms."""
    heavy = functools.partial(lamb, 1e-2, weight_decay=0.5)
    found, wanted = (run(dense, None, shape, heavy, 5)[0] for shape in ((2, 2, 2), ()))
    np.testing.assert_allclose(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_every_rule_of_a_decoder_learns_in_stages():
    mesh, key, ran = parse_mesh("pp=3"), jax.random.key(0), []
    for name, case in RULES.items():
        model = case.model()
        if not isinstance(model, Decoder):
            continue
        rule, batch = case.make(), np.tile(case.batches()[0], (3, 1))
        staged = models.pipeline(model, stages=3, microbatches=3)
        wanted, _ = rule.step(rule.init(model, key), batch)
        state = shard(rule.init(staged, key), mesh)
        found, _ = make_step(rule, mesh)(state, place_batch(batch, mesh))
        found = models.unpipeline(jax.device_get(rule.model(found)))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(rule.model(wanted)), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=0)
        ran.append(name)
    assert "backprop" in ran


# ---------------------------------------------------------------- what the program does


def gathered(text: str) -> list[tuple[int, ...]]:
    """Shapes that an all-gather makes."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    return [tuple(map(int, shape.split(","))) for shape in found if shape]


def compiled(mesh_text: str, model: Decoder):
    """A step on a mesh, compiled, with the state and the batch that it takes."""
    rule, mesh = backprop(optimizer=optax.sgd(0.5)), parse_mesh(mesh_text)
    state = shard(rule.init(model, jax.random.key(1)), mesh)
    batch = place_batch(batch_at(0), mesh)
    return make_step(rule, mesh).trace(state, batch).lower().compile(), state, batch


def test_stages_hold_and_pass_on_their_own_and_learn_as_one_device():
    """Two stages of one layer; a step of one device beside it."""
    model = dense(2)
    program, state, batch = compiled("pp=2", models.pipeline(model, stages=2, microbatches=4))
    text = program.as_text()
    assert "collective-permute" in text and not gathered(text) and "all-to-all" not in text
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.layers))
    assert bytes_per_device(state.model.layers) == whole / 2
    found, metrics = program(state, batch)
    assert found.model.layers.period[0].ffn.up.weight.w.sharding.spec[0] == "pp"

    rule = backprop(optimizer=optax.sgd(0.5))
    wanted, wanted_metrics = rule.step(
        rule.init(models.stack(model), jax.random.key(1)), batch_at(0)
    )
    assert float(metrics["loss"]) == pytest.approx(float(wanted_metrics["loss"]), abs=1e-5)
    found, wanted = (models.unstack(jax.device_get(x.model)) for x in (found, wanted))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["dp=2,pp=2", "pp=2,tp=2", "dp=2,pp=2,tp=2"])
def test_no_parameter_is_gathered(mesh):
    program, state, _ = compiled(mesh, models.pipeline(dense(), stages=2, microbatches=4))
    own = {leaf.shape[i:] for leaf in jax.tree.leaves(state.model) for i in range(leaf.ndim - 1)}
    activations = {(16, 16)}  # targets, which a matrix of this width is as large as
    assert "collective-permute" in program.as_text()
    assert not set(gathered(program.as_text())) & (own - activations)


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "shape"), [("pp=4", (4, 8)), ("dp=2,pp=2", (2, 4, 2))], ids=str)
def test_each_device_does_its_share_of_the_work(mesh, shape, monkeypatch):
    """Loops are unrolled, as a loop's body counts once; width enough that products are the work."""
    monkeypatch.setattr(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=True))
    wide = dataclasses.replace(CONFIG, width=64, hidden=128, layers=4)
    model, h = models.stack(Decoder(wide, key=jax.random.key(0))), jnp.ones((16, 16, 64))

    def work(layers: nnx.Module, h: jax.Array) -> jax.Array:
        context = Context(trunk.angles(layers, jnp.arange(16)[None]), {None: None})
        return jnp.sum(trunk.run(layers, h, context)[0] ** 2)

    def flops(layers: nnx.Module) -> float:
        return slope.lower(layers, h).compile().cost_analysis()["flops"]

    slope = jax.jit(jax.grad(work, argnums=(0, 1)))
    alone, sizes = flops(model.layers), parse_mesh(mesh)
    layers = models.pipeline(model, **dict(zip(SIZES, shape, strict=False))).layers
    with on(sizes):
        found = flops(shard(layers, sizes)) / alone
    schedule = layers.schedule
    share = schedule.ticks / (schedule.repeats * schedule.microbatches)
    assert found == pytest.approx(share / sizes.size, rel=0.1)


# ---------------------------------------------------------------- what is refused


def test_a_model_without_stages_is_told_how_it_gets_them():
    rule, mesh = backprop(), parse_mesh("pp=2")
    state = jax.eval_shape(rule.init, dense(2), jax.random.key(0))
    batch = jax.ShapeDtypeStruct((4, 9), jnp.int32)
    with pytest.raises(
        ConfigError, match=r"pp=2 cuts neither .*\(models\.pipeline\(model, stages="
    ):
        make_step(rule, mesh).trace(state, batch)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("pp=4", r"axis 'stages' of size 2 is not divisible by 4 \(pp=4\)"),
        ("dp=4,pp=2", r"rows of a microbatch: axis 'batch' of size 2 is not divisible by 4 \(dp=4"),
    ],
)
def test_stages_and_microbatches_that_a_mesh_does_not_divide(mesh, message):
    rule, mesh = backprop(optimizer=optax.sgd(0.1)), parse_mesh(mesh)
    model = models.pipeline(dense(2), stages=2, microbatches=2)
    state = jax.eval_shape(rule.init, model, jax.random.key(0))
    with pytest.raises(ConfigError, match=message):
        make_step(rule, mesh).trace(state, jax.ShapeDtypeStruct((4, 9), jnp.int32))


# ---------------------------------------------------------------- checkpoints


@pytest.mark.slow
def test_checkpoints_move_between_forms_and_meshes(tmp_path):
    """Two steps in four stages on pp=4; the third of each form from what was saved."""
    rule = backprop(optimizer=adam())
    model = models.pipeline(dense(), stages=4, microbatches=4)
    mesh, key = parse_mesh("pp=4"), jax.random.key(1)
    state, step = shard(rule.init(model, key), mesh), make_step(rule, mesh)
    for position in range(2):
        state, _ = step(state, place_batch(batch_at(position), mesh))
    trees.save(tmp_path / "saved", state)
    like = jax.eval_shape(rule.init, model, key)
    losses = []
    in_two = functools.partial(models.pipeline, stages=2, microbatches=2, repeats=2)
    for text, change in (
        ("dp=2,pp=2", lambda model: model),
        ("fsdp=2,tp=2", models.unpipeline),
        ("dp=2", lambda model: models.stack(models.unpipeline(model))),
        ("pp=2", in_two),
    ):
        mesh = parse_mesh(text)
        restored = trees.restore(tmp_path / "saved", abstract(like, parse_mesh("dp=1")))
        moved = shard(reformed(jax.device_get(restored), Decoder, change), mesh)
        back = reformed(jax.device_get(moved), Decoder, lambda m: models.pipeline(m, **FOUR))
        for a, b in zip(
            jax.tree.leaves(back.optimizer), jax.tree.leaves(state.optimizer), strict=True
        ):
            np.testing.assert_array_equal(a, b)
        _, metrics = make_step(rule, mesh)(moved, place_batch(batch_at(2), mesh))
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, run(dense, None)[0][2], atol=1e-5, rtol=0)


FOUR = {"stages": 4, "microbatches": 4}


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path):
    rule = backprop(optimizer=adam())
    model = models.pipeline(dense(4), stages=4, microbatches=4)

    def to(steps: int, folder: str) -> Decoder:
        options = LoopOptions(checkpoint_every=2, progress=False)
        given = {"key": jax.random.key(1), "folder": tmp_path / folder, "options": options}
        mesh = parse_mesh("dp=2,pp=4")
        return train(rule, model, batch_at, steps, resume=True, mesh=mesh, **given).state.model

    to(3, "cut")
    for a, b in zip(*map(jax.tree.leaves, (to(6, "cut"), to(6, "whole"))), strict=True):
        np.testing.assert_array_equal(a, b)
