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
# # From a list of edges to a graph network of four bits
#
# A graph is a list of edges, a network on it a stack of layers. Here one of eight layers is started
# from what the graph does to signals (Virgo, [2312.02622](https://arxiv.org/abs/2312.02622)),
# learns the classes of nodes, is quantized to INT4, and before any of that the graph is asked which
# of its parts says what is joined (NetInfoF, [ICLR 2024](https://openreview.net/forum?id=KY8ZNcljVU)).

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
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from ffnlab import graphs, learning, parallel, quantization, transform
from ffnlab.data import block_model, link_split
from ffnlab.graph import Graph, undirected, with_self_loops
from ffnlab.losses import masked
from ffnlab.models import GraphNetworkConfig, stack
from ffnlab.parallel import LoopOptions

FAST = bool(os.environ.get("FFNLAB_FAST"))  # a quick pass over the notebook, for tests
print("jax", jax.__version__, "on", jax.devices()[0])

# %% [markdown]
# ## A graph
# Edges are checked and sorted once, on the host. A graph is an argument of what is
# compiled: another one of the same sizes compiles nothing.

# %%
small = undirected(Graph.make([0, 1, 2, 2], [1, 2, 0, 3], nodes=5))
print(small.num_edges, "edges in both directions; degrees", small.degrees.tolist())

# %% [markdown]
# One of 400 nodes, whose classes join their own more often than others, with features that say
# little.

# %%
nodes = block_model(3, nodes=400, inside=0.08, across=0.01, width=32, noise=3.0, train=80, valid=80)
inputs = {"x": jnp.asarray(nodes.x), "graph": with_self_loops(nodes.graph)}
wanted = [jnp.asarray(np.where(p, nodes.y, -1)) for p in (nodes.train, nodes.valid, nodes.test)]
print(nodes.graph.num_edges, "edges;", nodes.train.sum(), "nodes to learn from")

# %% [markdown]
# ## What says which nodes are joined
# Some edges are hidden. Five embeddings of the rest are scored before anything is trained: how much
# do bins of their similarities tell of the hidden ones? One half is nothing, one is all.

# %%
split = link_split(nodes, valid=0.1, test=0.2)
pairs = graphs.fitting_pairs(split.graph)
found = graphs.embeddings(split.x, split.graph, dimension=8 if FAST else 32)
views = {name: graphs.view_of(z, pairs) for name, z in found.items()}
report = graphs.netinfof()(views, [graphs.scored_pairs(split)])
print(report)

# %%
figure = plt.figure(figsize=(5, 2.6), layout="constrained")
report.draw(figure)
figure.set_size_inches(5, 2.6)
plt.show()

# %% [markdown]
# ## A start that looks at the graph
# The transform sends two probes through the graph and draws the weights of every layer so that one
# more hop leaves their size as it is. What was decided prints.

# %%
depth = 4 if FAST else 8
plain = GraphNetworkConfig((32, *[64] * (depth - 1), 4)).make(key=jax.random.key(0))
started = {}
for start in ("xavier", "kaifor", "virgo"):
    started[start], stats = transform.apply(graphs.virgo(start=start), plain, [inputs])
print(stats)


# %%
def loss(model, batch):
    """Mean cross-entropy of the nodes that are learned from."""
    return masked(lambda given: model(**given), batch)


look = jax.jit(lambda model: graphs.layer_signals(model, (inputs, wanted[0]), loss))
plt.figure(figsize=(4.5, 2.6))
for start, model in started.items():
    line = look(model).backward[:-1]
    plt.semilogy(range(1, depth), line / line[-1], ".-", label=start)
plt.xlabel("layer")
plt.ylabel("gradient, over the last layer's")
plt.legend()
plt.show()

# %% [markdown]
# ## Learning
# The starts are members of one program, which scans alike layers: it compiles as fast as that of
# three layers.

# %%
rule = learning.members(lambda: learning.backprop(loss, optax.adam(1e-3)), len(started))
models = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(stack, started.values()))
outcome = parallel.train(
    rule,
    models,
    lambda position: (inputs, wanted[0]),
    20 if FAST else 100,
    key=jax.random.key(1),
    options=LoopOptions(log_every=0),
    together=10,
)
learned = rule.model(outcome.state)


# %%
@jax.jit
def accuracy(model, wanted):
    """Of the nodes of a part."""
    right = model(**inputs).argmax(-1) == wanted
    return jnp.sum(right & (wanted >= 0)) / jnp.sum(wanted >= 0)


for i, start in enumerate(started):
    model = jax.tree.map(lambda leaf, i=i: leaf[i], learned)
    print(start, f"test accuracy {float(accuracy(model, wanted[2])):.3f}")

# %% [markdown]
# ## Four bits
# Any transform that takes models takes this one: every matrix becomes INT4 with a scale for eight
# rows.

# %%
small, _ = transform.apply(quantization.nearest(format="int4", group=8), model.unstacked())
weight = small.layers[0].linear.weight
print(f"in INT4 {float(accuracy(small, wanted[2])):.3f}")
print(type(weight).__name__, weight.shape, "in", weight.nbytes, "bytes")
