"""How the INT4 x FP8 kernels are cut into tiles, chosen, and refuse what they cannot do."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import w4a8
from pallas_kernels.aot import CHIPS
from pallas_kernels.backend import INTERPRETER, JAX_VERSION, choose, unfit
from pallas_kernels.bench.rows import EXPERT_TOKENS, EXPERTS, LAYERS, TOKENS
from pallas_kernels.bench.rows import sizes as expert_sizes
from pallas_kernels.numerics import E4M3
from pallas_kernels.tiles import Padding
from pallas_kernels.w4a8 import cases, plan
from tests.w4a8_operands import tokens, weights

padding_of = jax.jit(Padding.of, static_argnums=(1, 2))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=3, max_size=3), st.sampled_from([1, 4]))
def test_groups_fill_whole_tiles(sizes, tile_m):
    padding = jax.tree.map(np.asarray, padding_of(jnp.array(sizes, jnp.int32), 24, tile_m))
    expert = np.repeat(np.arange(len(sizes)), sizes)
    np.testing.assert_array_equal(padding.used, np.arange(24) < len(expert))
    place = padding.place[: len(expert)]
    np.testing.assert_array_equal(padding.token[place], np.arange(len(expert)))
    np.testing.assert_array_equal(padding.tile_group[place // tile_m], expert)
    assert (padding.tile_group >= 0).sum() == sum(-(-size // tile_m) for size in sizes)


@pytest.mark.parametrize("m", [1, 8, 9, 64, 65, 4096])
@pytest.mark.parametrize(("n", "k"), [(128, 128), (256, 384), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("glu", [False, True])
def test_every_plan_fits_its_product(m, n, k, glu):
    if n % 256 and glu:
        return
    config = plan.choose(m, n, k, glu=glu)
    assert n % (config.columns * config.groups * config.cluster) == 0
    assert config.cluster == 1 or (m == 4096 and config.stages < 4 and config.split_k == 1)
    assert k // 128 % config.k_tiles == 0 and k // 128 // config.k_tiles >= config.split_k
    blocks = -(-m // config.tile_m) * n // (config.columns * config.groups)
    assert config.split_k == 1 or blocks < 132
    fields = dataclasses.asdict(config)
    assert fields["tile_m"] in (8, 16, 32, 64, 128) and fields["columns"] == (128 if glu else 64)


def busy(config, m, n, k):
    """The share of 132 multiprocessors that work, by dealing the pieces out one by one."""
    tiles = -(-m // config.tile_m) * n // (config.columns * config.groups)
    steps, load = k // 128 // config.k_tiles, np.zeros(config.cores)
    pieces = [
        (p + 1) * steps // config.split_k - p * steps // config.split_k
        for _ in range(tiles)
        for p in range(config.split_k)
    ]
    for i, piece in enumerate(pieces):  # a persistent block takes every 132nd
        load[i % len(load)] += piece
    assert sum(pieces) == tiles * steps
    return load.mean() / load.max()


# Where less than nine tenths work, because pieces of k would cost more than they fill: float32 sums
# of gate's and up's 22016 or 28672 columns, written and read again. Tiles of more tokens spill.
LESS = {("Llama-2-7B FFN", 64): 0.65, ("Llama-2-7B FFN", 256): 0.86}
LESS |= {("Llama-3-8B FFN", m): 0.84 for m in (1, 16, 64, 256)}


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_layers_of_the_bench_keep_the_gpu_busy(name, m):
    width, hidden = LAYERS[name]
    down = plan.choose(m, width, hidden)
    assert busy(down, m, width, hidden) >= 0.9
    glu = plan.choose(m, 2 * hidden, width, glu=True)
    assert busy(glu, m, 2 * hidden, width) >= LESS.get((name, m), 0.9)
    assert (name, m) not in LESS or glu.split_k == 1  # and so gate and up stay one kernel


@pytest.mark.parametrize("m", [1024, 4096, 8192])
@pytest.mark.parametrize("name", LAYERS)
def test_many_tokens_take_less_from_the_l2_cache_than_it_gives(name, m):
    """Bytes per clock and multiprocessor while its tensor core multiplies without a pause."""
    width, hidden = LAYERS[name]
    for n, k, most in ((width, hidden, 34), (2 * hidden, width, 42)):
        c = plan.choose(m, n, k, glu=n > width)
        wide = c.groups * c.columns
        step = 128 * c.tile_m / c.cluster + wide * (64 + 2)  # bytes of 128 rows, bfloat16 scales
        clocks = 2 * c.tile_m * wide * 128 / 8192  # of FP8 operations, 8192 a clock
        assert step / clocks < most


@pytest.mark.parametrize("m", [65, 128, 200, 256, 512])
@pytest.mark.parametrize("name", LAYERS)
def test_products_of_some_hundred_tokens_are_split_too(name, m):
    width, hidden = LAYERS[name]
    assert busy(plan.choose(m, width, hidden), m, width, hidden) >= 0.9


def test_what_the_bench_runs_is_what_is_compiled():
    compiled = [case.make()[0] for case in cases.CASES if case.chips == ("h200",)]
    calls = [call.keywords for call in compiled if isinstance(call, functools.partial)]
    ways = {(call["config"], call["glu"]) for call in calls}
    for (width, hidden), m in itertools.product(LAYERS.values(), TOKENS):
        down = plan.choose(m, width, hidden)
        glu = plan.choose(m, 2 * hidden, width, glu=True)
        assert {(down, False), (glu, glu.split_k == 1)} <= ways
    for (count, (k, n)), m in itertools.product(EXPERTS.items(), EXPERT_TOKENS):
        assert (plan.choose_grouped(m, n, k, count), False) in ways


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("m", EXPERT_TOKENS)
def test_the_experts_of_the_bench_keep_the_gpu_busy(experts, m):
    """As many blocks as the uneven experts of the bench fill."""
    k, n = EXPERTS[experts]
    config = plan.choose_grouped(m, n, k, experts)
    tiles = sum(-(-int(size) // config.tile_m) for size in expert_sizes(experts, m))
    assert busy(config, tiles * config.tile_m, n, k) >= 0.9


def test_the_kernel_says_why_it_cannot_run():
    codes, fragments, scales = weights(128, 256)
    x = tokens(3, 256)
    for change, message in (
        ({"codes": codes}, "sm90_interpret: takes codes in the order of `w4a8.pack`"),
        ({"act": None}, "sm90_interpret: rounds x to e4m3, act=None"),
        ({"treatment": "table"}, "takes codes packed as 'tc', these are 'sm'"),
        ({"group": 64, "scales": jnp.ones((4, 128))}, "takes groups of 128 rows, group=64"),
        ({"backend": "sm90"}, "sm90: runs on gpu, this is cpu"),
    ):
        call = {"codes": fragments, "scales": scales, "group": 128, "backend": "sm90_interpret"}
        with pytest.raises(
            ValueError, match=message if JAX_VERSION >= INTERPRETER else "jax 0.11|cpu"
        ):
            w4a8.matmul(x, **(call | change))
    table = w4a8.api.BACKENDS
    facts = {
        "codes": fragments,
        "group": 128,
        "act": "e4m3",
        "treatment": "promote",
        "narrow": False,
        "dtype": jnp.dtype(jnp.float32),
    }
    for chip in CHIPS.values():
        chosen = choose(table, platform=chip.platform, capability=chip.capability, **facts)
        assert (unfit(table[0], chip.platform, chip.capability) is None) == (chosen.name == "sm90")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"words": lambda w: w[:1]}, "hold 1 tiles of 64 columns, scales of shape .* need 2"),
        ({"words": lambda w: w[:, :1]}, r"scales must be \[k / group, n\] = \(1, 128\)"),
        ({"words": lambda w: w[..., :64]}, r"must be \[n / 64, k / 128, 8, 128\] int32"),
        ({"words": lambda w: w.astype(jnp.int16)}, "int32, got .* int16"),
        ({"encoding": "gray"}, "encoding='gray'; accepted: 'sm', 'tc'"),
        ({"scales": jnp.ones((2, 300))}, "need 6; were they cut"),
        ({"scales": jnp.full((2, 128), jnp.nan)}, "a NaN or an infinity"),
        ({"scales": jnp.full((2, 128), jnp.inf, jnp.bfloat16)}, "a NaN or an infinity"),
        ({"scales": jnp.full((2, 128), jnp.nan, E4M3)}, "a NaN or an infinity"),
    ],
)
def test_bad_packed_codes_name_themselves(change, message):
    _, fragments, scales = weights(128, 256)
    words = change.get("words", lambda w: w)(fragments.words)
    fragments = w4a8.Fragments(words, change.get("encoding", "sm"))
    with pytest.raises(ValueError, match=message):
        w4a8.matmul(tokens(1, 256), fragments, change.get("scales", scales), group=128)


def test_bad_operands_of_glu_and_grouped_name_themselves():
    codes, fragments, scales = weights(128, 256)
    with pytest.raises(ValueError, match="joined by `w4a8.join`"):
        w4a8.glu(tokens(1, 256), codes, scales)
    with pytest.raises(ValueError, match="joined by `w4a8.join`"):
        w4a8.glu(tokens(1, 256), fragments, scales)
    experts = (codes[None], scales[None])
    for sizes in (jnp.ones((1,)), jnp.ones((2,), jnp.int32)):
        with pytest.raises(ValueError, match=r"group_sizes must be \[e\] = \(1,\) integers"):
            w4a8.grouped(tokens(2, 256), *experts, sizes)
    one = jnp.ones((1,), jnp.int32)
    with pytest.raises(ValueError, match=r"divisors must be \[e\] = \(1,\)"):
        w4a8.grouped(tokens(2, 256), *experts, one, divisors=jnp.ones((2,)))
    with pytest.raises(ValueError, match=r"x must be \[m, k\]"):
        w4a8.grouped(tokens(2, 256)[None], *experts, one)
    with pytest.raises(ValueError, match=r"codes must be \[e, k / 2, n\]"):
        w4a8.grouped(tokens(2, 256), codes, scales, one)
