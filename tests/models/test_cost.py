"""Products counted from jaxprs, against counts by hand and against the closed forms of a model."""

import functools

import jax
import jax.numpy as jnp
import pytest

from ffnlab import models
from ffnlab.errors import ConfigError
from ffnlab.models import Decoder, DecoderConfig, account
from ffnlab.models.cost import multiply_adds
from ffnlab.testing import tiny
from pallas_kernels import grouped


def shape(*sizes):
    """An array that is not there."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_are_their_sizes_multiplied():
    assert multiply_adds(jnp.matmul, shape(3, 4, 5), shape(3, 5, 6)) == 3 * 4 * 5 * 6
    assert multiply_adds(jnp.dot, shape(7), shape(7)) == 7
    assert multiply_adds(lambda x: jnp.sin(x).sum() + x.max(), shape(9, 9)) == 0


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_what_each_output_reads(groups):
    conv = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(2, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    got = multiply_adds(conv, shape(2, 9, 8, 4), shape(3, 3, 4 // groups, 6))
    assert got == 2 * 4 * 6 * 6 * (3 * 3 * 4 // groups)


def test_loops_count_as_often_as_they_run_and_branches_by_the_dearest():
    def body(h, _):
        return h @ h, None

    loop = lambda h: jax.lax.scan(body, h, length=5)[0]  # noqa: E731
    assert multiply_adds(loop, shape(4, 4)) == 5 * 64
    assert (
        multiply_adds(lambda h: jax.lax.fori_loop(0, 3, lambda _, h: h @ h, h), shape(2, 2)) == 24
    )

    def either(p, h):
        return jax.lax.cond(p, lambda h: h @ h @ h, lambda h: h @ h, h)

    assert multiply_adds(either, jax.ShapeDtypeStruct((), bool), shape(4, 4)) == 128
    nested = jax.jit(jax.checkpoint(lambda h: jax.vmap(loop)(h)))
    assert multiply_adds(nested, shape(3, 4, 4)) == 3 * 5 * 64


def test_a_gradient_counts_its_own_products():
    loss = lambda w, x: (x @ w).sum()  # noqa: E731
    assert multiply_adds(jax.value_and_grad(loss), shape(4, 5), shape(3, 4)) == 2 * 60
    assert multiply_adds(jax.value_and_grad(loss, (0, 1)), shape(4, 5), shape(3, 4)) == 3 * 60


def test_grouped_products_count_each_row_once():
    def grouped(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([2, 0, 4]))

    assert multiply_adds(grouped, shape(6, 4), shape(3, 4, 5)) == 6 * 4 * 5
    both = jax.grad(lambda x, w: grouped(x, w).sum(), (0, 1))
    assert multiply_adds(both, shape(6, 4), shape(3, 4, 5)) in (2 * 120, 3 * 120)


def test_turns_that_are_not_known_are_refused():
    def open_ended(h):
        return jax.lax.while_loop(lambda h: h.sum() > 0, lambda h: h @ h, h)

    with pytest.raises(ConfigError, match="number of turns is not known"):
        multiply_adds(open_ended, shape(2, 2))
    counting = lambda h: jax.lax.while_loop(lambda h: h.sum() > 0, lambda h: h - 1, h)  # noqa: E731
    assert multiply_adds(counting, shape(2, 2)) == 0


GEMMA = DecoderConfig(
    vocab=31, width=16, hidden=24, layers=4, heads=4, kv_heads=2, head_dim=4,
    windows=(3, None, 3, None), sandwich_norms=True, qk_norm=True, tie_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(
    "model", [tiny(), Decoder(GEMMA, key=jax.random.key(0))], ids=["llama", "g"]
)
def test_one_token_of_a_decoder_is_its_closed_form(model, stacked):
    """A cached token attends to all slots: windows mask them and save nothing there."""
    context = 12
    form = models.stack(model) if stacked else model
    cache = jax.eval_shape(lambda: form.init_cache(1, context))
    step = lambda m, t, c: m.extend(t, c)[0]  # noqa: E731
    got = 2 * multiply_adds(step, form, jnp.zeros((1, 1), jnp.int32), cache)
    whole = sum(
        4 * block.attn.spec.heads * block.attn.spec.head_dim
        * (context - min(context, block.attn.spec.window or context))
        for block in model.layers
    )  # fmt: skip
    assert got == account.flops_per_token(model, context) + whole


def test_the_embedded_model_costs_what_it_always_did():
    model, _ = models.embedded()
    cache = jax.eval_shape(lambda: model.init_cache(1, 64))
    step = lambda m, t, c: m.extend(t, c)[0]  # noqa: E731
    assert 2 * multiply_adds(step, model, jnp.zeros((1, 1), jnp.int32), cache) == 3_473_408
    assert account.flops_per_token(model, 64) == 3_473_408


def test_grouped_products_count_whatever_backend_runs_them():
    sizes = jnp.array([2, 0, 4])
    for backend in (None, "xla"):
        call = functools.partial(grouped.matmul, group_sizes=sizes, backend=backend)
        assert multiply_adds(call, shape(6, 4), shape(3, 4, 5)) == 6 * 4 * 5
        both = jax.grad(lambda x, w, call=call: call(x, w).sum(), (0, 1))
        assert multiply_adds(both, shape(6, 4), shape(3, 4, 5)) == 3 * 6 * 4 * 5
    turned = functools.partial(grouped.matmul, group_sizes=sizes, transposed=True)
    both = jax.grad(lambda x, w: turned(x, w).sum(), (0, 1))
    assert multiply_adds(both, shape(6, 4), shape(3, 5, 4)) == 3 * 6 * 4 * 5
