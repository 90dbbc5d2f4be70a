"""The one list of removable sublayers."""

import jax
import numpy as np
import pytest
from flax import nnx

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP, Block
from ffnlab.models.units import present, slots, units
from ffnlab.testing import tiny


def test_units_are_numbered_by_layer_and_slot():
    model = models.remove(tiny(), [3, 0])
    found = units(model)
    assert [(u.number, u.layer, u.slot) for u in found] == [
        (2 * i + j, i, slot) for i in range(3) for j, slot in enumerate(("attn", "ffn"))
    ]
    assert [u.number for u in found if not u.present] == models.removed(model) == [0, 3]
    np.testing.assert_array_equal(present(model), [[False, True], [True, False], [True, True]])
    assert str(found[3]) == "ffn of layer 1"


def test_stacked_and_abstract_models_have_the_same_units():
    model = tiny()
    for other in (models.stack(model), jax.eval_shape(lambda: model)):
        assert units(other) == units(model)


def test_three_slots_are_three_units():
    model = tiny()
    blocks = [
        Block(
            b.attn_norm,
            b.attn,
            b.ffn_norm,
            b.ffn,
            slots=("ffn_in", "attn", "ffn"),
            others={"ffn_in": (b.ffn_norm, b.ffn)},
        )
        for b in model.layers
    ]
    model.layers = nnx.List(blocks)
    small = models.remove(model, [3, 7])
    assert small.layers[1].ffn_in is None and small.layers[2].attn is None
    assert models.removed(small) == [3, 7] and present(small).shape == (3, 3)
    assert slots(small) == slots(models.stack(model)) == ("ffn_in", "attn", "ffn")
    model.layers[0] = tiny().layers[0]
    with pytest.raises(ConfigError, match="different numbers of sublayers"):
        present(model)
    with pytest.raises(ConfigError, match="different sublayers: .*'ffn_in'"):
        slots(model)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([6], r"units holds 6, outside 0\.\.5"), ([-1], "holds -1"), ([1, 1], "no such sublayer")],
)
def test_numbers_that_are_no_units_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        models.remove(tiny(), numbers)


def test_models_without_blocks_have_none(key):
    with pytest.raises(ConfigError, match="model is a dict"):
        units({})
    chain = nnx.Module()
    chain.layers = nnx.List([MLP((2, 2), key=key)])
    with pytest.raises(ConfigError, match=r"layers of type \['MLP'\]"):
        units(chain)
