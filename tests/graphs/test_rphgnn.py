"""Summaries of graphs of several kinds: the authors' code, dense matrices, costs and bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError, NumericalError
from ffnlab.graph import Hetero
from ffnlab.graphs import Entry, RpHGNNOptions, featured, precomputed, propagated
from ffnlab.graphs.rounds import entries_of, of_relation
from ffnlab.graphs.squashing import PROJECTIONS, SQUASHES, direction
from ffnlab.models.account import compiled_cost
from ffnlab.models.cost import multiply_adds
from tests.fixtures.rphgnn import record

# Sums of a dozen numbers of about 1, through three rounds, in float32.
TOLERANCE = 2e-5
KINDS = ("author", "paper", "venue")  # in the order in which theirs asks for projections


def graph_of(relations=record.RELATIONS):
    return Hetero.make(record.NODES, relations)


def rows_of(run="plain"):
    return {kind: jnp.asarray(x, jnp.float32) for kind, x in record.features(run).items()}


@pytest.fixture(scope="module")
def official(fixtures):
    with np.load(fixtures / "rphgnn" / "official.npz", allow_pickle=False) as saved:
        return dict(saved)


def given_by_number(graph, x, options):
    """Projections as the authors' code asks for them: by round, kind and entry."""
    order = [(kind, e) for kind in KINDS for e in entries_of(graph, kind, options)]

    def matrix(turn, kind, entry):
        ends = entry.relation[0], entry.relation[2]
        other = ends[ends[0] == kind]
        rows = x[other if entry.parity == "odd" else kind].shape[1]
        number = turn * len(order) + order.index((kind, entry))
        return record.drawn(1000 + number, rows, x[kind].shape[1])

    return matrix


@pytest.mark.parametrize("run", record.RUNS)
def test_the_authors_code_hears_the_same(official, run):
    rounds, squash, alpha, hears, has_input = record.RUNS[run]
    options = RpHGNNOptions(
        rounds, squash, alpha=alpha, hears=hears, with_input=has_input, dtype="float32"
    )
    graph, x = graph_of(), rows_of(run)
    own = RpHGNNOptions(**vars(options) | {"with_own": run == "input"})
    given = given_by_number(graph, x, options)
    found = precomputed(graph, x, record.TARGET, own, projections=given)
    expected = [official[f"{run}.{i}"] for i in range(len(found.entries))]
    assert f"{run}.{len(expected)}" not in official
    for i, (entry, group, wanted) in enumerate(
        zip(found.entries, found.groups, expected, strict=True)
    ):
        np.testing.assert_allclose(group, wanted, atol=TOLERANCE)
        parity, *relation = official[f"{run}.{i}.key"].tolist()
        assert entry.parity == {"self": "own"}.get(parity, parity)
        if relation:  # even groups are called by the relation that they start in
            assert relation[1].removeprefix("r.") == entry.relation[1]
    assert found.sizes == tuple(wanted.shape[1:] for wanted in expected)
    traced = propagated(graph, x, record.TARGET, options, projections=given)
    for entry, group in zip(found.entries, found.groups, strict=True):
        if entry in traced:
            np.testing.assert_array_equal(group[:, group.shape[1] - rounds :], traced[entry])


def dense(graph, relation):
    """Row-normalized, in float64."""
    edges = graph.edges_of(relation)
    matrix = np.zeros((edges.num_receivers, edges.num_senders))
    np.add.at(matrix, (np.asarray(edges.receivers), np.asarray(edges.senders)), 1)
    return matrix / np.maximum(matrix.sum(1, keepdims=True), 1)


def test_a_round_is_two_row_normalized_products():
    graph, x = graph_of(), rows_of()
    options = RpHGNNOptions(1, dtype="float32")
    found = propagated(graph, x, "paper", options, key=jax.random.key(0))
    for entry, rows in found.items():
        first, name, last = entry.relation
        inward = entry.relation if last == "paper" else (last, f"r.{name}", first)
        other = inward[0]
        outward = inward if other == "paper" else ("paper", name, other)
        outward = outward if outward in graph.relations else ("paper", f"r.{name}", other)
        m, back = dense(graph, inward), dense(graph, outward)
        expected = m @ np.asarray(x[other]) if entry.parity == "odd" else m @ back @ x["paper"]
        np.testing.assert_allclose(rows[:, 0], expected, atol=1e-6)
    assert list(found) == entries_of(graph, "paper", options)
    assert len(found) == sum("paper" == r[2] for r in graph.relations) + sum(
        "paper" == r[0] for r in graph.relations
    )


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_projections_keep_inner_products(kind, key):
    h = jax.random.normal(key, (40, 64))
    h = direction(h)
    matrix = PROJECTIONS[kind](jax.random.fold_in(key, 1), 64, 256)
    assert abs(float(matrix.mean())) < 0.03
    scale = 1.0 if kind != "xavier" else (64 + 256) / 2
    projected = h @ matrix
    apart = scale * projected @ projected.T / 256 - h @ h.T
    assert float(jnp.abs(apart).mean()) < 0.1  # the card's bar
    lengths = jnp.linalg.norm(SQUASHES["project_norm_sum"].term(h, matrix), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=1e-6)
    if kind == "sparse":
        values, counts = np.unique(np.round(matrix, 4), return_counts=True)
        assert values.tolist() == pytest.approx([-(3**0.5), 0, 3**0.5], abs=1e-4)
        np.testing.assert_allclose(counts / matrix.size, [1 / 6, 2 / 3, 1 / 6], atol=0.02)


def test_nothing_heard_stays_zero_and_has_a_finite_gradient():
    zero = jnp.zeros((2, 3))
    assert direction(zero).tolist() == zero.tolist()
    assert np.isfinite(jax.grad(lambda x: direction(x).sum())(zero)).all()
    found = propagated(graph_of(), rows_of(), "paper", RpHGNNOptions(2), key=jax.random.key(0))
    at = found[Entry("odd", ("paper", "at", "venue"))]
    assert not np.asarray(at[6]).any() and np.asarray(at[0]).any()  # paper 6 is at no venue
    assert all(np.isfinite(rows).all() for rows in found.values())


def rounds_as_one(rounds):
    """All rounds as one function of what is traced."""
    options = RpHGNNOptions(rounds)
    return lambda graph, x, key: propagated(graph, x, "paper", options, key=key)


def test_every_round_adds_the_same_products():
    given = graph_of(), rows_of(), jax.random.key(0)
    added = np.diff([multiply_adds(rounds_as_one(rounds), *given) for rounds in (2, 3, 4)])
    assert added[0] == added[1] > 0


@pytest.mark.slow
def test_compiled_cost_is_linear_in_rounds():
    given = graph_of(), rows_of(), jax.random.key(0)
    costs = [compiled_cost(rounds_as_one(rounds), *given) for rounds in (2, 3, 4)]
    added = np.diff([cost.multiply_adds for cost in costs])
    assert added[0] == added[1] > 0
    results = np.diff([cost.results for cost in costs])
    assert abs(results[0] - results[1]) <= 0.05 * results[0]


def test_rounds_after_the_first_compile_nothing():
    graph, x = graph_of(), rows_of()
    run = lambda rounds, seed: precomputed(  # noqa: E731
        graph, x, "paper", RpHGNNOptions(rounds, squash="project_norm_mean"), key=seed
    )
    before = of_relation._cache_size()
    run(2, jax.random.key(0))
    assert of_relation._cache_size() - before <= 2 * len(graph.names)
    after = of_relation._cache_size()
    run(2, jax.random.key(1))
    assert of_relation._cache_size() == after


def test_the_same_key_draws_the_same_and_another_another():
    graph, x = graph_of(), rows_of()
    runs = [
        precomputed(graph, x, "paper", RpHGNNOptions(2), key=jax.random.key(seed)).rows
        for seed in (0, 0, 1)
    ]
    assert runs[0].dtype == np.float16 and np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2])


def test_groups_side_by_side():
    graph, x = graph_of(), rows_of()
    found = precomputed(graph, x, "paper", RpHGNNOptions(2), key=jax.random.key(0))
    both = found.beside(found)
    assert both.rows.shape[1] == 2 * found.rows.shape[1] and both.sizes == found.sizes * 2
    assert all(np.array_equal(a, b) for a, b in zip(both.groups, found.groups * 2, strict=True))
    other = precomputed(graph, x, "author", RpHGNNOptions(2), key=jax.random.key(0))
    with pytest.raises(ConfigError, match="7 nodes beside 5"):
        found.beside(other)


def test_kinds_without_features_get_some():
    graph, x = graph_of(), rows_of()
    found = featured(graph, {"paper": x["paper"]}, width=64, key=jax.random.key(0))
    assert {kind: rows.shape[1] for kind, rows in found.items()} == {
        "author": 64,
        "paper": 5,
        "venue": 64,
    }
    assert float(jnp.linalg.norm(found["author"], axis=1).mean()) == pytest.approx(1, abs=0.2)
    with pytest.raises(ConfigError, match=r"nodes of \['author', 'venue'\] have no rows"):
        featured(graph, {"paper": x["paper"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"squash": "max"}, "squash='max' is not one of"),
        ({"projection": "dense"}, "projection='dense' is not one of"),
        ({"hears": "none"}, "hears='none' is not one of"),
        ({"dtype": "int8"}, "dtype='int8' is not one of"),
        ({"alpha": 1.5}, "alpha=1.5 must lie in 0..1"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
    ],
)
def test_options_that_there_are_not(options, message):
    with pytest.raises(ConfigError, match=message):
        RpHGNNOptions(**options)


def test_what_cannot_be_summarized():
    graph, x, key = graph_of(), rows_of(), jax.random.key(0)
    for rows, target, options, message in (
        ({"paper": x["paper"]}, "paper", {}, r"missing \['author', 'venue'\]"),
        (x | {"book": x["paper"]}, "paper", {}, r"unknown \['book'\]"),
        (x | {"paper": x["paper"][1:]}, "paper", {}, r"x\['paper'\] is \[6, 5\]"),
        (x | {"paper": x["paper"] * jnp.nan}, "paper", {}, "not finite"),
        (x, "book", {}, "kind='book' is not one of"),
        (x, "paper", {"squash": "mean"}, "adds rows as they are, and kinds have widths"),
    ):
        with pytest.raises(ConfigError, match=message):
            precomputed(graph, rows, target, RpHGNNOptions(**options), key=key)
    with pytest.raises(ConfigError, match="key=None"):
        precomputed(graph, x, "paper", RpHGNNOptions(2))
    with pytest.raises(ConfigError, match=r"is \[1, 1\]; \[5, 4\] is projected by"):
        given = lambda *_: jnp.ones((1, 1))  # noqa: E731
        precomputed(graph, x, "paper", RpHGNNOptions(2), projections=given)
    with pytest.raises(NumericalError, match="not finite in float16"):
        large = {kind: 1e6 * rows for kind, rows in x.items()}
        precomputed(graph, large, "paper", RpHGNNOptions(1), key=key)
    alone = Hetero.make(record.NODES, {("author", "knows", "author"): ([0], [1])})
    with pytest.raises(ConfigError, match="target='paper' has no relation"):
        precomputed(alone, x, "paper", key=key)
