"""The weights and layers that the contract tests run over. A new one joins by one line.

Weights are [24, 16]. `test_contracts.py` fails when something that its package
exports is missing here.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ffnlab import layers, weights
from ffnlab.graph import Graph, with_self_loops
from ffnlab.layers import Block, Linear
from ffnlab.layers.attention.rope import tables
from ffnlab.layers.grouped import back, group, take
from ffnlab.testing import check_layer, tiny

IN, OUT, GROUP = 24, 16, 8


def matrix(key: jax.Array, shape: tuple[int, int] = (IN, OUT)) -> jax.Array:
    """A float32 Gaussian matrix."""
    return jax.random.normal(key, shape, jnp.float32)


def int4(key: jax.Array, act: str | None = None) -> weights.Int4:
    """Random codes over the full range, with a divisor."""
    q = jax.random.randint(key, (IN, OUT), -8, 8, jnp.int8)
    scales = jax.random.uniform(key, (IN // GROUP, OUT), jnp.float32, 0.01, 0.1)
    return weights.Int4.from_codes(q, scales, group=GROUP, divisor=4.0, act=act)


def packed_int4(key: jax.Array, columns: int = OUT) -> weights.PackedInt4:
    """One group of 128 rows, all but IN of them padding."""
    q = jax.random.randint(key, (IN, columns), -8, 8, jnp.int8)
    scales = jax.random.uniform(key, (1, columns), jnp.float32, 0.01, 0.1)
    w = weights.Int4.from_codes(q, scales, group=128, divisor=4.0, act="e4m3")
    return weights.PackedInt4.pack(w.codes, w.scales, w.divisor, rows=IN, act="e4m3")


def joined_int4(key: jax.Array) -> weights.JoinedInt4:
    """Gate and up of half of OUT columns each; among so many codes both have a -8."""
    return weights.JoinedInt4.join(*(packed_int4(k, OUT // 2) for k in jax.random.split(key)))


WEIGHTS: dict[str, Callable[[jax.Array], weights.Weight]] = {
    "BlockDense": lambda k: weights.BlockDense.project(matrix(k), 6, 3),
    "BlockDense-turned": lambda k: weights.BlockDense.project(
        matrix(k, (OUT, IN)), 6, 2
    ).transpose(),
    "BlockDiagonal": lambda k: weights.BlockDiagonal.project(matrix(k), 4),
    "BlockDiagonal-turned": lambda k: weights.BlockDiagonal.project(
        matrix(k, (OUT, IN)), 4
    ).transpose(),
    "BlockShuffle": lambda k: weights.BlockShuffle.project(matrix(k), 4),
    "BlockShuffle-turned": lambda k: weights.BlockShuffle.project(
        matrix(k, (OUT, IN)), 2
    ).transpose(),
    "Dense": lambda k: weights.Dense(matrix(k)),
    "Dense-bf16": lambda k: weights.Dense(matrix(k).astype(jnp.bfloat16)),
    "Dense-e4m3": lambda k: weights.Dense(matrix(k), act="e4m3"),
    "Float8": lambda k: weights.Float8.quantize(matrix(k)),
    "Float8-e4m3": lambda k: weights.Float8.quantize(matrix(k), act="e4m3"),
    "Int4": int4,
    "Int4-e4m3": lambda k: int4(k, "e4m3"),
    "Int8": lambda k: weights.Int8.quantize(matrix(k), group=GROUP),
    "Int8-e4m3": lambda k: weights.Int8.quantize(matrix(k), group=16, act="e4m3"),
    "JoinedInt4": joined_int4,
    "LoRA": lambda k: weights.LoRA.init(weights.Dense(matrix(k)), 3, k),
    "LoRA-Int4": lambda k: weights.LoRA.init(int4(k), 3, k),
    "LowRank": lambda k: weights.LowRank.truncate(matrix(k), 5),
    "Masked": lambda k: weights.Masked(weights.Dense(matrix(k)), matrix(k) > 0),
    "Merged": lambda k: weights.Merged.of(weights.LowRank.truncate(matrix(k), 5), rows=4),
    "Merged-blocks": lambda k: weights.Merged.of(
        weights.BlockShuffle.project(matrix(k), 4), rows=6
    ),
    "PackedInt4": packed_int4,
    "SparseInput": lambda k: weights.SparseInput(weights.Dense(matrix(k)), jnp.float32(0.4)),
    "Transposed": lambda k: weights.Transposed(weights.Dense(matrix(k, (OUT, IN)))),
    "Transposed-Float8": lambda k: weights.Transposed(
        weights.Float8.quantize(matrix(k, (OUT, IN)))
    ),
}


def linear(key: jax.Array, d_in: int = IN, d_out: int = OUT) -> Linear:
    """A Linear with a bias."""
    return Linear(d_in, d_out, key=key, axes=("embed", "mlp"), bias=True)


def block(key: jax.Array) -> Block:
    """The first block of `tiny`."""
    return tiny(key).layers[0]


def sparse_ffn(key: jax.Array) -> layers.SparseGatedFFN:
    """A SparseGatedFFN of width 24 that keeps about half of its 16 channels."""
    up = Linear(OUT, IN, key=key, axes=("mlp", "embed"))
    stored = linear(key).replace(weights.Transposed(up.weight))
    threshold = jnp.full((OUT,), 0.1)
    return layers.SparseGatedFFN(
        linear(key), stored, linear(key, OUT, IN), threshold, activation="silu"
    )


def input_of(shape: tuple[int, ...]) -> jax.Array:
    """A fixed Gaussian input."""
    return jax.random.normal(jax.random.key(11), shape)


def context(attention: layers.Attention, x: jax.Array) -> layers.Context:
    """The context of one causal text of x's length."""
    spec = attention.spec
    angles = {spec.rope: tables(spec.rope, spec.head_dim, jnp.arange(x.shape[1])[None])}
    return layers.Context(angles, {spec.window: None})


def checked(make: Callable, x: jax.Array | None = None, **more: Callable) -> Callable[[], None]:
    """The check of a layer, on INPUT where no other input is given."""
    return functools.partial(check_layer, make, INPUT if x is None else x, **more)


def on_graph(make: Callable) -> Callable[[], None]:
    """The check of a layer of graphs, on a small one."""
    graph = with_self_loops(Graph.make([0, 1, 2, 2, 4], [1, 2, 0, 1, 3], nodes=6))
    return checked(make, input_of((6, 16)), call=lambda m, x: m(x, graph))


def on_mesh(make: Callable, call: Callable) -> Callable[[], None]:
    """The check of a layer of edges and nodes: `call(layer, graph, edges, nodes)`."""
    graph = Graph.make([0, 1, 2, 2, 4], [1, 2, 0, 1, 3], nodes=6)
    edges = jnp.array([0, 2, 1, 3, 5])  # rows of the input that stand for edges
    return checked(make, input_of((6, 16)), call=lambda m, x: call(m, graph, x[edges], x))


INPUT = input_of((2, 5, 16))
IDS = jnp.array([[0, 1, 2, 1], [63, 4, 4, 0]])
FFN = {"activation": "gelu_tanh", "bias": True}
COLUMN = layers.ColumnSpec((8, 6), (1, 1), gamma=0.5)
CHOICE = jnp.array([[0, 1, 2, 1, 0], [1, 1, 0, 0, 2]])


def mixed_updates(key):
    """A linear map with two low-rank updates, of which the larger counts."""
    base = layers.Linear(16, 12, key=key, axes=("embed", "mlp"))
    router = layers.Linear(16, 2, key=key, axes=("embed", "router"))
    a, b = jax.random.normal(key, (2, 16, 3)), jax.random.normal(key, (2, 3, 12))
    return layers.RoutedLinear(base, router, a, b, k=1)


def in_groups(layer, x):
    """A grouped layer of the rows of x, spread over three groups and none."""
    rows = x.reshape(-1, x.shape[-1])
    groups = group(jnp.arange(len(rows)) % 4, 3)
    return back(layer(take(rows, groups), groups), groups)


LAYERS: dict[str, Callable[[], None]] = {
    "Attention": checked(lambda k: block(k).attn, call=lambda m, x: m(x, context(m, x))[0]),
    "BatchNorm": checked(lambda k: layers.BatchNorm(16)),
    "BatchNorm-training": checked(
        lambda k: layers.BatchNorm(16), call=lambda m, x: m.in_training(x)[0]
    ),
    "Block": checked(block, call=lambda m, x: m(x, context(m.attn, x))[0]),
    "ByChoice": checked(
        lambda k: layers.ByChoice([layers.FFN(16, 8, key=k), layers.GatedFFN(16, 4, key=k)]),
        call=lambda m, x: m(x, layers.Context({}, {}), layers.LayerInputs(choice=CHOICE))[0],
    ),
    "Column": checked(
        lambda k: layers.Column(COLUMN, key=k),
        input_of((2, 4, 4, 8)),
        call=lambda m, x: m(x, (x, x[:, ::2, ::2, :6]))[-1].astype(x.dtype),
    ),
    "ConvNeXt": checked(lambda k: layers.ConvNeXt(16, 8, key=k, gamma=0.5), INPUT[:, :, None]),
    "Conv": checked(lambda k: layers.Conv(16, 8, key=k), INPUT[:, :, None]),
    "Conv-1d": checked(lambda k: layers.Conv(16, 8, key=k, size=(3,), groups=8, bias=True)),
    "ConvNorm": checked(lambda k: layers.ConvNorm(16, 8, key=k, groups=4), INPUT[:, :, None]),
    "EdgeMLP": on_mesh(
        lambda k: layers.EdgeMLP(16, 12, 8, key=k), lambda m, graph, e, x: m(graph, e, x, x)
    ),
    "EffLayer": checked(lambda k: layers.EffLayer(16, key=k, leading=1)),
    "Embedding": checked(lambda k: layers.Embedding(64, 16, key=k), IDS),
    "EnsembleScale": checked(
        lambda k: layers.EnsembleScale(np.array([1, 0, 1]), jax.random.uniform(k, (3, 16))),
        call=lambda m, x: m(jnp.stack([x, 2 * x, 3 * x])),
    ),
    "FFN": checked(lambda k: layers.FFN(16, 32, key=k)),
    "FoldedFFN": checked(
        lambda k: layers.FoldedFFN(linear(k, 16, 8), linear(k, 8, 16), linear(k, 16, 16))
    ),
    "FoldedFFN-straight": checked(lambda k: layers.FoldedFFN(None, None, linear(k, 16, 16))),
    "Guided": checked(lambda k: layers.Guided(linear(k, 16, 8), alpha=0.5)),
    "IdleFFN": checked(
        lambda k: layers.IdleFFN(
            linear(k, 16, 8), linear(k, 8, 16), active=3, norm=layers.BatchNorm(8)
        )
    ),
    "FixedAffine": checked(lambda k: layers.FixedAffine(input_of((16,)), jnp.ones(16))),
    "FourierFeatures": checked(
        lambda k: layers.FourierFeatures(input_of((3, 16)), jnp.ones(3), length=1.0)
    ),
    "KernelAdapter": checked(
        lambda k: layers.KernelAdapter(
            layers.ReluFeatures(input_of((3, 16))), linear(k, 3, 16), jnp.ones(16)
        )
    ),
    "KernelFFN": checked(
        lambda k: layers.KernelFFN(
            layers.ReluFeatures(input_of((3, 16))),
            linear(k, 8, 16),
            psi=linear(k, 3, 8),
            up=linear(k, 16, 8),
        )
    ),
    "ReluFeatures": checked(lambda k: layers.ReluFeatures(input_of((3, 16)), floor=-1.0)),
    "GatedFFN": checked(lambda k: layers.GatedFFN(16, 32, key=k, **FFN)),
    "GroupNorm": checked(lambda k: layers.GroupNorm(16, 4)),
    "GroupedFFN": checked(lambda k: layers.GroupedFFN(3, 16, 8, key=k, bias=True), call=in_groups),
    "GroupedLinear": checked(
        lambda k: layers.GroupedLinear(3, 16, 8, key=k, axes=("embed", "mlp")), call=in_groups
    ),
    "GroupedNorm": checked(
        lambda k: layers.GroupedNorm([layers.LayerNorm(16)] * 3), call=in_groups
    ),
    "InstanceNorm": checked(lambda k: layers.InstanceNorm(16)),
    "GAT": on_graph(lambda k: layers.GAT(16, 8, key=k, heads=2)),
    "GCN": on_graph(lambda k: layers.GCN(16, 8, key=k)),
    "GraphSAGE": on_graph(lambda k: layers.GraphSAGE(16, 20, key=k)),
    "JoinedGatedFFN": checked(
        lambda k: layers.JoinedGatedFFN(linear(k, 16, 16), linear(k, 8, 16), activation="silu")
    ),
    "LayerNorm": checked(lambda k: layers.LayerNorm(16)),
    "Level": checked(
        lambda k: layers.Level(COLUMN, 1, key=k), input_of((2, 4, 4, 8)), call=lambda m, x: m(x)
    ),
    "Linear": checked(lambda k: linear(k, 16, 8)),
    "MLP": checked(lambda k: layers.MLP((16, 12, 8), key=k)),
    "MeshBlock": on_mesh(
        lambda k: layers.MeshBlock(16, key=k, heads=2),
        lambda m, graph, e, x: m(graph, e, x)[1],
    ),
    "MeshBlock-plain": on_mesh(
        lambda k: layers.MeshBlock(16, key=k, gated=False),
        lambda m, graph, e, x: m(graph, e, x)[1],
    ),
    "Modalities": checked(
        lambda k: layers.Modalities(jnp.arange(64) % 3, 3),
        IDS,
        call=lambda m, x: jax.nn.one_hot(m(x), m.count),
    ),
    "MoE": checked(
        lambda k: layers.MoE(16, layers.MoESpec(4, 2, 8, shared=8), key=k),
        call=lambda m, x: m(x)[0],
    ),
    "NormedMLP": checked(lambda k: layers.NormedMLP((16, 12, 8), key=k)),
    "PReLU": checked(lambda k: layers.PReLU(16)),
    "SReLU": checked(lambda k: layers.SReLU(end=0.5, slope=2.0)),
    "Noisy": checked(
        lambda k: layers.Noisy(layers.MLP((16, 8, 16), key=k), 0.1),
        call=lambda m, x: m(x, jax.random.key(5)),
    ),
    "Mamba": checked(
        lambda k: layers.Mamba(16, key=k, states=3, taps=2, rank=2),
        call=lambda m, x: m(x)[0],
    ),
    "RMSNorm": checked(lambda k: layers.RMSNorm(16, offset=1.0)),
    "Residual": checked(
        lambda k: layers.Residual.bottleneck(16, 4, key=k, op="max", stride=2), INPUT[:, :, None]
    ),
    "Residual-basic": checked(
        lambda k: layers.Residual.basic(16, 24, key=k, stride=2), INPUT[:, :, None]
    ),
    "Recurrent": checked(
        lambda k: layers.Recurrent(16, 6, key=k, layers=2, direction="both"),
        call=lambda m, x: m(x)[0],
    ),
    "Recurrent-gru": checked(
        lambda k: layers.Recurrent(16, 6, key=k, cell="gru", direction="reverse"),
        call=lambda m, x: m(x, mask=jnp.arange(5) < jnp.array([[3], [5]]))[0],
    ),
    "ScaleNorm": checked(lambda k: layers.ScaleNorm(16)),
    "SkipGate": checked(lambda k: layers.SkipGate(16, key=k, over="channels")),
    "SkipGate-tokens": checked(lambda k: layers.SkipGate(16, key=k), input_of((2, 16, 5))),
    "SkipScaling": checked(
        lambda k: layers.scale_skips("apart", sizes=(16, 16), over="channels", key=k),
        call=lambda m, x: sum(m([x, 2 * x])),
    ),
    "RoutedLinear": checked(mixed_updates),
    "Spatial": checked(
        lambda k: layers.Spatial(16, key=k, op="hybrid", stride=2), INPUT[:, :, None]
    ),
    "SparseGatedFFN": checked(sparse_ffn, input_of((2, 5, IN))),
    "TanhChain": checked(lambda k: layers.TanhChain(16, key=k, noise=0.1)),
    "Transmission": checked(lambda k: layers.Transmission(16, 8, key=k, noise=0.1)),
    # Bits have no slope: what goes around them has.
    "TwoBit": checked(lambda k: layers.TwoBit(16, 16, key=k), call=lambda m, x: m(x) + x),
}
