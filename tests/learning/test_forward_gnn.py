"""Forward learning of graph networks: what is local, what is seen, how layers end, bad input.

Whole runs are compared with the authors' in `test_forward_gnn_official.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.data import block_model, link_split
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph, with_self_loops
from ffnlab.layers import MLP
from ffnlab.learning import (
    ForwardGNNOptions,
    GraphInputs,
    forward_gnn,
    forward_gnn_answers,
    link_batch,
    link_question,
    members,
    node_batch,
    node_question,
)
from ffnlab.learning.forward_gnn import layerwise, top_down
from ffnlab.learning.forward_gnn.batches import with_virtual_nodes, wrong
from ffnlab.learning.forward_gnn.layerwise import Method
from ffnlab.learning.forward_gnn.objectives import ForwardForward, objective_of, rank_auc
from ffnlab.learning.forward_gnn.rule import default_optimizer
from ffnlab.models import GraphNetwork, GraphNetworkConfig
from ffnlab.models.account import compiled_cost
from ffnlab.parallel import LoopOptions, parse_mesh, train
from ffnlab.scores import roc_auc
from ffnlab.testing import equal

CLASSES, WIDTH, HIDDEN = 3, 5, 8
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
NODES = block_model(
    3, nodes=24, classes=CLASSES, width=WIDTH, inside=0.3, across=0.1, noise=3.0, train=12, valid=8
)
QUIET = LoopOptions(log_every=0, progress=False)
SGD = optax.sgd(0.1)
SHORT = {"every": 2, "patience": 2, "limit": 6}
NAMES = ("single_forward", "label_appending", "virtual_nodes", "links")


def options_of(objective="single_forward", **more):
    return ForwardGNNOptions(objective, **SHORT | more)


@functools.cache
def batch_of(options, seed=0):
    if options.objective == "links":
        return link_batch(link_split(NODES, 1))
    return node_batch(NODES, options, seed=seed)


def network(options, depth=2, layer="gcn", seed=0):
    first = WIDTH + (CLASSES if options.objective == "label_appending" else 0)
    sizes = (first, *[HIDDEN] * depth)
    if options.form == "top_down":
        sizes = (*sizes, 0 if options.objective == "links" else CLASSES)
    return GraphNetwork(
        GraphNetworkConfig(sizes, layer, form=options.form), key=jax.random.key(seed)
    )


def method_of(options, optimizer=SGD):
    return Method(options, objective_of(options, CLASSES), optimizer)


@functools.cache
def rule_of(options):
    return forward_gnn(batch_of(options), options, SGD)


def after(steps, options, batch=None, **more):
    """The state after some steps."""
    batch = batch_of(options) if batch is None else batch
    state = rule_of(options).init(network(options, **more), jax.random.key(0))
    for _ in range(steps):
        state, _ = rule_of(options).step(state, batch)
    return state


# What is local.


def reached(losses, model):
    """Which layer's parameters have a gradient in which loss, [losses, layers]."""
    parts = jax.jit(jax.jacobian(losses))(model).layers
    found = np.zeros((len(parts), len(parts)), bool)
    for j, part in enumerate(parts):
        for leaf in jax.tree.leaves(part):
            found[:, j] |= np.any(np.asarray(leaf).reshape(len(parts), -1) != 0, axis=1)
    return found


@pytest.mark.parametrize(
    "objective", [*NAMES[:1], *map(slow, NAMES[1:2]), NAMES[2], slow(NAMES[3])]
)
def test_the_loss_of_a_layer_has_a_gradient_in_that_layer_alone(objective):
    options = options_of(objective)
    model, batch = network(options, depth=3), batch_of(options)
    losses = lambda m: jnp.stack(layerwise.layer_losses(method_of(options), m, batch))  # noqa: E731
    np.testing.assert_array_equal(reached(losses, model), np.eye(3, dtype=bool))


@pytest.mark.parametrize("signal", ["input", slow("loss")])
def test_what_is_told_from_above_brings_no_gradient(signal):
    """Rows above and below are constants of a step, and a layer's loss is told of them."""
    options = options_of(top_down=signal)
    model, batch, method = network(options, depth=3), batch_of(options), method_of(options)
    memories = tuple(SGD.init(None) for _ in model.layers)

    def losses(model, shift=0.0):
        held = [rows + shift for rows in top_down.bottom_up(method, model, batch.inputs)]
        return jnp.stack(top_down.learned(method, model, memories, held, batch)[-1])

    np.testing.assert_array_equal(reached(losses, model), np.eye(3, dtype=bool))
    run = jax.jit(losses)
    assert np.all(run(model, 0.0) != run(model, 0.1)), "each loss depends on the rows beside it"


@pytest.mark.parametrize("objective", [NAMES[0], slow(NAMES[1])])
def test_a_step_goes_down_the_loss_of_one_layer_and_leaves_the_others(objective):
    options = options_of(objective, patience=0, limit=2)
    model, batch = network(options), batch_of(options)
    first, second = after(1, options), after(3, options)
    for state, layer in ((first, 0), (second, 1)):
        before = after(2, options).model if layer else model
        gradient = jax.grad(
            lambda m: layerwise.layer_losses(method_of(options), m, batch)[layer]  # noqa: B023
        )(before)
        moved = jax.tree.map(lambda w, g: w - 0.1 * g, before, gradient)
        for i in range(2):
            ours, theirs = state.model.layers[i], moved.layers[i]
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
        assert equal(state.model.layers[1 - layer], before.layers[1 - layer])


@pytest.mark.slow
def test_memory_of_a_step_does_not_grow_with_depth():
    """Of layers alike: from the second on, whatever their number."""
    options = options_of()
    nodes = block_model(
        0, nodes=300, classes=CLASSES, width=WIDTH, inside=0.05, train=150, valid=60
    )
    batch = node_batch(nodes, options)
    rule = forward_gnn(batch, options, SGD)
    found = [
        compiled_cost(
            rule.step, jax.eval_shape(rule.init, network(options, depth), jax.random.key(0)), batch
        ).temporary
        for depth in (2, 4, 6)
    ]
    row = 4 * HIDDEN * (300 + CLASSES)
    assert max(found) - min(found) < row, "less than one more layer's rows"


# What is seen.


@settings(max_examples=20)
@given(st.integers(0, 9999), st.booleans())
def test_virtual_nodes_are_joined_with_the_nodes_of_their_class(seed, both_ways):
    random = np.random.default_rng(seed)
    n, classes = int(random.integers(1, 9)), int(random.integers(1, 4))
    ends = random.integers(n, size=(2, int(random.integers(0, 12))))
    y = random.integers(-1, classes, n)
    found = with_virtual_nodes(Graph.make(*ends, nodes=n), y, classes, both_ways=both_ways)
    assert found.num_nodes == n + classes
    assert found.num_edges == ends.shape[1] + (1 + both_ways) * np.sum(y >= 0)
    dense = np.zeros((n + classes, n + classes), int)
    np.add.at(dense, (np.asarray(found.receivers), np.asarray(found.senders)), 1)
    own = np.zeros((n, n), int)
    np.add.at(own, (ends[1], ends[0]), 1)
    one_hot = (y[:, None] == np.arange(classes)).astype(int)
    np.testing.assert_array_equal(dense[:n, :n], own)
    np.testing.assert_array_equal(dense[n:, :n], one_hot.T)
    np.testing.assert_array_equal(dense[:n, n:], one_hot * both_ways)
    assert not dense[n:, n:].any()


def relabelled(part):
    """The graph with other classes in a part of its nodes."""
    y = NODES.y.copy()
    y[part] = (y[part] + 1) % CLASSES
    return NODES._replace(y=y)


@pytest.mark.parametrize(
    ("objective", "signal"), [(NAMES[0], "input"), *((name, "none") for name in NAMES[:3])]
)
def test_classes_that_are_not_learned_from_are_not_shown(objective, signal):
    options = options_of(objective, top_down=signal)
    batch = batch_of(options)
    other = node_batch(relabelled(NODES.valid | NODES.test), options)
    assert equal(dataclasses.replace(other, held_out=batch.held_out), batch)
    assert not equal(other.held_out, batch.held_out)
    of_test = node_question(relabelled(NODES.test), options)
    assert equal(of_test, node_question(NODES, options)), "what is asked says no answer"
    one = np.arange(24) == np.flatnonzero(NODES.train)[0]
    of_train = node_batch(relabelled(one), options)
    assert not equal(of_train.inputs, batch.inputs), "and what is learned from is shown"


def test_other_classes_leave_training_as_it_is_bit_for_bit():
    options = options_of(patience=0, limit=3)
    other = node_batch(relabelled(NODES.valid | NODES.test), options)
    assert equal(after(5, options), after(5, options, other))


@pytest.mark.parametrize("objective", [NAMES[0], NAMES[2]])
def test_virtual_nodes_are_the_same_whenever_asked(objective):
    """Features of virtual nodes are drawn by the seed: of a batch, what it asks, and the test."""
    options = options_of(objective)
    batch, other = node_batch(NODES, options, seed=4), node_batch(NODES, options, seed=5)
    assert not equal(batch.inputs.x, other.inputs.x)
    for inputs in (batch.asked or batch.inputs, node_question(NODES, options, seed=4)):
        np.testing.assert_array_equal(inputs.x, batch.inputs.x)
    assert np.asarray(batch.inputs.x)[24:].std() == pytest.approx(1, abs=0.4)


def test_edges_that_are_asked_are_not_seen():
    split = link_split(NODES, 1)
    batch, question = link_batch(split), link_question(split)

    def seen(inputs, part):
        ends = zip(*map(np.asarray, (inputs.graph.senders, inputs.graph.receivers)), strict=True)
        edges = {(int(a), int(b)) for a, b in ends}
        return [(int(a), int(b)) in edges for a, b in part.ends[part.joined]]

    for inputs in (batch.inputs, batch.asked):
        assert all(seen(inputs, split.train))
        assert not any(seen(inputs, split.valid) + seen(inputs, split.test))
    assert all(seen(question, split.valid)) and not any(seen(question, split.test))


def test_the_default_optimizer_is_the_authors(key):
    """Adam at 1e-3 of the gradient and 5e-4 of the parameter: these two may cancel."""
    w = {"w": jnp.array([2.0, 2.0])}

    def step(options, gradient):
        made = default_optimizer(options)
        return np.asarray(made.update({"w": jnp.array(gradient)}, made.init(w), w)[0]["w"])

    decayed = [options_of(), options_of("links"), options_of(top_down="loss")]
    for options in decayed:
        np.testing.assert_allclose(step(options, [-1e-3, 0.0]), [0, -1e-3], rtol=1e-4, atol=1e-7)
    bare = options_of("links", top_down="input")
    np.testing.assert_allclose(step(bare, [-1e-3, 0.0]), [1e-3, 0], rtol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_wrong_classes_are_wrong_and_each_another(count):
    y = np.where(NODES.train, NODES.y, -1)
    found = np.stack(wrong(y, CLASSES, count, 0))
    assert len(found) == (count or CLASSES - 1)
    assert np.all((found == -1) == (y == -1))
    learned = found[:, y >= 0]
    assert np.all(learned != y[y >= 0])
    if count != 1:
        np.testing.assert_array_equal(np.sort([*learned, y[y >= 0]], 0).T, [range(CLASSES)] * 12)


def test_appended_labels_are_shares():
    batch = batch_of(options_of("label_appending"))
    labels = batch.inputs.labels
    np.testing.assert_allclose(labels.sum(-1), 1, rtol=1e-6)
    assert np.all(labels[:, ~NODES.train] == np.float32(1 / CLASSES)), "uniform, and not zero"
    np.testing.assert_array_equal(labels[0, NODES.train].argmax(-1), NODES.y[NODES.train])
    asked = batch.asked.labels
    for c in range(CLASSES):
        assert np.all(asked[c, NODES.valid].argmax(-1) == c) and np.all(
            asked[c, NODES.test] == np.float32(1 / CLASSES)
        )
    known = node_question(NODES, options_of("label_appending")).labels
    np.testing.assert_array_equal(known[0, NODES.valid].argmax(-1), NODES.y[NODES.valid])


def permuted(inputs, order):
    """Nodes in another order, virtual ones last."""
    place = np.argsort(order)
    ends = (place[np.asarray(e)] for e in (inputs.graph.senders, inputs.graph.receivers))
    return GraphInputs(np.asarray(inputs.x)[order], Graph.make(*ends, nodes=len(order)))


@pytest.mark.parametrize("layer", ["gcn", slow("sage"), slow("gat")])
def test_answers_do_not_depend_on_the_order_of_nodes(layer):
    options = options_of()
    batch = node_batch(NODES, options, loops=layer != "sage")
    order = np.append(np.random.default_rng(0).permutation(24), np.arange(24, 24 + CLASSES))
    answers = jax.jit(forward_gnn_answers(batch, options))
    model = network(options, layer=layer)
    there = answers(model, permuted(batch.inputs, order))
    np.testing.assert_allclose(there, answers(model, batch.inputs)[order[:24]], atol=1e-5)


# Objectives.


def test_equal_copies_cancel_at_even_odds_alone(key):
    """d/dg (softplus(-g) + softplus(g)) = 2 sigmoid(g) - 1, which is 0 where goodness is."""
    objective = ForwardForward(virtual=0, threshold=2.0)
    h = jax.random.uniform(key, (4, 6))
    h = h * jnp.sqrt(jnp.array([2.0, 0.5, 2.0, 7.0]) / jnp.sum(h**2, -1))[:, None]
    targets, inputs = jnp.zeros(4, jnp.int32), batch_of(options_of("label_appending")).inputs
    gradient = jax.grad(lambda h: objective.loss(jnp.stack([h, h, h]), inputs, targets))(h)
    goodness = jnp.sum(h**2, -1) - 2
    expected = (2 * jax.nn.sigmoid(goodness) - 1)[:, None] * 2 * h / 4
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.abs(gradient[jnp.array([0, 2])]).max() < 1e-6 < np.abs(gradient[1]).max()


@pytest.mark.parametrize("objective", [NAMES[1], slow(NAMES[2])])
def test_true_copies_become_better_than_wrong_ones(objective):
    options = options_of(objective, patience=0, limit=40)
    state, batch = after(40, options, depth=1), batch_of(options)
    method = method_of(options)
    rows = layerwise.first_rows(method.objective, batch.inputs)
    read = layerwise.propagated(state.best, 0, rows, batch.inputs.graph)
    h = layerwise.output(state.best, state.best.layers[0], read, batch.inputs.graph)
    goodness = np.asarray(jnp.sum(h**2, -1))[:, :24][:, NODES.train]
    assert goodness[0].mean() > goodness[1:].mean()


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=12, max_size=12))
def test_the_area_is_that_of_ranks(pairs):
    scores, positive = (np.array(side) for side in zip(*pairs, strict=True))
    if positive.all() or not positive.any():
        return
    want = roc_auc(scores.astype(float), positive)
    found = jax.jit(rank_auc)(jnp.asarray(scores, jnp.float32), jnp.asarray(positive))
    assert float(found) == pytest.approx(want, abs=1e-6)


# How layers begin and end.


def test_what_a_layer_reads_is_propagated_once():
    options = options_of(patience=0, limit=2)
    batch, begun = batch_of(options), after(3, options)
    first = begun.model.layers[0]
    graph = batch.inputs.graph
    rows = jax.nn.relu(first(begun.model.read(first, jnp.asarray(batch.inputs.x)), graph))
    read = begun.model.layers[1].propagated(begun.model.read(first, rows), graph)
    np.testing.assert_allclose(begun.held.read[0][0], read, rtol=1e-5, atol=1e-6)
    assert equal(after(4, options).held, begun.held), "and stays"


def test_a_layer_ends_at_its_best():
    """The scores are those of the same steps, one by one; the best, not the last, is kept."""
    options = options_of(every=1, patience=2, limit=30)
    batch, states = batch_of(options), []
    rule = rule_of(options)
    state = rule.init(network(options), jax.random.key(0))
    while int(state.layer) == 0:
        states.append(jax.tree.map(jnp.copy, state.model))
        state, _ = rule.step(state, batch)
    answers = forward_gnn_answers(batch, options)
    told = [np.asarray(answers(m, batch.inputs, 1)).argmax(-1) for m in states[1:]]
    scores = [np.mean((a == NODES.y)[NODES.valid]) for a in told]
    best = int(np.argmax(scores))
    assert len(states) == best + 1 + 2 and len(states) < 30
    assert equal(state.model.layers[0], states[best + 1].layers[0])
    assert equal(state.best.layers[0], state.model.layers[0])
    done = rule.step(after(60, options), batch)
    assert float(done[1]["loss"]) == 0 and float(done[1]["layer"]) == 2
    assert equal(done[0], after(60, options)), "nothing changes any more"


def test_answers_are_of_the_layers_that_have_begun():
    options = options_of(patience=0, limit=2)
    batch, answers = batch_of(options), forward_gnn_answers(batch_of(options), options)
    for steps, layers in ((1, 1), (2, 1), (3, 2), (5, 2)):
        state = after(steps, options)
        np.testing.assert_allclose(
            rule_of(options).predict(state, batch.inputs),
            answers(rule_of(options).model(state), batch.inputs, layers),
            rtol=1e-5,
        )


def test_an_interrupted_run_ends_in_the_same_bits(tmp_path):
    """Stopped in the middle of the second layer, and in groups of steps."""
    options = options_of(patience=3)
    run = functools.partial(
        train,
        rule_of(options),
        network(options),
        lambda position: batch_of(options),
        key=jax.random.key(0),
        options=QUIET,
    )
    whole = run(13)
    run(8, folder=tmp_path)
    rest = run(13, folder=tmp_path, resume=True)
    assert int(whole.state.layer) >= 1 and equal(rest.state, whole.state)
    grouped = run(13, together=5).state
    for a, b in zip(jax.tree.leaves(grouped), jax.tree.leaves(whole.state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_mesh_learns_the_same():
    options = options_of()
    given = {"key": jax.random.key(0), "options": QUIET}
    found = train(
        rule_of(options),
        network(options),
        lambda position: batch_of(options),
        5,
        mesh=parse_mesh("tp=2"),
        **given,
    )
    weight = found.state.model.layers[0].linear.weight.dense()
    assert len(weight.sharding.device_set) == 2 and not weight.sharding.is_fully_replicated
    for a, b in zip(jax.tree.leaves(found.state), jax.tree.leaves(after(5, options)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, slow(1)])
def test_members_end_their_layers_by_themselves(chunk):
    """Of two, one learns nothing, so its first validation is its best."""
    options = options_of(patience=1, every=1, limit=8)
    rates = [1.0, 0.0]
    make = lambda rate: forward_gnn(batch_of(options), options, optax.sgd(rate))  # noqa: E731
    rule = members(make, 2, vary={"rate": rates}, chunk=chunk)
    models = [network(options, seed=i) for i in range(2)]
    start = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    state, alone = rule.init(start, jax.random.key(0)), make(rates[0])
    own = alone.init(models[0], jax.random.key(0))
    for _ in range(3):
        state, metrics = rule.step(state, batch_of(options))
        own, _ = alone.step(own, batch_of(options))
    assert set(metrics) == {"loss", "layer", "held_out", "worst"}
    mine, other = (jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(2))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(own), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)
    assert equal(other.model, models[1]) and (int(other.layer), int(other.taken)) == (1, 1)
    assert (int(mine.layer), int(mine.taken)) != (1, 1), "they are not in step"


# Bad input.


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"objective": "triplets"}, "objective='triplets' is not one of"),
        ({"top_down": "both"}, "top_down='both' is not one of"),
        ({"objective": "virtual_nodes", "top_down": "input"}, "is of objective"),
        ({"objective": "links", "top_down": "loss"}, "is of objective"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"every": 0}, "every=0"),
        ({"limit": 0}, "limit=0"),
        ({"patience": -1}, "patience=-1"),
        ({"negatives": -1}, "negatives=-1"),
        ({"temperature": np.nan}, "temperature=nan must be a finite number"),
        ({"threshold": np.inf}, "threshold=inf must be a finite number"),
        ({"every": True}, "every=True must be a whole number"),
    ],
)
def test_options_that_mean_nothing_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        ForwardGNNOptions(**given)


@pytest.mark.parametrize(
    ("nodes", "options", "error", "said"),
    [
        (NODES._replace(y=NODES.y - 1), {}, ValueError, "y has classes from -1"),
        (NODES._replace(y=NODES.y * 2), {}, ValueError, "y of train has no node of class 1"),
        (NODES._replace(train=NODES.train & (NODES.y != 2)), {}, ValueError, "no node of class 2"),
        (NODES._replace(train=NODES.train & False), {}, ValueError, "no node to learn from"),
        (NODES, {"objective": "label_appending", "negatives": 3}, ConfigError, "negatives=3, cl"),
        (NODES, {"objective": "links"}, ConfigError, "link_batch"),
        (NODES._replace(x=NODES.x * np.nan), {}, ValueError, "x has values that are no finite"),
        (NODES._replace(x=NODES.x[:-1]), {}, ValueError, r"x is float32\[23, 5\]; floats \[n, d\]"),
        (NODES._replace(x=NODES.x[:, 0]), {}, ValueError, r"x is float32\[24\]; floats \[n, d\]"),
        (NODES._replace(y=NODES.y[:-1]), {}, ValueError, r"y is int32\[23\]; integers \[n\]"),
        (NODES._replace(y=NODES.y * 1.0), {}, ValueError, r"y is float64\[24\]; integers \[n\]"),
        (
            NODES._replace(train=NODES.train * 1),
            {},
            ValueError,
            r"train is int64\[24\]; bool \[n\]",
        ),
        (NODES._replace(valid=NODES.train), {}, ValueError, "is in several of train, valid and te"),
        (
            NODES._replace(test=NODES.valid),
            {},
            ValueError,
            "is in several of train, valid and test",
        ),
    ],
)
def test_graphs_that_cannot_be_learned_are_refused(nodes, options, error, said):
    for make in (node_batch, node_question):
        with pytest.raises(error, match=said):
            make(nodes, ForwardGNNOptions(**options))


def test_edges_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"senders\[0\]=9 must lie in 0..8"):
        Graph.make([9], [1], nodes=9)


def changed(batch, **fields):
    return dataclasses.replace(batch, **fields)


def test_batches_that_do_not_fit_are_refused():
    options = options_of()
    batch, state = batch_of(options), after(0, options)
    check = functools.partial(rule_of(options).check, jax.eval_shape(lambda: state))
    check(batch)
    bad_x = np.array(batch.inputs.x)
    bad_x[0, 0] = np.nan
    out = np.where(np.arange(24) == 0, 3, batch.targets)
    for wrong_one, said in (
        ((batch.inputs, batch.targets), "batch is a tuple"),
        (changed(batch, targets=batch.targets[:-1]), "targets int32.23. and not int32.24."),
        (changed(batch, targets=out.astype(np.int32)), "classes from 0 to 3"),
        (changed(batch, targets=np.where(batch.targets == 1, -1, batch.targets)), "of class 1"),
        (changed(batch, held_out=np.full(24, -1, np.int32)), "no node to validate on"),
        (changed(batch, held_out=np.full(24, 7, np.int32)), "classes from 7 to 7"),
        (changed(batch, inputs=changed(batch.inputs, x=bad_x)), "inputs.x has .* no finite num"),
    ):
        with pytest.raises(ValueError, match=said):
            check(wrong_one)


def test_what_is_asked_is_looked_at_too():
    options = options_of("label_appending")
    batch = batch_of(options)
    for name in ("x", "labels"):
        asked = changed(batch.asked, **{name: getattr(batch.asked, name) * np.nan})
        with pytest.raises(ValueError, match=f"asked.{name} has values that are no finite"):
            rule_of(options).check(None, changed(batch, asked=asked))


def test_virtual_nodes_of_no_class_are_refused():
    for y in (np.full(24, CLASSES), np.full(24, -2), np.zeros(3, int)):
        with pytest.raises(ValueError, match=r"y must be \[24\] of -1 to 2"):
            with_virtual_nodes(NODES.graph, y, CLASSES)


def test_answers_of_layers_that_are_not_there_are_refused():
    options = options_of()
    answers, model = forward_gnn_answers(batch_of(options), options), network(options)
    for layers in (-1, 0, 3):
        with pytest.raises(ConfigError, match=f"layers={layers}: 1 to 2 are there"):
            answers(model, batch_of(options).inputs, layers)
    other = GraphNetworkConfig((WIDTH + 1, 4), form="layerwise").make(key=jax.random.key(0))
    with pytest.raises(ConfigError, match="the first must be 5"):
        answers(other, batch_of(options).inputs)


def test_pairs_that_do_not_fit_are_refused():
    options = options_of("links")
    batch = batch_of(options)
    check = functools.partial(rule_of(options).check, None)
    check(batch)
    beyond = np.full_like(batch.inputs.pairs, 24)
    for wrong_one, said in (
        (changed(batch, inputs=changed(batch.inputs, pairs=beyond)), "nodes 24 to 24 of 24"),
        (changed(batch, targets=np.ones_like(batch.targets)), "targets has the values .1."),
        (changed(batch, held_out=np.zeros_like(batch.held_out)), "held_out has the values .0."),
    ):
        with pytest.raises(ValueError, match=said):
            check(wrong_one)


def test_networks_that_do_not_fit_are_refused():
    options, fed = options_of(), options_of(top_down="input")
    told = options_of(top_down="loss")

    def config(sizes, form="layerwise"):
        return GraphNetworkConfig(sizes, form=form)

    for of, model, said in (
        (options, MLP((WIDTH, HIDDEN), key=jax.random.key(0)), "model is a MLP"),
        (options, config((WIDTH, 4, 3), "scores"), "form='scores': with top_down='none'"),
        (options, config((WIDTH + 1, 4)), "the first must be 5"),
        (options_of("label_appending"), config((WIDTH, 4)), "the first must be 8"),
        (fed, config((WIDTH, 4, 4)), "form='layerwise': with top_down='input'"),
        (fed, config((WIDTH, 4, 4, 4), "top_down"), "the last must be 3"),
        (told, config((WIDTH, 4, 6)), "told from above in their loss are alike"),
    ):
        make = lambda key, model=model: model.make(key=key)  # noqa: E731
        made = model if isinstance(model, MLP) else jax.eval_shape(make, jax.random.key(0))
        with pytest.raises(ConfigError, match=said):
            rule_of(of).init(made, jax.random.key(0))
    stacked = network(options, depth=4).stacked()
    with pytest.raises(ConfigError, match="model is stacked"):
        rule_of(options).init(stacked, jax.random.key(0))


@pytest.mark.parametrize("objective", NAMES)
def test_a_batch_of_another_objective_is_refused(objective):
    for other in NAMES:
        if other != objective:
            with pytest.raises(ConfigError, match="like is no batch of objective"):
                forward_gnn(batch_of(options_of(other)), options_of(objective))


def test_links_are_found(key):
    """A graph whose classes join their own: pairs of the test are told apart after learning."""
    nodes = block_model(
        0, nodes=60, classes=3, width=8, inside=0.3, across=0.01, noise=1.0, train=9, valid=9
    )
    split, options = link_split(nodes, 0), options_of("links", limit=60, patience=0)
    batch = link_batch(split)
    config = GraphNetworkConfig((8, 8), form="layerwise")
    rule = forward_gnn(batch, options, optax.adam(0.02))
    outcome = train(
        rule, config.make(key=key), lambda position: batch, 60, key=key, options=QUIET, together=20
    )
    scores = np.asarray(rule.predict(outcome.state, link_question(split)))
    assert scores.min() >= 0 and scores.max() <= 1
    m = len(scores) // 2
    by_chance = 0.5 + 3 * np.sqrt((2 * m + 1) / (12 * m * m))  # three deviations of its area
    assert roc_auc(scores, split.test.joined) > by_chance
    assert with_self_loops(split.seen).num_edges == link_question(split).graph.num_edges
