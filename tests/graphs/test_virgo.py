"""The transform that starts networks on graphs: what it draws, from which graphs, and for whom."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import models, transform
from ffnlab.errors import ConfigError, NumericalError
from ffnlab.graph import Graph, symmetric_norm
from ffnlab.graphs import hop_norms, layer_signals, redrawn, variances, virgo
from ffnlab.layers import MLP
from ffnlab.losses import masked
from ffnlab.models import GraphNetworkConfig
from ffnlab.quantization import nearest
from ffnlab.storage import trees
from ffnlab.testing import counted, equal
from tests.graphs.test_virgo_core import features, random_graph

SIZES = (7, 24, 24, 24, 4)


def network(layer="gcn", **options):
    sizes = options.pop("sizes", SIZES)
    return GraphNetworkConfig(sizes, layer, **options).make(key=jax.random.key(0))


def batches(count=2):
    return [{"x": features(i), "graph": random_graph(i)} for i in range(count)]


def weights(model):
    """The drawn matrices of each layer, and all biases."""
    drawn, biases = [], []
    for layer in model.unstacked().layers:
        maps = [getattr(layer, n) for n in ("linear", "own", "near") if hasattr(layer, n)]
        drawn.append([np.asarray(m.weight.dense()) for m in maps])
        biases += [m.bias for m in maps if m.bias is not None]
        biases += [layer.b[...]] if hasattr(layer, "b") else []
    return drawn, biases


@pytest.mark.parametrize("layer", ["gcn", "sage", "gat"])
def test_every_map_is_uniform_with_the_variance_of_its_layer(layer):
    model = network(layer, **({"heads": 2} if layer == "gat" else {}))
    model = jax.tree.map(lambda leaf: leaf + 0.5, model)  # biases too
    new, stats = transform.apply(virgo(), model, batches(), progress=False)
    norms = [hop_norms(b["x"], b["graph"], hops=4) for b in batches()]
    both = jax.tree.map(lambda *each: jnp.logaddexp(*each), *norms)._replace(nodes=jnp.float32(120))
    want = variances("virgo", model.config.pairs, both)
    np.testing.assert_allclose(list(stats.variance.values()), want, rtol=1e-5)
    drawn, biases = weights(new)
    assert len(drawn) == 4 and biases and all(not np.any(b) for b in biases)
    for maps, variance in zip(drawn, want, strict=True):
        assert len(maps) == (2 if layer == "sage" else 1)
        half = float(np.sqrt(3 * variance))
        for w in maps:
            assert 0.9 * half < np.abs(w).max() <= half
            # 4 standard errors of a mean of squares of uniform numbers
            assert np.mean(w**2) == pytest.approx(float(variance), rel=4 * np.sqrt(0.8 / w.size))
        assert len(maps) == 1 or not np.array_equal(*maps)
    if layer == "gat":
        for one, other in zip(new.layers, model.layers, strict=True):
            assert equal((one.sending, one.receiving), (other.sending, other.receiving))


def test_the_maps_of_graphsage_share_a_variance_where_asked():
    whole, half = (
        transform.calibrate(virgo(halved=h), network("sage"), batches(), progress=False).variance
        for h in (False, True)
    )
    np.testing.assert_allclose([2 * v for v in half.values()], list(whole.values()), rtol=1e-6)
    gcn = [
        transform.calibrate(virgo(halved=h), network(), batches(), progress=False).variance
        for h in (False, True)
    ]
    assert equal(*gcn)


def test_the_seed_draws_and_neither_weights_nor_form_count():
    new, stats = transform.apply(virgo(seed=3), network(), batches(), progress=False)
    larger = jax.tree.map(lambda leaf: 2 * leaf, network())
    again, _ = transform.apply(virgo(seed=3), larger.stacked(), batches(), progress=False)
    assert len(again.layers) == 3 and equal(again.unstacked(), new)
    assert equal(models.unstack(models.stack(new)), new)
    other, same = transform.apply(virgo(seed=4), network(), batches(), progress=False)
    assert equal(same, stats) and not equal(other, new)
    keys = jax.random.split(jax.random.key(0), 3)
    each = jax.vmap(lambda key: redrawn(network(), jnp.full(4, 0.1), key))(keys)
    first = jax.tree.map(lambda leaf: leaf[1], each)
    assert equal(first, redrawn(network(), jnp.full(4, 0.1), keys[1]))


def test_stats_print_the_variance_of_every_layer():
    stats = transform.calibrate(virgo(start="kaifor"), network(), batches(), progress=False)
    lines = [line for line in str(stats).splitlines() if "layers[" in line]
    assert len(lines) == 4 and "0.2857" in lines[0] and "0.08333" in lines[1]
    assert "0.5" in lines[1], "the half-width"


def test_layers_are_found_by_their_paths():
    """Whose order is another once a tree was taken apart: layers[10] comes before layers[2]."""
    deep = network(sizes=(7, *range(8, 19), 4))
    stats = transform.calibrate(virgo(start="kaifor"), deep, batches(1), progress=False)
    moved = stats._replace(variance=dict(sorted(stats.variance.items())))
    assert list(moved.variance) != list(stats.variance) and str(moved) == str(stats)
    found = [float(moved.variance[f"layers[{i}]"]) for i in range(12)]
    np.testing.assert_allclose(found, [2 / a for a, _ in deep.config.pairs], rtol=1e-6)
    assert equal(virgo().rewrite(deep, moved), virgo().rewrite(deep, stats))
    with pytest.raises(ConfigError, match="stats are of no graph"):
        virgo().rewrite(deep, virgo().init(deep))


def test_a_second_graph_of_the_same_sizes_compiles_nothing():
    made, (first, _) = virgo(), batches()
    stats = made.observe(made.init(network()), network(), first)
    model, batch = network(), ({"x": 2 * first["x"], "graph": first["graph"]}, jnp.zeros(60))
    with counted() as count:
        made.observe(stats, model, batch)
    assert count.programs == 0, "and a batch with targets is a batch"


def test_a_quantizer_takes_what_was_drawn():
    """nearest(…) on a graph network just works."""
    new, _ = transform.apply(virgo(), network(sizes=(8, 24, 24, 4)), batches_of_eight())
    small, _ = transform.apply(nearest(group=8), new)
    run = jax.jit(lambda model, batch: model(**batch))
    found, want = (run(m, batches_of_eight()[0]) for m in (small, new))
    assert 1e-4 < float(jnp.linalg.norm(found - want) / jnp.linalg.norm(want)) < 0.5
    with pytest.raises(ConfigError, match=r"layers\[0\].linear is Int4; Dense weights are drawn"):
        virgo().init(small)


def batches_of_eight():
    return [{"x": features(width=8), "graph": random_graph()}]


def test_a_graph_and_what_was_drawn_for_it_are_saved_and_restored(tmp_path):
    new, stats = transform.apply(virgo(), network(), batches(), progress=False)
    kept = {"graph": random_graph(), "network": new, "stats": stats}
    trees.save(tmp_path / "kept", kept)
    assert equal(trees.restore(tmp_path / "kept", jax.eval_shape(lambda: kept)), kept)
    models.save(new.stacked(), tmp_path / "model", format="ffnlab")
    assert equal(models.load(tmp_path / "model"), new.stacked())


def test_what_cannot_be_drawn_is_refused():
    key = jax.random.key(0)
    with pytest.raises(ConfigError, match="model is a MLP; a GraphNetwork is accepted"):
        virgo().init(MLP((3, 2), key=key))
    with pytest.raises(ConfigError, match="form='layerwise'"):
        virgo().init(network(form="layerwise"))
    with pytest.raises(ConfigError, match="activation='tanh'"):
        virgo().init(network(activation="tanh"))
    assert virgo(start="xavier").init(network(activation="tanh"))
    with pytest.raises(ConfigError, match="classes=1 must be at least 2"):
        virgo().init(network(sizes=(7, 4, 1)))
    assert virgo(classes=2).init(network(sizes=(7, 4, 1)))
    with pytest.raises(ConfigError, match="start='he' is not one of"):
        virgo(start="he")
    with pytest.raises(ConfigError, match="seed=-1"):
        virgo(seed=-1)
    made = virgo()
    with pytest.raises(ConfigError, match="batch is a ArrayImpl; "):
        made.observe(made.init(network()), network(), features())


def test_probes_that_vanish_are_an_error_and_no_nan():
    apply = functools.partial(transform.apply, model=network(), progress=False)
    centred = features() - features().mean(1, keepdims=True)
    with pytest.raises(NumericalError, match="the mean feature of each node has norm 0"):
        apply(virgo(), batches=[{"x": centred, "graph": random_graph()}])
    new, _ = apply(virgo(start="virgoback"), batches=[{"x": centred, "graph": random_graph()}])
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(new))
    lonely = Graph.make([0], [0], nodes=60)  # no loops but one
    x = features().at[0].set(0)
    given = {"x": x, "graph": lonely, "weights": symmetric_norm(lonely)}
    with pytest.raises(NumericalError, match="behind hop 1: .*nodes without edges and self loops"):
        apply(virgo(start="virgofor"), batches=[given])
    bad = {"x": features().at[3, 3].set(jnp.nan), "graph": random_graph()}
    with pytest.raises(NumericalError, match="none that is finite"):
        apply(virgo(), batches=[bad])


def cross_entropy(model, batch):
    """Of all nodes."""
    return masked(lambda inputs: model(**inputs), batch)


@pytest.mark.parametrize("layer", ["gcn", "sage"])
def test_signals_are_those_of_each_layer_by_hand(layer):
    model, batch = network(layer, sizes=(7, 5, 6, 3)), batches(1)[0]
    given = (batch, jnp.arange(60) % 3)
    first, second, third = model.layers
    x, graph = batch["x"], batch["graph"]
    a = first(x, graph)
    b = second(jax.nn.relu(a), graph)
    c = third(jax.nn.relu(b), graph)
    nats = lambda y: -jnp.mean(jax.nn.log_softmax(y)[jnp.arange(60), given[1]])  # noqa: E731
    of_c = jax.grad(nats)(c)
    of_b = jax.grad(lambda b: nats(third(jax.nn.relu(b), graph)))(b)
    of_a = jax.grad(lambda a: nats(third(jax.nn.relu(second(jax.nn.relu(a), graph)), graph)))(a)
    want = [[jnp.mean(y**2) for y in each] for each in ((a, b, c), (of_a, of_b, of_c))]
    for form in (model, model.stacked()):
        found = jax.jit(lambda m: layer_signals(m, given, cross_entropy))(form)
        np.testing.assert_allclose(found.forward, want[0], rtol=1e-5)
        np.testing.assert_allclose(found.backward, want[1], rtol=1e-5)


def test_virgo_keeps_signals_of_one_size():
    """Behind eight layers, where Xavier's are a hundredth."""
    model = network(sizes=(7, *[32] * 7, 4))
    given = ({"x": features(), "graph": random_graph()}, jnp.arange(60) % 4)
    look = jax.jit(lambda m: layer_signals(m, given, cross_entropy))
    ratios = {}
    for start in ("virgofor", "virgo", "xavier"):
        new, _ = transform.apply(virgo(start=start), model, [given], progress=False)
        found = look(new)
        ratios[start] = found.forward[-2] / found.forward[0], found.backward[0] / found.backward[-2]
    assert 0.1 < ratios["virgofor"][0] < 10 and ratios["xavier"][0] < 0.05
    assert ratios["virgo"][1] > 20 * ratios["xavier"][1]
