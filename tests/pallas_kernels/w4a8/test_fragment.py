"""The order of the Hopper fragments, lane by lane: a model of the decoding in numpy.

The in-register decoding is PTX, which no interpreter runs. Here its instructions (rotate, AND, the
byte permutation prmt, the conversion to e4m3) are applied by hand to the words that a lane loads,
and each byte is compared with the code that JAX's own description of the tensor core's operand says
that lane must hold.
"""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import _compat, w4a8
from pallas_kernels.backend import JAX_VERSION
from pallas_kernels.w4a8 import decode, packed

fragmented_array = pytest.importorskip("jax.experimental.mosaic.gpu.fragmented_array")

LOWEST = {"sm": -7, "tc": -8}


def held_by_lane(layout, shape, count=4):
    """Flat index of the element in (warp, lane, register, byte) of a tiled layout."""
    index = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, tail = index.shape[: -len(tile)], index.shape[-len(tile) :]
        pairs = [side for a, b in zip(tail, tile, strict=True) for side in (a // b, b)]
        index = index.reshape(*lead, *pairs)
        n, d = len(lead), len(tile)
        index = index.transpose(*range(n), *range(n, n + 2 * d, 2), *range(n + 1, n + 2 * d, 2))
    # Ranks count from the end; a dimension that is replicated holds nothing of its own.
    warp = [axis + index.ndim for axis in layout.warp_dims if isinstance(axis, int)]
    lane = [axis + index.ndim for axis in layout.lane_dims if isinstance(axis, int)]
    vector = layout.vector_dim + index.ndim
    rest = [axis for axis in range(index.ndim) if axis not in (*warp, *lane, vector)]
    return index.transpose(*warp, *lane, *rest, vector).reshape(4, 32, -1, count)


def prmt(a, b, selector):
    """PTX prmt: four bytes of the eight in (a, b), picked by the low three bits of each nibble."""
    eight = [(word >> (8 * i)) & 0xFF for word in (a, b) for i in range(4)]
    picks = [eight[(selector >> (4 * i)) & 7] for i in range(4)]
    assert not any((selector >> (4 * i)) & 8 for i in range(4))  # would copy signs instead
    return sum(byte << (8 * i) for i, byte in enumerate(picks))


def sign_magnitude(word):
    """`decode.sign_magnitude`."""
    turned = (word >> 4 | word << 28) & 0xFFFFFFFF
    return word & 0x87878787, turned & 0x87878787


def twos_complement(word, tables):
    """`decode.twos_complement`; a prmt reads 16 bits of its selector."""
    sign, index, found = (word & 0x88888888) >> 1, word & 0x77777777, []
    for half in range(2):
        low, high, negative_low, negative_high = tables[half]
        part = (index >> (16 * half)) & 0xFFFF
        pattern = ((sign >> (16 * half)) | 0x32103210) & 0xFFFF
        found.append(prmt(prmt(low, high, part), prmt(negative_low, negative_high, part), pattern))
    return found


def products(scale):
    """`decode.products`: bytes of e4m3(scale * q) for q = 0..7, -8..-1, as four words."""
    q = np.array([*range(8), *range(-8, 0)], np.float32)
    values = np.clip(np.float32(scale) * q, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return [int(word) for word in values.view(np.uint32)]


def decoded(words, both):
    """[4, 32, 16, 4] e4m3 as float32: what each lane's registers hold after decoding a tile."""
    words = np.asarray(words).reshape(2, 128, 4).view(np.uint32)
    registers = [
        [r for half in range(2) for word in words[half, thread] for r in both(int(word), thread)]
        for thread in range(128)
    ]
    held = np.array(registers, np.uint32).view(ml_dtypes.float8_e4m3fn)
    return held.astype(np.float32).reshape(4, 32, 16, 4)


def half_sign_magnitude(word):
    """`decode.half_sign_magnitude`."""
    found = []
    for pick in (0x4140, 0x4342):
        for four in sign_magnitude(word):
            pair = prmt(four, 0, pick)
            found.append((pair & 0x00070007) << 7 | (pair & 0x00800080) << 8)
    return found


def half_twos_complement(word):
    """`decode.half_twos_complement`, its subtraction on both float16 of a register."""
    code = []
    for j in range(4):
        biased = (word >> 4 * j & 0x000F000F) ^ 0x00080008 | 0x64006400
        pair = np.array([biased], np.uint32).view(np.float16) - np.float16(1032)
        code.append(int(pair.view(np.uint32)[0]))
    return [
        prmt(code[first], code[first + 1], pick) for first in (0, 2) for pick in (0x5410, 0x7632)
    ]


def tile_of(q, encoding):
    """The words of a [64, 128] tile of w.T and, per lane, the codes it must hold."""
    codes = w4a8.pack_nibbles(jnp.asarray(q.T))
    words = w4a8.pack(codes, encoding).words[0, 0]
    return words, q.reshape(-1)[held_by_lane(fragmented_array.WGMMA_LAYOUT_8BIT, (64, 128))]


@pytest.fixture(params=["sm", "tc"])
def encoding(request):
    return request.param


@pytest.fixture
def q(encoding):
    return np.random.default_rng(0).integers(LOWEST[encoding], 8, (64, 128)).astype(np.int8)


def test_each_lane_decodes_its_own_codes(q, encoding):
    words, expected = tile_of(q, encoding)
    plain = [*decode.POSITIVE, *decode.NEGATIVE]

    def both(word, thread):
        return sign_magnitude(word) if encoding == "sm" else twos_complement(word, (plain, plain))

    unit = decode.SUBNORMAL if encoding == "sm" else 1
    np.testing.assert_array_equal(decoded(words, both) * unit, expected)


def test_the_table_gives_rounded_products_of_each_column(encoding, q):
    if encoding == "sm":
        with pytest.raises(ValueError, match="encoding='sm'; use 'tc'"):
            decode.table(encoding)
        return
    words, _ = tile_of(q, encoding)
    scales = np.random.default_rng(1).uniform(2.0**-9, 80, 64).astype(np.float32)  # 80 saturates
    # A thread's two columns, by JAX's layout of one value per column.
    index = np.arange(64).reshape(4, 2, 8)

    def both(word, thread):
        columns = index[thread // 32, :, thread % 32 // 4]
        return twos_complement(word, [products(scales[column]) for column in columns])

    w = (q.astype(np.float32) * scales[:, None]).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    held = held_by_lane(fragmented_array.WGMMA_LAYOUT_8BIT, (64, 128))
    expected = w.astype(np.float32).reshape(-1)[held]
    np.testing.assert_array_equal(decoded(words, both), expected)


@pytest.mark.skipif(JAX_VERSION < (0, 11, 2), reason="jax has no mma before 0.11.2")
def test_each_lane_of_ampere_decodes_its_own_codes(q, encoding):
    words, _ = tile_of(q, encoding)
    four = half_sign_magnitude if encoding == "sm" else half_twos_complement
    words = np.asarray(words).reshape(2, 128, 4).view(np.uint32)
    registers = [
        [r for part in range(2) for word in words[part, thread] for r in four(int(word))]
        for thread in range(128)
    ]
    held = np.array(registers, np.uint32).view(np.float16).astype(np.float32)
    layout = _compat.mma_layouts(jnp.float16)[0].to_mgpu()
    # The product's k runs over the reordered tokens: lane by lane, what `half_order` put there.
    order = np.asarray(decode.half_order(jnp.arange(128)[None]))[0]
    expected = q[:, order].reshape(-1)[held_by_lane(layout, (64, 128), 2)]
    unit = decode.HALF_SUBNORMAL if encoding == "sm" else 1
    np.testing.assert_array_equal(held.reshape(4, 32, 32, 2) * unit, expected)


@pytest.mark.skipif(JAX_VERSION < (0, 11, 2), reason="jax has no mma before 0.11.2")
def test_ada_holds_its_operand_as_hopper_does():
    ada = _compat.mma_layouts(jnp.float8_e4m3fn)[0].to_mgpu()
    hopper = held_by_lane(fragmented_array.WGMMA_LAYOUT_8BIT, (64, 128))
    np.testing.assert_array_equal(held_by_lane(ada, (64, 128)), hopper)


def test_constants_are_the_sixteen_values():
    table = np.array([*decode.POSITIVE, *decode.NEGATIVE], np.uint32)
    values = table.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(values, [*range(8), *range(-8, 0)])


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2), st.integers(1, 130), st.sampled_from(["sm", "tc"]), st.integers(0, 9))
def test_packing_round_trips(tiles, columns, encoding, seed):
    q = np.random.default_rng(seed).integers(LOWEST[encoding], 8, (128 * tiles, columns))
    codes = w4a8.pack_nibbles(jnp.asarray(q, jnp.int8))
    fragments = w4a8.pack(codes, encoding)
    assert fragments.words.shape == (-(-columns // 128) * 2, tiles, 8, 128)
    np.testing.assert_array_equal(w4a8.unpack(fragments, columns), codes)


def test_stacks_are_packed_one_by_one():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 5)), jnp.uint8)
    fragments = w4a8.pack(codes, "tc")
    assert fragments.words.shape == (2, 3, 2, 1, 8, 128) and fragments.rows == 128
    np.testing.assert_array_equal(w4a8.unpack(fragments, 5), codes)
    np.testing.assert_array_equal(fragments.words[1, 2], w4a8.pack(codes[1, 2], "tc").words)


def test_joined_matrices_come_apart_again():
    random = np.random.default_rng(0)
    gate, up = (
        w4a8.pack(jnp.asarray(random.integers(0, 256, (64, 130)), jnp.uint8), "tc")
        for _ in range(2)
    )
    scales = [jnp.asarray(random.uniform(1, 2, (1, 130)), jnp.bfloat16) for _ in range(2)]
    codes, joined = w4a8.join(gate, up, *scales)
    assert codes.words.shape == (8, 1, 8, 128) and joined.shape == (1, 512)
    np.testing.assert_array_equal(codes.words[1], up.words[0])
    parts = packed.split(codes, joined)
    np.testing.assert_array_equal(parts[0].words, gate.words)
    np.testing.assert_array_equal(parts[3][:, :130], scales[1])
    assert (parts[2][:, 130:] == 0).all()


@pytest.mark.parametrize(
    ("codes", "encoding", "message"),
    [
        (jnp.zeros((64, 4), jnp.uint8), "gray", "encoding='gray'; accepted: 'sm', 'tc'"),
        (jnp.zeros((64, 4), jnp.int8), "sm", "uint8"),
        (jnp.zeros((64,), jnp.uint8), "sm", "uint8"),
        (jnp.zeros((48, 4), jnp.uint8), "sm", "k must be a multiple of 128"),
        (jnp.zeros((0, 4), jnp.uint8), "sm", "k=0"),
        (jnp.zeros((64, 0), jnp.uint8), "sm", "n=0"),
        (jnp.full((64, 4), 8, jnp.uint8), "sm", "hold a -8"),
        (jnp.full((64, 4), 0x80, jnp.uint8), "sm", "hold a -8"),
    ],
)
def test_what_cannot_be_packed(codes, encoding, message):
    with pytest.raises(ValueError, match=message):
        w4a8.pack(codes, encoding)


def test_what_cannot_be_joined():
    one = w4a8.pack(jnp.zeros((64, 4), jnp.uint8))
    scales = jnp.ones((1, 4))
    with pytest.raises(ValueError, match="one shape and encoding"):
        w4a8.join(one, w4a8.pack(jnp.zeros((64, 4), jnp.uint8), "tc"), scales, scales)
    with pytest.raises(ValueError, match="gate_scales and up_scales differ"):
        w4a8.join(one, one, scales, scales.astype(jnp.bfloat16))
