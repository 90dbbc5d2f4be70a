"""The table that ends studies of searches."""

import jax
import numpy as np
import pytest

from ffnlab.layers import MLP
from ffnlab.models import Decoder, DecoderConfig, ResNet, ResNetConfig, narrow, stack
from ffnlab.studies.found_networks import Entry, rows, shape
from ffnlab.weights import Int8

KEY = jax.random.key(0)


def test_a_row_says_what_the_network_is():
    large = MLP((5, 8, 6, 3), key=KEY)
    small = narrow(large, {"maps[0]": [0, 2, 3]})
    entries = {"largest": Entry(large, (0.75,)), "found": Entry(small, (0.5, 1.0, 0.75))}
    found = rows(entries, np.ones((4, 5), np.float32), turns=2)
    assert [r["network"] for r in found] == ["largest", "found"]
    assert [r["shape"] for r in found] == ["maps 8-6", "maps 3-6"]
    assert [r["MACs"] for r in found] == [5 * 8 + 8 * 6 + 6 * 3, 5 * 3 + 3 * 6 + 6 * 3]
    assert [r["bytes"] for r in found] == [4 * (106 + 17), 4 * (51 + 12)]
    assert [r["accuracy"] for r in found] == [0.75, 0.75]
    for r in found:
        low, high = map(float, r["latency quartiles ms"].split(" to "))
        assert 0 < low <= r["latency ms"] * 1.01 and r["latency ms"] <= high * 1.01


def test_shapes_of_other_kinds():
    config = DecoderConfig(vocab=8, width=6, hidden=10, layers=2, heads=2, kv_heads=2, head_dim=4)
    decoder = Decoder(config, key=KEY)
    assert shape(decoder) == shape(stack(decoder)) == "embed 6, attn 2-2, ffn 10-10"
    for name in ("gate", "up", "down"):
        linear = getattr(decoder.layers[1].ffn, name)
        setattr(decoder.layers[1].ffn, name, linear.replace(Int8.quantize(linear.weight.dense())))
    assert shape(decoder) == "embed 6, attn 2-2, ffn 10-10 int8"
    net = ResNet(ResNetConfig((1, 1), (4, 6), 3), key=KEY)
    assert shape(net) == "spatial 4-6, stem 4, expand 6"
    with pytest.raises(ValueError, match="is accepted"):
        shape(3)
