"""Hypernetworks: two official codes, every cell of the review's table, what is generated."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

from ffnlab import models, quantization, transform, tree
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, Conv, Linear
from ffnlab.learning import backprop, generated, labelled
from ffnlab.models import Condition, Hypernet, HypernetConfig, HypernetSpec, MLPConfig, Tasked
from ffnlab.models.hypernet import generator
from ffnlab.models.hypernet.inputs import check_task
from ffnlab.models.hypernet.spec import ARCHITECTURES, INPUTS, OUTPUTS, VARIABILITIES, why_invalid
from ffnlab.models.hypernet.targets import check_target
from ffnlab.testing import tiny
from ffnlab.weights import Dense, Int4
from tests.fixtures.hypernets import record

SMALL = MLPConfig((3, 5, 4, 1), "elu")
PARITY = {
    "all": {"outputs": "once"},
    "layerwise": {"outputs": "component_wise", "shared": False},
    "chunking": {"outputs": "chunk_wise", "shared": False, "chunk": 17},
    "split": {"outputs": "multi_head"},
}


def drawn(config, key):
    """A hypernetwork, drawn in one program."""
    return jax.jit(lambda key: config.make(key=key))(key)


def with_arrays(net, values):
    """A hypernetwork with these embeddings of tasks, then maps as torch has them."""
    new, (tasks, *maps) = tree.copy(net), values
    new.tasks.w.set_value(Dense(jnp.asarray(tasks)))
    trunk = [] if new.trunk is None else [*new.trunk.maps]
    if new.spec.outputs == "multi_head":
        head = maps[2 * len(trunk) :]
        for i, linear in enumerate(new.heads.maps):
            w, b = (np.stack(head[2 * i + j :: 4]) for j in (0, 1))
            linear.w.set_value(Dense(jnp.asarray(w.swapaxes(1, 2))))
            linear.b.set_value(jnp.asarray(b))
    else:
        trunk.append(new.heads)
    for linear, w, b in zip(trunk, maps[::2], maps[1::2], strict=False):
        linear.w.set_value(Dense(jnp.asarray(w.T)))
        linear.b.set_value(jnp.asarray(b))
    return new


def plain(outputs="once", **options):
    """A hypernetwork of the sizes of the recorded ones, drawn so that nothing is added."""
    given = {"tasks": 2, "embedding": 4, "hidden": (8, 6), "init": "uniform"}
    return HypernetSpec(outputs=outputs, **given | options)


@pytest.mark.parametrize("name", PARITY)
def test_pieces_are_those_of_hyperite(name, fixtures, key):
    """tests/fixtures/hypernets/record.py drew the parameters and recorded the official outputs."""
    with np.load(fixtures / "hypernets" / "expected.npz", allow_pickle=False) as saved:
        wanted = [saved[f"{name} {task}"] for task in range(2)]
        numbers = saved[f"{name} numbers"]
    net = drawn(HypernetConfig(SMALL, plain(**PARITY[name])), key)
    which = list(PARITY).index(name)
    net = with_arrays(net, record.filled(record.shapes_of(name), which))
    for task, official in enumerate(wanted):
        np.testing.assert_allclose(
            net.come(Condition(task=task)).reshape(-1), official, rtol=1e-5, atol=1e-6
        )
    options = PARITY[name] | {"embedding": 16, "hidden": (100, 100)}
    options |= {"chunk": 125} if name == "chunking" else {}
    large = HypernetConfig(MLPConfig((8, 20, 20, 1)), plain(**options))
    made = jax.eval_shape(lambda key: large.make(key=key), key)
    assert sum(leaf.size for leaf in jax.tree.leaves(made)) == numbers[0]
    assert (
        math.prod(jax.eval_shape(lambda net: net.come(Condition(task=0)), made).shape)
        == (numbers[1])
    )


def test_chunks_are_those_of_hypercl(fixtures, key):
    tasks, pieces, *maps = record.filled(record.chunked_shapes(), 10)
    net = drawn(HypernetConfig(SMALL, plain("chunk_wise", tasks=3, chunk=record.CHUNK)), key)
    net = with_arrays(net, [tasks, *maps])
    net.pieces.w.set_value(Dense(jnp.asarray(pieces)))
    with np.load(fixtures / "hypernets" / "expected.npz", allow_pickle=False) as saved:
        for task in range(3):
            found = net.vector(task)
            assert found.shape == (record.WEIGHTS,) != (5 * record.CHUNK,)
            np.testing.assert_allclose(found, saved[f"hypercl {task}"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_a_chain_of_chunks_is_an_unrolled_loop(cell, key):
    """(h, c)_k = cell([e_t; c_k], (h, c)_(k-1)) from 0, w_k = h_k W + b, the last chunk cut; in
    float64, by torch's formulas."""
    kinds = {"architecture": "rnn", "cell": cell, "hidden": (6,)}
    net = drawn(HypernetConfig(SMALL, plain("chunk_wise", chunk=17, **kinds)), key)
    random = np.random.default_rng(0)
    net = jax.tree.map(lambda leaf: jnp.float32(random.normal(0, 0.5, leaf.shape)), net)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), net)
    (reads,), (hears,), last = wide.trunk.input, wide.trunk.hidden, wide.heads
    w, u, v = (linear.w.get_value().w for linear in (reads, hears, last))
    b, c = reads.b.get_value(), hears.b.get_value() if cell == "gru" else 0.0
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    for task in range(2):
        h, memory, found = np.zeros(6), np.zeros(6), []
        for piece in wide.pieces.w.get_value().w:
            x = np.concatenate([wide.tasks.w.get_value().w[task], piece]) @ w + b
            y = h @ u + c
            if cell == "lstm":
                i, f, g, o = np.split(x + y, 4)
                memory = sigmoid(f) * memory + sigmoid(i) * np.tanh(g)
                h = sigmoid(o) * np.tanh(memory)
            elif cell == "gru":
                (x_r, x_z, x_n), (y_r, y_z, y_n) = np.split(x, 3), np.split(y, 3)
                z = sigmoid(x_z + y_z)
                h = (1 - z) * np.tanh(x_n + sigmoid(x_r + y_r) * y_n) + z * h
            else:
                h = np.tanh(x + y)
            found.append(h @ v + last.b.get_value())
        assert len(found) * 17 > net.layout.size
        wanted = np.concatenate(found)[: net.layout.size]
        np.testing.assert_allclose(net.vector(task), wanted, atol=1e-6)


CELLS = list(itertools.product(INPUTS, OUTPUTS, VARIABILITIES, VARIABILITIES, ARCHITECTURES))


def spec_of(cell, **options):
    """The spec of a cell of the table."""
    inputs, outputs, variability, output_variability, architecture = cell
    sizes = {inputs: 3} if inputs != "task" else {"tasks": 2}
    given = {"hidden": (4,), "embedding": 3, "chunk": 7} | sizes | options
    return HypernetSpec((inputs,), outputs, variability, output_variability, architecture, **given)


def inputs_for(spec, value=1.0):
    """Inputs of a spec, all of one value."""
    drawn = {name: jnp.full(getattr(spec, name), value) for name in ("data", "noise")}
    found = {**drawn, "task": jnp.int32(1)}
    return Condition(**{name: found[name] for name in spec.inputs})


def is_valid(cell):
    """The table, written once more by itself."""
    inputs, outputs, variability, _, architecture = cell
    has_pieces = outputs in ("component_wise", "chunk_wise")
    return (variability == "dynamic" or inputs == "task") and (
        has_pieces or architecture in ("mlp", "linear")
    )


def test_every_cell_of_the_table(key):
    """3 inputs x 4 outputs x 2 x 2 x 5: those that cannot be say why; some of the others here."""
    assert len(CELLS) == 240
    valid = [cell for cell in CELLS if is_valid(cell)]
    assert len(valid) == 4 * 2 * (2 * 2 + 2 * 5) == 112
    for cell in CELLS:
        assert (why_invalid((cell[0],), *cell[1:]) is None) == is_valid(cell), cell
        if is_valid(cell):
            spec_of(cell)
            continue
        with pytest.raises(ConfigError, match="known beforehand|runs over pieces"):
            spec_of(cell)
    by_kind = lambda cells: {cell[1::3]: cell for cell in cells}  # noqa: E731
    first, last = by_kind(valid[::-1]), by_kind(valid)  # of each outputs and architecture
    assert len(first) == 14 and not {*first.values()} & {*last.values()}
    for cell in (*first.values(), *last.values()):
        check_shapes(cell, key)


def check_shapes(cell, key):
    """Traces what a cell makes: it has the target's type, structure, shapes and dtypes."""
    target = MLPConfig((3, 4, 2))
    config = HypernetConfig(target, spec_of(cell))
    given = inputs_for(config.spec)
    made, wanted = jax.eval_shape(
        lambda key: (config.make(key=key).make(given), target.make(key=key)), key
    )
    assert type(made) is MLP and jax.tree.structure(made) == jax.tree.structure(wanted), cell
    facts = [[(x.shape, x.dtype) for x in jax.tree.leaves(m)] for m in (made, wanted)]
    assert facts[0] == facts[1], cell


@pytest.mark.slow
@pytest.mark.parametrize("cell", [c for c in CELLS if is_valid(c)], ids="-".join)
def test_every_valid_cell_learns(cell, key):
    """Compiled; every array of the hypernetwork has a gradient, and the same bits again."""
    check_shapes(cell, key)
    spec = spec_of(cell)
    net = drawn(HypernetConfig(MLPConfig((3, 4, 2)), spec), key)
    # Of opposite signs: a ReLU that is dead for one is not for the other.
    both = inputs_for(spec), inputs_for(spec, -1.0)
    batch = jax.tree.map(lambda *leaves: jnp.stack(leaves), *both), jax.tree.map(twice, ROWS)
    step = jax.jit(jax.grad(lambda net: generated(labelled)(net, batch)[0]))
    gradient = step(net)
    for path, leaf in tree.select(gradient, tree.floating).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    assert all(map(np.array_equal, *(jax.tree.leaves(g) for g in (gradient, step(net)))))


def twice(rows):
    """The same rows for two examples."""
    return jnp.concatenate([rows, rows])


ROWS = (jax.random.normal(jax.random.key(7), (1, 6, 3)), jnp.array([[0, 1, 1, 0, 1, 0]]))
TARGETS = {
    "mlp": (lambda: MLP((5, 8, 4), key=jax.random.key(1)), jnp.ones((2, 5))),
    "convnet": (
        lambda: models.ConvNet((2, 3, 5), 4, key=jax.random.key(1)),
        jax.random.normal(jax.random.key(2), (2, 4, 4, 2)),
    ),
    "decoder": (tiny, jnp.array([[3, 1, 4], [1, 5, 9]])),
}


@pytest.mark.parametrize("name", TARGETS)
def test_what_depends_on_nothing_is_the_target(name, key):
    make, x = TARGETS[name]
    target, spec = make(), HypernetSpec((), architecture="linear")
    net = jax.jit(lambda key: Hypernet(spec, target, key=key))(key)
    assert net.config is not None
    vector = jax.jit(lambda net: net.vector(Condition()))(net)
    np.testing.assert_array_equal(vector, ravel_pytree(target)[0])
    call = jax.jit(lambda model, x: model(x))
    np.testing.assert_allclose(call(net, x), call(target, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", TARGETS)
def test_transforms_and_captures_take_what_is_generated(name, key):
    make, x = TARGETS[name]
    target, spec = make(), HypernetSpec(tasks=2, init="target", hidden=(8,))
    net = jax.jit(lambda key: Hypernet(spec, target, key=key))(key)
    first, second = map(jax.jit(lambda task: net.make(task)), (0, 1))
    assert type(first) is type(target)
    call = jax.jit(lambda model, x: model(x))
    assert not np.array_equal(call(first, x), call(second, x))
    np.testing.assert_allclose(call(net, Tasked(x, 1)), call(second, x), rtol=1e-5, atol=1e-6)
    _, seen = jax.jit(lambda m, x: tree.capture(m, tree.of_type(Linear, Conv), x))(first, x)
    assert len(seen) == len(tree.select(target, tree.of_type(Linear, Conv)))
    if name == "convnet":  # its matrices have no width that is a multiple of a group
        new, _ = transform.apply(quantization.nearest(format="float8"), first)
    else:
        new, _ = transform.apply(quantization.nearest(group=4), first)
        assert tree.select(new, tree.of_type(Int4))
    assert np.isfinite(call(new, x)).all()


def test_an_ordinary_network_is_a_special_case(key):
    """50 steps of Adam of Phi = Theta are those of the network, to 1e-6 (card, item 1)."""
    target = MLP((3, 5, 2), key=key)
    net = Hypernet(HypernetSpec((), architecture="linear"), target, key=key)
    rows = ROWS[0][0], ROWS[1][0]
    losses = []
    for model in (net, target):
        rule = backprop(labelled, optax.adam(1e-2))
        state, found = rule.init(model, key), []
        for _ in range(50):
            state, metrics = rule.step(state, rows)
            found.append(metrics["loss"])
        losses.append(np.array(found))
    np.testing.assert_allclose(*losses, atol=1e-6)
    assert losses[0][-1] < 0.5 * losses[0][0]


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_the_gradient_goes_by_the_chain_rule(outputs, key):
    """dL/dPhi = (dTheta/dPhi)^T dL/dTheta, each computed by itself."""
    net = drawn(HypernetConfig(MLPConfig((3, 4, 2)), plain(outputs, chunk=7)), key)
    phi, unravel = ravel_pytree(net)
    loss = lambda target: labelled(target, (ROWS[0][0], ROWS[1][0]))[0]  # noqa: E731
    found = jax.grad(lambda phi: loss(unravel(phi).make(1)))(phi)
    jacobian = jax.jacobian(lambda phi: unravel(phi).vector(1))(phi)
    theta, back = ravel_pytree(net.make(1))
    by_hand = jax.grad(lambda theta: loss(back(theta)))(theta) @ jacobian
    np.testing.assert_allclose(found, by_hand, atol=1e-6)
    assert np.abs(found).max() > 1e-3


def test_static_inputs_are_generated_once(key):
    net = drawn(HypernetConfig(SMALL, HypernetSpec(tasks=3, outputs="chunk_wise", chunk=7)), key)
    kept, again = net.cached(), jax.jit(lambda net, task: net.make(task))
    make = lambda task: again(net, task)  # noqa: E731
    for task in range(3):
        one = jax.tree.map(lambda leaf, task=task: leaf[task], kept)
        assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(make(task))))
        assert not np.array_equal(*(jax.tree.leaves(m)[1] for m in (one, make((task + 1) % 3))))


def test_dynamic_inputs_make_weights_for_every_example(key):
    spec = HypernetSpec(INPUTS, input_variability="dynamic", tasks=2, data=3, noise=2, hidden=(6,))
    net = drawn(HypernetConfig(MLPConfig((3, 4, 2)), spec), key)
    x, ids = ROWS[0][0], jnp.array([0, 1, 1, 0, 1, 0])
    noise = jax.random.normal(key, (6, 2))
    found = net(Tasked(x, ids), key=key)
    each = [net.make(Condition(ids[i], x[i], noise[i])) for i in range(6)]
    looped = jnp.stack([target(x[i]) for i, target in enumerate(each)])
    np.testing.assert_allclose(found, looped, atol=1e-5)
    vectors = np.stack([net.vector(Condition(ids[i], x[i], noise[i])) for i in range(6)])
    assert len(np.unique(vectors, axis=0)) == 6
    quiet = net(Tasked(x, ids))
    assert not np.allclose(quiet, found)
    at_mean = net.make(Condition(ids[2], x[2], jnp.zeros(2)))(x[2])
    np.testing.assert_allclose(quiet[2], at_mean, atol=1e-5)


@pytest.mark.parametrize("component", ["layer", "channel"])
def test_a_component_is_a_call_cut_to_its_size(component, key):
    """No array lies across two calls, and what is cut reaches nothing."""
    spec = plain("component_wise", component=component)
    net = drawn(HypernetConfig(MLPConfig((3, 4, 2)), spec), key)
    come, first = net.come(Condition(task=1)), net.make(1).maps[0]
    if component == "layer":
        assert come.shape == (2, 4 * (3 + 1))
        whole = np.concatenate([first.bias, first.weight.dense().reshape(-1)])
        np.testing.assert_array_equal(come[0], whole)
    else:
        assert come.shape == (4 + 2, 4 + 1)
        columns = np.vstack([first.bias, first.weight.dense()]).T
        np.testing.assert_array_equal(come[:4, :4], columns)


def test_an_absent_channel_is_one_less(key):
    spec = HypernetSpec(
        tasks=2, output_variability="dynamic", optional="maps[0]**", hidden=(6,), embedding=2
    )
    net = drawn(HypernetConfig(MLPConfig((3, 4, 2), "tanh"), spec), key)
    assert (net.gates.b.get_value() == 2).all()  # of scores of about +-1: most are there
    net.gates.b.set_value(jnp.array([9.0, -9.0, 9.0, -9.0]))
    np.testing.assert_array_equal(net.present(0), [1, 0, 1, 0])
    wide, x = net.make(0), ROWS[0][0]
    assert not wide.maps[0].weight.dense()[:, 1].any() and wide.maps[0].bias[1] == 0
    narrow = MLP((3, 2, 2), key=key, activation="tanh")
    for new, old, rows, columns in (
        (narrow.maps[0], wide.maps[0], slice(None), [0, 2]),
        (narrow.maps[1], wide.maps[1], [0, 2], slice(None)),
    ):
        new.w.set_value(Dense(jnp.asarray(np.asarray(old.weight.dense())[rows][:, columns])))
        new.b.set_value(jnp.asarray(np.asarray(old.bias)[columns]))
    np.testing.assert_allclose(wide(x), narrow(x), atol=1e-6)
    gradient = jax.grad(lambda net: net.vector(0).sum())(net)
    assert np.abs(gradient.gates.b.get_value()).min() > 0  # a closed channel can open again
    net.gates.w.set_value(Dense(9 * jnp.ones((2, 4))))
    masks = {tuple(np.asarray(net.present(task)).tolist()) for task in range(2)}
    assert len(masks) == 2  # another architecture for another task


def test_embeddings_are_of_mean_square_1_and_orthogonal_where_they_can_be(key):
    for rows in (3, 8):
        found = np.asarray(generator.table(rows, 8, key=key))
        np.testing.assert_allclose(found @ found.T, 8 * np.eye(rows), atol=1e-5)
    assert np.mean(np.asarray(generator.table(900, 8, key=key)) ** 2) == pytest.approx(1, abs=0.05)
    # As many tasks as pieces: they are drawn by keys of their own.
    net = drawn(HypernetConfig(SMALL, HypernetSpec(tasks=3, outputs="component_wise")), key)
    assert not np.isclose(net.tasks.weight.dense(), net.pieces.weight.dense()).any()


def test_the_last_map_is_drawn_by_what_it_reads(key):
    """w / sqrt(v_i / (H E[h^2])) is the draw; v_i is the mean over the pieces that have a place."""
    source = np.array([[0, 1, 2], [3, 4, -1]])
    wanted = generator.wanted_variances(source, np.array([1.0, 2.0, 4.0, 3.0, 6.0]))
    np.testing.assert_array_equal(generator.mean_over(wanted), [2, 4, 4])
    np.testing.assert_array_equal(generator.mean_over(np.full((2, 1), np.nan)), [0])
    spec, h = HypernetSpec(), jax.random.normal(key, (4, 2, 8))
    for scale in (1.0, 3.0):
        last = generator.last_map(spec, scale * h, np.array([2.0, 4.0, 0.0]), key=key)
        spread = np.sqrt(np.array([2.0, 4.0, 0.0]) / (8 * np.mean((scale * h) ** 2)))
        by_hand = jax.random.normal(key, (8, 3)) * spread
        np.testing.assert_allclose(last.weight.dense(), by_hand, rtol=1e-5)


def test_heads_differ_and_examples_are_of_all_tasks(key):
    spec = HypernetSpec(tasks=3, outputs="multi_head", hidden=(6, 4), init="target")
    net = drawn(HypernetConfig(SMALL, spec), key)
    for linear in net.heads.maps:
        first, second = linear.w.get_value().w
        assert not np.isclose(first, second).all()
    seen = net.examples(key)
    given = [net.calls(Condition(task=task)) for task in range(3)]
    each = [generator.run_trunk(spec, net.trunk, u) for u in given]
    np.testing.assert_allclose(seen, np.stack(each), rtol=1e-5)


def test_blocks_of_attention_add_to_what_they_read(key):
    spec = HypernetSpec(outputs="chunk_wise", architecture="attention", chunk=7, hidden=(4, 4))
    net = drawn(HypernetConfig(SMALL, spec), key)
    first, *blocks = net.trunk
    still = nnx.List([first, *jax.tree.map(jnp.zeros_like, blocks)])
    u = net.calls(Condition(task=0))
    np.testing.assert_allclose(generator.run_trunk(spec, still, u), first(u), rtol=1e-6)
    assert np.abs(generator.run_trunk(spec, net.trunk, u) - first(u)).max() > 0.1


DEEP = MLPConfig((32,) * 7)


@pytest.mark.parametrize("outputs", ["once", "multi_head"])
def test_generated_layers_begin_like_drawn_ones(outputs, key):
    """Variances within 25 % of 2 / in, activations' std in [0.5, 2] through six layers (card, 6);
    maps drawn as torch draws them do not."""
    x = jax.random.normal(jax.random.key(3), (256, 32))
    kept = {}
    for init in ("hyperfan", "uniform"):
        spec = HypernetSpec(outputs=outputs, init=init, hidden=(64,), embedding=16)
        target = drawn(HypernetConfig(DEEP, spec), key).make(0)
        variances = [float(linear.weight.dense().var()) for linear in target.maps]
        h, spreads = x, []
        for stage in target.stages:
            h = stage(h)
            spreads.append(float(h.std()))
        right = [abs(v * 32 / 2 - 1) <= 0.25 for v in variances]
        kept[init] = all(right) and all(0.5 <= s <= 2 for s in spreads)
        if init == "hyperfan":
            assert not any(linear.bias.any() for linear in target.maps)
    assert kept == {"hyperfan": True, "uniform": False}


def test_chunks_begin_with_the_mean_variance(key):
    """Over many tasks; the wanted ones are 2 / 8 for w0, 2 / 64 for w1, 0 for biases."""
    spec = HypernetSpec(outputs="chunk_wise", chunk=320, tasks=64, hidden=(64,))
    net = drawn(HypernetConfig(MLPConfig((8, 64, 64)), spec), key)
    come = jax.vmap(lambda task: net.come(Condition(task=task)))(jnp.arange(64))
    wanted = (8 * 64 * 2 / 8 + 64 * 64 * 2 / 64) / net.layout.size
    assert abs(float((come**2).mean()) / wanted - 1) < 0.25
    by_place = np.where(net.parts.source >= 0, 1, 0).sum(0)
    assert by_place.min() >= 14 and net.parts.joined(come[0]).shape == (net.layout.size,)


def test_what_is_constant_in_a_target_stays_so_at_the_start(key):
    """Norms of a decoder begin at 1, embeddings with their own variance."""
    target, spec = tiny(), HypernetSpec(init="target", hidden=(32,))
    first = jax.jit(lambda key: Hypernet(spec, target, key=key).make(0))(key)
    made, target = (dict(tree.select(m, tree.floating)) for m in (first, target))
    for path, leaf in target.items():
        if np.ptp(leaf) == 0:
            np.testing.assert_array_equal(made[path], leaf)
        else:
            assert 0.5 < float(made[path].std() / leaf.std()) < 2, path


def test_statistics_are_kept(key):
    target = models.ResNet(models.ResNetConfig((1, 1), (2, 3), 3, image=(4, 4)), key=key)
    spec = HypernetSpec(init="target", hidden=(4,))
    net = jax.jit(lambda key: Hypernet(spec, target, key=key))(key)
    (path, _), *_ = [(p, n) for p, n in tree.walk(target) if p.endswith("variance")]
    made = jax.jit(lambda net: net.make(0))(net)
    assert len(net.kept) and np.all(np.asarray(tree.select(made, tree.at(path))[path][...]) > 0)
    assert np.isfinite(made(jnp.ones((1, 4, 4, 3)))).all()
    trained = {leaf.size for leaf in jax.tree.leaves(tree.trained(net)[1])}
    assert trained == {leaf.size for leaf in jax.tree.leaves(net.kept)}


@pytest.mark.parametrize("architecture", ["cnn", "rnn", "attention", "mlp"])
def test_which_pieces_read_which(architecture, key):
    """d piece_k / d embedding_j: an RNN reads what came before, a convolution its neighbours."""
    sizes = {"chunk": 4, "hidden": (4,), "embedding": 2, "activation": "tanh"}
    spec = HypernetSpec(outputs="chunk_wise", architecture=architecture, **sizes)
    net = drawn(HypernetConfig(MLPConfig((3, 4, 2)), spec), key)
    u = net.calls(Condition(task=0))
    through = lambda u: generator.pieces_from(  # noqa: E731
        spec, net.heads, generator.run_trunk(spec, net.trunk, u)
    )
    reads = np.abs(jax.jacobian(through)(u)).sum((1, 3)) > 0
    k, j = np.indices(reads.shape)
    wanted = {"cnn": abs(k - j) <= 1, "rnn": j <= k, "attention": j >= 0, "mlp": j == k}
    np.testing.assert_array_equal(reads, wanted[architecture])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk=0 must be a whole number of at least 1"),
        ({"tasks": 0}, "tasks=0 must be a whole number of at least 1"),
        ({"outputs": "multi_head", "heads": 3}, r"heads=3 must divide the last of hidden=\(64,\)"),
        (
            {"outputs": "chunk_wise", "architecture": "attention", "heads": 5},
            "heads=5 must divide",
        ),
        (
            {"outputs": "chunk_wise", "architecture": "rnn", "hidden": (4, 5)},
            "widths of 'rnn' must be equal",
        ),
        ({"hidden": ()}, r"hidden=\(\) must be one or more"),
        ({"inputs": ("data",)}, "data is not known beforehand"),
        (
            {"inputs": ("data",), "input_variability": "dynamic"},
            "data=0 and inputs=.*at least 1 where it is there",
        ),
        ({"noise": 2}, "noise=2 and inputs="),
        ({"inputs": ("task", "task")}, "each once"),
        ({"inputs": ("class",)}, "must be a tuple of some of"),
        ({"hidden": (4, 0)}, r"hidden=\(4, 0\) must be a tuple of positive whole numbers"),
        ({"data": -1}, "data=-1 must be a whole number of at least 0"),
        ({"outputs": "all"}, "outputs='all' is not one of"),
        ({"inputs": ()}, "in one piece is the target's own weights"),
        (
            {"inputs": (), "architecture": "linear", "output_variability": "dynamic"},
            "changes nothing",
        ),
        (
            {"inputs": ("noise",), "noise": 1, "input_variability": "dynamic", "tasks": 2},
            "tasks=2 are told apart",
        ),
        ({"shared": False}, "shared=False has an embedding for each task and piece"),
        ({"init": "he"}, "init='he' is not one of"),
    ],
)
def test_specs_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        HypernetSpec(**options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("inputs", "task", "inputs='task' must be a tuple of some of"),
        ("inputs", ["task"], "must be a tuple of some of"),
        ("chunk", 2.5, "chunk=2.5 must be a whole number"),
        ("embedding", float("nan"), "embedding=nan must be a whole number"),
        ("tasks", True, "tasks=True must be a whole number"),
        ("hidden", 64, "hidden=64 must be a tuple of positive whole numbers"),
        ("hidden", [64], r"hidden=\[64\] must be a tuple"),
        ("hidden", (2.5,), r"hidden=\(2.5,\) must be a tuple of positive whole numbers"),
    ],
)
def test_specs_of_other_types(name, value, message):
    """Types are checked at the call here, and not where the library is used: so after it."""
    spec = HypernetSpec()
    object.__setattr__(spec, name, value)
    with pytest.raises(ConfigError, match=message):
        spec.__post_init__()


def test_targets_that_cannot_be_generated(key):
    packed, _ = transform.apply(quantization.nearest(group=4), tiny())
    with pytest.raises(ConfigError, match=r"target: .* is of (u?int|float8).*; codes and counters"):
        Hypernet(HypernetSpec(), packed, key=key)
    with pytest.raises(ConfigError, match="without floating arrays"):
        Hypernet(HypernetSpec(), Bare(), key=key)
    with pytest.raises(ConfigError, match="its constants are looked at"):
        jax.eval_shape(lambda key: Hypernet(HypernetSpec(), MLP((2, 2), key=key), key=key), key)
    with pytest.raises(ConfigError, match=r"target is a MLP; one of .*'MLPConfig'.* is accepted"):
        check_target(MLP((2, 2), key=key))
    gated = HypernetSpec(output_variability="dynamic", optional="layers**")
    with pytest.raises(ConfigError, match=r"optional='layers\*\*' matches nothing generated"):
        drawn(HypernetConfig(SMALL, gated), key)


class Bare(nnx.Module):
    """A module without arrays."""


def test_inputs_that_a_hypernetwork_does_not_read(key):
    net = drawn(HypernetConfig(SMALL, HypernetSpec(tasks=3, hidden=(4,))), key)
    x = jnp.ones((2, 3))
    for wrong, message in (
        (lambda: net(x), "task: which of the 3 tasks"),
        (lambda: net(x, 3), "task=3: there are tasks 0 to 2"),
        (lambda: net(x, -1), "task=-1: there are tasks 0 to 2"),
        (lambda: net(x, jnp.array([0, 1])), "static inputs are of one task"),
        (lambda: net.make(Condition()), r"inputs=\(\) are given; this hypernetwork reads"),
        (lambda: net.make(Condition(0, jnp.ones(3))), r"inputs=\('task', 'data'\) are given"),
        (lambda: net.present(0), "every channel is there"),
        (lambda: check_task(net.spec, True), "task=True: tasks 0 to 2 are whole numbers"),
        (lambda: generated(labelled, penalty=-1.0), "penalty=-1.0 must be finite and at least 0"),
        (lambda: generated(labelled)(net, (np.array([0, 3]), ())), "there are tasks 0 to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    assert np.isnan(jax.jit(net.vector)(jnp.int32(3))).all()  # never another task's
    spec = HypernetSpec(("data",), input_variability="dynamic", data=4, hidden=(4,))
    dynamic = drawn(HypernetConfig(SMALL, spec), key)
    with pytest.raises(ValueError, match=r"x is float32\[2, 3\]; data=4 needs 4 floats"):
        dynamic(x)
    with pytest.raises(ValueError, match="x is a NoneType without examples"):
        dynamic(None)
    with pytest.raises(ValueError, match=r"x is float32\[0, 3\]; data=4 needs"):
        dynamic(jnp.ones((0, 3)))
    several = HypernetSpec(tasks=2, input_variability="dynamic", hidden=(4,))
    with pytest.raises(ValueError, match=r"task has shape \(3,\): one for all of x"):
        drawn(HypernetConfig(SMALL, several), key)(x, jnp.array([0, 1, 0]))
    with pytest.raises(ValueError, match=r"data has shape \(3,\), \(4,\) is accepted"):
        dynamic.make(Condition(data=jnp.ones(3)))
    with pytest.raises(ConfigError, match="only static inputs of tasks"):
        dynamic.cached()


def test_the_loss_of_what_is_generated(key):
    """The mean over tasks of the target's loss, and of the mean square of its weights."""
    net = drawn(HypernetConfig(MLPConfig((3, 2)), HypernetSpec(tasks=2, hidden=(4,))), key)
    rows = tuple(jnp.concatenate([part, part[:, ::-1]]) for part in ROWS)
    batch = (jnp.array([1, 0]), rows)
    each = [labelled(net.make(t), (rows[0][i], rows[1][i]))[0] for i, t in enumerate((1, 0))]
    found, metrics = generated(labelled)(net, batch)
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-6)
    assert set(metrics) == {"accuracy"}
    more, metrics = generated(labelled, penalty=0.5)(net, batch)
    square = np.mean([np.mean(np.asarray(net.vector(t)) ** 2) for t in (0, 1)])
    np.testing.assert_allclose(metrics["weights"], square, rtol=1e-5)
    np.testing.assert_allclose(more, found + 0.5 * square, rtol=1e-6)
