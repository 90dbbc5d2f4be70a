"""`check_transform` passes a plain one, and fails one broken for each line of its contract."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from ffnlab import tree
from ffnlab.layers import MLP, Linear
from ffnlab.testing import check_transform
from ffnlab.transform import Transform
from ffnlab.weights import Dense

MODEL = MLP((4, 3, 2), key=jax.random.key(0))
BATCHES = list(jax.random.normal(jax.random.key(1), (2, 5, 4)))
FIRST = tree.at("maps[0]") & tree.of_type(Linear)


@jax.jit
def highest(stats, model, batch):
    return jnp.maximum(stats, jnp.abs(batch).max())


def scaled(model, factor):
    grow = lambda linear: linear.replace(Dense(factor * linear.weight.dense()))  # noqa: E731
    return tree.map_at(model, FIRST, grow)


def plain(**changes):
    """Scales the first map by the largest input; the broken ones differ in one thing."""
    parts = {"init": lambda model: jnp.float32(0), "observe": highest, "rewrite": scaled}
    return lambda: Transform("plain", **parts | changes)


def in_place(model, stats):
    model.maps[0].b[...] += 1
    return scaled(model, stats)


def compiling(stats, model, batch):
    return jax.jit(lambda stats, batch: jnp.maximum(stats, jnp.abs(batch).max()))(stats, batch)


def remembering():
    """Decides in a variable of its own."""
    seen = []

    def observe(stats, model, batch):
        seen.append(float(jnp.abs(batch).max()))
        return stats

    return plain(observe=observe, rewrite=lambda model, stats: scaled(model, max(seen)))()


def hoarding():
    """Keeps all batches."""
    observe = lambda stats, model, batch: (*stats, batch)  # noqa: E731
    return plain(init=lambda model: (), observe=observe, rewrite=lambda m, s: scaled(m, 2.0))()


count = itertools.count(2)
BROKEN = {
    "it is a transform": lambda: None,
    "arguments stay .*model or a batch was changed": plain(rewrite=in_place),
    "arguments stay .*the model is another": plain(rewrite=lambda m, s: scaled(m, next(count))),
    "arguments stay .*the stats are others": plain(init=lambda m: jnp.float32(next(count))),
    "arguments stay .*asks for another pass": plain(
        observe=None, advance=lambda model, stats: (stats, False)
    ),
    "still runs: nothing was changed": plain(rewrite=lambda m, s: jax.tree.map(jnp.copy, m)),
    "still runs: tuple came": plain(rewrite=lambda model, stats: (model,)),
    "still runs: its output is not finite": plain(rewrite=lambda m, s: scaled(m, jnp.inf)),
    "still runs: its output is .5, 3": plain(
        rewrite=lambda m, s: tree.map_at(m, tree.at("maps"), lambda maps: type(maps)(maps[:1]))
    ),
    "compiles nothing: 1 programs": plain(observe=compiling),
    "holds no more": hoarding,
    "applied elsewhere": remembering,
}


def test_a_plain_transform_passes():
    check_transform(plain(), model=MODEL, batches=BATCHES)
    nothing = plain(observe=None, init=lambda model: (), rewrite=lambda m, s: scaled(m, 2.0))
    check_transform(nothing, model=MODEL, batches=BATCHES)


@pytest.mark.parametrize("said", BROKEN)
def test_each_line_of_the_contract_is_held(said):
    with pytest.raises(AssertionError, match=f"the transform breaks its contract: .*{said}"):
        check_transform(BROKEN[said], model=MODEL, batches=BATCHES)


def test_stacked_decoders_are_taken():
    def of_blocks(path):
        chosen = tree.of_type(Linear) & tree.at(path)
        double = lambda linear: linear.replace(Dense(2 * linear.weight.dense()))  # noqa: E731
        rewrite = lambda model, stats: tree.map_at(model, chosen, double)  # noqa: E731
        return plain(observe=None, init=lambda model: (), rewrite=rewrite)

    check_transform(of_blocks("layers**.up"))
    with pytest.raises(AssertionError, match="stacked models are taken"):
        check_transform(of_blocks("layers[0].**.up"))
