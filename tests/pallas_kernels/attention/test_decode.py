"""Decode attention: against plain float64, paged and contiguous, in the interpreter, lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ffnlab.testing import counted
from ffnlab.weights import kv as formats
from pallas_kernels.aot import lower_for
from pallas_kernels.attention import decode
from pallas_kernels.attention.api_decode import seen, shares
from pallas_kernels.attention.cases import make_decode
from pallas_kernels.backend import INTERPRETER, JAX_VERSION
from pallas_kernels.numerics import E4M3

interpreted = pytest.mark.skipif(
    JAX_VERSION < INTERPRETER, reason=f"jax {jax.__version__} has no interpreter for GPU kernels"
)
KINDS = ("float", "int8", "uint8")


def operands(kind, lengths, *, s, heads=4, kv=2, d=8, dtype=jnp.float32, seed=0):
    """q, a contiguous cache with NaN behind each sequence, its scales, and what it stands for."""
    keys, b = jax.random.split(jax.random.key(seed), 3), len(lengths)
    q = jax.random.normal(keys[0], (b, heads, d), dtype)
    k, v = (jax.random.normal(x, (b, s, kv, d), dtype) for x in keys[1:])
    behind = jnp.arange(s)[:, None] >= jnp.asarray(lengths)[:, None, None]
    if kind == "float":
        cache = tuple(jnp.where(behind[..., None], jnp.nan, x) for x in (k, v))
        return q, cache, {}, (k, v)
    coded = [formats.quantize_int4(x) for x in (k, v)]
    scales = [jnp.where(behind, jnp.nan, x.astype(jnp.float32)) for _, x in coded]
    codes = tuple(formats.pack(x) if kind == "uint8" else x for x, _ in coded)
    exact = tuple(formats.fake("int4", x.astype(jnp.float32)) for x in (k, v))
    k_scale, v_scale = (x.transpose(0, 2, 1) for x in scales)
    return q, codes, {"k_scale": k_scale, "v_scale": v_scale}, exact


def plain(q, exact, lengths, window=None):
    """One sequence and head after the other, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, *exact))
    y = np.zeros_like(q)
    for i, length in enumerate(lengths):
        first = 0 if window is None else max(0, length - window)
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[2])
            s = k[i, first:length, g] @ q[i, h] * q.shape[-1] ** -0.5
            p = np.exp(s - s.max())
            y[i, h] = p @ v[i, first:length, g] / p.sum()
    return y


def paged(cache, scales, page, seed=0):
    """A contiguous cache as shuffled pages with one to spare, and the table."""
    b, s = cache[0].shape[:2]
    order = np.random.default_rng(seed).permutation(b * (s // page) + 1)
    where = np.argsort(order)  # the page that is the i-th of the pool

    def spread(x):
        flat = x.reshape(-1, page, *x.shape[2:])
        return jnp.concatenate([flat, flat[:1]])[where]

    table = jnp.asarray(order[:-1].reshape(b, -1), jnp.int32)
    rows = {name: spread(x.transpose(0, 2, 1)).transpose(0, 2, 1) for name, x in scales.items()}
    return [spread(x) for x in cache], rows, table


@pytest.mark.parametrize("backend", ["xla", "reference"])
@pytest.mark.parametrize("window", [None, 1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_plain_attention(kind, window, backend):
    lengths = (24, 1, 13)
    q, cache, scales, exact = operands(kind, lengths, s=24)
    options = {"window": window, "backend": backend}
    y = decode(q, *cache, jnp.asarray(lengths, jnp.int32), **scales, **options)
    wanted = plain(q, exact, lengths, window)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
    cache, scales, pages = paged(cache, scales, 8)
    y = decode(q, *cache, jnp.asarray(lengths, jnp.int32), pages=pages, **scales, **options)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    ("kind", "lengths", "window", "splits", "page"),
    [
        ("float", (150,), None, 2, None),
        ("uint8", (70, 3), 70, 2, 64),
        ("uint8", (450, 64), None, 1, None),  # a slot is filled again; one group without a tile
    ],
)
def test_hopper_body_equals_plain_attention(kind, lengths, window, splits, page):
    """Memory that nobody wrote is NaN in the interpreter."""
    shapes = {
        "s": -(-max(lengths) // 64) * 64 if page is None else 128,
        "kv": len(lengths),
        "d": 64,
    }
    q, cache, scales, exact = operands(kind, lengths, **shapes, dtype=jnp.bfloat16)
    scales = {name: x.astype(E4M3) for name, x in scales.items()}  # they are e4m3's numbers
    pages = None
    if page is not None:
        cache, scales, pages = paged(cache, scales, page)
    run = functools.partial(decode, q, *cache, jnp.asarray(lengths, jnp.int32), **scales)
    options = {"pages": pages, "window": window, "splits": splits, "backend": "sm90_interpret"}
    y = run(**options, out_dtype=jnp.float32)
    wanted = plain(q, exact, lengths, window)
    # Weights times the values' scale have the 8 significant bits of bfloat16.
    assert np.abs(np.asarray(y, np.float64) - wanted).max() < 2.0**-8 * np.abs(wanted).max()
    if page is None:
        np.testing.assert_array_equal(y, run(**options, out_dtype=jnp.float32))


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("length", [1, 64, 65, 200, 1000])
def test_groups_share_a_block_and_mask_what_holds_unseen_keys(length, window):
    from pallas_kernels.attention import decode_sm90

    splits, tile = 3, decode_sm90.TILE
    call = decode_sm90.Call(
        1024, 64, 8, window, splits, 4, True, 1.0, jnp.dtype(jnp.bfloat16), True
    )
    first, found = 0 if window is None else max(0, length - window), []
    for split in range(splits):
        begin, count = map(int, call.share(jnp.int32(length), split))
        for wg in range(decode_sm90.GROUPS):
            turns, whole = call.turns(jnp.int32(length), begin, count, wg)
            tiles = [begin + i * decode_sm90.GROUPS + wg for i in range(int(turns))]
            bare = tiles[: 0 if whole is None else int(whole)]
            assert all(first <= i * tile and (i + 1) * tile <= length for i in bare)
            assert window is not None or len(bare) == sum((i + 1) * tile <= length for i in tiles)
            found += tiles
    assert sorted(found) == list(range(first // tile, -(-length // tile)))


@pytest.mark.parametrize("keys", [4096, 32768])
@pytest.mark.parametrize("sequences", [1, 4, 16, 33, 64])
def test_a_gpu_is_filled_by_one_block_per_multiprocessor(sequences, keys):
    blocks, tiles, cores = 8 * sequences, keys // 64, 132
    split = shares(blocks, tiles, cores)
    load = np.zeros(cores)
    for piece in range(blocks * split):  # the next free multiprocessor takes the next block
        first = piece % split * -(-tiles // split)
        load[load.argmin()] += max(0, min(-(-tiles // split), tiles - first))
    assert load.sum() == blocks * tiles
    assert load.mean() / load.max() >= 0.9


def test_a_window_leaves_its_own_tiles():
    assert [seen(300, w) for w in (None, 1, 64, 65, 1000)] == [5, 2, 2, 3, 5]


def kernels(chip, function, arguments):
    """Mosaic kernels in the module lowered for a chip."""
    return lower_for(function, arguments, chip).count("stablehlo.custom_call @mosaic_gpu")


@pytest.mark.parametrize("kind", ["int4", "bfloat16"])
def test_hopper_runs_one_kernel(kind):
    case = make_decode(kind, 128)
    if JAX_VERSION < (0, 11):
        with pytest.raises(ValueError, match="sm90: needs jax 0.11"):
            kernels("h200", *case)
    else:
        assert kernels("h200", *case) == 1


def test_chosen_on_hopper_only():
    shape = jax.ShapeDtypeStruct
    cache = shape((2, 512, 1, 64), jnp.bfloat16)
    args = shape((2, 4, 64), jnp.bfloat16), cache, cache, shape((2,), jnp.int32)
    assert kernels("h200", decode, args) == int(JAX_VERSION >= (0, 11))
    assert kernels("a100", decode, args) == 0


def bad(**change):
    """Calls decode with one operand replaced."""
    one = jnp.ones((2, 5, 1, 8))
    operands = {"q": one[:, 0], "k": one, "v": one, "lengths": jnp.ones(2, jnp.int32)}
    return decode(**operands | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 8))}, r"q must be \[b, heads, d\]"),
        ({"k": jnp.ones((2, 5, 8))}, r"k must be \[b, s, kv, 8\]"),
        ({"v": jnp.ones((2, 6, 1, 8))}, "k and v alike"),
        ({"k": jnp.ones((2, 5, 1, 8), jnp.uint8)}, r"k must be \[b, s, kv, 4\]"),
        ({"k": jnp.ones((2, 5, 1, 8), jnp.int8)}, "k holds codes: pass k_scale"),
        ({"v_scale": jnp.ones((2, 5))}, r"v_scale must be \(2, 1, 5\)"),
        ({"k_scale": jnp.ones((2, 1, 5), jnp.float16)}, "k_scale must be .* got .* float16"),
        ({"v": jnp.ones((2, 5, 1, 3), jnp.uint8)}, r"v must be \[b, s, kv, 4\]"),
        ({"q": jnp.ones((2, 1, 8), jnp.int8)}, "q must be .* got .* int8"),
        ({"lengths": jnp.ones(3, jnp.int32)}, r"lengths must be \[2\] int32"),
        ({"scale": jnp.inf}, "scale=inf; it takes a finite number"),
        ({"q": jnp.ones((3, 1, 8)), "lengths": jnp.ones(3, jnp.int32)}, "does not fit k"),
        ({"lengths": jnp.ones(2)}, r"lengths must be \[2\] int32"),
        ({"pages": jnp.ones((1, 3), jnp.int32)}, r"pages must be \[2, n\] int32"),
        ({"window": 0}, "window=0"),
        ({"splits": 0}, "splits=0"),
        ({"backend": "sm90"}, "sm90: runs on gpu, this is cpu"),
        ({"backend": "cuda"}, "'sm90', 'xla', 'reference'"),
    ],
)
def test_bad_operands_name_themselves(change, message):
    with pytest.raises(ValueError, match=message):
        bad(**change)


@pytest.mark.skipif(JAX_VERSION < INTERPRETER, reason="refused for the jax version first")
def test_refusals_say_why():
    with pytest.raises(ValueError, match="sm90_interpret: takes bfloat16 or float16 queries"):
        bad(backend="sm90_interpret")
    half = jnp.ones((2, 5, 1, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match="pages of a multiple of 64 keys.*got 64, 5 and 1"):
        bad(q=half[:, 0], k=half, v=half, backend="sm90_interpret")


@pytest.mark.parametrize("kind", ["float", "uint8"])
@pytest.mark.parametrize("window", [None, 5])
def test_gradients_by_finite_differences(kind, window):
    """Along random directions; NaN behind the last key reaches no gradient."""
    lengths = jnp.array([7, 3], jnp.int32)
    q, cache, scales, _ = operands(kind, (7, 3), s=8, d=4)
    cache, scales, pages = paged(cache, scales, 4)
    floats = [q, *(scales.values() if scales else cache)]
    weight = jax.random.normal(jax.random.key(1), q.shape)

    @jax.jit
    def loss(q, a, b):
        moved = {**scales, **dict(zip(scales, (a, b), strict=False))}
        k, v = cache if scales else (a, b)
        y = decode(q, k, v, lengths, **moved, pages=pages, window=window)
        return (y * weight).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(*floats)
    for i, (x, gradient) in enumerate(zip(floats, gradients, strict=True)):
        assert not np.isnan(gradient).any()
        step = 3e-3 * jax.random.normal(jax.random.key(i), x.shape)
        ends = [loss(*floats[:i], x + sign * step, *floats[i + 1 :]) for sign in (1, -1)]
        # Third derivatives times the step's cube, and rounding of float32.
        np.testing.assert_allclose(ends[0] - ends[1], 2 * (gradient * step).sum(), atol=1e-4)
        where = np.isnan(x)
        assert (np.asarray(gradient)[where] == 0).all()


def test_gradients_of_each_backend_are_those_of_the_reference():
    lengths = jnp.array([6], jnp.int32)
    q, cache, _, _ = operands("float", (6,), s=8, d=4)

    def gradients(backend, dtype=jnp.float32):
        run = functools.partial(decode, lengths=lengths, backend=backend, out_dtype=dtype)
        return jax.grad(lambda q, k, v: run(q, k, v).sum(), (0, 1, 2))(q, *cache)

    for found, wanted in zip(gradients("xla"), gradients("reference"), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_codes_lengths_and_pages_have_no_gradient():
    q, cache, scales, _ = operands("uint8", (6,), s=8, d=4)
    ints = *cache, jnp.array([6], jnp.int32)
    pull = jax.vjp(lambda *x: decode(q, *x, **scales), *ints)[1]
    assert all(x.dtype == jax.dtypes.float0 for x in pull(jnp.ones_like(q)))


def test_works_under_vmap_and_compiles_once():
    q, cache, _, exact = operands("float", (6, 3), s=8, d=4)
    lengths = jnp.array([6, 3], jnp.int32)
    run = jax.jit(jax.vmap(lambda q, k, v, n: decode(q[None], k[None], v[None], n[None])[0]))
    np.testing.assert_allclose(
        run(q, *cache, lengths), plain(q, exact, (6, 3)), rtol=1e-5, atol=1e-5
    )
    other = 2 * q, lengths - 1
    with counted() as count:
        run(other[0], *cache, other[1])
    assert count.programs == 0
