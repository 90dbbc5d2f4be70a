"""Meshes: their descriptions, and that every axis of one saves its devices some of the work."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from ffnlab import compat, models
from ffnlab.errors import ConfigError
from ffnlab.layers.logical import LAYOUT, ambient
from ffnlab.learning import backprop, labelled
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.parallel import (
    LoopOptions,
    abstract,
    create,
    make_step,
    mesh_sizes,
    parse_mesh,
    place_batch,
    shard,
    shardings,
    skip_bad_steps,
    train,
)
from ffnlab.rule import Rule
from ffnlab.storage import trees

CONFIG = DecoderConfig(vocab=64, width=16, hidden=32, layers=2, heads=4, kv_heads=4, head_dim=8)
CUSTOM = {"batch": ("model",), "mlp": ("data",), "heads": ("data",), "vocab": ("data",)}
SWAPPED = {"batch": ("data",), "mlp": ("model",), "heads": ("model",), "vocab": ("model",)}
ROWS = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)


def decoder(*, stacked: bool = False) -> Decoder:
    model = Decoder(CONFIG, key=jax.random.key(0))
    return models.stack(model) if stacked else model


def traced(mesh, rule=None, *, layout=LAYOUT, model=None, batch=ROWS):
    """The step of a rule on a mesh, as traced for abstract arguments."""
    rule = backprop(optimizer=optax.sgd(0.1)) if rule is None else rule
    model = decoder() if model is None else model
    state = jax.eval_shape(rule.init, model, jax.random.key(0))
    batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))
    return make_step(rule, mesh, layout).trace(state, batch)


@functools.cache
def flops(mesh_text: str) -> float:
    """Operations of one device in a step of scanned layers, as XLA counts them in its program."""
    step = traced(parse_mesh(mesh_text), model=decoder(stacked=True))
    return step.lower().compile().cost_analysis()["flops"]


# ---------------------------------------------------------------- descriptions


def test_descriptions_of_meshes():
    assert dict(parse_mesh("dp=-1,tp=2").shape) == {"dp": 4, "tp": 2}
    assert dict(parse_mesh("").shape) == {"dp": 1}
    assert mesh_sizes("fsdp=2, dp=-1") == {"fsdp": 2, "dp": -1}
    assert dict(parse_mesh("model=2", layout=CUSTOM).shape) == {"model": 2}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dp", "'dp' is not NAME=SIZE, each name once"),
        ("dp=x", "'dp=x' is not NAME=SIZE"),
        ("dp=²", "'dp=²' is not NAME=SIZE"),
        ("dp=--2", "'dp=--2' is not NAME=SIZE"),
        ("2=dp", "'2=dp' is not NAME=SIZE"),
        ("dp=2,", "'' is not NAME=SIZE"),
        ("dp=2,dp=2", "'dp=2' is not NAME=SIZE, each name once"),
        ("dp=0", "'dp=0' must be at least 1, or -1 for the devices that are left"),
        ("tp=2,dp=-2", "'dp=-2' must be at least 1, or -1"),
        ("dp=-1,tp=-1", "one size may be -1, not those of dp and tp"),
        ("dp=16", "needs 16 devices; there are 8"),
        ("dp=-1,tp=16", "needs 16 devices; there are 8"),
        ("dp=-1,tp=3", "3 does not divide the 8 devices"),
        ("xx=2", r"'xx' is not an axis of the layout \['dp', 'fsdp', 'ep', 'sp', 'tp', 'pp'\]"),
        ("fdsp=1", r"'fdsp' is not an axis of the layout .*; nearest: 'fsdp'"),
    ],
)
def test_bad_descriptions_say_what_is_wrong(text, message):
    with pytest.raises(ConfigError, match=f"^mesh='{text}'.*{message}"):
        parse_mesh(text)


def test_a_description_is_of_the_axes_of_its_layout():
    with pytest.raises(ConfigError, match=r"'tp' is not an axis of the layout \['model', 'data'\]"):
        parse_mesh("tp=2", layout=CUSTOM)


# ---------------------------------------------------------------- what an axis is good for


@pytest.mark.parametrize(
    "mesh", ["dp=4", "fsdp=4", "ep=4", "tp=4", "sp=4", "dp=2,sp=2", "fsdp=2,tp=2"]
)
def test_every_axis_of_a_mesh_shares_the_work(mesh):
    """Four devices do a quarter each, but for what all do alike: norms, the optimizer, masks."""
    assert 0.25 <= flops(mesh) / flops("dp=1") < 0.3


def test_stacks_are_not_cut_along_their_layers():
    mesh = parse_mesh("fsdp=2,tp=2")
    up = shardings(decoder(stacked=True), mesh).layers.period[0].ffn.up.weight
    assert up.w.spec == PartitionSpec(None, "fsdp", "tp")


def test_stacks_go_on_on_another_mesh(tmp_path):
    model = decoder(stacked=True)
    trees.save(tmp_path / "saved", shard(model, parse_mesh("fsdp=2,tp=2")))
    like = abstract(model, parse_mesh("dp=2,tp=4"))
    found = trees.restore(tmp_path / "saved", like)
    assert found.layers.period[0].ffn.up.weight.w.sharding.spec == PartitionSpec(None, None, "tp")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(a, b)


NOTHING = "neither a leaf of the state nor the batch nor an activation"


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("sp=3", rf"^mesh='sp=3': sp=3 cuts {NOTHING}: none has an axis 'length'"),
        ("dp=2,sp=3", r"^mesh='dp=2,sp=3': sp=3 cuts .*its devices would repeat the work"),
    ],
)
def test_an_axis_that_cuts_nothing_is_an_error(mesh, message):
    """A model without tokens has no use for one that cuts the sequence."""
    rule, model, batch = nameless()
    with pytest.raises(ConfigError, match=message):
        traced(parse_mesh(mesh), rule, model=model, batch=batch)
    assert traced(parse_mesh("sp=1,dp=2,tp=1"))


def test_no_step_is_taken_on_an_idle_axis():
    rule, mesh = backprop(optimizer=optax.sgd(0.1)), parse_mesh("sp=3")
    state = shard(rule.init(decoder(), jax.random.key(0)), mesh)
    step, batch = make_step(rule, mesh), place_batch(ROWS, mesh)
    for _ in range(2):
        with pytest.raises(ConfigError, match="sp=3 cuts"):
            step(state, batch)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(state)), "it is donated later"
    with pytest.raises(ConfigError, match="sp=3 cuts"):
        train(rule, decoder(), lambda _: ROWS, 1, key=jax.random.key(0), mesh=mesh)


def nameless() -> tuple[Rule, dict[str, jax.Array], tuple[np.ndarray, np.ndarray]]:
    """A rule, a model whose matrix names no axes, and a batch."""
    batch = (np.ones((8, 6), np.float32), np.zeros(8, np.int32))
    rule = backprop(lambda model, batch: labelled(lambda x: x @ model["w"], batch), optax.sgd(0.1))
    return rule, {"w": jnp.ones((6, 64))}, batch


def test_a_model_without_names_is_not_cut():
    rule, model, batch = nameless()
    with pytest.raises(ConfigError, match=f"tp=2 cuts {NOTHING}"):
        traced(parse_mesh("tp=2"), rule, model=model, batch=batch)
    with pytest.raises(ConfigError, match="tp=2 cuts"):
        traced(parse_mesh("dp=2,tp=2"), rule, model=model, batch=batch)
    assert traced(parse_mesh("dp=2"), rule, model=model, batch=batch)


def test_the_sequence_is_cut_only_where_its_length_divides():
    assert traced(parse_mesh("sp=4"))
    with pytest.raises(
        ConfigError, match=r"15 tokens: sp=4 cuts a row in 4 .*; use rows of 12 or 16"
    ):
        traced(parse_mesh("sp=4"), batch=ROWS[:, :-1])


def test_batches_of_every_shape_are_checked():
    rule, mesh = backprop(optimizer=optax.sgd(0.1)), parse_mesh("sp=2")
    step = make_step(rule, mesh)
    state, _ = step(shard(rule.init(decoder(), jax.random.key(0)), mesh), ROWS)
    with pytest.raises(ConfigError, match="sp=2 cuts"):
        step(state, ROWS[:, :-1])
    state, _ = step(state, ROWS)
    assert state.step == 2


def test_a_mesh_made_by_hand_is_checked_against_its_layout():
    mesh = compat.make_mesh((2, 2), ("data", "model"))
    with pytest.raises(ConfigError, match=r"data=2 cuts .*the layout does not name it; model=2"):
        traced(mesh)
    assert traced(mesh, layout=CUSTOM)


def test_a_step_that_was_traced_before_is_checked_alike():
    """What a rule's step cuts is seen also where jax does not trace it again."""
    rule, mesh = backprop(optimizer=optax.sgd(0.1)), parse_mesh("sp=4")
    for _ in range(2):
        assert traced(mesh, rule)


# ---------------------------------------------------------------- layouts


def activations(program) -> collections.Counter[str]:
    """How often a step cuts arrays of rank 3, which here are activations alone, by how."""
    pattern = r"\[\d+,\d+,\d+\] = sharding_constraint\[[^\]]*?spec=P\((.*?)\)"
    return collections.Counter(re.findall(pattern, str(program.jaxpr), re.DOTALL))


def test_activations_follow_the_layout_of_the_step():
    """One rule on one mesh under two layouts in turn; its step is jitted by itself."""
    rule, model = skip_bad_steps(backprop(optimizer=optax.sgd(0.1))), decoder()
    mesh = compat.make_mesh((2, 2), ("data", "model"))
    for layout, rows, vocab in ((CUSTOM, "model", "data"), (SWAPPED, "data", "model")) * 2:
        found = activations(traced(mesh, rule, layout=layout, model=model))
        blocks, logits = f"'{rows}', None, None", f"'{rows}', None, '{vocab}'"
        assert found == {blocks: 2 * CONFIG.layers, logits: 2}, "forward and backward"


def test_one_rule_is_cut_as_each_layout_says():
    rule, mesh = backprop(optimizer=optax.sgd(0.1)), compat.make_mesh((2, 2), ("data", "model"))
    found = []
    for layout in (CUSTOM, SWAPPED):
        state = shard(rule.init(decoder(), jax.random.key(0)), mesh, layout)
        state, metrics = make_step(rule, mesh, layout)(state, place_batch(ROWS, mesh, layout))
        up = state.model.layers[0].ffn.up.weight.w
        assert up.sharding.spec == PartitionSpec(None, *layout["mlp"])
        found.append(float(metrics["loss"]))
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_a_batch_is_cut_wherever_it_comes_from():
    """A batch of host arrays is cut by the step itself."""
    rule, mesh = seeing(), parse_mesh("dp=4")
    state, metrics = make_step(rule, mesh)(jnp.zeros(()), np.arange(8.0))
    assert float(metrics["sum"]) == 28
    program = traced(mesh, rule, model=jnp.zeros(()), batch=np.arange(8.0)).lower().compile()
    assert "f32[2]" in program.as_text()
    assert state == 1


def seeing() -> Rule:
    """Counts its steps and adds up its batch."""
    step = jax.jit(lambda state, batch: (state + 1, {"sum": jnp.sum(batch)}))
    return Rule("seeing", lambda model, key: model, step, lambda state, inputs: inputs)


def test_what_is_created_follows_the_layout():
    mesh, seen = compat.make_mesh((2, 2), ("data", "model")), []

    def make():
        seen.append((ambient(), jax.sharding.get_abstract_mesh().shape))
        return jnp.ones(4)

    create(make, (), mesh, CUSTOM)
    assert seen and all(layout == CUSTOM and shape == mesh.shape for layout, shape in seen)


def test_evaluations_share_the_work_too():
    """Rows of an evaluation are cut along the mesh of the run, by its layout."""
    rule = backprop(optimizer=optax.sgd(0.1))
    mesh, seen = compat.make_mesh((2, 2), ("data", "model")), []

    def evaluate(state):
        logits = rule.predict(state, jnp.asarray(ROWS))
        seen.append(logits.sharding.shard_shape(logits.shape))
        return {"mean": logits.mean()}

    train(
        rule,
        decoder(),
        lambda _: ROWS,
        1,
        key=jax.random.key(0),
        evaluate=evaluate,
        options=LoopOptions(progress=False),
        mesh=mesh,
        layout=CUSTOM,
    )
    assert seen == [(4, 17, 32)]
