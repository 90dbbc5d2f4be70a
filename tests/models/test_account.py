"""Costs: closed forms written out by hand, and XLA's own count of the same program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ffnlab import tree, weights
from ffnlab.errors import SelectionError
from ffnlab.layers import GatedFFN, Linear, SparseGatedFFN
from ffnlab.models import Decoder, DecoderConfig, account, remove, stack

D, H, V, L, HEADS, KV, HD = 16, 24, 40, 3, 4, 2, 8
CONFIG = DecoderConfig(
    vocab=V,
    width=D,
    hidden=H,
    layers=L,
    heads=HEADS,
    kv_heads=KV,
    head_dim=HD,
    windows=(5, None, 5),
)
ATTENTION = D * HEADS * HD * 2 + D * KV * HD * 2  # numbers in q, o and k, v
FFN = 3 * D * H


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


def expected_flops(context):
    seen = 2 * min(context, 5) + context
    return 2 * L * (ATTENTION + FFN) + 4 * HEADS * HD * seen + 2 * D * V


def test_parameters_and_bytes_are_sums_of_products(model):
    n = L * (ATTENTION + FFN + 2 * D) + D * V + D
    assert account.parameters(model) == account.parameters(stack(model)) == n
    assert account.nbytes(model) == 4 * n
    assert account.parameters(jax.eval_shape(lambda: model)) == n
    untied = Decoder(
        DecoderConfig(**{**vars(CONFIG), "tie_embeddings": False, "qkv_bias": True}),
        key=jax.random.key(0),
    )
    assert account.parameters(untied) == n + D * V + L * (HEADS + 2 * KV) * HD


@pytest.mark.parametrize("context", [1, 4, 100])
def test_flops_are_the_closed_form(model, context):
    assert account.flops_per_token(model, context) == expected_flops(context)
    assert account.flops_per_token(stack(model), context) == expected_flops(context)


def test_removed_sublayers_cost_nothing(model):
    smaller = remove(model, [0, 3])  # the attention of block 0, the FFN of block 1
    assert account.flops_per_token(smaller, 9) == (
        expected_flops(9) - 2 * ATTENTION - 4 * HEADS * HD * 5 - 2 * FFN
    )
    assert account.parameters(smaller) == account.parameters(model) - ATTENTION - FFN - 2 * D


def test_formats_count_as_documented(model):
    def with_up(make):
        return tree.map_at(
            model, tree.at("layers[*].ffn.up"), lambda m: m.replace(make(m.weight.dense()))
        )

    base = account.flops_per_token(model, 1)
    total = account.parameters(model)

    def int4(w):
        q = jnp.zeros(w.shape, jnp.int8)
        return weights.Int4.from_codes(q, jnp.ones((2, H), jnp.float32), group=8)

    packed = with_up(int4)
    assert account.flops_per_token(packed, 1) == base
    assert account.parameters(packed) == account.parameters(stack(packed)) == total
    saved = L * (4 * D * H - (D * H // 2 + 4 * 2 * H + 4))  # float32 against codes, scales, divisor
    assert account.nbytes(packed) == account.nbytes(model) - saved

    thin = with_up(lambda w: weights.LowRank.truncate(w, 2))
    assert account.parameters(thin) == total - L * (D * H - 2 * (D + H))
    assert account.flops_per_token(thin, 1) == base - 2 * L * (D * H - 2 * (D + H))

    adapted = with_up(lambda w: weights.LoRA.init(weights.Dense(w), 2, jax.random.key(0)))
    assert account.parameters(adapted) == total + L * 2 * (D + H)
    assert account.flops_per_token(adapted, 1) == base + 2 * L * 2 * (D + H)

    masked = with_up(lambda w: weights.Masked(weights.Dense(w), jnp.zeros(w.shape, bool)))
    assert account.parameters(masked) == total
    assert account.flops_per_token(masked, 1) == base


def test_sparse_layers_count_what_they_read(model):
    def sparse(ffn):
        up = ffn.up.replace(weights.Transposed(weights.Dense(ffn.up.weight.dense().T)))
        return SparseGatedFFN(ffn.gate, up, ffn.down, jnp.ones(H), activation=ffn.activation)

    gated = tree.map_at(model, tree.at("layers[*].ffn"), sparse)
    base = account.flops_per_token(model, 1)
    assert account.flops_per_token(gated, 1) == base
    assert account.parameters(gated) == account.parameters(model), "thresholds were measured"
    assert account.nbytes(gated) == account.nbytes(model) + 4 * L * H
    saved = 0.75 * 2 * 2 * D * H
    zeros = {"layers[1].ffn": 0.75}
    assert account.flops_per_token(gated, 1, zeros=zeros) == base - saved
    assert account.flops_per_token(stack(gated), 1, zeros=zeros) == base - saved

    def thrifty(linear):
        return linear.replace(weights.SparseInput(linear.weight, jnp.float32(0.1)))

    both = tree.map_at(gated, tree.at("layers[0].attn.q") & tree.of_type(Linear), thrifty)
    zeros = {"layers[0].attn.q": 0.5, **zeros}
    less = 0.5 * 2 * D * HEADS * HD
    assert account.flops_per_token(both, 1, zeros=zeros) == base - saved - less
    with pytest.raises(SelectionError, match=r"layers\[2\].attn.q"):
        account.flops_per_token(both, 1, zeros={"layers[2].attn.q": 0.5})


def test_cache_bytes_by_kind(model):
    assert account.cache_bytes_per_token(model) == L * 2 * KV * HD * 4
    for kind, size in (("float8", HD + 2), ("int4", HD // 2 + 1)):
        rounding = jax.tree.map(lambda x: x, model)
        for block in rounding.layers:
            block.attn.spec = type(block.attn.spec)(**{**vars(block.attn.spec), "kv_format": kind})
        assert account.cache_bytes_per_token(rounding) == L * 2 * KV * size
        assert account.cache_bytes_per_token(stack(rounding)) == L * 2 * KV * size


def test_close_to_what_xla_counts():
    config = DecoderConfig(
        vocab=64, width=64, hidden=128, layers=1, heads=4, kv_heads=4, head_dim=16
    )
    model = Decoder(config, key=jax.random.key(0))
    tokens = np.zeros((1, 16), np.int32)
    analysis = jax.jit(lambda m, t: m(t)).lower(model, tokens).compile().cost_analysis()
    mean = account.flops_per_token(model, 16)  # one block of queries sees all 16 keys
    # XLA also counts norms, softmax and activations; at this width they are a few per cent.
    assert mean * 16 <= analysis["flops"] <= 1.2 * mean * 16


class OneOfTwo(nnx.Module):
    """An FFN of which a token takes one of two, the first by a share that is measured."""

    def __init__(self, big, small):
        self.big, self.small = big, small

    def __call__(self, x):
        return self.big(x)

    def flops_per_token(self, share):
        sizes = [
            2 * sum(m.weight.shape[0] * m.weight.shape[1] for m in (f.gate, f.up, f.down))
            for f in (self.big, self.small)
        ]
        share = 1.0 if share is None else share
        return share * sizes[0] + (1 - share) * sizes[1]


def test_a_layer_that_answers_for_itself_is_asked_once(model):
    small = GatedFFN(D, 4, key=jax.random.key(1))
    chosen = tree.map_at(
        model, tree.at("layers[1].ffn"), lambda ffn: OneOfTwo(ffn, small), expect=1
    )
    base = expected_flops(9)
    assert account.flops_per_token(chosen, 9) == base
    half = account.flops_per_token(chosen, 9, zeros={"layers[1].ffn": 0.5})
    assert half == base - FFN + 3 * D * 4
    assert account.flops_per_token(stack(chosen), 9) == base
    with pytest.raises(SelectionError, match=r"layers\[0\]\.ffn"):
        account.flops_per_token(chosen, 9, zeros={"layers[0].ffn": 0.5})
