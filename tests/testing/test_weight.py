"""`check_weight` passes a plain one, and fails one broken for each line of its contract."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import weights
from ffnlab.testing import check_weight
from ffnlab.weights import AxisNames, Weight, register, static

IN, OUT = 6, 4


@register
@dataclasses.dataclass(frozen=True)
class Plain(Weight):
    """The least that a weight is; the broken ones differ from it in one thing."""

    w: jax.Array

    @property
    def shape(self):
        return self.w.shape[-2:]

    @property
    def dtype(self):
        return self.w.dtype

    def dense(self):
        return self.w

    def leaf_axes(self, axes):
        return weights.rebuild(self, w=AxisNames(axes))


def drawn(key):
    return jax.random.normal(key, (IN, OUT))


def broken(**changes):
    """A weight of a key, of a class with other members."""
    cls = register(dataclasses.dataclass(frozen=True)(type("Broken", (Plain,), changes)))
    return lambda key: cls(drawn(key))


@dataclasses.dataclass(frozen=True)
class Unregistered(Plain):
    """No pytree."""


@register
@dataclasses.dataclass(frozen=True)
class Static(Plain):
    """A number that belongs into an array is a static field."""

    scale: float = static(1.0)


@register
@dataclasses.dataclass(frozen=True)
class More(Plain):
    """Has one array more."""

    more: object = None

    def leaf_axes(self, axes):
        return weights.rebuild(self, w=AxisNames(axes), more=AxisNames([None]))


@register
@dataclasses.dataclass(frozen=True)
class Noting(Plain):
    """Keeps something of its last product."""

    last: object

    def matmul(self, x):
        object.__setattr__(self, "last", x.mean())
        return super().matmul(x)

    def leaf_axes(self, axes):
        return weights.rebuild(self, w=AxisNames(axes), last=AxisNames([]))


class Checked(Plain):
    """Is rebuilt by `__init__`, which looks at what it gets."""

    def __init__(self, w):
        if w.ndim < 2:
            raise ValueError("w is no matrix")
        object.__setattr__(self, "w", w)


jax.tree_util.register_pytree_node(Checked, lambda w: ((w.w,), None), lambda _, w: Checked(*w))


def outside_jax(self, x):
    """A product that cannot be mapped over stacked weights."""
    shape = jax.ShapeDtypeStruct((*x.shape[:-1], OUT), x.dtype)
    return jax.pure_callback(lambda w, x: (x @ w).astype(x.dtype), shape, self.w.astype(x.dtype), x)


def plain(self, x):
    return x @ self.w.astype(x.dtype)


count = itertools.count()
detached = jax.lax.stop_gradient
BROKEN = {
    "it is a weight": drawn,
    "same weight: it gives another": lambda key: Plain(drawn(jax.random.key(next(count)))),
    "pytree of arrays: it is one leaf": lambda key: Unregistered(drawn(key)),
    "pytree of arrays: its structure": lambda key: Static(drawn(key), float(drawn(key)[0, 0])),
    "pytree of arrays: a leaf is float": lambda key: More(drawn(key), 1.0),
    "pytree of arrays: AttributeError": lambda key: Checked(drawn(key)),
    "arrays: shape is": broken(shape=property(lambda self: (OUT, IN))),
    "arrays: dtype is": broken(dtype=property(lambda self: jnp.dtype(jnp.bfloat16))),
    "arrays: nbytes is 8": broken(nbytes=8),
    "product with dense: .*Not equal": broken(matmul=lambda self, x: 2 * plain(self, x)),
    "product with dense: of bfloat16": broken(matmul=lambda self, x: x @ self.w),
    "product with dense: its shape": broken(matmul=lambda self, x: plain(self, x[0])),
    "or transposes: its shape": broken(transpose=lambda self: self),
    "or transposes: .*Arrays are not equal": broken(transpose=lambda self: Plain(2 * self.w.T)),
    "arguments stay .*: matmul changes": lambda key: Noting(drawn(key), jnp.float32(0)),
    "compiles nothing: 1 programs": lambda key: More(
        drawn(key), jnp.zeros(1 + int(jax.random.key_data(key)[-1]))
    ),
    "mapped and scanned": broken(matmul=outside_jax),
    "gradients .*that of the input is zero": broken(
        matmul=lambda self, x: detached(x) @ self.w.astype(x.dtype)
    ),
    "gradients .*those of all its float arrays are zero": broken(
        matmul=lambda self, x: x @ detached(self.w).astype(x.dtype)
    ),
    "gradients .*not finite": broken(
        matmul=lambda self, x: plain(self, x) + 0 * jnp.sqrt(x[..., :1] * 0)
    ),
    "saved and restored": lambda key: More(drawn(key), jnp.zeros(3, jnp.uint4)),
    "leaf axes .*another structure": broken(leaf_axes=lambda self, axes: AxisNames(axes)),
    r"leaf axes .*\('embed',\) for an array": broken(
        leaf_axes=lambda self, axes: weights.rebuild(self, w=AxisNames(axes[:1]))
    ),
    "leaf axes .*none is cut": broken(
        leaf_axes=lambda self, axes: weights.rebuild(self, w=AxisNames([axes[0], None]))
    ),
    "prepared .*Not equal": broken(prepare=lambda self, backend: Plain(2 * self.w)),
    "prepared .*for cpu its shape": broken(prepare=lambda self, backend: Plain(self.w[:, :2])),
    "abstract values": broken(nbytes=property(lambda self: np.asarray(self.w).nbytes)),
}


def test_a_plain_weight_passes():
    check_weight(lambda key: Plain(drawn(key)))


def test_the_product_may_be_said():
    rounded = broken(matmul=lambda self, x: jnp.round(x) @ self.w.astype(x.dtype))
    with pytest.raises(AssertionError, match="product with dense"):
        check_weight(rounded)

    def product(w, x):
        return jnp.round(x) @ w.dense().astype(x.dtype)

    with pytest.raises(AssertionError, match="grouped products"):  # the next line that it breaks
        check_weight(rounded, product=product)


@pytest.mark.parametrize("said", BROKEN)
def test_each_line_of_the_contract_is_held(said):
    with pytest.raises(AssertionError, match=f"(?s)the weight breaks its contract: .*{said}"):
        check_weight(BROKEN[said])
