"""How the INT4 x FP8 kernels are cut into tiles, chosen, and refuse what they cannot do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import w4a8
from pallas_kernels.aot import CHIPS
from pallas_kernels.backend import INTERPRETER, JAX_VERSION, choose, unfit
from pallas_kernels.numerics import E4M3
from pallas_kernels.tiles import Padding
from pallas_kernels.w4a8 import plan
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
    assert n % (config.columns * config.groups) == 0
    assert k // 128 % (config.k_tiles * config.split_k) == 0
    assert config.split_k == 1 or m <= 64
    fields = dataclasses.asdict(config)
    assert fields["tile_m"] in (8, 16, 32, 64, 128) and fields["columns"] == (128 if glu else 64)


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
