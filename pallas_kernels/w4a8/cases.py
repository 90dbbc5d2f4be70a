"""What `python -m pallas_kernels.aot` compiles of this kernel."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.aot.cases import Case, named
from pallas_kernels.backend import lazy
from pallas_kernels.bench.rows import EXPERT_TOKENS, EXPERTS, LAYERS, TOKENS
from pallas_kernels.numerics import E4M3
from pallas_kernels.w4a8 import api, api_glu, backends, plan
from pallas_kernels.w4a8.packed import Fragments

KERNEL = "pallas_kernels.w4a8.{}"
# Sums of one product are scaled while the next one is under way.
ALL_BUT_ONE = (
    r"WARPGROUP\.DEPBAR\.LE gsb0, 0x1[^\n]*\n(?:(?![^\n]*DEPBAR)[^\n]*\n)*[^\n]*(?:FFMA|FADD)"
)
TABLE = backends.table("matmul", print, print)  # glu and grouped have the same kernels


def product(
    kernel,
    m,
    n,
    k,
    config,
    *,
    encoding="sm",
    treatment="promote",
    glu=False,
    scales=jnp.float32,
    experts=1,
):
    """A kernel's `multiply` and its padded operands, as `Case.make` gives them."""
    call = functools.partial(
        lazy(KERNEL.format(kernel), "multiply"),
        config=config,
        encoding=encoding,
        glu=glu,
        treatment=treatment,
        out=jnp.float32 if config.split_k > 1 else jnp.bfloat16,
    )
    array = jax.ShapeDtypeStruct
    return call, (
        array((m, k), E4M3),
        array((1 + glu, m), jnp.float32),
        array((experts, n // 64, k // 128, 8, 128), jnp.int32),
        array((experts, k // 128, n), scales),
        array((m // config.tile_m,), jnp.int32),
    )


def follow(m, n, k, config, with_sumsq):
    """The Hopper kernel that adds a residual, may sum squares, and its padded operands."""
    plain, operands = product("sm90", m, n, k, config)
    call = functools.partial(
        lazy(KERNEL.format("sm90"), "multiply_and_follow"), with_sumsq=with_sumsq, **plain.keywords
    )
    residual = jax.ShapeDtypeStruct((m, n), jnp.bfloat16)
    return lambda residual, *rest: call(*rest, residual=residual), (residual, *operands)


def following(name, m, with_sumsq):
    """A case of `follow`, unsplit as it must be."""
    config = dataclasses.replace(plan.choose(m, 4096, 4096), split_k=1)
    make = functools.partial(follow, m, 4096, 4096, config, with_sumsq)
    expect, entries = ("QGMMA", "LDS.128"), named(TABLE, "sm90")
    name, h200 = f"w4a8 matmul, {m} tokens, {name}", ("h200",)
    # Of the last pass, once a block: 36 bytes by jax 0.10, of two blocks that share copies.
    spill = 36 if config.cluster > 1 else 0
    return Case(name, make, h200, expect, max_spill=spill, backends=entries)


def case(name, m, n, k, **options):
    """A case of the Hopper kernel with the configuration that `plan` chooses."""
    config = options.pop("config", None) or plan.choose(m, n, k, glu=options.get("glu", False))
    make = functools.partial(product, "sm90", m, n, k, config, **options)
    return Case(
        f"w4a8 {name}",
        make,
        ("h200",),
        expect=("QGMMA", "LDS.128", *(("MULTICAST",) if config.cluster > 1 else ())),
        patterns=(ALL_BUT_ONE,) if config.tile_m <= 64 else (),
        max_spill=0,
        backends=named(TABLE, "sm90"),
    )


def layers():
    """What `plan` chooses for every product of the bench's layers, once per way to cut."""
    found = {}
    for name, (width, hidden) in LAYERS.items():
        for m in TOKENS:
            for op, n, k in (("glu", 2 * hidden, width), ("down", width, hidden)):
                config = plan.choose(m, n, k, glu=op == "glu")
                uneven = k // 128 // config.k_tiles % config.split_k > 0
                padded = -(-m // config.tile_m) * config.tile_m
                made = functools.partial(case, f"{op} of {name}, {m} tokens", padded, n, k)
                options = {"config": config, "glu": op == "glu" and config.split_k == 1}
                found.setdefault((op, config, uneven), made(scales=jnp.bfloat16, **options))
    return found


def experts():
    """What `plan` chooses for the experts of the bench, once per way to cut."""
    found = {}
    for count, (k, n) in EXPERTS.items():
        for m in EXPERT_TOKENS:
            config = plan.choose_grouped(m, n, k, count)
            rows = (m // config.tile_m + count) * config.tile_m
            name, options = f"{count} experts, {m} tokens", {"config": config, "experts": count}
            made = functools.partial(case, name, rows, n, k, scales=jnp.bfloat16)
            found.setdefault(config, made(**options))
    return found


def feed_forward(m, width, hidden):
    """A gated layer by the public products, every divisor an operand, and its abstract operands."""
    array = jax.ShapeDtypeStruct

    def matrix(k, n):
        words = array((n // 64, k // 128, 8, 128), jnp.int32)
        return Fragments(words, "sm"), array((k // 128, n), jnp.bfloat16)

    def run(x, gated, down, divisors, divisor):
        inner = api_glu.glu(x, *gated, divisors=(divisors[0], divisors[1]), backend="sm90")
        options = {"group": 128, "divisor": divisor, "residual": x, "backend": "sm90"}
        return api.matmul(inner, *down, **options)

    divisors = array((2,), jnp.float32), array((), jnp.float32)
    matrices = matrix(width, 2 * hidden), matrix(hidden, width)
    return run, (array((m, width), jnp.bfloat16), *matrices, *divisors)


def whole(name, m, launches):
    """A case of a gated layer of the bench: how many kernels a decoding step launches for it."""
    make = functools.partial(feed_forward, m, *LAYERS[name])
    return Case(
        f"w4a8 layer, {name}, {m} tokens",
        make,
        ("h200",),
        expect=("QGMMA", "E4M3"),
        max_spill=0,
        backends=named(TABLE, "sm90"),
        launches=launches,
    )


def older(name, m, n, k, chip, instruction, **options):
    """A case of the kernel of Ampere and Ada."""
    config = plan.choose(m, n, k, glu=options.get("glu", False), **plan.LIMITS["sm80"])
    make = functools.partial(product, "sm80", m, n, k, config, **options)
    expect, entries = (instruction, "LDG.E.128"), named(TABLE, "sm80")
    return Case(f"w4a8 {name}", make, (chip,), expect, backends=entries)


def tpu(m, n, k):
    """The TPU kernel and its abstract operands."""
    call = functools.partial(
        lazy(KERNEL.format("tpu"), "matmul"), group=128, act="e4m3", sx=None, divisor=1.0
    )
    array = jax.ShapeDtypeStruct
    return lambda x, codes, scales: call(x, codes=codes, scales=scales), (
        array((m, k), jnp.bfloat16),
        array((k // 2, n), jnp.uint8),
        array((k // 128, n), jnp.float32),
    )


def triton(m, n, k, group):
    """The public product by Triton on canonical codes and its abstract operands."""
    call = functools.partial(api.matmul, group=group, backend="triton")
    array = jax.ShapeDtypeStruct
    return call, (
        array((m, k), jnp.bfloat16),
        array((k // 2, n), jnp.uint8),
        array((k // group, n), jnp.bfloat16),
    )


CHIPS = (("a100", "HMMA.16816.F32"), ("l4", "QMMA.16832.F32.E4M3.E4M3"))
CASES = (
    *layers().values(),
    *experts().values(),
    # Two roundings and two products; the passes that add pieces of k; turning what those leave of
    # several tokens.
    whole("Llama-2-7B FFN", 1, 6),
    whole("Llama-2-7B FFN", 16, 7),
    whole("Llama-3-8B FFN", 16, 5),
    case("matmul, 32 tokens", 32, 4096, 4096),
    case("glu, 32 tokens", 32, 28672, 4096, glu=True),
    *(case(f"matmul, {m} tokens, tc", m, 4096, 4096, encoding="tc") for m in (16, 64, 128)),
    *(
        case(f"matmul, {m} tokens, table", m, 4096, 4096, encoding="tc", treatment="table")
        for m in (16, 64, 128)
    ),
    case("matmul, 128 tokens, bfloat16 scales", 128, 4096, 4096, scales=jnp.bfloat16),
    case("matmul, 128 tokens, e4m3 scales", 128, 4096, 4096, scales=E4M3),
    case("matmul, 16 tokens, e4m3 scales", 16, 4096, 4096, scales=E4M3),
    *(following("residual and squares", m, True) for m in (64, 128, 4096)),
    following("residual", 128, False),
    *(
        older(f"matmul, {m} tokens{name}", m, 4096, 4096, chip, instruction, encoding=encoding)
        for chip, instruction in CHIPS
        for m in (8, 64)
        for name, encoding in ((f" on {chip}", "sm"), (f" on {chip}, tc", "tc"))
    ),
    *(
        older(f"glu, {m} tokens on {chip}", m, 28672, 4096, chip, instruction, glu=True)
        for m in (16, 64)
        for chip, instruction in CHIPS
    ),
    *(
        Case(
            f"w4a8 matmul by Triton, {m} tokens, groups of {group}",
            functools.partial(triton, m, 4096, 4096, group),
            ("a100", "l4"),
            ("HMMA.16816.F32", "LDGSTS.E"),
            max_spill=0,
            backends=named(TABLE, "triton"),
        )
        for m, group in ((1, 128), (32, 128), (64, 128), (4096, 128), (1, 32))
    ),
    *(
        Case(
            f"w4a8 matmul, {m} tokens on a TPU",
            functools.partial(tpu, m, 4096, 4096),
            ("v5e", "v6e"),
            ("tpu_custom_call",),
            backends=named(TABLE, "tpu"),
        )
        for m in (16, 1024)
    ),
)
