"""Selecting, replacing, partitioning and capturing parts of models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from ffnlab import models, tree, weights
from ffnlab.errors import SelectionError
from ffnlab.layers import GatedFFN, Linear
from ffnlab.testing import batches, tiny


def test_select_by_type_path_and_predicate_agree():
    model = tiny()
    by_type = tree.select(model, tree.of_type(GatedFFN))
    by_path = tree.select(model, tree.at("layers[*].ffn"))
    by_fn = tree.select(model, tree.where(lambda path, node: path.endswith(".ffn")))
    assert list(by_type) == list(by_path) == list(by_fn) == [f"layers[{i}].ffn" for i in range(3)]
    assert by_type["layers[1].ffn"] is model.layers[1].ffn


def test_selectors_combine():
    model = tiny()
    linears = tree.of_type(Linear)
    inside = tree.select(model, linears & tree.at("layers[0].**"))
    outside = tree.select(model, linears & ~tree.at("layers[0].**"))
    both = tree.select(model, (linears & tree.at("layers[0].**")) | tree.of_type(nnx.List))
    assert len(inside) == 7 and len(outside) == 14
    assert set(both) == {*inside, "layers"}


def test_star_stops_at_one_name():
    model = tiny()
    assert list(tree.select(model, tree.at("layers[*].*_norm"))) == [
        f"layers[{i}].{part}_norm" for i in range(3) for part in ("attn", "ffn")
    ]
    with pytest.raises(SelectionError):
        tree.select(model, tree.at("*.q_norm"))


def test_nothing_matched_names_the_nearest_paths():
    with pytest.raises(SelectionError, match=r"layers\[0\]\.ffn\.up"):
        tree.select(tiny(), tree.at("layers[*].mlp.up"))
    with pytest.raises(SelectionError, match="matches 3 nodes, expected 2"):
        tree.map_at(tiny(), tree.of_type(GatedFFN), lambda n: n, expect=2)


def test_map_at_returns_a_new_model_and_keeps_the_old(key):
    model = tiny()
    before = jax.tree.map(np.array, model)
    double = lambda w: weights.Dense(2 * w.dense())  # noqa: E731
    new = tree.map_at(model, tree.at("layers[*].ffn.up.w.value"), double, expect=3)
    for old, twice in zip(model.layers, new.layers, strict=True):
        np.testing.assert_array_equal(twice.ffn.up.weight.dense(), 2 * old.ffn.up.weight.dense())
        np.testing.assert_array_equal(twice.ffn.gate.weight.dense(), old.ffn.gate.weight.dense())
        assert twice.ffn.up.w.axes == ("embed", "mlp")
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, before, model)))
    new.layers[0].ffn = None
    assert model.layers[0].ffn is not None


def test_what_is_not_replaced_is_copied_too():
    """A module changed later in the new model, however far from the selection, is not the old's."""
    model, own = tiny(), (nnx.Module, nnx.Variable)
    new = tree.replace(model, {"layers[0].ffn.up": model.layers[0].ffn.up})
    old = {id(node) for _, node in tree.walk(model) if isinstance(node, own)}
    shared = [path for path, node in tree.walk(new) if isinstance(node, own) and id(node) in old]
    assert all(path.startswith("layers[0].ffn.up") for path in shared)
    assert new.layers[2].attn.q.w.axes == model.layers[2].attn.q.w.axes


def test_overlapping_selections_are_refused():
    with pytest.raises(SelectionError, match=r"'layers\[0\]' contains 'layers\[0\]\.ffn'"):
        tree.map_at(tiny(), tree.at("layers[0]") | tree.at("layers[0].ffn"), lambda n: n)


def test_replace_refuses_an_unknown_path():
    with pytest.raises(SelectionError, match=r"'layers\[9\]\.ffn' does not exist"):
        tree.replace(tiny(), {"layers[9].ffn": None})


def moved(params, gradient):
    """The parameters after Adam's first step."""
    updates, _ = optax.adam(1e-3).update(gradient, optax.adam(1e-3).init(params))
    return optax.apply_updates(params, updates)


def test_partition_and_combine_are_inverse_and_grad_sees_one_part():
    model = tiny()
    chosen, rest = tree.partition(model, tree.at("layers[*].ffn"))
    assert len(jax.tree.leaves(chosen)) == 9
    assert len(jax.tree.leaves(chosen)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(model))
    whole = tree.combine(chosen, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(model)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, whole, model)))

    batch = batches()[0]
    loss = lambda c: tree.combine(c, rest)(batch).var()  # noqa: E731
    stepped = tree.combine(jax.jit(lambda c: moved(c, jax.grad(loss)(c)))(chosen), rest)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), stepped, model)
    assert [path for path, leaf in tree.walk(changed) if leaf is True] == [
        path for path, leaf in tree.walk(chosen) if isinstance(leaf, jax.Array)
    ]


def test_partition_of_floating_leaves_lets_integers_be():
    model = tiny()
    q = jnp.ones((16, 32), jnp.int8)
    int4 = weights.Int4.from_codes(q, jnp.ones((2, 32)), group=8)
    lora = weights.LoRA.init(int4, 2, jax.random.key(0))
    model = tree.map_at(model, tree.at("layers[0].ffn.up"), lambda linear: linear.replace(lora))
    chosen, rest = tree.partition(model, tree.floating)
    assert all(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(chosen))
    assert [x.dtype for x in jax.tree.leaves(rest)] == [jnp.uint8]
    jax.jit(jax.grad(lambda c: tree.combine(c, rest)(batches()[0]).sum()))(chosen)


def test_combine_refuses_parts_of_different_trees():
    with pytest.raises(ValueError, match="not the two parts of one tree"):
        tree.combine({"a": None}, {"b": 1})


@given(st.integers(0, 2**9 - 1))
def test_any_partition_combines_to_the_whole(bits):
    leaves = {f"leaf{i}": float(i) for i in range(9)}
    selector = tree.where(lambda path, _: bool(bits >> int(path[-3]) & 1))
    if bits == 0:
        with pytest.raises(SelectionError):
            tree.partition(leaves, selector)
        return
    chosen, rest = tree.partition(leaves, selector)
    assert len(jax.tree.leaves(chosen)) == bits.bit_count()
    assert tree.combine(chosen, rest) == leaves


def test_capture_returns_inputs_and_outputs_under_jit():
    model, tokens = tiny(), batches()[0]
    run = jax.jit(lambda m, t: tree.capture(m, tree.at("layers[*].ffn.down"), t))
    logits, captured = run(model, tokens)
    np.testing.assert_allclose(logits, model(tokens), rtol=1e-5, atol=1e-5)
    assert list(captured) == [f"layers[{i}].ffn.down" for i in range(3)]
    for i, (path, seen) in enumerate(captured.items()):
        down = model.layers[i].ffn.down
        np.testing.assert_allclose(down(seen.input[0]), seen.output, rtol=1e-4, atol=1e-5)
        assert seen.output.shape == (2, 12, 16), path


def test_capture_of_whole_sublayers_adds_up_to_the_residual():
    model, tokens = tiny(), batches()[0]
    _, captured = tree.capture(model, tree.at("layers[*]"), tokens)
    h = captured["layers[0]"].input[0]
    np.testing.assert_array_equal(captured["layers[1]"].input[0], captured["layers[0]"].output[0])
    assert h.shape == (2, 12, 16)


def test_capture_refuses_what_never_runs_and_what_is_no_module():
    model = tiny()
    with pytest.raises(SelectionError, match="did not run"):
        tree.capture(model, tree.at("layers"), batches()[0])
    with pytest.raises(SelectionError, match="matches nothing"):
        tree.capture(model, tree.at("layers[0].ffn.up.w"), batches()[0])


class Twice(nnx.Module):
    """One map applied twice, and another once."""

    def __init__(self, key):
        self.inner = Linear(4, 4, key=key, axes=("embed", "embed"))
        self.last = Linear(4, 4, key=key, axes=("embed", "embed"))

    def __call__(self, x):
        return self.last(self.inner(self.inner(x)))


def test_capture_refuses_a_module_that_runs_twice():
    model, x = Twice(jax.random.key(0)), jnp.ones((1, 4))
    with pytest.raises(ValueError, match='inner is called more than once.*calls="all"'):
        tree.capture(model, tree.at("inner"), x)
    with pytest.raises(ValueError, match="calls='both' is not one of"):
        tree.capture(model, tree.at("inner"), x, calls="both")


def test_capture_of_all_calls_gives_them_in_order():
    model, x = Twice(jax.random.key(0)), jnp.ones((1, 4))
    linears = tree.of_type(Linear)
    y, found = jax.jit(lambda m, x: tree.capture(m, linears, x, calls="all"))(model, x)
    assert {path: len(calls) for path, calls in found.items()} == {"inner": 2, "last": 1}
    first, second = found["inner"]
    np.testing.assert_array_equal(first.input[0], x)
    np.testing.assert_allclose(second.input[0], model.inner(x), rtol=1e-6)
    np.testing.assert_array_equal(first.output, second.input[0])
    np.testing.assert_array_equal(found["last"][0].output, y)


def test_bytes_count_packed_weights():
    q = jnp.ones((16, 32), jnp.int8)
    int4 = weights.Int4.from_codes(q, jnp.ones((2, 32), jnp.bfloat16), group=8)
    assert tree.nbytes({"w": int4}) == 16 * 32 // 2 + 2 * 32 * 2 + 4
    assert tree.nbytes(jnp.zeros((4, 3), jnp.int4)) == 6
    assert tree.nbytes(tiny()) == 4 * sum(x.size for x in jax.tree.leaves(tiny()))


def test_stacked_models_are_selected_by_their_period():
    stacked = models.stack(tiny())
    assert list(tree.select(stacked, tree.of_type(GatedFFN))) == ["layers.period[0].ffn"]
