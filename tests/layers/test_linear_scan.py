"""The linear recurrence: every form against a loop, derivatives against jax's, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ffnlab.errors import ConfigError
from ffnlab.layers.linear_scan import FORMS, form_for, linear_scan


def looped(a, b, start):
    """In float64, place by place."""
    a, b, h = (np.asarray(x, np.float64) for x in (a, b, start))
    found = []
    for one, other in zip(a, b, strict=True):
        h = one * h + other
        found.append(h)
    return np.stack(found)


def drawn(seed, length, shape=(2, 3), low=0.0, high=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    a = jax.random.uniform(keys[0], (length, *shape), minval=low, maxval=high)
    b = jax.random.normal(keys[1], (length, *shape))
    return a, b, jax.random.normal(keys[2], shape)


@pytest.mark.parametrize("form", FORMS)
@settings(deadline=None, max_examples=10)
@given(length=st.sampled_from([1, 2, 3, 7, 16, 17]), seed=st.integers(0, 99))
def test_every_form_is_the_recurrence(form, length, seed):
    a, b, start = drawn(seed, length, low=-1.0)
    found = linear_scan(a, b, start, form=form)
    np.testing.assert_allclose(found, looped(a, b, start), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("low", "high"), [(0.0, 1e-6), (0.9999, 1.0), (0.0, 1.0)])
def test_values_and_gradients_of_ten_thousand_places(form, low, high):
    """To 1e-6 of the same recurrence of magnitudes, which is what rounding goes by: where a is near
    1 that is ten thousand numbers that cancel.
    """
    a, b, start = drawn(0, 10_000, (2,), low, high)
    weight = np.random.default_rng(1).normal(size=a.shape).astype(np.float32)
    expected, sizes = looped(a, b, start), looped(a, np.abs(b), np.abs(start))
    found = linear_scan(a, b, start, form=form)
    assert (np.abs(found - expected) <= 1e-6 * sizes).all()
    got = jax.grad(lambda *x: jnp.sum(weight * linear_scan(*x, form=form)), (0, 1, 2))(a, b, start)
    for one, other, most in zip(
        got,
        adjoint(a, weight, expected, start),
        adjoint(a, np.abs(weight), sizes, np.abs(start)),
        strict=True,
    ):
        assert (np.abs(one - other) <= 2e-6 * most).all()


def adjoint(a, weight, h, start):
    """Derivatives of sum(weight * h) by a, b and start, in float64."""
    a = np.asarray(a, np.float64)
    following = np.append(a[1:], np.zeros((1, *a.shape[1:])), 0)
    g = looped(following[::-1], weight[::-1], np.zeros(a.shape[1:]))[::-1]
    return g * np.concatenate([np.asarray(start)[None], h[:-1]]), g, a[0] * g[0]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_loop(form):
    a, b, start = drawn(3, 9)

    def looped(a, b, start):
        found, h = [], start
        for i in range(len(a)):
            h = a[i] * h + b[i]
            found.append(h)
        return jnp.stack(found)

    value = lambda scan: lambda *x: jnp.sum(jnp.sin(scan(*x)))  # noqa: E731
    mine = jax.grad(value(lambda *x: linear_scan(*x, form=form)), (0, 1, 2))(a, b, start)
    for one, other in zip(mine, jax.grad(value(looped), (0, 1, 2))(a, b, start), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_any_axis_broadcasts_and_batches():
    a, b, start = drawn(4, 6)
    expected = linear_scan(a, b, start)
    turned = linear_scan(*(jnp.moveaxis(x, 0, -1) for x in (a, b)), start, axis=-1)
    np.testing.assert_allclose(turned, jnp.moveaxis(expected, 0, -1), atol=1e-6)
    decay = jnp.full((6, 1, 1), 0.5)
    np.testing.assert_allclose(
        linear_scan(decay, b), looped(np.broadcast_to(decay, b.shape), b, np.zeros((2, 3))),
        atol=1e-6,
    )  # fmt: skip
    both = jax.vmap(lambda a, b: linear_scan(a, b))(jnp.stack([a, a]), jnp.stack([b, 2 * b]))
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    """4096 times 1 is 4096; bfloat16 alone stays at 256."""
    ones = jnp.ones(4096, jnp.bfloat16)
    found = linear_scan(ones, ones)
    assert found.dtype == jnp.bfloat16 and float(found[-1]) == 4096


def test_only_a_and_h_are_kept():
    """The backward pass keeps four arrays: a, h, and no products of prefixes."""
    a, b, start = drawn(5, 64)
    for form in FORMS:
        _, pull = jax.vjp(lambda a, b, form=form: linear_scan(a, b, start, form=form), a, b)
        kept = sum(x.size for x in jax.tree.leaves(pull) if hasattr(x, "size"))
        assert kept <= 2 * a.size + 2 * start.size


def test_what_is_refused():
    a = jnp.ones((3, 2))
    for change, message in (
        ({"form": "other"}, "form='other' is not one of"),
        ({"axis": 2}, "axis=2 is not there"),
        ({"b": jnp.ones((4, 2))[:0]}, "shapes that broadcast"),
        ({"b": jnp.ones((1, 2))}, "with the same places"),
        ({"a": jnp.ones((0, 2)), "b": jnp.ones((0, 2))}, "one or more"),
        ({"b": jnp.ones(2)}, "with the same places"),
        ({"start": jnp.ones((3, 2))}, "start"),
    ):
        with pytest.raises(ConfigError, match=message):
            linear_scan(**{"a": a, "b": a} | change)


def test_forms_by_backend():
    assert form_for("cpu", 2048) == "sequential" and form_for("gpu", 2048) == "associative"
