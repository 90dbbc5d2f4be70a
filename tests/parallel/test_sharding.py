"""Meshes: the same losses on every mix of axes, the collectives of each, packed weights."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from ffnlab import models, quantization, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Linear
from ffnlab.layers.logical import LAYOUT, constrain, partition
from ffnlab.learning import backprop
from ffnlab.models import Decoder, DecoderConfig
from ffnlab.parallel import (
    LoopOptions,
    check,
    create,
    make_step,
    parse_mesh,
    place_batch,
    shard,
    shardings,
    train,
)
from ffnlab.rule import Rule
from ffnlab.weights import Dense, Int8, LoRA, Masked, SparseInput
from tests.contracts_methods import RULES

CONFIG = DecoderConfig(vocab=64, width=16, hidden=32, layers=2, heads=4, kv_heads=2, head_dim=8)
STEPS = 20


def batch_at(position: int) -> np.ndarray:
    return np.random.default_rng(position).integers(0, 64, (8, 17)).astype(np.int32)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


def losses(mesh_text: str | None, *, stacked: bool = False, steps: int = STEPS) -> list[float]:
    """The losses of a run, on one device or on a mesh."""
    rule, model = backprop(optimizer=optimizer()), Decoder(CONFIG, key=jax.random.key(0))
    state = rule.init(models.stack(model) if stacked else model, jax.random.key(1))
    step, place = rule.step, lambda batch: batch
    if mesh_text is not None:
        mesh = parse_mesh(mesh_text)
        state, step = shard(state, mesh), make_step(rule, mesh)
        place = lambda batch: place_batch(batch, mesh)  # noqa: E731
    found = []
    for position in range(steps):
        state, metrics = step(state, place(batch_at(position)))
        found.append(float(metrics["loss"]))
    return found


@pytest.fixture(scope="module")
def alone():
    return losses(None)


MIXES = ["dp=8", "fsdp=8", "tp=2", "dp=2,fsdp=2,tp=2", "fsdp=2,sp=2,tp=2", "dp=2,sp=4"]


@pytest.mark.parametrize("mesh", MIXES)
def test_every_mix_has_the_losses_of_one_device(mesh, alone):
    np.testing.assert_allclose(losses(mesh), alone, atol=1e-5, rtol=0)


def test_scanned_layers_too(alone):
    found = losses("dp=2,fsdp=2,tp=2", stacked=True)
    np.testing.assert_allclose(found, alone, atol=1e-5, rtol=0)


def compiled(mesh_text: str) -> tuple[str, object]:
    """The compiled step on a mesh, as text, and the state it was compiled for."""
    rule, mesh = backprop(optimizer=optimizer()), parse_mesh(mesh_text)
    state = shard(rule.init(Decoder(CONFIG, key=jax.random.key(0)), jax.random.key(1)), mesh)
    batch = place_batch(batch_at(0), mesh)
    step = jax.jit(lambda s, b: rule.step(s, b))
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile().as_text(), state


def gathered(text: str) -> set[tuple[int, ...]]:
    """Shapes that an all-gather makes."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", text)
    return {tuple(map(int, shape.split(","))) for shape in found if shape}


def matrices(state) -> set[tuple[int, ...]]:
    return {leaf.shape for leaf in jax.tree.leaves(state.model) if leaf.ndim == 2}


def test_data_parallel_reduces_gradients_and_gathers_nothing():
    text, state = compiled("dp=4")
    assert "all-reduce" in text and not gathered(text) & matrices(state)


def test_tensor_parallel_gathers_no_parameter():
    text, state = compiled("tp=2")
    assert "all-reduce" in text and not gathered(text) & matrices(state)


def test_fsdp_gathers_parameters():
    text, _ = compiled("fsdp=4")
    assert "all-gather" in text


def test_states_are_cut_like_parameters_and_stay_so():
    rule, mesh = backprop(optimizer=optimizer()), parse_mesh("fsdp=2,tp=2")
    state = shard(rule.init(Decoder(CONFIG, key=jax.random.key(0)), jax.random.key(1)), mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    up = state.model.layers[0].ffn.up.weight.w
    assert up.sharding.spec == PartitionSpec("fsdp", "tp")
    cut = [leaf for leaf in jax.tree.leaves(state.optimizer) if not leaf.is_fully_replicated]
    assert len(cut) == 2 * len(jax.tree.leaves(state.model)), "both averages of AdamW"
    state, _ = make_step(rule, mesh)(state, place_batch(batch_at(0), mesh))
    same = lambda a, b: a.is_equivalent_to(b.sharding, b.ndim)  # noqa: E731
    assert all(jax.tree.leaves(jax.tree.map(same, places, state)))


def test_a_new_part_of_a_state_is_cut_by_its_names_and_not_as_it_was_made():
    """Parameters from one number, which lies whole, and numbers from rows, which lie cut."""
    rule, mesh = remaking(), parse_mesh("dp=2,tp=2")
    state = shard(rule.init(None, jax.random.key(0)), mesh)
    state, metrics = make_step(rule, mesh)(state, place_batch(np.ones((8, 4), np.float32), mesh))
    assert state["w"].get_value().sharding.spec == PartitionSpec(None, "tp")
    for leaf in (state["sums"], *metrics.values()):
        assert leaf.is_fully_replicated


def remaking() -> Rule:
    """Its state is made anew from each batch."""

    def of(batch):
        w = jnp.broadcast_to(batch.sum(), (4, 8))
        return {"w": nnx.Param(w, axes=("embed", "mlp")), "sums": batch.sum(axis=1)}

    return Rule(
        "remaking",
        lambda model, key: of(jnp.zeros((8, 4))),
        lambda state, batch: (of(batch), {"rows": batch[:, 0] * state["sums"]}),
        lambda state, inputs: inputs,
    )


ON_GRAPHS = [name for name in RULES if name.startswith("forward_gnn")]


@pytest.mark.parametrize("name", ON_GRAPHS)
def test_a_graph_is_no_batch_that_devices_could_share(name):
    case, mesh = RULES[name], parse_mesh("dp=2")
    rule, batch = case.make(), case.batches()[0]
    state = create(lambda m: rule.init(m, jax.random.key(0)), (shard(case.model(), mesh),), mesh)
    with pytest.raises(ConfigError, match="dp=2 cuts neither a leaf of the state nor the batch"):
        make_step(rule, mesh)(state, place_batch(batch, mesh))


@pytest.mark.parametrize("name", [name for name in RULES if name not in ON_GRAPHS])
def test_every_rule_runs_on_a_mesh(name):
    """No rule is asked what it is."""
    case, mesh = RULES[name], parse_mesh("dp=2")
    rule, batches = case.make(), case.batches()
    key = jax.random.key(0)
    expected, _ = rule.step(rule.init(case.model(), key), batches[0])
    state = create(lambda model: rule.init(model, key), (shard(case.model(), mesh),), mesh)
    found, metrics = make_step(rule, mesh)(state, place_batch(batches[0], mesh))
    assert all(np.ndim(value) == 0 for value in metrics.values())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-3)


def test_a_state_is_created_where_it_lies():
    mesh, key = parse_mesh("fsdp=2,tp=2"), jax.random.key(0)

    def init(model):
        state = backprop(optimizer=optimizer()).init(model, key)
        return state._replace(key=jax.random.key_data(state.key))

    model = Decoder(CONFIG, key=key)
    state, wanted = create(init, (shard(model, mesh),), mesh), shard(init(model), mesh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, b.ndim)
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model))


def test_no_device_ever_holds_a_created_model_whole():
    wide = dataclasses.replace(CONFIG, hidden=512, vocab=512)
    make = functools.partial(Decoder, wide, key=jax.random.key(0))
    mesh = parse_mesh("fsdp=8")
    model = create(make, (), mesh)
    places = shardings(model, mesh)
    memory = jax.jit(make, out_shardings=places).lower().compile().memory_analysis()
    used = memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert used < 0.5 * sum(leaf.nbytes for leaf in jax.tree.leaves(model))
    with pytest.raises(ConfigError, match=r"axis 'vocab' of size 512 .* 3 \(tp=3\)"):
        create(make, (), parse_mesh("tp=3"))


def test_packed_weights_are_cut_like_their_matrix():
    model = Decoder(CONFIG, key=jax.random.key(0))
    method = quantization.nearest(format="int4", group=8)
    packed, _ = transform.apply(method, model, [])
    mesh, tokens = parse_mesh("tp=2"), batch_at(0)[:, :-1]
    cut = shard(packed, mesh)
    codes = tree.select(cut, tree.at("layers[0].ffn.up"))["layers[0].ffn.up"].weight.codes
    assert codes.sharding.spec == PartitionSpec(None, "tp")
    run = jax.jit(lambda m, t: m(t))
    np.testing.assert_allclose(run(cut, tokens), run(packed, tokens), rtol=1e-4, atol=1e-4)


def test_sizes_that_do_not_divide_are_named():
    model = Decoder(CONFIG, key=jax.random.key(0))
    with pytest.raises(ConfigError, match=r"embed\.w: axis 'vocab' of size 64 .* 3 \(tp=3\)"):
        check(model, parse_mesh("tp=3"))
    with pytest.raises(ConfigError, match=r"layers\[0\]\.ffn\.\w+\.w: axis 'mlp' of size 32"):
        layout = {"mlp": ("tp",)}
        shardings(model, parse_mesh("tp=5"), layout)
    with pytest.raises(ConfigError, match=r"batch: axis 'batch' of size 8"):
        place_batch(batch_at(0), parse_mesh("dp=3"))


def test_an_axis_is_used_once_and_missing_ones_are_skipped():
    sizes = {"fsdp": 2, "tp": 2}
    assert partition(("embed", "embed"), (4, 4), sizes) == PartitionSpec("fsdp", None)
    assert partition(("batch", None), (4, 3), {"tp": 2}) == PartitionSpec(None, None)
    assert partition(("batch",), (8,), {"dp": 2, "fsdp": 2}) == PartitionSpec(("dp", "fsdp"))
    assert partition(("mlp",), (3,), sizes) == PartitionSpec(None), "an activation stays whole"
    assert set(LAYOUT) >= {"batch", "length", "expert"}
    x = jnp.ones((2, 3))
    assert constrain(x, ("batch", "embed")) is x


def test_a_run_goes_on_on_another_mesh(tmp_path, alone):
    rule, model = backprop(optimizer=optimizer()), Decoder(CONFIG, key=jax.random.key(0))
    options = LoopOptions(log_every=1, progress=False)
    found = {}
    for steps, mesh in ((4, "dp=2,tp=2"), (7, "fsdp=4"), (9, "")):
        outcome = train(
            rule,
            model,
            batch_at,
            steps,
            key=jax.random.key(1),
            folder=tmp_path,
            resume=True,
            options=options,
            mesh=parse_mesh(mesh) if mesh else None,
        )
        found[mesh] = outcome.metrics["loss"]
    wanted = [alone[steps - 1] for steps in (4, 7, 9)]
    np.testing.assert_allclose(list(found.values()), wanted, atol=1e-5)


@pytest.mark.parametrize("mesh_text", ["dp=1", "dp=2,fsdp=2"])
def test_microbatches_are_the_whole_batch(mesh_text, alone):
    rule, mesh = backprop(optimizer=optimizer(), microbatches=2), parse_mesh(mesh_text)
    state = shard(rule.init(Decoder(CONFIG, key=jax.random.key(0)), jax.random.key(1)), mesh)
    step, found = make_step(rule, mesh), []
    for position in range(5):
        state, metrics = step(state, place_batch(batch_at(position), mesh))
        found.append(float(metrics["loss"]))
    np.testing.assert_allclose(found, alone[:5], atol=1e-5, rtol=0)
    assert state.step == 5


SPLIT = {
    "LoRA": lambda w: LoRA.init(Int8.quantize(w, group=8), 2, jax.random.key(2)),
    "Masked": lambda w: Masked(Dense(w), w > 0),
    "SparseInput": lambda w: SparseInput(Dense(w), jnp.float32(0.1)),
}


def part_trained(name: str, *, stacked: bool = False, dtype=jnp.float32) -> Decoder:
    """A decoder with weights of which some arrays are trained and some are not."""
    model = Decoder(CONFIG, key=jax.random.key(0), dtype=dtype)
    wrap = lambda linear: linear.replace(  # noqa: E731
        SPLIT[name](linear.weight.dense().astype(jnp.float32))
    )
    model = tree.map_at(model, tree.at("layers[*].ffn.*") & tree.of_type(Linear), wrap)
    return models.stack(model) if stacked else model


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", SPLIT)
def test_the_state_of_weights_trained_in_part_is_cut_as_they_are(name, stacked, key):
    """Moments and masters, leaf by leaf; the arrays that are not trained have none."""
    make = lambda: part_trained(name, stacked=stacked, dtype=jnp.bfloat16)  # noqa: E731
    state = jax.eval_shape(lambda: backprop(optimizer=optax.adam(0.1)).init(make(), key))
    places = shardings(state, parse_mesh("fsdp=2,tp=2"))
    by_path = lambda part: {  # noqa: E731
        jax.tree_util.keystr(path): place.spec
        for path, place in jax.tree_util.tree_leaves_with_path(part)
    }
    of_model, moments = by_path(places.model), by_path(places.optimizer.inner[0].mu)
    assert 0 < len(moments) < len(of_model)
    for path, spec in (moments | by_path(places.optimizer.masters)).items():
        assert spec == of_model[path], path
    assert {"fsdp", "tp"} <= {axis for spec in moments.values() for axis in spec}


def test_a_lora_is_trained_on_a_mesh_as_on_one_device(key):
    rule, found = backprop(optimizer=optax.sgd(0.1)), []
    for text in ("dp=1", "fsdp=2,tp=2"):
        mesh = parse_mesh(text)
        step, state = make_step(rule, mesh), shard(rule.init(part_trained("LoRA"), key), mesh)
        for position in range(2):
            state, metrics = step(state, place_batch(batch_at(position), mesh))
        found.append(float(metrics["loss"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_what_an_optimizer_keeps_of_rows_alone_is_whole(key):
    """Adafactor has a row and a column in place of a large matrix, and one number for nothing."""
    config = dataclasses.replace(CONFIG, hidden=128, width=128)
    rule = backprop(optimizer=optax.adafactor(0.1))
    state = jax.eval_shape(lambda: rule.init(Decoder(config, key=key), key))
    places = shardings(state, parse_mesh("fsdp=2,tp=2")).optimizer
    state = jax.tree.leaves(state.optimizer)
    rows = [(leaf.size, p.spec) for leaf, p in zip(state, jax.tree.leaves(places), strict=True)]
    assert any(leaf.shape == (128,) for leaf in state)
    assert all(not any(spec) for size, spec in rows if size == 1)
