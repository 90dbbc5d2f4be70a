"""What networks cost: hand counts, bytes as stored, turns with a reference, failures dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab import clock
from ffnlab.errors import ConfigError
from ffnlab.layers import MLP
from ffnlab.models import ResNet, ResNetConfig
from ffnlab.pruning.search import (
    SearchOptions,
    Space,
    Variable,
    drawn_alike,
    macs,
    measured,
    meter,
    search,
)
from ffnlab.weights import Int8

KEY = jax.random.key(0)
ROWS = np.ones((6, 5), np.float32)


def net(hidden: int) -> MLP:
    return MLP((5, hidden, 3), key=KEY)


def by_hand(n: int) -> int:
    """Products of a CIFAR ResNet of depth 6 n + 2 and 3 x 32 x 32 pixels, layer by layer."""
    total, side, width = 3 * 9 * 16 * 32 * 32, 32, 16
    for stage, out in enumerate((16, 32, 64)):
        for block in range(n):
            side = side // 2 if stage and not block else side
            total += 9 * width * out * side**2 + 9 * out * out * side**2
            width = out
    return total + 64 * 10


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_products_of_cifar_resnets_are_those_of_a_hand_count(depth):
    n = (depth - 2) // 6
    config = ResNetConfig((n, n, n), (16, 32, 64), 10)
    model = jax.eval_shape(lambda key: ResNet(config, key=key), KEY)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    assert macs(model, images) == by_hand(n)
    # The figures that papers print, in millions, are of nets whose two shortcuts are convolutions.
    shortcuts = 16 * 32 * 16**2 + 32 * 64 * 8**2
    printed = {20: 40.8, 32: 69.1, 56: 125.7, 110: 253.1}
    if depth in printed:
        whole = (macs(model, images) + shortcuts) / 1e6
        assert whole == pytest.approx(printed[depth], rel=1e-3)


def test_products_are_of_one_row_whatever_is_asked_by_name():
    assert macs(net(4), ROWS) == macs(net(4), {"x": ROWS}) == 5 * 4 + 4 * 3


def test_a_model_is_timed_in_turns_with_the_reference(monkeypatch):
    """The clock moves by what a call's output says: hidden units, as the bias of one output."""
    now = [0.0]

    def slow(hidden):
        model = net(hidden)
        for layer in model.maps:
            layer.w = layer.w.replace(jax.tree.map(jnp.zeros_like, layer.weight))
        model.maps[1].b = model.maps[1].b.replace(jnp.full(3, float(hidden)))
        return model

    def waited(result):
        now[0] += float(result[0, 0])
        return result

    monkeypatch.setattr(clock.jax, "block_until_ready", waited)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    cost_of = meter(slow(8), ROWS, turns=4)
    for hidden in (2, 4):
        costs = cost_of(slow(hidden))
        assert costs.seconds.median == costs.seconds.high == hidden
        assert costs.ratio.low == costs.ratio.median == hidden / 8
        assert costs.macs == 8 * hidden and costs.bytes == 4 * (9 * hidden + 3)


def test_bytes_are_those_stored():
    model = net(4)
    model.maps[0] = model.maps[0].replace(Int8.quantize(model.maps[0].weight.dense()))
    costs = meter(net(4), ROWS, turns=1)(model)
    assert costs.bytes == 5 * 4 + 4 * 4 + 4 * (4 + 4 * 3 + 3)  # codes, scales; biases and a matrix


def test_what_cannot_be_measured_is_dropped_by_a_search():
    """A network that does not run gives no row to a predictor, and the search goes on."""
    space = Space((Variable("hidden", tuple(range(1, 9))),))
    cost_of = meter(net(8), ROWS, turns=1)

    def measure(config):
        (hidden,) = config["hidden"]
        if hidden == 3:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        costs = cost_of(net(hidden))
        return {"macs": costs.macs, "latency": costs.ratio.median * (np.nan if hidden == 5 else 1)}

    options = SearchOptions(("macs", "latency"), budget=8, tactic="random", population=4)
    with pytest.warns(UserWarning, match="dropped: measuring") as said:
        log = search(space, measure, options)
    assert len(said) == 2 and len(measured(log)[0]) == 6
    assert not {3, 5} & {int(v[0]) + 1 for v in measured(log)[0]}


WIDTHS = Space((Variable("width", tuple(range(1, 9)), count=4),))


def test_networks_drawn_alike_cost_as_much_and_differ():
    rng = np.random.default_rng(0)
    asked = []

    def cost(config):
        asked.append(config)
        return sum(config["width"])

    drawn = [drawn_alike(WIDTHS, cost, 12, rng)["width"] for _ in range(60)]
    assert all(sum(widths) == 12 for widths in drawn) and len(set(drawn)) > 40
    only = Space((Variable("width", (1, 2)),))
    same, other = {"width": (1,)}, {"width": (2,)}
    assert drawn_alike(only, lambda c: 1.0, 1.0, rng, besides=same) == other
    near = drawn_alike(WIDTHS, cost, 12.5, rng, within=0.05)["width"]
    assert sum(near) in (12, 13)
    # Nothing costs so much: the nearest of all that were drawn.
    del asked[:]
    most = drawn_alike(WIDTHS, cost, 100, rng, draws=50)["width"]
    assert len(asked) == 50 and sum(most) == max(sum(c["width"]) for c in asked)


def test_bad_input():
    with pytest.raises(ConfigError, match="turns=0"):
        meter(net(2), ROWS, turns=0)
    with pytest.raises(ConfigError, match="target=0 must be above 0"):
        drawn_alike(WIDTHS, lambda config: 1.0, 0, np.random.default_rng(0))
    one = Space((Variable("width", (1,)),))
    with pytest.raises(ConfigError, match="draws=9 gave nothing but besides"):
        drawn_alike(one, sum, 1, np.random.default_rng(0), draws=9, besides={"width": (1,)})
    with pytest.raises(ConfigError, match="draws=0"):
        drawn_alike(WIDTHS, lambda config: 1.0, 1, np.random.default_rng(0), draws=0)
