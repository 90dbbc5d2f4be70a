"""The INT4 x FP8 products on Hopper, from one tile to persistent blocks, and the grouped ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import grouped as groups
from pallas_kernels import w4a8
from pallas_kernels.first.machine import differing, error
from pallas_kernels.numerics import E4M3, quantize_tokens
from pallas_kernels.w4a8 import calls, plan

ENCODINGS = (("tc", "promote"), ("sm", "promote"), ("tc", "table"))
REPEATS = 200


def packed(random, k, n, encoding, experts=()):
    """INT4 codes [*experts, k, n], -7..7 for "sm", and the same packed."""
    q = random.integers(-7 if encoding == "sm" else -8, 8, (*experts, k, n))
    pack = jax.vmap(w4a8.pack_nibbles) if experts else w4a8.pack_nibbles
    return q, w4a8.pack(pack(jnp.asarray(q, jnp.int8)), encoding)


def product(here, x8, sx, codes, scales, treatment="promote", out=jnp.float32, **config):
    """x8 [m, k] e4m3 times codes, by the kernel of Hopper."""
    run = functools.partial(
        calls.matmul,
        kernel="sm90",
        treatment=treatment,
        out_dtype=out,
        config=plan.Config(**config),
        interpret=here.interpret,
    )
    return jax.jit(run)(x8, sx, codes, scales, jnp.float32(1))


def report(here, what, y, wanted, **facts):
    """Shows how many numbers are wrong, and the first of them with its place."""
    y, wanted = np.asarray(y), np.asarray(wanted, np.float64)
    places = np.argwhere(~(y.astype(np.float64) == wanted))  # NaN is wrong
    first = None
    if len(places):
        at = tuple(map(int, places[0]))
        first = {"at": at, "got": repr(float(y[at])), "wanted": float(wanted[at])}
    here.show(what, wrong=len(places), of=wanted.size, first=first, **facts)


def words(here):
    """One tile times unit vectors: every decoded weight, by row of k and column."""
    random = np.random.default_rng(0)
    unit = jnp.eye(128, dtype=jnp.float32).astype(E4M3)
    for encoding, treatment in ENCODINGS:
        q, codes = packed(random, 128, 128, encoding)
        scales = jnp.ones((1, 128), jnp.float32)
        y = product(here, unit, jnp.ones((128, 1)), codes, scales, treatment, tile_m=8)
        number = repr(float(np.asarray(y)[0, 0]))
        report(here, f"{encoding}, {treatment}", y, q, number=number, wanted_number=int(q[0, 0]))


def integers(here):
    """Sums that float32 and the tensor core's FP8 accumulation hold exactly."""
    random, k = np.random.default_rng(1), here.size(4096, 512)
    x = random.integers(-2, 3, (16, k))
    x8, ones = jnp.asarray(x, jnp.float32).astype(E4M3), jnp.ones((16, 1))
    for encoding, treatment in ENCODINGS:
        q, codes = packed(random, k, here.size(4096, 128), encoding)
        scales = jnp.ones((k // 128, q.shape[1]), jnp.float32)
        for tile_m in here.size((8, 16, 64), (8,)):
            y = product(here, x8, ones, codes, scales, treatment, tile_m=tile_m)
            report(here, f"{encoding}, {treatment}, tiles of {tile_m}", y, x @ q)


def encodings(here):
    """Both encodings of the same weights: all e4m3 numbers but NaN, subnormal ones too.

    "sm" decodes to subnormal numbers of e4m3, which a tensor core may not keep through its sums.
    """
    random, k = np.random.default_rng(2), here.size(1024, 256)
    q = random.integers(-7, 8, (k, 128))
    bits = random.integers(0, 256, (16, k)).astype(np.uint8)
    bits[bits & 0x7F == 0x7F] = 1  # the smallest number in place of NaN
    x8 = jax.lax.bitcast_convert_type(jnp.asarray(bits), E4M3)
    operands = x8, jnp.ones((16, 1)), jnp.ones((k // 128, 128), jnp.float32)
    for what, tokens in (("all numbers", x8), ("subnormal numbers", small(bits))):
        y = [
            product(
                here,
                tokens,
                operands[1],
                w4a8.pack(w4a8.pack_nibbles(jnp.asarray(q, jnp.int8)), encoding),
                operands[2],
                tile_m=16,
            )
            for encoding in ("tc", "sm")
        ]
        here.show(what, bits_differ=differing(*y), error=error(y[1], y[0]))


def small(bits):
    """The subnormal e4m3 numbers of these bits."""
    return jax.lax.bitcast_convert_type(jnp.asarray(bits & 0x87), E4M3)


def ways(here):
    """Ways to cut that give a persistent block several pieces, and their operands."""
    random, k, n = np.random.default_rng(3), here.size(4096, 512), here.size(2048, 256)
    q, codes = packed(random, k, n, "sm")
    scales = jnp.asarray(random.uniform(0.004, 0.05, (k // 128, n)), jnp.float32)
    w = q * np.repeat(np.asarray(scales, np.float64), 128, axis=0)
    x = jnp.asarray(random.normal(size=(here.size(150, 20), k)), jnp.bfloat16)
    cores = here.size(16, 2)
    found = {
        "16 bits": (jnp.bfloat16, {"tile_m": 16}),
        "16 bits, wide": (jnp.bfloat16, {"tile_m": 16, "columns": 128, "k_tiles": 2}),
        "even pieces of k": (jnp.float32, {"tile_m": 16, "split_k": 2, "k_tiles": 2}),
        "uneven pieces of k": (jnp.float32, {"tile_m": 16, "split_k": 3}),
    }
    made = {}
    for name, (out, config) in found.items():
        made[name] = functools.partial(
            calls.matmul, kernel="sm90", treatment="promote", out_dtype=out,
            config=plan.Config(**config, cores=cores), interpret=here.interpret,
        )  # fmt: skip
    return made, (*quantize_tokens(x), codes, scales, jnp.float32(1)), w


def pieces(here):
    """Persistent blocks with several pieces, split, with an epilogue, and over experts."""
    made, operands, w = ways(here)
    x = np.asarray(operands[0]).astype(np.float64) * np.asarray(operands[1], np.float64)
    for name, run in made.items():
        here.show(name, error=error(jax.jit(run)(*operands), x @ w))
    residual = jnp.ones((len(x), w.shape[1]), jnp.bfloat16)
    options = {"out_dtype": jnp.bfloat16, "residual": residual, "with_sumsq": True}
    config = plan.Config(tile_m=64, cores=here.size(16, 2))
    options |= {"kernel": "sm90", "treatment": "promote", "interpret": here.interpret}
    follow = functools.partial(calls.followed, **options, config=config)
    y, squares = jax.jit(follow)(*operands)
    here.show("residual", error=error(y, x @ w + 1))
    here.show("sums of squares", error=error(squares, np.square(x @ w + 1).sum(-1)))
    experts(here)


def experts(here):
    """Tokens by expert, one of them without any."""
    random, k, n = np.random.default_rng(4), here.size(2048, 128), here.size(1408, 128)
    q, codes = packed(random, k, n, "sm", (3,))
    scales = jnp.ones((3, k // 128, n), jnp.float32)
    sizes, m = jnp.array([20, 0, 5], jnp.int32), 27
    x8, sx = quantize_tokens(jnp.asarray(random.normal(size=(m, k)), jnp.bfloat16))
    run = functools.partial(
        calls.grouped, kernel="sm90", treatment="promote", out_dtype=jnp.bfloat16,
        config=plan.Config(tile_m=8, cores=here.size(16, 2)), interpret=here.interpret,
    )  # fmt: skip
    y = jax.jit(run)(x8, sx, codes, scales, jnp.ones(3), sizes)
    x = np.asarray(x8).astype(np.float64) * np.asarray(sx, np.float64)
    wanted = np.concatenate([x[:20] @ q[0], x[20:25] @ q[2], np.zeros((2, n))])
    here.show("experts, one empty", error=error(y, wanted))


def repeats(here):
    """The same product many times: bits that differ from the first time's.

    They would where a register operand is overwritten while its product is under way, or a slot is
    read while it is filled again.
    """
    made, operands, _ = ways(here)
    for name, run in made.items():
        run, count = jax.jit(run), here.size(REPEATS, 2)
        first = np.asarray(run(*operands))
        bits = [differing(first, run(*operands)) for _ in range(count)]
        here.show(name, repeats=count, runs_that_differ=sum(b > 0 for b in bits), bits=sum(bits))


def neighbours(here):
    """Pairs of blocks that load their tokens once for both, many times."""
    _, operands, w = ways(here)
    config = plan.Config(tile_m=16, stages=3, cluster=2, cores=here.size(16, 2))
    options = {"kernel": "sm90", "treatment": "promote", "interpret": here.interpret}
    run = functools.partial(calls.matmul, **options, out_dtype=jnp.bfloat16, config=config)
    run, x = jax.jit(run), np.asarray(operands[0]).astype(np.float64)
    first = np.asarray(run(*operands))
    here.show("shared tokens", error=error(first, x * np.asarray(operands[1], np.float64) @ w))
    bits = [differing(first, run(*operands)) for _ in range(here.size(REPEATS, 2))]
    here.show("repeats", runs_that_differ=sum(b > 0 for b in bits), bits=sum(bits))


def grouped(here):
    """The products of bfloat16 experts."""
    random, k, n = np.random.default_rng(5), here.size(2048, 128), here.size(1408, 128)
    w = jnp.asarray(random.normal(size=(3, k, n)), jnp.bfloat16)
    x, sizes = jnp.asarray(random.normal(size=(173, k)), jnp.bfloat16), jnp.array([0, 150, 20])
    run = functools.partial(groups.matmul, backend=here.backend("sm90"))
    y = jax.jit(run)(x, w, sizes.astype(jnp.int32))
    wanted = groups.matmul(x, w, sizes.astype(jnp.int32), backend="reference")
    here.show("bfloat16, one expert empty", error=error(y, wanted))
