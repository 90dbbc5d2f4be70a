"""The machine itself, and the kernels that need least of it: no tensor core, no tensor copies."""

import functools
import shutil
import statistics
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import backend, quantize, sparse
from pallas_kernels.bench.measure import alone

CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
SPARSITY = 0.7


def machine(here):
    """Clocks, the rate of a copy, an empty kernel, what a call costs the host."""
    here.show("device", kind=backend.device_kind(), jax=jax.__version__, devices=len(jax.devices()))
    here.show("clocks", said=clocks())
    size, turns = here.size(1 << 29, 1 << 12), here.size(15, 2)
    copy = jax.jit(lambda x: x + jnp.bfloat16(1))
    x = jnp.ones((size,), jnp.bfloat16)
    once, several = (functools.partial(chain, copy, x, count) for count in (2, 8))
    seconds = alone(once, several, 2, 8, turns, jax.block_until_ready)
    here.show("copy", terabytes_per_second=4 * size / seconds / 1e12)
    one = jnp.ones((1,), jnp.float32)
    few, many = (
        functools.partial(jax.jit(functools.partial(chain, empty(here), count=count)), one)
        for count in (8, 32)
    )
    seconds = alone(few, many, 8, 32, turns, jax.block_until_ready)
    here.show("an empty kernel", us=1e6 * seconds)
    here.show("dispatch of a call", us=1e6 * dispatch(jax.jit(lambda x: x + 1), one, turns))


def clocks():
    """What the driver's tool says of clocks, power and heat; why not, where it is not there."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "no nvidia-smi"
    command = [tool, f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def chain(run, x, count):
    """x after `count` calls, each of the one before."""
    for _ in range(count):
        x = run(x)
    return x


def empty(here):
    """A kernel of one block that copies one number."""
    from pallas_kernels import _compat

    def body(x, out):
        out[0] = x[0]

    shape = jax.ShapeDtypeStruct((1,), jnp.float32)
    return _compat.kernel(body, out_type=shape, interpret=here.interpret)


def dispatch(run, x, turns):
    """Seconds from a call to its result, the median."""
    seconds = []
    for _ in range(turns + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(x))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def plain(here):
    """Rounding, to the bit, and the sparse products, against their references."""
    name, random = here.backend("mosaic"), np.random.default_rng(0)
    for k in here.size((4096, 11008, 14336), (256,)):
        x = jnp.asarray(random.normal(size=(8, k)), jnp.bfloat16).at[4].set(0)
        found, wanted = quantize.tokens(x, backend=name), quantize.tokens(x, backend="reference")
        here.show(f"rounding of tokens, k = {k}", bits_wrong=[*map(differing, found, wanted)])
    d, f = here.size((4096, 14336), (1024, 64))
    w = jnp.asarray(random.normal(size=(f, d)), jnp.bfloat16)
    x = jnp.asarray(random.normal(size=(1, d)), jnp.float32)
    gate = jnp.asarray(random.normal(size=(1, f)) * (random.random((1, f)) > SPARSITY), jnp.float32)
    packed = sparse.pack(w.astype(jnp.float32))
    for kind, weight in (("bfloat16", w), ("int4", packed)):
        calls = {
            "matvec": (sparse.matvec, gate, weight),
            "rows": (sparse.rows, x, weight, gate),
            "glu": (sparse.glu, gate, weight, weight, x),
        }
        for operation, (run, *operands) in calls.items():
            y, wanted = (
                jax.jit(functools.partial(run, backend=b))(*operands) for b in (name, "reference")
            )
            here.show(f"sparse {operation}, {kind}", error=error(y, wanted))


def differing(a, b):
    """Bits in which two arrays differ."""
    a, b = (np.asarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return int(np.unpackbits(a ^ b).sum())


def error(y, wanted):
    """Relative norm of the difference; NaN if anything is."""
    y, wanted = (np.asarray(x).astype(np.float64) for x in (y, wanted))
    return float(np.linalg.norm(y - wanted) / max(np.linalg.norm(wanted), 1e-30))
