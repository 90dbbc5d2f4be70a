"""What is timed: feed-forward layers, experts and sparse layers, ours beside XLA's and torch's."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import grouped, quantize, sparse, w4a8
from pallas_kernels.bench import attention, torch
from pallas_kernels.bench.measure import Row, Work
from pallas_kernels.numerics import E4M3

LAYERS = {"Llama-2-7B FFN": (4096, 11008), "Llama-3-8B FFN": (4096, 14336)}
FEW = 64  # tokens up to which memory takes the time
TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
EXPERTS = {8: (4096, 14336), 64: (2048, 1408)}
EXPERT_TOKENS = (512, 4096)
KEPT = (0.5, 0.3, 0.1)
CPU_TOKENS = 16
BF16 = jnp.bfloat16


def rows():
    """All rows, a list of `Row`."""
    found = []
    for name in LAYERS:
        for m in TOKENS:
            found += feed_forward(name, m)
    for experts, (width, hidden) in EXPERTS.items():
        for m in EXPERT_TOKENS:
            for name, make in (("ragged_dot", ragged), ("grouped", ours), ("w4a8", int4_experts)):
                make = functools.partial(make, experts, m, width, hidden)
                found.append(Row(mixture(experts, m), name, make, False))
    width, hidden = LAYERS["Llama-3-8B FFN"]
    for kept in KEPT:
        for name, packed in (("sparse bfloat16", False), ("sparse int4", True)):
            make = functools.partial(gated, width, hidden, kept, packed)
            found.append(Row(skipped(kept), name, make, False))
    return found + attention.rows()


def feed_forward(name, m):
    """The rows of one layer and number of tokens."""
    task, sizes = layer(name, m), (m, *LAYERS[name])
    forms = {"bfloat16 XLA": dense, "FP8 XLA": fp8, "w4a8": int4}
    found = []
    for by, make in forms.items():
        anywhere, early = m <= CPU_TOKENS and make is not int4, m <= FEW and make is int4
        row = Row(task, by, functools.partial(make, *sizes), anywhere)
        found.append(row._replace(early=early))
    for by, make, bits in (("bfloat16 torch", torch.dense, 16), ("FP8 torch", torch.fp8, 8)):
        make = functools.partial(make, *sizes, cost(*sizes, bits))
        found.append(Row(task, by, make, False, torch.measure))
    return found


def layer(name, m):
    """The task of a layer's rows."""
    return f"{name}, {m} tokens"


def mixture(experts, m):
    """The task of the rows of experts."""
    width, hidden = EXPERTS[experts]
    return f"{experts} experts of {width} x {hidden}, {m} tokens"


def skipped(kept):
    """The task of the rows that keep a share of channels."""
    return f"Llama-3-8B FFN, 1 token, {round(100 * (1 - kept))} % sparse"


def tokens(m, k):
    """Random activations."""
    return jax.random.normal(jax.random.key(99), (m, k), BF16)


@functools.cache
def normal(shape, dtype=BF16):
    """A function of a key: a random matrix; one function for all rows, so it is compiled once."""
    return lambda key: (jax.random.normal(key, shape, BF16) * 0.02).astype(dtype)


@functools.cache
def each(*makers):
    """A function of a key: one array from each maker."""

    def make(key):
        keys = jax.random.split(key, len(makers))
        return [maker(k) for maker, k in zip(makers, keys, strict=True)]

    return make


def cost(m, width, hidden, weight_bits, scale_bytes=0.0):
    """Bytes and operations of gate, up and down."""
    weights = 3 * width * hidden * (weight_bits / 8 + scale_bytes / 128)
    return weights + 2 * m * (2 * width + 2 * hidden), 6 * m * width * hidden


def dense(m, width, hidden):
    """The layer in bfloat16."""

    def run(x, weights):
        gate, up, down = weights
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    weights = each(*map(normal, [(width, hidden), (width, hidden), (hidden, width)]))
    return Work(run, tokens(m, width), weights, *cost(m, width, hidden, 16), False)


def fp8(m, width, hidden):
    """The layer in FP8 with a scale per token, by XLA."""

    def product(x, w):
        codes, scale = quantize.tokens(x, backend="xla")
        dims = (((1,), (1,)), ((), ()))
        y = jax.lax.dot_general(codes, w, dims, preferred_element_type=jnp.float32)
        return (y * scale).astype(BF16)

    def run(x, weights):
        gate, up, down = weights
        return product(jax.nn.silu(product(x, gate)) * product(x, up), down)

    shapes = [(hidden, width), (hidden, width), (width, hidden)]
    weights = each(*(normal(shape, E4M3) for shape in shapes))
    return Work(run, tokens(m, width), weights, *cost(m, width, hidden, 8), True)


@functools.cache
def fragments(k, n, *, experts=(), encoding="sm", dtype=BF16):
    """A function of a key: random packed codes (any word is one) and scales."""

    def make(key):
        bits = jax.random.bits(key, (*experts, n // 64, k // 128, 8, 128), jnp.uint32)
        words = jax.lax.bitcast_convert_type(bits, jnp.int32)
        scales = jax.random.uniform(key, (*experts, k // 128, n), BF16, 0.004, 0.02)
        return w4a8.Fragments(words, encoding), scales.astype(dtype)

    return make


def int4(m, width, hidden):
    """The layer in INT4 x FP8, gate and up in one."""

    def run(x, weights):
        gate_up, down = weights
        return w4a8.matmul(w4a8.glu(x, *gate_up), *down, group=128)

    weights = each(fragments(width, 2 * hidden), fragments(hidden, width))
    return Work(run, tokens(m, width), weights, *cost(m, width, hidden, 4, 2), True)


def sizes(experts, m):
    """Tokens per expert, uneven: as a router would leave them."""
    share = jax.random.dirichlet(jax.random.key(7), jnp.full((experts,), 2.0))
    ends = jnp.round(jnp.cumsum(share) * m).astype(jnp.int32).at[-1].set(m)
    return jnp.diff(ends, prepend=jnp.zeros((1,), jnp.int32))


def expert_cost(experts, m, width, hidden, bits):
    """Bytes and operations of one product with every expert's matrix."""
    weights = experts * width * hidden * bits / 8
    return weights + 2 * m * (width + hidden), 2 * m * width * hidden


def ragged(experts, m, width, hidden, *, backend="xla"):
    """One product of tokens with their experts in bfloat16."""

    def run(common, w):
        x, group_sizes = common
        return grouped.matmul(x, w, group_sizes, backend=backend)

    common = tokens(m, width), sizes(experts, m)
    weights = normal((experts, width, hidden))
    return Work(run, common, weights, *expert_cost(experts, m, width, hidden, 16), False)


ours = functools.partial(ragged, backend=None)


def int4_experts(experts, m, width, hidden):
    """The same in INT4 x FP8."""

    def run(common, weights):
        (x, group_sizes), (codes, scales) = common, weights
        return w4a8.grouped(x, codes, scales, group_sizes)

    common = tokens(m, width), sizes(experts, m)
    weights = fragments(width, hidden, experts=(experts,))
    return Work(run, common, weights, *expert_cost(experts, m, width, hidden, 4.125), True)


def gated(width, hidden, kept, packed):
    """A layer with a share of its channels on, gate dense, one token: all bfloat16 or INT4."""

    def run(common, weights):
        x, mask = common
        gate, up, down = weights
        inner = w4a8.matmul(x, *gate, group=128) if packed else x @ gate
        on = jnp.where(mask, jax.nn.silu(inner), 0).astype(BF16)
        return sparse.glu(on, up, down, x)

    def stored(key):
        w = normal((hidden, width))(key)
        return sparse.pack(w.astype(jnp.float32)) if packed else w

    gate = fragments(width, hidden) if packed else normal((width, hidden))
    mask = jax.random.uniform(jax.random.key(5), (1, hidden)) < kept
    matrix = width * hidden
    nbytes = matrix * ((0.5 + 2 / 128 + kept) if packed else (2 + 4 * kept))
    flops = 2 * matrix * (1 + 2 * kept)
    return Work(run, (tokens(1, width), mask), each(gate, stored, stored), nbytes, flops, False)
