"""On the Initialization of Graph Neural Networks (2023, arXiv 2312.02622): the transform.

It looks at graphs, and draws the weights of a network on graphs anew, uniform with the variances of
`ffnlab.graphs.virgo_core`, where the formulas and what differs from the authors' code are. The
usual starts, from widths alone, are the same transform with other names.

    W_l ~ U(-a_l, a_l),   a_l = sqrt(3 variance_l);   biases are zero

Both maps of a GraphSAGE layer are drawn with the whole variance, as the authors draw them, though
what they give is added up: signals then grow by nearly twice a layer. `halved` gives each half of
it. Of attention the map that its heads share is drawn, while its scores start as they did. A is the
normalized matrix for all three kinds of layers, as the authors have it, with self loops where a
graph came without.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key, PyTree

from ffnlab import tree
from ffnlab.errors import ConfigError, NumericalError, check_seed, is_known
from ffnlab.graphs.virgo_core import (
    STARTS,
    HopNorms,
    check_start,
    hop_norms,
    joined,
    nothing_seen,
    variances,
)
from ffnlab.layers import GAT, GCN, GraphSAGE, Linear
from ffnlab.models import GraphNetwork
from ffnlab.models.graph_network import Repeated
from ffnlab.report import Rows, printed
from ffnlab.transform import Transform
from ffnlab.weights import Dense

__all__ = ["VirgoStats", "redrawn", "virgo"]

MAPS: dict[type[nnx.Module], tuple[str, ...]] = {
    GCN: ("linear",),
    GraphSAGE: ("own", "near"),
    GAT: ("linear",),
}
WHAT = {"forward": "the mean feature of each node", "backward": "ones"}


class VirgoStats(NamedTuple):
    """What graphs say of a start; prints as a table of layers.

    Attributes:
      norms: of the probes, by hop.
      variance: of the weights of each layer, by its path; 0 until all graphs were seen.
    """

    norms: HopNorms
    variance: dict[str, Float[Array, ""]]

    def __str__(self) -> str:
        rows = [
            {
                "layer": at(i),
                "variance": float(self.variance[at(i)]),
                "half-width": float(3 * self.variance[at(i)]) ** 0.5,
                "log norm forward": float(self.norms.forward[i]),
                "log norm backward": float(self.norms.backward[i]),
            }
            for i in range(len(self.variance))
        ]
        return printed(Rows(rows))


def at(i: int) -> str:
    """The path of a layer."""
    return f"layers[{i}]"


def virgo(
    *,
    start: str = "virgo",
    mean: str = "harmonic",
    classes: int | None = None,
    halved: bool = False,
    seed: int = 0,
) -> Transform[GraphNetwork, VirgoStats]:
    """The transform that draws the weights of a network on graphs from what graphs do to signals.

    Its batches are graphs with features as the network takes them, {"x", "graph"} and perhaps
    "weights", alone or first in a tuple; norms of several are added up, as of one graph that holds
    all of them. They should not be padded: a node that was added is a node.

    Args:
      start: "virgo" (the harmonic mean of the next two), "virgofor", "virgoback", or what asks for
        widths alone: "kaifor", "kaiback" (Kaiming by fan-in, by fan-out) or "xavier".
      mean: of "virgo", "harmonic" (the authors' default) or "normal".
      classes: what is divided by, less one, in the last layer; its width when None.
      halved: each of GraphSAGE's two maps has half of a layer's variance.
      seed: of the draw.
    Returns:
      a Transform of the name `start`; its stats are `VirgoStats`, which hang on the graphs and the
      widths, not on the weights that were there.
    Raises:
      ConfigError: another start or mean, fewer than two classes; from the transform, what is no
        `GraphNetwork` of scores with dense weights, or for virgo one of another nonlinearity than
        ReLU, whose half the formula has.
        Stats of no graph are refused by `rewrite`.
      NumericalError: from the transform, a probe that vanishes: features whose mean is 0 at every
        node, or a graph without edges.
    Source:
      LspongebobJH/virgo_icml2023, utils.py: `gen_c2_for`, `gen_c2_back`, `gen_c2`, `init_layers`.

    >>> virgo(start="xavier").name
    'xavier'
    """
    check_start(start, mean, classes)
    check_seed(seed)

    def decided(model: GraphNetwork, norms: HopNorms) -> Float[Array, "layers"]:
        found = variances(start, model.config.pairs, norms, mean=mean, classes=classes)
        return found / 2 if halved and model.config.layer == "sage" else found

    def init(model: nnx.Module) -> VirgoStats:
        network = checked(model, start)
        norms = nothing_seen(len(network.config.pairs))
        decided(network, norms)  # says what is wrong with the number of classes
        return VirgoStats(norms, {at(i): jnp.float32(0) for i in range(len(norms.forward))})

    @jax.jit
    def seen(norms: HopNorms, batch: Mapping[str, PyTree]) -> HopNorms:
        more = hop_norms(**batch, hops=len(norms.forward))
        return joined(norms, more)

    def observe(stats: VirgoStats, model: GraphNetwork, batch: PyTree) -> VirgoStats:
        return stats._replace(norms=seen(stats.norms, inputs_of(batch)))

    def advance(model: GraphNetwork, stats: VirgoStats) -> tuple[VirgoStats, bool]:
        check_norms(stats.norms, start)
        found = decided(model, stats.norms)
        return stats._replace(variance={at(i): v for i, v in enumerate(found)}), True

    def rewrite(model: GraphNetwork, stats: VirgoStats) -> GraphNetwork:
        each = [stats.variance[at(i)] for i in range(len(stats.variance))]
        if is_known(*each) and not min(map(float, each)) > 0:
            raise ConfigError("stats are of no graph: transform.calibrate shows them some")
        return redrawn(model, jnp.stack(each), jax.random.key(seed))

    return Transform(start, init, observe, rewrite, advance)


def redrawn(
    model: GraphNetwork, variance: Float[Array, "layers"], key: Key[Array, ""]
) -> GraphNetwork:
    """The network with weights drawn uniformly around 0, and biases of 0.

    Args:
      model: of any form, stacked or not; under `jax.vmap` too.
      variance: of the weights of each layer.
      key: of the draw.
    """
    flat, new = model.unstacked(), {}
    for i, layer in enumerate(flat.layers):
        names = MAPS[type(layer)]
        for name, k in zip(names, jax.random.split(jax.random.fold_in(key, i), 2), strict=False):
            new[f"{at(i)}.{name}"] = drawn(getattr(layer, name), variance[i], k)
        if hasattr(layer, "b"):
            new[f"{at(i)}.b"] = nnx.Param(jnp.zeros_like(layer.b[...]), axes=layer.b.axes)
    found = tree.replace(flat, new)
    return found.stacked() if is_stacked(model) else found


def drawn(linear: Linear, variance: Float[Array, ""], key: Key[Array, ""]) -> Linear:
    """A map with weights of a variance, and a bias of 0 where it has one."""
    w = linear.weight.dense()
    half = jnp.sqrt(3 * variance)
    entries = half * jax.random.uniform(key, w.shape, minval=-1, maxval=1)
    bias = None if linear.bias is None else jnp.zeros_like(linear.bias)
    return linear.replace(Dense(entries.astype(w.dtype)), bias)


def is_stacked(model: GraphNetwork) -> bool:
    """Whether layers of a network are scanned."""
    return any(isinstance(part, Repeated) for part in model.layers)


def inputs_of(batch: PyTree) -> Mapping[str, PyTree]:
    """The graph with features of a batch.

    Raises:
      ConfigError: it has none.
    """
    found = batch[0] if isinstance(batch, tuple) and batch else batch
    if not isinstance(found, Mapping) or not {"x", "graph"} <= set(found):
        raise ConfigError(
            f"batch is a {type(batch).__name__}; {{'x': features, 'graph': graph}} is accepted, "
            "alone or first in a tuple"
        )
    return {name: found[name] for name in ("x", "graph", "weights") if name in found}


def checked(model: object, start: str) -> GraphNetwork:
    """The network; ConfigError for what cannot be drawn."""
    if not isinstance(model, GraphNetwork):
        raise ConfigError(f"model is a {type(model).__name__}; a GraphNetwork is accepted")
    config = model.config
    if config.form != "scores":
        raise ConfigError(
            f"form={config.form!r}: layers that pass on directions forget how large their weights "
            "are; form='scores' is accepted"
        )
    if STARTS[start] and config.activation != "relu":
        raise ConfigError(
            f"activation={config.activation!r}: variances of {start!r} are those of 'relu'; "
            f"{[name for name, asked in STARTS.items() if not asked]} take any"
        )
    flat = model.unstacked()
    for i, layer in enumerate(flat.layers):
        for name in MAPS[type(layer)]:
            kind = type(getattr(layer, name).weight)
            if kind is not Dense:
                raise ConfigError(f"{at(i)}.{name} is {kind.__name__}; Dense weights are drawn")
    return model


def check_norms(norms: HopNorms, start: str) -> None:
    """Raises NumericalError where a probe that a start asks for is gone."""
    for name in STARTS[start]:
        finite = jnp.isfinite(getattr(norms, name))
        if not finite.all():
            raise NumericalError(
                f"{WHAT[name]} has norm 0, or none that is finite, behind hop "
                f"{int(finite.argmin()) + 1}: features whose mean is 0 at every node or that are "
                "not finite, or nodes without edges and self loops; "
                f"{[n for n, asked in STARTS.items() if name not in asked]} do not ask for it"
            )
