# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Kernels: INT4 weights and rows that are not read
#
# A decoding step reads every weight once, so its time is the weights' bytes divided by the memory's
# speed. This notebook makes a layer's matrix four times smaller, then skips most of what is left,
# and times both against bfloat16 on whatever GPU or CPU it finds.

# %%
source = "ffnlab"  # @param {type: "string"}
# The released package, or the path of a clone or of a wheel; one beside this notebook is found.

import importlib.util
import pathlib
import subprocess
import sys

spec = importlib.util.find_spec("ffnlab")
if spec is None or spec.origin is None:  # a clone beside this notebook looks like a package
    beside = [*pathlib.Path().glob("ffnlab-*.whl"), pathlib.Path("ffnlab"), pathlib.Path("..")]
    places = beside if source == "ffnlab" else [pathlib.Path(source)]
    there = [p for p in places if p.suffix == ".whl" or (p / "ffnlab/__init__.py").is_file()]
    chosen = there[0].resolve() if there else source
    if subprocess.run([sys.executable, "-m", "pip", "install", "-q", f"{chosen}[run]"]).returncode:
        sys.exit(f"pip cannot install {chosen}: put a clone or wheel of ffnlab beside the notebook")
    importlib.invalidate_caches()

import ffnlab

print("ffnlab", ffnlab.__version__, "· Python", sys.version.split()[0])

# %%
import jax
import jax.numpy as jnp

from pallas_kernels import backend, quantize, sparse, w4a8

platform, capability = backend.device()
print("jax", jax.__version__, "on", jax.devices()[0], capability or "")

# %%
import os

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
SMALL = FAST or platform == "cpu"
K, N = (512, 1024) if FAST else (2048, 5632) if SMALL else (4096, 14336)
DENSE = jnp.float32 if platform == "cpu" else jnp.bfloat16  # a CPU multiplies float32 faster
SETS = 2 if FAST else 4  # weight sets taken in turn, so that none stays in a cache
print(f"weights [{K}, {N}], {jnp.dtype(DENSE).name}: {K * N * jnp.dtype(DENSE).itemsize / 1e6} MB")

# %% [markdown]
# ## Round a matrix to four bits
# Each group of 128 rows of a column shares a scale: `w = q * scale`, q from -7 to 7. Two codes go
# into a byte. On Hopper they are packed once more, into the order in which a tensor core's lanes
# want them.

# %%
weights = [jax.random.normal(jax.random.key(i), (K, N)) / K**0.5 for i in range(SETS)]
coded = [quantize.groups(w, group=128) for w in weights]
codes, scales = coded[0]
error = jnp.linalg.norm(w4a8.dequantize(codes, scales, group=128) - weights[0])
print("error of the weights", float(error / jnp.linalg.norm(weights[0])))
print("bytes", weights[0].size * 2, "in bfloat16,", codes.nbytes + scales.nbytes, "in INT4")

hopper = platform == "gpu" and capability is not None and capability[0] == 9
int4 = [(w4a8.pack(c), s) if hopper else (c, s) for c, s in coded]
dense = [w.astype(DENSE) for w in weights]

# %% [markdown]
# The activations are rounded too, to FP8 with one scale per token. What both roundings cost:

# %%
x = jax.random.normal(jax.random.key(9), (16, K), DENSE)
exact = jnp.matmul(x.astype(jnp.float32), weights[0], precision="highest")
ours = w4a8.matmul(x, *int4[0], group=128, out_dtype=jnp.float32)
print("error of the product", float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact)))

# %% [markdown]
# ## Time it by the number of tokens
# One program multiplies by all the weight sets, and the median of several runs counts.

# %%
import statistics
import time


def microseconds(product, x, sets):
    """Median time of one product, the weight sets taken in turn."""
    run = jax.jit(lambda x, sets: [product(x, *one) for one in sets])
    jax.block_until_ready(run(x, sets))
    times = []
    for _ in range(3 if FAST else 15):
        start = time.perf_counter()
        jax.block_until_ready(run(x, sets))
        times.append((time.perf_counter() - start) / len(sets))
    return 1e6 * statistics.median(times)


plain = [(w,) for w in dense]
rows = []
for tokens in (1, 4) if FAST else (1, 4, 16, 64, 256):
    x = jax.random.normal(jax.random.key(tokens), (tokens, K), DENSE)
    before = microseconds(jnp.matmul, x, plain)
    after = microseconds(lambda x, c, s: w4a8.matmul(x, c, s, group=128), x, int4)
    rows.append((tokens, before, after))
    print(f"{tokens:4} tokens: dense {before:8.1f} us, W4A8 {after:8.1f} us, {before / after:.2f}x")

# %% [markdown]
# ## Against the floor
# The dotted lines are what the bytes alone would take at a memory speed you set: 4300 GB/s is an
# H200, 300 an L4 or a T4, 1500 an A100, 20 a laptop. Where the lines rise, arithmetic has taken
# over, and four bits save memory but no time.

# %%
import matplotlib.pyplot as plt

GIGABYTES = 20 if platform == "cpu" else 4300
tokens, before, after = zip(*rows, strict=True)
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for name, times, size, color in (
    (f"dense {jnp.dtype(DENSE).name}", before, dense[0].nbytes, "C0"),
    ("W4A8", after, codes.nbytes + scales.nbytes, "C1"),
):
    axes.plot(tokens, times, "o-", color=color, label=name)
    axes.axhline(size / GIGABYTES / 1e3, color=color, linestyle=":")
axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="microseconds")
axes.legend()
plt.show()

# %% [markdown]
# ## Skip rows
# In a sparse FFN most hidden channels are off for a token, and their rows of the down projection
# need not be read. `sparse.matvec` reads the others. `sparse.pack` makes INT4 rows that can be read
# one at a time: bytes saved twice. (On a CPU unpacking takes longer than the bytes it saves.)

# %%
down = [(jnp.asarray(w.T, DENSE),) for w in weights]  # a row per hidden channel
packed = [(sparse.pack(w.T),) for w in weights]
hidden = jax.random.normal(jax.random.key(7), (1, N), DENSE)
full = microseconds(jnp.matmul, hidden, down)
for off in (0.5, 0.7, 0.9):
    keep = jax.random.uniform(jax.random.key(8), hidden.shape) >= off
    x = jnp.where(keep, hidden, jnp.zeros((), DENSE))
    some, four = (microseconds(sparse.matvec, x, sets) for sets in (down, packed))
    print(f"{off:.0%} off: dense {full:.1f} us, skipping {some:.1f} us, INT4 too {four:.1f} us")

# %% [markdown]
# ## Which implementation ran
# Each kernel has several; a call takes the first that fits the device, and says why the others do
# not. `backend=` asks for one by name.

# %%
for name in ("sm90", "xla"):
    try:
        y = w4a8.matmul(jnp.ones((1, K), DENSE), *int4[0], group=128, backend=name)
        print(name, "gives", y.shape)
    except ValueError as reason:
        print(reason)
