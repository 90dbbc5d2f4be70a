"""The contracts of weights and layers, held by every one of them (see `contracts.py`)."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from ffnlab import layers, weights
from ffnlab.testing import check_weight
from ffnlab.weights import Weight
from tests.contracts import IN, LAYERS, OUT, WEIGHTS


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


@pytest.mark.parametrize("name", WEIGHTS)
def test_weight(name, key):
    assert tuple(WEIGHTS[name](key).shape) == (IN, OUT)
    check_weight(WEIGHTS[name], product=expected_product)


def test_a_format_without_a_transpose_says_so(key):
    without = [make(key) for make in WEIGHTS.values()]
    without = [w for w in without if type(w).transpose is Weight.transpose]
    assert without
    for w in without:
        with pytest.raises(ValueError, match="no transpose of its own"):
            w.transpose()


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    LAYERS[name]()
