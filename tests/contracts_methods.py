"""The transforms, rules and probes that the contract tests run over. A new one joins by one line.

Transforms take `testing.tiny()` and `testing.batches()` unless a case says otherwise, a rule what
its case says.
`test_contracts_methods.py` fails when a factory of a method package is missing here.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree

from ffnlab import (
    analysis,
    editing,
    graphs,
    learning,
    models,
    pruning,
    quantization,
    routing,
    sparsity,
    structure,
    transform,
)
from ffnlab.data import block_model
from ffnlab.graph import with_self_loops
from ffnlab.layers import MLP, BatchNorm, Linear
from ffnlab.learning.exact_permutations import ensemble
from ffnlab.models import adapters
from ffnlab.models.convnet import ConvNet
from ffnlab.probe import Probe
from ffnlab.rule import Rule
from ffnlab.testing import ProbeCase, RuleCase, TransformCase, tiny, tiny_encoder


class Normed(nnx.Module):
    """Two maps with a batch norm after each."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        self.maps = nnx.List([Linear(4, 4, key=k, axes=("embed", "mlp")) for k in keys])
        self.norms = nnx.List([BatchNorm(4, axis="mlp") for _ in keys])

    def __call__(self, x):
        for linear, norm in zip(self.maps, self.norms, strict=True):
            x = jnp.tanh(norm(linear(x)))
        return x


def rows() -> list[jax.Array]:
    """Two batches of six rows of width 4."""
    return list(jax.random.normal(jax.random.key(1), (2, 6, 4)))


def reconstruction(model: MLP, batch: jax.Array) -> tuple[jax.Array, dict]:
    """The mean squared error of an autoencoder."""
    return jnp.mean((model(batch) - batch) ** 2), {}


def vit(pool: str = "token") -> models.ViT:
    """A vision transformer of two blocks."""
    config = models.ViTConfig((8, 8), 4, 16, 24, 2, 4, channels=2, classes=3, pool=pool)
    return models.ViT(config, key=jax.random.key(5))


def uvit() -> models.UViT:
    """A U-ViT of three blocks for `images`."""
    config = models.UViTConfig((8, 8), 2, 16, 24, 2, 4, channels=2)
    return models.UViT(config, key=jax.random.key(6))


def images() -> list[jax.Array]:
    """Two batches of two images for `vit` and `uvit`."""
    return list(jax.random.uniform(jax.random.key(3), (2, 2, 8, 8, 2)))


def chosen(**options: bool) -> models.Decoder:
    """The tiny decoder with a small FFN beside each of its own."""
    return transform.apply(routing.duo(ratio=8, **options), tiny())[0]


def updated(seed: int) -> models.Decoder:
    """The tiny decoder with low-rank updates."""
    return transform.apply(adapters.lora(rank=2, seed=seed), tiny())[0]


def repaired() -> models.ViT:
    """The vision transformer with idle channels."""
    return transform.apply(structure.repa(idle=0.5), vit("mean"))[0]


def replaced() -> models.Encoder:
    """The tiny encoder with random features in its FFNs."""
    return transform.apply(structure.snnk(features=6), tiny_encoder())[0]


def thin(with_guides: bool = False) -> models.Decoder:
    """The tiny decoder with low-rank FFNs."""
    model, _ = transform.apply(structure.structured(rank=4), tiny())
    return transform.apply(structure.guided(), model)[0] if with_guides else model


spanning = functools.partial(tiny_encoder, head="span")


def of_bytes() -> models.Decoder:
    """A decoder of two blocks over bytes."""
    config = models.DecoderConfig(256, 16, 32, layers=2, heads=2, kv_heads=1, head_dim=8)
    return models.Decoder(config, key=jax.random.key(8))


def fact() -> list[editing.Fact]:
    """Something for it to say."""
    return [editing.Fact("Al", "{} is", "x")]


def graph_network() -> models.GraphNetwork:
    """Four layers, the second and the third alike."""
    return models.GraphNetworkConfig((5, 8, 8, 8, 3)).make(key=jax.random.key(0))


def on_graphs() -> list[dict[str, PyTree]]:
    """Two batches of a graph of twelve nodes with features of width 5."""
    nodes = block_model(1, nodes=12, classes=3, width=5, inside=0.5, train=7, valid=3)
    graph = with_self_loops(nodes.graph)
    return [{"x": jnp.asarray(x), "graph": graph} for x in (nodes.x, nodes.x[::-1].copy())]


TRANSFORMS: dict[str, TransformCase] = {
    "adapter": TransformCase(lambda: adapters.adapter(bottleneck=3, seed=1)),
    "biases": TransformCase(adapters.biases),
    "bundle": TransformCase(structure.bundle, replaced),
    "bundled": TransformCase(lambda: structure.bundled(features=6)),
    "bundled-vit": TransformCase(lambda: structure.bundled(features=6), vit, images),
    "cats": TransformCase(lambda: sparsity.cats(sparsity=0.5)),
    "classifier": TransformCase(
        lambda: adapters.classifier(classes=3),
        functools.partial(tiny_encoder, head="classes", classes=3),
    ),
    "chess": TransformCase(lambda: sparsity.chess(sparsity=0.5)),
    "chess-abs-attention": TransformCase(
        lambda: sparsity.chess(sparsity=0.5, importance="abs", attention=True)
    ),
    "ensemble_scale": TransformCase(pruning.ensemble_scale),
    "expand": TransformCase(lambda: structure.expand(layers=4)),
    "expand-source": TransformCase(lambda: structure.expand(source=(0, 0, 2)), tiny_encoder),
    "duo": TransformCase(lambda: routing.duo(ratio=8, skip=True)),
    "finercut": TransformCase(lambda: pruning.finercut(remove=1)),
    "finercut-encoder": TransformCase(lambda: pruning.finercut(remove=1), tiny_encoder),
    "connect": TransformCase(
        lambda: routing.pal.connect(models.AudioInput((3,), ("attended",)), seed=1)
    ),
    "fireq-encoder": TransformCase(lambda: quantization.fireq(group=8), tiny_encoder),
    "fireq": TransformCase(lambda: quantization.fireq(group=8, top_k=1)),
    "fireq-weights": TransformCase(
        lambda: quantization.fireq(
            group=8, kv=None, query=None, channel=False, pre_rope=False, post_rope=False
        )
    ),
    "fitted_by": TransformCase(
        lambda: learning.fitted_by(
            learning.backprop(reconstruction, optax.adam(1e-2)), key=jax.random.key(0), passes=2
        ),
        lambda: MLP((4, 2, 4), key=jax.random.key(0)),
        rows,
    ),
    "group_norm": TransformCase(lambda: pruning.group_norm(rate=0.4, select="layers[*].ffn")),
    "group_norm-budget": TransformCase(lambda: pruning.group_norm(speed_up=1.5, steps=20)),
    "group_norm-mlp": TransformCase(
        lambda: pruning.group_norm(rate=0.5), lambda: MLP((4, 6, 3), key=jax.random.key(0)), rows
    ),
    "guided": TransformCase(structure.guided, thin),
    "head": TransformCase(adapters.head),
    "lora": TransformCase(lambda: adapters.lora(rank=2)),
    "lora_experts": TransformCase(lambda: routing.lora_experts(experts=2, rank=2)),
    "macaron": TransformCase(structure.macaron, vit, images),
    "macaron-kept": TransformCase(lambda: structure.macaron(start="kept")),
    "macaron-split": TransformCase(lambda: structure.macaron(start="split"), tiny_encoder),
    "macaron-twice": TransformCase(lambda: structure.macaron(start="twice")),
    "meta_prune": TransformCase(
        lambda: pruning.meta_prune(
            metanetwork=models.MetaNetworkConfig(2, 2, width=4).make(key=jax.random.key(7)),
            rate=0.4,
            select="layers[*].ffn",
        )
    ),
    "mixed": TransformCase(lambda: routing.mixed([updated(1), updated(2)])),
    "nearest": TransformCase(lambda: quantization.nearest(format="int4", group=8)),
    "nearest-encoder": TransformCase(lambda: quantization.nearest(group=8), tiny_encoder),
    "nearest-float8": TransformCase(
        lambda: quantization.nearest(format="float8", activations="e4m3")
    ),
    "nearest-vit": TransformCase(lambda: quantization.nearest(group=8), vit, images),
    "path_ensemble": TransformCase(lambda: pruning.path_ensemble(remove=2, how="greedy")),
    "path_ensemble-vit": TransformCase(
        lambda: pruning.path_ensemble(remove=2, distance="kl"), vit, images
    ),
    "pflayer": TransformCase(structure.pflayer, vit, images),
    "repa": TransformCase(structure.repa, vit, images),
    "repa_fold": TransformCase(lambda: structure.repa_fold(force=True), repaired, images),
    "scalelong": TransformCase(lambda: structure.scalelong(kappa=0.7), uvit, images),
    "scalelong-learned": TransformCase(
        lambda: structure.scalelong(method="apart", seed=1), uvit, images
    ),
    "share": TransformCase(lambda: structure.share(repeats=(2, 1))),
    "snnk": TransformCase(lambda: structure.snnk(features=6)),
    "snnk_adapter": TransformCase(lambda: structure.snnk_adapter(features=3)),
    "snnk-cos": TransformCase(lambda: structure.snnk(kind="cos", length=1.0), tiny_encoder),
    "structured": TransformCase(lambda: structure.structured(rank=4)),
    "structured-blocks": TransformCase(
        lambda: structure.structured(form="block_shuffle", start="spectral"), tiny_encoder
    ),
    "structured-vit": TransformCase(
        lambda: structure.structured(form="block_dense", rank=8, first=True), vit, images
    ),
    "population_norms": TransformCase(models.population_norms, Normed, rows),
    "untie": TransformCase(lambda: routing.untie(starts=(32,))),
    "untie-drawn": TransformCase(
        lambda: routing.untie(starts=(20, 40), copies="drawn", norm="output")
    ),
    "switch_head": TransformCase(
        lambda: routing.switch_head(experts=2, hidden=8, layers=2, heads=2), spanning
    ),
    "top2_head": TransformCase(lambda: routing.top2_head(experts=3, hidden=8), spanning),
    "pmet": TransformCase(
        lambda: editing.pmet(fact(), layers=(0, 1), prefixes=(), steps=2, preserve=9.0), of_bytes
    ),
    "unguided": TransformCase(lambda: structure.unguided(force=True), lambda: thin(True)),
    "upcycle": TransformCase(lambda: routing.upcycle(experts=4)),
    "premerged": TransformCase(lambda: structure.premerged(rows=64), thin),
    "principal": TransformCase(
        lambda: analysis.principal(rows()[0], components=2),
        lambda: MLP((4, 6, 3), key=jax.random.key(0)),
        rows,
    ),
    "prompts": TransformCase(lambda: adapters.prompts(tokens=2)),
    "virgo": TransformCase(graphs.virgo, graph_network, on_graphs),
    "virgo-xavier": TransformCase(lambda: graphs.virgo(start="xavier"), graph_network, on_graphs),
    "with_routers": TransformCase(routing.with_routers, lambda: chosen(skip=False)),
}


def labelled() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two batches of six inputs of width 5 with one of four classes each."""
    random = np.random.default_rng(0)
    xs = random.normal(size=(2, 6, 5)).astype(np.float32)
    return list(zip(xs, random.integers(0, 4, (2, 6)), strict=True))


PLAIN = functools.partial(MLP, (5, 8, 7, 4), bias=False)


def classifier(make: Callable[[], Rule], network: Callable = PLAIN) -> RuleCase:
    """A rule for labelled inputs, on a small network made from a key."""
    model = functools.partial(network, key=jax.random.key(0))
    return RuleCase(make, model, labelled, lambda batch: jax.numpy.asarray(batch[0]))


PLAIN_OF = lambda key: PLAIN(key=key)  # noqa: E731


def several() -> Rule:
    """Three members of backpropagation, two at a time, each at a rate of its own."""
    one = lambda rate: learning.backprop(learning.labelled, optax.adam(rate))  # noqa: E731
    return learning.members(one, 3, vary={"rate": [1e-2, 1e-3, 1e-4]}, chunk=2)


def a_row_for_each_of_three(outputs: PyTree, inputs: PyTree) -> None:
    """Holds scores of each input by each member."""
    assert outputs.shape == (3, len(inputs), 4), f"outputs are {outputs.shape}"


def scheduled(key: jax.Array) -> learning.NoPropNet:
    """A network of NoProp that learns its embedding and its noise schedule."""
    schedule = learning.LearnedSchedule(4, key=key)
    options = {"blocks": None, "embedding": 3, "schedule": schedule}
    return learning.NoPropNet(5, 4, hidden=6, key=key, **options)


def two_domains() -> list[tuple]:
    """Batches of a source of six labelled inputs and a target of as many, moved by one."""
    return [((x, y), x[::-1] + 1) for x, y in labelled()]


def of_two_domains(make: Callable[[], Rule], network: Callable = PLAIN) -> RuleCase:
    """A rule for a source and a target."""
    inputs = lambda batch: jnp.asarray(batch[0][0])  # noqa: E731
    return dataclasses.replace(classifier(make, network), batches=two_domains, inputs=inputs)


def halves() -> list[tuple]:
    """Pairs of batches: rows for weights, and others for what is searched."""
    one, other = labelled()
    return [(one, other), (other, one)]


def task_rows() -> list[learning.TaskRows]:
    """The two batches of `labelled`, of two tasks."""
    return [learning.TaskRows(np.int32(task), rows) for task, rows in enumerate(labelled())]


def hypernet(**options: str | int) -> models.Hypernet:
    """A hypernetwork of three tasks for a small network."""
    spec = models.HypernetSpec(outputs="chunk_wise", tasks=3, hidden=(6,), chunk=16, **options)
    return models.HypernetConfig(models.MLPConfig((5, 8, 4)), spec).make(key=jax.random.key(0))


def a_row_for_each(outputs: PyTree, inputs: models.Tasked) -> None:
    """Holds scores of each input."""
    assert outputs.shape == (len(inputs.x), 4), f"outputs are {outputs.shape}"


def around_systems(key: jax.Array, system: str = "transmission") -> models.PhysicalNet:
    """A network of two physical systems."""
    config = models.PhysicalConfig(5, 4, (8, 6), system, skip=True, slots=4, noise=0.1)
    return config.make(key=key)


def graph_batch(**options: object) -> learning.GraphBatch:
    """A graph of 12 nodes of three classes, some to learn from and some held out."""
    nodes = block_model(1, nodes=12, classes=3, width=5, inside=0.5, train=7, valid=3)
    return learning.node_batch(nodes, learning.ForwardGNNOptions(**options))


def on_graph(sizes: tuple[int, ...], **options: object) -> RuleCase:
    """Forward learning of a graph network, one way of it."""
    form = "top_down" if options.get("top_down") == "input" else "layerwise"
    config = models.GraphNetworkConfig(sizes, form=form)
    make = functools.partial(graph_batch, **options)

    def a_row_for_each_node(outputs: PyTree, inputs: PyTree) -> None:
        assert outputs.shape == (12, 3), f"outputs are {outputs.shape}"

    return RuleCase(
        lambda: learning.forward_gnn(make(), learning.ForwardGNNOptions(**options)),
        lambda: config.make(key=jax.random.key(0)),
        lambda: [make(), make()],
        lambda batch: batch.inputs if batch.asked is None else batch.asked,
        a_row_for_each_node,
    )


def confidence(model: MLP, batch: tuple) -> jax.Array:
    """The lower the cross-entropy, the higher."""
    return -learning.labelled(model, batch)[0]


RULES: dict[str, RuleCase] = {
    "backprop": RuleCase(learning.backprop),
    "continual": RuleCase(
        lambda: learning.continual(learning.ContinualOptions(importance="fisher")),
        functools.partial(hypernet, architecture="rnn"),
        task_rows,
        lambda batch: models.Tasked(jnp.asarray(batch.rows[0]), batch.task),
        a_row_for_each,
    ),
    "counter_current": classifier(learning.counter_current),
    "dann": of_two_domains(lambda: learning.dann(ramp=4)),
    "dann-source": classifier(lambda: learning.dann(strength=0.0)),
    "exact_permutations": RuleCase(
        lambda: learning.exact_permutations(4, 8, 3, chunk=2),
        lambda: ensemble.networks(4, 8, 3, jax.random.key(0)),
        lambda: [ensemble.basis([2, 0, 3, 1])] * 2,
        lambda batch: jnp.asarray(batch[0]),
        check=a_row_for_each_of_three,
    ),
    "digital_twin": classifier(
        lambda: learning.digital_twin(hidden=(6,), measured=1),
        functools.partial(around_systems, system="tanh_chain"),
    ),
    "early_stopping": classifier(
        lambda: learning.early_stopping(
            learning.backprop(learning.labelled), confidence, every=1, patience=1
        )
    ),
    "forward_gnn": on_graph((5, 4, 4)),
    "forward_gnn-labels": on_graph((8, 4), objective="label_appending"),
    "forward_gnn-top_down": on_graph((5, 4, 4, 3), top_down="input"),
    "members": dataclasses.replace(
        classifier(several, lambda key: jax.vmap(PLAIN_OF)(jax.random.split(key, 3))),
        check=a_row_for_each_of_three,
    ),
    "noprop": classifier(
        learning.noprop, functools.partial(learning.NoPropNet, 5, 4, hidden=6, blocks=3)
    ),
    "noprop-continuous": classifier(
        lambda: learning.noprop(learning.NoPropOptions("continuous", 1.0, integration=3)),
        scheduled,
    ),
    "sparse_group": classifier(
        lambda: graphs.sparse_group(5, l1=1e-3, l2=1e-3), functools.partial(MLP, (5, 4))
    ),
    "shallow_dann": of_two_domains(
        learning.shallow_dann, functools.partial(MLP, (5, 8, 4), activation="sigmoid")
    ),
    "tas": RuleCase(
        lambda: pruning.tas(example=jax.ShapeDtypeStruct((1, 5), jnp.float32), steps=10),
        functools.partial(PLAIN, key=jax.random.key(0)),
        halves,
        lambda batch: jnp.asarray(batch[0][0]),
    ),
    "physical_ff": classifier(lambda: learning.physical_ff(inner=2), around_systems),
    "physical_ff-mlp": classifier(lambda: learning.physical_ff(inner=2)),
}


def pictures() -> list[tuple[np.ndarray, np.ndarray]]:
    """Two batches of three images [4, 4, 2] with one of four classes each."""
    random = np.random.default_rng(0)
    xs = random.normal(size=(2, 3, 4, 4, 2)).astype(np.float32)
    return list(zip(xs, random.integers(0, 4, (2, 3)), strict=True))


def on_inputs(model: PyTree, batch: PyTree) -> PyTree:
    """The model's output for labelled inputs."""
    return model(batch[0])


# Besides the Decoder: what a probe looks at, and batches for it.
NETWORKS: dict[str, dict] = {
    "mlp": {"model": lambda: PLAIN_OF(jax.random.key(0)), "batches": labelled},
    "convnet": {
        "model": lambda: ConvNet((2, 3, 5), 4, key=jax.random.key(0)),
        "batches": pictures,
    },
}


def aligned(loss: Callable, **options: str) -> Probe:
    """The step of plain gradient descent, beside the gradient."""
    rule = learning.backprop(loss, optax.sgd(0.1))
    return analysis.gradient_alignment(rule, loss, **options)


def in_halves(network: str) -> dict[str, Callable]:
    """A network, and its batches with two classes."""
    given = NETWORKS[network]
    return given | {"batches": lambda: [(x, y // 2) for x, y in given["batches"]()]}


def lossy(network: str, select: str) -> Probe:
    """A component of each layer, with noise, as twelve rows allow."""
    model, batches = (in_halves(network)[part]() for part in ("model", "batches"))
    fitted = transform.calibrate(
        analysis.principal(jnp.asarray(batches[0][0])), model, batches, progress=False
    )
    return analysis.lossy_information(fitted, select=select, components=1, neighbours=1, jitter=0.1)


def probed(make: Callable, of_network: Callable, **options: object) -> dict[str, ProbeCase]:
    """One probe of every network; of the Decoder by its first factory, without a suffix."""
    found = {"": ProbeCase(make, **options)}
    return found | {
        f"-{name}": ProbeCase(of_network, **given, **options) for name, given in NETWORKS.items()
    }


def views() -> dict[str, graphs.View]:
    """Two embeddings of eight nodes."""
    zs = jax.random.normal(jax.random.key(4), (2, 2, 8, 3))
    return {name: graphs.View(*pair) for name, pair in zip("UF", zs, strict=True)}


def pair_batches() -> list[graphs.PairRows]:
    """Two batches of twelve pairs, of which every third is scored."""
    ends = np.random.default_rng(2).integers(8, size=(2, 12, 2)).astype(np.int32)
    scored = np.arange(12) % 3 == 0
    return [graphs.PairRows(e, e.sum(1) % 2 == 0, scored) for e in ends]


def node_batches() -> list[graphs.NodeRows]:
    """Four nodes and four, of two classes."""
    nodes = np.arange(8, dtype=np.int32).reshape(2, 4)
    return [graphs.NodeRows(each, each % 2, np.arange(4) > 1) for each in nodes]


PROBES: dict[str, ProbeCase] = {
    f"{name}{network}": case
    for name, cases in {
        "compiled_cost": probed(
            analysis.compiled_cost,
            lambda: analysis.compiled_cost(on_inputs),
            same_stacked=False,
        ),
        "gradient_alignment": probed(
            lambda: aligned(learning.next_token),
            lambda: aligned(learning.labelled),
            unmatched=lambda: aligned(learning.next_token, select="nowhere"),
        ),
        "information_plane": {
            "": ProbeCase(
                functools.partial(analysis.information_plane, select="layers[*].ffn.up", bins=3),
                unmatched=lambda: analysis.information_plane(select="nowhere"),
            ),
            "-mlp": ProbeCase(
                functools.partial(analysis.information_plane, bins=4, low=0.0, high=3.0),
                unmatched=lambda: analysis.information_plane(select="nowhere"),
                **NETWORKS["mlp"],
            ),
            "-convnet": ProbeCase(
                functools.partial(analysis.information_plane, select="convs[*]", adaptive=True),
                unmatched=lambda: analysis.information_plane(select="nowhere"),
                **NETWORKS["convnet"],
            ),
        },
        "interpretation": probed(analysis.interpretation, analysis.interpretation, rtol=1e-3),
        "lossy_information": {
            "-mlp": ProbeCase(
                lambda: lossy("mlp", "maps[*]"),
                unmatched=lambda: lossy("mlp", "nowhere"),
                **in_halves("mlp"),
            ),
            "-convnet": ProbeCase(
                lambda: lossy("convnet", "convs[*]"),
                unmatched=lambda: lossy("convnet", "nowhere"),
                **in_halves("convnet"),
            ),
        },
        "netinfof": {"": ProbeCase(lambda: graphs.netinfof(bins=3), views, pair_batches)},
        "netinfof_nodes": {
            "": ProbeCase(lambda: graphs.netinfof_nodes(bins=3), views, node_batches)
        },
        "weight_norms": probed(
            analysis.weight_norms,
            analysis.weight_norms,
            unmatched=lambda: analysis.weight_norms(select="nowhere"),
        ),
        "oracle": {"": ProbeCase(routing.oracle, lambda: chosen(skip=True))},
    }.items()
    for network, case in cases.items()
}
