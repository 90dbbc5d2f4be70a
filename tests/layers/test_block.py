"""Blocks: slots, how each joins the stream, gates, removal, what sublayers report."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab.errors import ConfigError
from ffnlab.layers import Block, Context, Join, LayerInputs, Linear, RMSNorm

WIDTH = 6
NOTHING = Context({}, {})
# Sums of a few products in float32, in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def part(seed: int) -> Linear:
    """A sublayer that is one map."""
    return Linear(WIDTH, WIDTH, key=jax.random.key(seed), axes=("embed", "mlp"))


def norm(seed: int) -> RMSNorm:
    """A norm with gains of its own."""
    layer = RMSNorm(WIDTH)
    layer.scale = nnx.Param(
        jax.random.uniform(jax.random.key(seed), (WIDTH,), minval=0.5, maxval=2.0), axes=("embed",)
    )
    return layer


class Reporting(nnx.Module):
    """A sublayer that is told of its context and says what it was given."""

    informed = True

    def __init__(self, inner: Linear):
        self.inner = inner

    def __call__(self, x, context, inputs):
        return self.inner(x), {"choice": inputs.choice, "index": context.index}


def macaron(joins=None) -> Block:
    """Three sublayers with a norm each."""
    return Block(
        norm(1),
        part(2),
        norm(3),
        part(4),
        slots=("ffn_in", "attn", "ffn"),
        joins=joins,
        others={"ffn_in": (norm(5), part(6))},
    )


@pytest.fixture
def h():
    return jax.random.normal(jax.random.key(9), (2, 3, WIDTH))


@pytest.mark.parametrize(
    ("join", "formula"),
    [
        (Join(), lambda h, f, n: h + f(n(h))),
        (Join(scale=0.5), lambda h, f, n: h + 0.5 * f(n(h))),
        (Join(norm="output"), lambda h, f, n: h + n(f(h))),
        (Join(norm="after", scale=3.0), lambda h, f, n: n(h + 3.0 * f(h))),
        (Join(residual=False), lambda h, f, n: f(n(h))),
        (Join(norm="after", residual=False), lambda h, f, n: n(f(h))),
    ],
)
def test_a_sublayer_joins_as_its_join_says(h, join, formula):
    block = Block(None, None, norm(1), part(2), slots=("ffn",), joins=(join,))
    np.testing.assert_allclose(block(h, NOTHING)[0], formula(h, part(2), norm(1)), **CLOSE)


def test_slots_run_in_order_each_with_its_gate(h):
    joins = (Join(scale=0.5), Join(), Join(scale=0.5))
    block, gates = macaron(joins), jnp.array([1.0, 0.25, -2.0])
    got, cache, outputs = block(h, NOTHING, inputs=LayerInputs(gates=gates), branches=True)
    want, added = h, []
    for scale, gate, n, f in ((0.5, 1.0, 5, 6), (1.0, 0.25, 1, 2), (0.5, -2.0, 3, 4)):
        added.append(scale * gate * part(f)(norm(n)(want)))
        want = want + added[-1]
    np.testing.assert_allclose(got, want, **CLOSE)
    np.testing.assert_allclose(outputs.branches, jnp.stack(added), **CLOSE)
    assert cache is None and outputs.reports == {}


@pytest.mark.parametrize("place", ["before", "output", "after"])
@pytest.mark.parametrize("gone", ["ffn_in", "attn", "ffn"])
def test_a_removed_sublayer_is_a_gate_of_zero(h, place, gone):
    block = macaron((Join(norm=place),) * 3)
    gates = jnp.array([float(name != gone) for name in block.slots])
    closed = block(h, NOTHING, inputs=LayerInputs(gates=gates), branches=True)
    small = block.without(gone)
    removed = small(h, NOTHING, branches=True)
    np.testing.assert_allclose(removed[0], closed[0], **CLOSE)
    np.testing.assert_allclose(removed[2].branches, closed[2].branches, **CLOSE)
    assert len(jax.tree.leaves(small)) == len(jax.tree.leaves(block)) - (
        1 if place == "after" else 2
    )
    assert getattr(block, gone) is not None  # the block itself is as it was
    with pytest.raises(ValueError, match=f"sublayer='{gone}'.*no such sublayer"):
        small.without(gone)


def test_without_a_residual_nothing_is_removed():
    block = Block(None, None, norm(1), part(2), slots=("ffn",), joins=(Join(residual=False),))
    with pytest.raises(ValueError, match="no residual"):
        block.without("ffn")


def test_what_an_informed_sublayer_reports_comes_back(h):
    block = Block(None, None, norm(1), Reporting(part(2)))
    choice = jnp.arange(6).reshape(2, 3)
    out, _, outputs = block(h, NOTHING._replace(index=7), inputs=LayerInputs(choice=choice))
    np.testing.assert_array_equal(outputs.reports["ffn"]["choice"], choice)
    assert outputs.reports["ffn"]["index"] == 7 and outputs.branches is None
    plain = Block(None, None, norm(1), part(2))
    np.testing.assert_array_equal(out, plain(h, NOTHING)[0])


def test_a_block_of_the_default_form_has_the_structure_it_always_had():
    block = Block(norm(1), part(2), norm(3), part(4))
    assert not {"slots", "joins"} & set(vars(block))
    assert block.slots == ("attn", "ffn") and block.joins == (Join(), Join())
    again = jax.tree.map(lambda leaf: leaf, macaron((Join(0.5), Join(), Join(0.5))))
    assert again.slots == ("ffn_in", "attn", "ffn") and again.joins[0].scale == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": ("attn", "attn", "ffn")}, "each once"),
        ({"slots": ("attn",)}, r"sublayers \['attn', 'ffn'\]"),
        ({"slots": ("attn", "ffn", "cross")}, "sublayers"),
        ({"others": {"cross": (None, None)}}, r"\['attn', 'cross', 'ffn'\]"),
        ({"joins": (Join(),)}, "1 joins for 2 slots"),
    ],
)
def test_slots_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Block(norm(1), part(2), norm(3), part(4), **options)


def test_an_unknown_place_of_a_norm_is_refused():
    with pytest.raises(ConfigError, match="norm='front' is not"):
        Join(norm="front")
