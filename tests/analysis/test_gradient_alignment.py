"""Cosines of steps with gradients: known angles, and the sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ffnlab import models, tree
from ffnlab.analysis import gradient_alignment
from ffnlab.errors import NumericalError, SelectionError
from ffnlab.layers import MLP
from ffnlab.learning import backprop, counter_current, labelled, next_token
from ffnlab.testing import batches, tiny
from tests.contracts_methods import labelled as labelled_batches

LAYERS = ["maps[0]", "maps[1]"]


@pytest.fixture
def model(key):
    return MLP((5, 8, 4), key=key)


def given(count=2):
    return [tuple(map(jnp.asarray, batch)) for batch in labelled_batches()[:count]]


def align(rule, model, data, loss=labelled, **options):
    return gradient_alignment(rule, loss, **options)(model, data, progress=False)


def test_a_step_down_the_gradient_has_cosine_one(model):
    found = align(backprop(labelled, optax.sgd(0.1)), model, given())
    assert list(found.cosines) == [*LAYERS, "all"]
    np.testing.assert_allclose(list(found.cosines.values()), 1, atol=1e-5)  # rounding of steps
    for row in found.rows():
        assert row["step"] == pytest.approx(0.1 * row["gradient"], rel=1e-4)


def test_a_step_up_the_gradient_has_minus_one(model):
    found = align(backprop(labelled, optax.scale(0.1)), model, given())
    np.testing.assert_allclose(list(found.cosines.values()), -1, atol=1e-5)


def flat(trees):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(trees)])


def test_mean_steps_are_compared_with_the_mean_gradient(model):
    """Also where steps are not linear: batches of unequal size weigh as much as they have rows."""
    rule, (a, b) = backprop(labelled, optax.sign_sgd(0.1)), given()
    data = [a, jax.tree.map(lambda leaf: leaf[:2], b)]
    slopes = [jax.grad(lambda m, d: labelled(m, d)[0])(model, d) for d in data]
    gradient = sum(n * flat(slope.maps[1]) for n, slope in zip((6, 2), slopes, strict=True)) / 8
    step = sum(n * np.sign(flat(s.maps[1])) for n, s in zip((6, 2), slopes, strict=True)) / 8
    found = align(rule, model, data)
    expected = step @ gradient / np.linalg.norm(step) / np.linalg.norm(gradient)
    assert found.figures()["cosine/maps[1]"] == pytest.approx(expected, abs=1e-5)
    assert found.layers["maps[1]"].gradient == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert found.layers["maps[1]"].update == pytest.approx(0.1 * np.linalg.norm(step), rel=1e-4)


def test_a_loss_that_counts_decides_what_a_batch_weighs(model):
    """Three of the rows count in the first batch and none in the second, whose gradient is none."""

    def counting(model, batch):
        nats, _ = labelled(model, batch)
        counted = jnp.where(batch[1].sum() == total, 3, 0)
        return nats, {"count": counted}

    first, second = given()
    total = int(first[1].sum())
    assert int(second[1].sum()) != total
    rule = backprop(labelled, optax.sgd(0.1))
    one, both = (align(rule, model, data, counting) for data in ([first], [first, second]))
    assert one.rows() == both.rows()


def test_local_losses_go_another_way(key):
    model = MLP((5, 8, 7, 4), bias=False, key=key)
    found = align(counter_current(optimizer=optax.sgd(0.1)), model, given(1))
    assert -1 < found.figures()["cosine"] < 0.99
    assert len(found.cosines) == 4


def test_parts_that_do_not_move_have_no_angle(model):
    rule = backprop(labelled, optax.sgd(0.1), trainable=tree.at("maps[1]"))
    found = align(rule, model, given())
    assert [("cosine" in row) for row in found.rows()] == [False, True, True]
    assert list(found.figures()) == ["cosine/maps[1]", "cosine"]
    assert found.figures()["cosine"] < 0.99, "the whole gradient has parts that do not move"
    with pytest.raises(
        NumericalError, match="'gradient_alignment': the update of backprop is zero"
    ):
        align(backprop(labelled, optax.sgd(0.0)), model, given())
    constant = lambda model, batch: (0 * labelled(model, batch)[0], {})  # noqa: E731
    with pytest.raises(NumericalError, match="'gradient_alignment': the gradient of backprop is z"):
        align(backprop(labelled, optax.sgd(0.1)), model, given(), constant)


def test_small_gradients_have_an_angle(model):
    """Their squares are zero in float32."""
    faint = lambda model, batch: (1e-25 * labelled(model, batch)[0], {})  # noqa: E731
    found = align(backprop(labelled, optax.sgd(0.1)), model, given(), faint)
    np.testing.assert_allclose(list(found.cosines.values()), 1, atol=1e-5)


def test_steps_of_a_model_in_bfloat16_are_not_rounded(model):
    """In bfloat16 most of them would be lost: they are a thousandth of the weights and less."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    found = align(backprop(labelled, optax.sgd(1e-3)), half, given())
    np.testing.assert_allclose(list(found.cosines.values()), 1, atol=1e-3)  # rounding of float32


def test_steps_begin_where_they_are_told(model, key):
    """The momentum of an earlier step, up the slope, is still there."""
    rule, (batch, _) = backprop(labelled, optax.sgd(0.01, momentum=0.9)), given()
    state = rule.init(model, key)
    state = state._replace(optimizer=jax.tree.map(lambda leaf: leaf - 100, state.optimizer))
    kept = jax.tree.map(np.array, state.model)
    found = align(rule, model, [batch], begin=lambda model: state)
    assert found.figures()["cosine"] < 0.9 < align(rule, model, [batch]).figures()["cosine"]
    jax.tree.map(np.testing.assert_array_equal, state.model, kept)


def test_the_rule_looks_at_batches_first(model):
    rule = counter_current(optimizer=optax.sgd(0.1))
    x, _ = labelled_batches()[0]
    with pytest.raises(ValueError, match="9"):
        align(rule, model, [(x, np.full(6, 9))])


def test_a_loss_that_is_nan_is_an_error_though_its_gradient_is_finite(model):
    (x, y), other = given()
    beyond = (x, jnp.full_like(y, 9))
    finite = jax.grad(lambda model: labelled(model, beyond)[0])(model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(finite))
    with pytest.raises(NumericalError, match="probe 'gradient_alignment'"):
        align(backprop(labelled, optax.sgd(0.1)), model, [beyond, other])


def test_layers_are_selected_and_blocks_taken_apart():
    rule, select = backprop(optimizer=optax.sgd(0.1)), "layers[1].ffn"
    flat_, stacked = (
        align(rule, made, batches(), next_token, select=select)
        for made in (tiny(), models.stack(tiny()))
    )
    names = [f"layers[1].ffn.{name}" for name in ("down", "gate", "up")]
    assert list(flat_.layers) == list(stacked.layers) == [*names, "all"]
    with pytest.raises(SelectionError, match="matches nothing"):
        gradient_alignment(rule, next_token, select="layers[7]").init(tiny())
