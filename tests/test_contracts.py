"""The contracts of weights and layers, run over every one of them (see `contracts.py`)."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from ffnlab import compat, io, layers, weights
from ffnlab.weights import Weight
from tests.compiles import counted
from tests.contracts import IN, LAYERS, OUT, WEIGHTS, input_of

weight_cases = pytest.mark.parametrize("name", WEIGHTS)
layer_cases = pytest.mark.parametrize("name", LAYERS)


def equal(a: object, b: object) -> bool:
    """Same structure, dtypes and bits."""
    plain = lambda leaf: jax.random.key_data(leaf) if io.is_key(leaf) else leaf  # noqa: E731
    bits = lambda leaf: (leaf.dtype, leaf.shape, np.asarray(plain(leaf)).tobytes())  # noqa: E731
    same = jax.tree.structure(a) == jax.tree.structure(b)
    return same and list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


def expected_product(w: Weight, x: jax.Array) -> jax.Array:
    """x @ dense, with the rounding or the mask of the input that the weight declares."""
    inner = getattr(w, "w", None)
    act = getattr(w, "act", None) or getattr(inner, "act", None)
    if act == "e4m3":
        x = weights.fake_e4m3(x)
    if isinstance(w, weights.SparseInput):
        x = jnp.where(jnp.abs(x) > w.threshold, x, 0)
    return x @ w.dense().astype(x.dtype)


def test_every_weight_and_layer_is_under_contract():
    for package, table in ((weights, WEIGHTS), (layers, LAYERS)):
        base = Weight if package is weights else nnx.Module
        kinds = {
            name
            for name in package.__all__
            if inspect.isclass(getattr(package, name))
            and issubclass(getattr(package, name), base)
            and getattr(package, name) is not base
        }
        assert kinds <= {case.split("-")[0] for case in table}


@weight_cases
def test_shape_dtype_and_bytes(name, key):
    w = WEIGHTS[name](key)
    assert tuple(w.shape) == (IN, OUT)
    assert w.dense().shape == (IN, OUT)
    assert w.dense().dtype == w.dtype
    assert w.nbytes == sum(weights.nbytes(leaf) for leaf in jax.tree.leaves(w))


@weight_cases
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_matmul_is_the_product_with_dense(name, dtype, key):
    w, x = WEIGHTS[name](key), input_of((2, 3, IN)).astype(dtype)
    y = w.matmul(x)
    assert y.dtype == dtype and y.shape == (2, 3, OUT)
    # float32: order of summation. bfloat16: one rounding of each factor and of the result.
    limit = 1e-4 if dtype == jnp.float32 else 0.1
    np.testing.assert_allclose(
        y.astype(jnp.float32), expected_product(w, x).astype(jnp.float32), rtol=limit, atol=limit
    )


@weight_cases
def test_transpose_says_so_or_transposes(name, key):
    w = WEIGHTS[name](key)
    if type(w).transpose is Weight.transpose:
        with pytest.raises(ValueError, match="no transpose of its own"):
            w.transpose()
    else:
        np.testing.assert_array_equal(w.transpose().dense(), w.dense().T)
        assert tuple(w.transpose().shape) == (OUT, IN)


@weight_cases
def test_arguments_stay_and_the_second_call_compiles_nothing(name, key):
    w, x = WEIGHTS[name](key), input_of((4, IN))
    before = jax.tree.map(np.array, w)
    product = jax.jit(lambda w, x: w.matmul(x))
    first = product(w, x)
    other = WEIGHTS[name](jax.random.key(5))
    with counted() as count:
        product(other, x)
        assert np.array_equal(product(w, x), first)
    assert count.programs == 0
    assert equal(before, w)


@weight_cases
def test_vmap_over_stacked_weights_and_scan(name, key):
    ws = [WEIGHTS[name](k) for k in jax.random.split(key, 3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ws)
    x = input_of((2, IN))
    each = np.stack([w.matmul(x) for w in ws])
    over = jax.vmap(lambda w: w.matmul(x))(stacked)
    np.testing.assert_allclose(over, each, rtol=1e-4, atol=1e-4)  # batched sums reorder
    scanned = jax.lax.scan(lambda c, w: (c, w.matmul(x)), 0, stacked)[1]
    np.testing.assert_allclose(scanned, each, rtol=1e-4, atol=1e-4)


@weight_cases
def test_gradients_flow_to_the_input_and_to_float_leaves(name, key):
    w, x = WEIGHTS[name](key), input_of((4, IN))
    grads, dx = jax.jit(jax.grad(lambda w, x: (w.matmul(x) ** 2).sum(), (0, 1), allow_int=True))(
        w, x
    )
    assert np.all(np.isfinite(dx)) and np.any(dx != 0)
    assert jax.tree.structure(grads) == jax.tree.structure(w)
    for leaf in jax.tree.leaves(grads):
        if leaf.dtype != jax.dtypes.float0:
            assert np.all(np.isfinite(leaf.astype(jnp.float32)))


@weight_cases
def test_saved_and_restored_equal(name, key, tmp_path):
    w = WEIGHTS[name](key)
    io.save(tmp_path / "w", w)
    like = jax.eval_shape(lambda: w)
    assert equal(io.restore(tmp_path / "w", like), w)


@weight_cases
def test_packed_form_shards_like_its_matrix(name, key):
    w, x = WEIGHTS[name](key), input_of((4, IN))
    mesh = compat.make_mesh((2,), ("tp",))
    is_names = lambda node: isinstance(node, weights.AxisNames)  # noqa: E731
    names = w.leaf_axes(("embed", "mlp"))
    assert jax.tree.structure(names, is_leaf=is_names) == jax.tree.structure(w)
    places = jax.tree.map(
        lambda axes: NamedSharding(
            mesh, PartitionSpec(*["tp" if a == "mlp" else None for a in axes])
        ),
        names,
        is_leaf=is_names,
    )
    for leaf, place in zip(jax.tree.leaves(w), jax.tree.leaves(places), strict=True):
        assert len(place.spec) == leaf.ndim
    sharded = jax.device_put(w, places)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(sharded))
    np.testing.assert_allclose(
        jax.jit(lambda w, x: w.matmul(x))(sharded, x), w.matmul(x), rtol=1e-5, atol=1e-5
    )


@weight_cases
@pytest.mark.parametrize("backend", ["cpu", "cuda", "tpu"])
def test_prepared_weight_is_the_same_function(name, backend, key):
    w, x = WEIGHTS[name](key), input_of((4, IN))
    prepared = weights.prepare(w, backend)
    assert tuple(prepared.shape) == tuple(w.shape)
    np.testing.assert_allclose(prepared.matmul(x), w.matmul(x), rtol=1e-4, atol=1e-4)


@weight_cases
def test_abstract_values_pass_through(name, key):
    w = jax.eval_shape(WEIGHTS[name], key)
    assert tuple(w.shape) == (IN, OUT) and w.nbytes == WEIGHTS[name](key).nbytes
    out = jax.eval_shape(lambda w, x: w.matmul(x), w, input_of((4, IN)))
    assert out.shape == (4, OUT)


@layer_cases
def test_layer_is_pure_jits_once_and_differentiates(name, key):
    make, call = LAYERS[name]
    layer, x = make(key), input_of((2, 5, 16))
    before = jax.tree.map(np.array, layer)
    run = jax.jit(call)
    first, second = run(layer, x), make(key)
    with counted() as count:
        again = run(second, x)
    assert count.programs == 0
    assert np.array_equal(first, again)
    grads = jax.jit(jax.grad(lambda m: call(m, x).sum()))(layer)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))
    assert equal(before, layer)


@layer_cases
def test_layer_follows_the_dtype_of_its_input(name, key):
    make, call = LAYERS[name]
    if name == "Embedding":
        assert call(make(key), input_of((2, 5, 16))).dtype == jnp.float32
        return
    y = call(make(key), input_of((2, 5, 16)).astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


@layer_cases
def test_every_parameter_names_its_axes(name, key):
    make, _ = LAYERS[name]
    params = [
        node
        for node in jax.tree.leaves(make(key), is_leaf=lambda n: isinstance(n, nnx.Variable))
        if isinstance(node, nnx.Variable)
    ]
    assert params
    for param in params:
        value = param.get_value()
        assert len(param.axes) == len(value.shape)


@layer_cases
def test_layer_saved_and_restored_equal(name, key, tmp_path):
    layer = LAYERS[name][0](key)
    io.save(tmp_path / "layer", layer)
    assert equal(io.restore(tmp_path / "layer", jax.eval_shape(lambda: layer)), layer)
