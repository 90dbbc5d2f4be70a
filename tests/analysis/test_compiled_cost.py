"""What programs need: products written out by hand, memory of what is certainly kept."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.analysis import compiled_cost
from ffnlab.errors import ConfigError
from ffnlab.graph import Graph
from ffnlab.layers import MLP
from ffnlab.models import GraphNetworkConfig, account

SIZES = (5, 7, 3)
ROWS = [np.zeros((4, 5), np.float32), np.ones((2, 5), np.float32)]


def test_a_forward_pass_of_all_rows(key):
    found = compiled_cost()(MLP(SIZES, key=key), ROWS)
    (row,) = found.rows()
    assert row["rows"] == 6
    assert row["multiply_adds"] == 6 * (5 * 7 + 7 * 3)
    assert row["arguments"] == 4 * (6 * 5 + 5 * 7 + 7 + 7 * 3 + 3)
    assert row["results"] == 4 * 6 * 3
    assert row["temporary"] >= 4 * 6 * 7, "the hidden activations are kept in between"
    figures = found.figures()
    assert figures["multiply_adds_per_row"] == 5 * 7 + 7 * 3
    assert figures["compiler_flops"] >= 2 * figures["multiply_adds"]


def test_any_function_of_model_and_batch(key):
    def slope(model, batch):
        x, y = batch
        return jax.grad(lambda model: ((model(x) - y) ** 2).sum())(model)

    batch = (ROWS[0], np.zeros((4, 3), np.float32))
    found = compiled_cost(slope)(MLP(SIZES, key=key), [batch])
    # Forward; backward by the weights of both maps, and by the hidden activations.
    assert found.cost.multiply_adds == 4 * (2 * 5 * 7 + 3 * 7 * 3)


def test_nothing_is_run(key):
    def fn(model, batch):
        jax.debug.callback(lambda: pytest.fail("it ran"))
        return model(batch)

    compiled_cost(fn)(MLP(SIZES, key=key), ROWS)
    assert account.compiled_cost(jnp.dot, *2 * [jax.ShapeDtypeStruct((3, 3), "float32")])[3] == 27


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ([np.float32(3)], r"arrays \[\(\)\] has no rows"),
        ([()], r"arrays \[\] has no rows"),
        ([np.zeros((0, 5))], r"\(0, 5\)\] has no rows"),
        ([(np.zeros((2, 5)), np.zeros(3))], r"\(2, 5\), \(3,\)\] has no rows"),
        ([np.zeros((2, 5)), np.zeros((2, 4))], r"rows are .*1, ?4.*, and were .*1, ?5"),
    ],
)
def test_batches_without_rows_or_of_two_kinds_are_refused(key, batches, said):
    with pytest.raises(ConfigError, match=f"probe 'compiled_cost': .*{said}"):
        compiled_cost()(MLP(SIZES, key=key), batches)


def test_a_graph_is_one_row(key):
    graph = Graph.make([0, 1, 1], [1, 2, 0], nodes=3)
    batch = {"x": jnp.ones((3, 4)), "graph": graph}
    model = GraphNetworkConfig((4, 2)).make(key=key)
    probe = compiled_cost(lambda model, batch: model(**batch))
    found = probe(model, [batch])
    assert found.count == 1 and found.figures()["multiply_adds"] >= 3 * 4 * 2
    with pytest.raises(ConfigError, match="a graph is one batch; here is another"):
        probe(model, [batch, batch])


def test_a_function_that_does_not_take_the_batch_is_named(key):
    pairs = [(np.zeros((2, 5), np.float32), np.zeros(2, np.int32))]
    with pytest.raises(ConfigError, match=r"'compiled_cost': fn\(model, batch\) takes no batch of"):
        compiled_cost()(MLP(SIZES, key=key), pairs)


def test_a_backend_that_does_not_tell_is_an_error(key, monkeypatch):
    class Silent:
        lower = compile = lambda self, *_: self
        memory_analysis = cost_analysis = lambda self: None

    monkeypatch.setattr(account.jax, "jit", lambda fn: Silent())
    with pytest.raises(ConfigError, match="does not tell what a program needs"):
        account.compiled_cost(lambda x: x, 1.0)
