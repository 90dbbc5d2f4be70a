"""Forward learning of graph networks, beside backpropagation of equal depth.

On stochastic block models, and in the full form on Cora: the single-forward rule layer by layer,
the forward-forward rules that need negative examples, layers told from above, three kinds of layer,
and hidden edges. Both sides try as many rates and keep their best parameters by one validation.
Memory by depth is read from compiled programs; which layer's loss reaches which layer, from a
Jacobian.
"""

import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ffnlab.data import block_model, cora, find_folder, link_split
from ffnlab.learning import ForwardGNNOptions, node_batch
from ffnlab.learning.forward_gnn.layerwise import Method, layer_losses
from ffnlab.learning.forward_gnn.objectives import objective_of
from ffnlab.models import GraphNetworkConfig
from ffnlab.storage.files import StrPath
from ffnlab.studies import STUDIES, tuning
from ffnlab.studies import forward_gnn_claims as said
from ffnlab.studies import forward_gnn_measure as measure
from ffnlab.studies.forward_gnn_claims import (
    BP,
    CORA,
    FEATURES,
    FF,
    LINKS,
    SBM,
    SF,
    TOLD,
    Curves,
    Sizes,
    named,
)
from ffnlab.studies.forward_gnn_measure import BLOCKS, Budget, Way
from ffnlab.studies.result import Claim, Result
from ffnlab.studies.tuning import Tuned

__all__ = ["run"]


def sizes_of(seed: int, quick: bool) -> Sizes:
    """Of either form."""
    if quick:
        short = Budget((3e-3, 3e-2), 500, 10, 20, 50)
        return Sizes([seed], 64, (1, 2, 3), short, short, (2, 4), 600, False)
    blocks = Budget((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 500, 10, 20, 20)
    of_cora = Budget((1e-3, 3e-3, 1e-2, 3e-2), 200, 5, 15, 1)
    seeds = [seed, seed + 1, seed + 2]
    return Sizes(seeds, 64, (1, 2, 3), blocks, of_cora, (1, 2, 3, 4, 5, 6), 600, True)


def run(*, out: StrPath | None = None, quick: bool = False, seed: int = 0) -> Result:
    """The study; arguments as for `ffnlab.studies.run.run_study`."""
    begin = time.perf_counter()
    sizes = sizes_of(seed, quick)
    found = {SBM: on_blocks(sizes)}
    if sizes.is_full and find_folder("planetoid_cora") is not None:
        found |= {CORA: on_cora(sizes), LINKS: on_links(sizes)}
    curves = memory(sizes)
    return Result(
        slug="forward-gnn",
        title=STUDIES["forward-gnn"].title,
        settings={
            "block models": dict(BLOCKS),
            "hidden": sizes.hidden,
            "optimizer": f"Adam, {measure.DECAY} of the parameters added to gradients",
            "budget of block models": sizes.blocks._asdict(),
            "budget of cora": sizes.cora._asdict(),
            "validation": tuning.trials(found),
            "seeds": list(sizes.seeds),
        },
        seed=seed,
        quick=quick,
        seconds=time.perf_counter() - begin,
        claims=[
            *said.depth_claims(found, sizes),
            *said.other_claims(found, sizes),
            said.memory_claim(curves, sizes),
            locality_claim(seed),
        ],
        table=[*tuning.table(found), *said.memory_rows(curves)],
        pictures={
            "accuracy_by_depth": lambda figure: said.draw_accuracy(figure, found, sizes),
            "memory_by_depth": lambda figure: said.draw_memory(figure, curves),
        },
    ).write(out)


def layered(width: int, hidden: int, depth: int, **more: Any) -> GraphNetworkConfig:
    """A network whose layers learn one by one."""
    return GraphNetworkConfig((width, *[hidden] * depth), form="layerwise", **more)


def scored(width: int, hidden: int, depth: int, outputs: int, **more: Any) -> GraphNetworkConfig:
    """A network of as many layers for backpropagation."""
    return GraphNetworkConfig((width, *[hidden] * (depth - 1), outputs), **more)


def by_depth(
    width: int, classes: int, sizes: Sizes, budget: Budget, graphs: Sequence[Any]
) -> dict[str, Tuned]:
    """Both sides at every depth: the rule in one run of the deepest, of which all are parts."""
    deepest = layered(width, sizes.hidden, max(sizes.depths))
    way = measure.by_forward(ForwardGNNOptions(), deepest, budget, sizes.depths)
    of_depth = measure.tuned(way, budget, graphs, sizes.seeds)
    found = {named(SF, depth): one for depth, one in of_depth.items()}
    for depth in sizes.depths:
        config = scored(width, sizes.hidden, depth, classes)
        through = measure.by_backprop(config, budget)
        found[named(BP, depth)] = one_of(through, budget, graphs, sizes.seeds)
    return found | {FEATURES: measure.by_features(graphs, sizes.seeds)}


def one_of(way: Way, budget: Budget, graphs: Sequence[Any], seeds: Sequence[int]) -> Tuned:
    """What a way of a single depth reaches."""
    return next(iter(measure.tuned(way, budget, graphs, seeds).values()))


def on_blocks(sizes: Sizes) -> dict[str, Tuned]:
    """All ways on block models: another graph for each seed."""
    graphs = measure.block_graphs(sizes.seeds)
    width, classes, hidden, budget = BLOCKS["width"], BLOCKS["classes"], sizes.hidden, sizes.blocks

    def reached(options: ForwardGNNOptions, config: GraphNetworkConfig) -> Tuned:
        way = measure.by_forward(options, config, budget)
        return one_of(way, budget, graphs, sizes.seeds)

    found = by_depth(width, classes, sizes, budget, graphs)
    appended = layered(width + classes, hidden, 2)
    found[named(FF["label_appending"], 2)] = reached(ForwardGNNOptions("label_appending"), appended)
    if not sizes.is_full:
        return found
    two = layered(width, hidden, 2)
    found[named(FF["virtual_nodes"], 2)] = reached(ForwardGNNOptions("virtual_nodes"), two)
    fed = GraphNetworkConfig((width, hidden, hidden, classes), form="top_down")
    for signal, config in (("input", fed), ("loss", two)):
        found[named(TOLD[signal], 2)] = reached(ForwardGNNOptions(top_down=signal), config)
    for layer, more in (("sage", {}), ("gat", {"heads": 4})):
        config = layered(width, hidden, 2, layer=layer, **more)
        found[f"{named(SF, 2)}, {layer}"] = reached(ForwardGNNOptions(), config)
        through = scored(width, hidden, 2, classes, layer=layer, **more)
        way = measure.by_backprop(through, budget)
        found[f"{named(BP, 2)}, {layer}"] = one_of(way, budget, graphs, sizes.seeds)
    return found


def on_cora(sizes: Sizes) -> dict[str, Tuned]:
    """Both sides on Cora at every depth: other first weights for each seed."""
    nodes = cora()
    graphs = [nodes] * len(sizes.seeds)
    return by_depth(nodes.x.shape[1], int(nodes.y.max()) + 1, sizes, sizes.cora, graphs)


def on_links(sizes: Sizes) -> dict[str, Tuned]:
    """Hidden edges of Cora, found by layers of their own losses and by backpropagation."""
    split = link_split(cora(), sizes.seeds[0])
    graphs, width = [split] * len(sizes.seeds), split.x.shape[1]
    ours = layered(width, sizes.hidden, 2)
    ways = {
        SF: measure.by_forward(ForwardGNNOptions("links"), ours, sizes.cora),
        BP: measure.links_by_backprop(scored(width, sizes.hidden, 2, sizes.hidden), sizes.cora),
    }
    return {
        named(name, 2): one_of(way, sizes.cora, graphs, sizes.seeds) for name, way in ways.items()
    }


def memory(sizes: Sizes) -> Curves:
    """What a step needs, by depth, of both sides."""
    share = sizes.nodes / BLOCKS["nodes"]  # as many edges of a node in a graph of any size
    given = BLOCKS | {"nodes": sizes.nodes} | {k: BLOCKS[k] / share for k in ("inside", "across")}
    parts = {"train": int(0.64 * sizes.nodes), "valid": int(0.16 * sizes.nodes)}
    nodes = block_model(0, **given, **parts)
    width, classes, hidden, budget = BLOCKS["width"], BLOCKS["classes"], sizes.hidden, sizes.blocks
    options = ForwardGNNOptions()
    return {
        SF: {
            depth: measure.memory_of(
                measure.by_forward(options, layered(width, hidden, depth), budget), nodes
            )
            for depth in sizes.memory
        },
        BP: {
            depth: measure.memory_of(
                measure.by_backprop(scored(width, hidden, depth, classes), budget), nodes
            )
            for depth in sizes.memory
        },
    }


def locality_claim(seed: int) -> Claim:
    """Which layers each layer's loss moves."""
    options, depth = ForwardGNNOptions(), 4
    nodes = block_model(seed, nodes=60, classes=3, width=8, inside=0.2, train=30, valid=10)
    batch = jax.tree.map(jnp.asarray, node_batch(nodes, options, seed=seed))
    method = Method(options, objective_of(options, 3), optax.identity())
    model = layered(8, 16, depth).make(key=jax.random.key(seed))
    losses = lambda model: jnp.stack(layer_losses(method, model, batch))  # noqa: E731
    moved = np.zeros((depth, depth), bool)
    for j, layer in enumerate(jax.jit(jax.jacobian(losses))(model).layers):
        for leaf in jax.tree.leaves(layer):
            moved[:, j] |= np.any(np.asarray(leaf).reshape(depth, -1) != 0, axis=1)
    crossing = int((moved & ~np.eye(depth, dtype=bool)).sum())
    return Claim(
        "no error crosses a layer",
        "purely local losses",
        f"{crossing} of {depth * (depth - 1)} pairs of layers have a gradient",
        crossing == 0 and bool(moved.diagonal().all()),
        "Jacobian of the losses of all layers by the parameters of all, exactly 0 but on its "
        "diagonal",
        seeds=1,
    )
