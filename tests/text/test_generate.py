"""Generation: against the full forward pass step by step, batched, streamed, compiled once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.errors import ConfigError
from ffnlab.layers import Rope
from ffnlab.models import Decoder, DecoderConfig, stack
from ffnlab.text.generate import begin, check, decode, generate, prefill, stream_tokens
from ffnlab.text.sample import Sampling

CONFIG = DecoderConfig(
    vocab=40, width=16, hidden=24, layers=2, heads=4, kv_heads=2, head_dim=8, max_positions=256
)
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9, 7, 9, 3, 2]]
WARM = Sampling(temperature=1.0)


@pytest.fixture(scope="module")
def model():
    return Decoder(CONFIG, key=jax.random.key(0))


forward = jax.jit(lambda model, tokens: model(tokens))


def by_full_forward(model, prompt, n):
    """Greedy decoding by the whole forward pass for every token."""
    ids = list(prompt)
    for _ in range(n):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(forward(model, padded)[0, len(ids) - 1])))
    return ids[len(prompt) :]


def test_greedy_equals_the_full_forward_pass_and_batch_equals_single(model):
    n = 12
    expected = [by_full_forward(model, prompt, n) for prompt in PROMPTS]
    together = generate(model, PROMPTS, max_tokens=n)
    assert together.lists() == expected
    assert together.tokens.shape == (3, n)
    assert not together.stopped.any()
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        assert generate(model, [prompt], max_tokens=n).lists() == [ids]


@pytest.mark.parametrize(
    "change",
    [
        {"windows": (4, None), "attn_softcap": 20.0, "logit_softcap": 15.0, "qk_norm": True},
        {"rope": Rope(theta=500.0, scaling="linear", factor=2.0), "tie_embeddings": False},
    ],
    ids=["window-softcap", "rope-untied"],
)
def test_other_models_equal_their_full_forward_pass(change):
    config = DecoderConfig(**{**vars(CONFIG), **change})
    model = Decoder(config, key=jax.random.key(1))
    expected = [by_full_forward(model, prompt, 6) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_tokens=6).lists() == expected


def test_stacked_model_generates_the_same(model):
    assert (
        generate(stack(model), PROMPTS, max_tokens=8).lists()
        == generate(model, PROMPTS, max_tokens=8).lists()
    )


def test_bfloat16_model_computes_in_float32_on_a_cpu(model):
    stored = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model)
    widened = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
    assert (
        generate(stored, PROMPTS, max_tokens=8).lists()
        == generate(widened, PROMPTS, max_tokens=8).lists()
    )


@pytest.mark.parametrize("kind", ["float8", "int4"])
def test_cache_kind_equals_the_model_that_rounds_without_a_cache(model, kind):
    rounding = jax.tree.map(lambda x: x, model)
    for block in rounding.layers:
        spec = block.attn.spec
        block.attn.spec = type(spec)(**{**vars(spec), "kv_format": kind})
    expected = [by_full_forward(rounding, prompt, 6) for prompt in PROMPTS]
    assert generate(model, PROMPTS, max_tokens=6, kv=kind).lists() == expected
    assert generate(rounding, PROMPTS, max_tokens=6).lists() == expected
    plain = [by_full_forward(model, prompt, 6) for prompt in PROMPTS]
    assert generate(rounding, PROMPTS, max_tokens=6, kv="dense").lists() == plain


def test_array_prompts_with_padding_at_either_end(model):
    width = max(map(len, PROMPTS))
    left = np.array([[-1] * (width - len(p)) + p for p in PROMPTS])
    right = jnp.array([p + [-1] * (width - len(p)) for p in PROMPTS])
    expected = generate(model, PROMPTS, max_tokens=4).lists()
    assert generate(model, left, max_tokens=4).lists() == expected
    assert generate(model, right, max_tokens=4).lists() == expected


def test_stop_tokens_end_rows_one_by_one(model):
    free = generate(model, PROMPTS, max_tokens=12).lists()
    stops = [free[0][2], free[2][5]]
    result = generate(model, PROMPTS, max_tokens=12, stop=stops)
    for ids, full, stopped in zip(result.lists(), free, result.stopped, strict=True):
        cut = next((i for i, t in enumerate(full) if t in stops), None)
        assert ids == full[:cut]
        assert stopped == (cut is not None)
    assert (result.tokens[np.arange(12) >= result.lengths[:, None]] == -1).all()


def test_loop_ends_when_all_rows_have_stopped(model):
    first = [ids[0] for ids in generate(model, PROMPTS, max_tokens=1).lists()]
    rows = check(model, PROMPTS, 20, Sampling(), None, None)
    prepared, state, advance = begin(model, rows, 20, Sampling(), None, first, None)
    assert int(advance(prepared, state, 20).step) == 1
    assert generate(model, PROMPTS, max_tokens=20, stop=first).lists() == [[], [], []]


def test_stream_yields_what_generate_returns(model):
    for sampling, n in itertools.product((Sampling(), WARM), (1, 20)):
        key = jax.random.key(4)
        options = {"max_tokens": n, "sampling": sampling, "key": key}
        expected = generate(model, PROMPTS[:1], **options).lists()[0]
        assert list(stream_tokens(model, PROMPTS[0], **options)) == expected
    stop = [expected[3]]
    options = {"max_tokens": 20, "sampling": WARM, "key": key, "stop": stop}
    cut = expected.index(stop[0])
    assert list(stream_tokens(model, PROMPTS[0], **options)) == expected[:cut]


def test_same_key_same_tokens_and_rows_do_not_depend_on_each_other(model):
    options = {"max_tokens": 10, "sampling": WARM}
    first = generate(model, PROMPTS, key=jax.random.key(7), **options).lists()
    assert generate(model, PROMPTS, key=jax.random.key(7), **options).lists() == first
    assert generate(model, PROMPTS, key=jax.random.key(8), **options).lists() != first
    alone = generate(model, PROMPTS[:1], key=jax.random.key(7), **options).lists()
    assert alone == first[:1]


def test_every_step_and_row_has_noise_of_its_own(model):
    """Where all tokens are equally likely, two of 40 are the same once in 40 times."""
    uniform, options = jax.tree.map(jnp.zeros_like, model), {"max_tokens": 32, "sampling": WARM}
    tokens = generate(uniform, PROMPTS, key=jax.random.key(0), **options).tokens
    for a, b in ((tokens[:, 1:], tokens[:, :-1]), (tokens[1:], tokens[:-1])):
        assert np.mean(a == b) < 0.1
    assert all(len(set(row)) > 16 for row in tokens.tolist())


def test_prompt_and_new_tokens_may_fill_all_positions(model):
    check(model, [[1] * 250], 6, Sampling(), None, None)


def test_top_k_of_one_is_greedy(model):
    drawn = generate(
        model, PROMPTS, max_tokens=6, sampling=Sampling(1.0, top_k=1), key=jax.random.key(0)
    )
    assert drawn.lists() == generate(model, PROMPTS, max_tokens=6).lists()


def test_new_prompts_and_numbers_compile_nothing(model):
    def sizes():
        return prefill._cache_size(), decode._cache_size()

    key = jax.random.key(0)
    before = sizes()
    generate(model, PROMPTS, max_tokens=9, sampling=Sampling(0.7, 5, 0.9), key=key, stop=(1, 2))
    after = sizes()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 1)
    for n, sampling, stop in [
        (9, Sampling(0.5, 5, 0.8), (3, 4)),
        (32, Sampling(2.0, 5, 0.1), (0, 9)),
    ]:
        prompts = [[n] * (n - 3), [4, 4], [1]]
        generate(model, prompts, max_tokens=n, sampling=sampling, key=key, stop=stop)
    assert sizes() == after
    list(stream_tokens(model, [1, 2, 3], max_tokens=30))
    after = sizes()
    list(stream_tokens(model, [4], max_tokens=25))
    assert sizes() == after


def test_model_is_left_alone(model):
    before = [np.asarray(x) for x in jax.tree.leaves(model)]
    generate(model, PROMPTS, max_tokens=3)
    for x, y in zip(before, jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        ([[1], []], {}, "each at least one token"),
        (np.full((1, 3), -1), {}, "each at least one token"),
        ([[1, 40]], {}, r"prompt 0 holds the id 40, outside 0\.\.39"),
        ([[1], [-2]], {}, "prompt 1 holds the id -2"),
        ([[1]], {"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ([[1] * 250], {"max_tokens": 7}, "exceeds the model's max_positions=256"),
        ([[1]], {"sampling": WARM}, "needs a key"),
        ([[1]], {"kv": "int2"}, "accepted: dense, float8, int4"),
    ],
)
def test_bad_arguments_are_named(model, prompts, options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model, prompts, **{"max_tokens": 4, **options})


def test_stream_checks_at_the_call(model):
    with pytest.raises(ConfigError, match="each at least one token"):
        stream_tokens(model, [], max_tokens=3)
