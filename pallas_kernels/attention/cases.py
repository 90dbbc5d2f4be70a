"""What is compiled of attention: Llama-3-8B's heads, a prompt of 4096, a cache of 16384 keys."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import attention
from pallas_kernels.aot.cases import Case, named
from pallas_kernels.attention import api, api_decode

# The left operand of a product with the values; and exponentials between scores and their wait.
FROM_REGISTERS = r"GMMA\S* R\d+, R\d+, gdesc"
BESIDE_SCORES = r"GMMA\S* R\d+, gdesc[^\n]*\n(?:(?![^\n]*DEPBAR)[^\n]*\n)*[^\n]*MUFU\.EX2"
PROMPT, HEADS, KV_HEADS = 4096, 32, 8


def make(precision, d, window=None, tile=None, codes=False):
    """Prefill over INT4 codes ("fp8", `codes`) or bfloat16, and its abstract arguments."""
    shape, keys = jax.ShapeDtypeStruct, (1, PROMPT, KV_HEADS, d)
    q, codes = shape((1, PROMPT, HEADS, d), jnp.bfloat16), codes or precision == "fp8"
    k = shape(keys, jnp.int8 if codes else jnp.bfloat16)
    scales = shape(keys[:3], jnp.float8_e4m3fn) if codes else None
    options = {"precision": precision, "window": window, "tile": tile, "backend": "sm90"}

    def run(q, k, v, k_scale, v_scale):
        return attention.prefill(q, k, v, k_scale=k_scale, v_scale=v_scale, **options)

    return run, (q, k, k, scales, scales)


def case(precision, d, suffix="", patterns=(FROM_REGISTERS, BESIDE_SCORES), max_spill=0, **options):
    """A case of the Hopper kernel."""
    products = {"fp8": ("QGMMA", "e4m3"), "float32": ("HGMMA", "bfloat16")}
    instruction, operands = products[precision]
    return Case(
        f"attention prefill, {operands}, heads of {d}{suffix}",
        functools.partial(make, precision, d, **options),
        ("h200",),
        expect=(instruction,),
        patterns=patterns,
        max_spill=max_spill,
        backends=named(api.BACKENDS, "sm90"),
        # Beside the kernel: keys and values widened, scales turned, their largest.
        launches=5 if precision == "fp8" else None,
    )


def make_decode(kind, d, sequences=4, pages=64, page=256):
    """Decode over a paged cache in INT4 or bfloat16, and its abstract arguments."""
    shape, cache = jax.ShapeDtypeStruct, (sequences * pages, page, KV_HEADS)
    codes = kind == "int4"
    k = shape((*cache, d // 2 if codes else d), jnp.uint8 if codes else jnp.bfloat16)
    scales = shape((cache[0], KV_HEADS, page), jnp.float8_e4m3fn) if codes else None

    def run(q, k, v, lengths, table, k_scale, v_scale):
        options = {"pages": table, "k_scale": k_scale, "v_scale": v_scale, "backend": "sm90"}
        return attention.decode(q, k, v, lengths, **options)

    q, table = shape((sequences, HEADS, d), jnp.bfloat16), shape((sequences, pages), jnp.int32)
    return run, (q, k, k, shape((sequences,), jnp.int32), table, scales, scales)


def decode_case(kind, d):
    """A case of the Hopper kernel for single steps."""
    return Case(
        f"attention decode, {kind} cache, heads of {d}",
        functools.partial(make_decode, kind, d),
        ("h200",),
        expect=("HGMMA",),
        patterns=(FROM_REGISTERS,),
        max_spill=0,
        backends=named(api_decode.BACKENDS, "sm90"),
    )


CASES = (
    *(case(precision, d) for precision, d in (("fp8", 64), ("float32", 64), ("float32", 128))),
    case("fp8", 128, patterns=(FROM_REGISTERS,)),
    # A register by jax 0.10, outside of the loops of products.
    case("fp8", 128, ", window of 1024", (FROM_REGISTERS,), max_spill=4, window=1024),
    case("fp8", 128, ", tiles of 64", tile=64),
    *(case("float32", d, ", int4 keys", codes=True) for d in (64, 128)),
    *(decode_case(kind, d) for kind in ("int4", "bfloat16") for d in (64, 128)),
)
