"""Weights of the official OneForecast, NNG and GraphCast classes, by the names of their parameters.

`YuanGao-YG/OneForecast` keeps its state as torch does; saved as safetensors (`safetensors.torch
.save_file(model.state_dict(), …)`), its parameters have the names below. Their processor is three
stacks, of one block, all but two, and one: `processor_encoder`, `processor`, `processor_decoder`.
The GraphCast of the same repository has the names of blocks that are not gated.
"""

import jax
import numpy as np

from ffnlab.formats.named_tensors import Named, Source, filled, matrix, of_linear, opened
from ffnlab.layers.mesh import EdgeMLP, MeshBlock, NormedMLP
from ffnlab.layers.stacking import stack_modules
from ffnlab.models.oneforecast import Crossing, OneForecast, OneForecastConfig
from ffnlab.models.stack import Stacked, with_layers
from ffnlab.storage.files import StrPath

__all__ = ["load_oneforecast"]

EMBEDDERS = {
    "of_grid": "encoder_embedder.grid_node_mlp",
    "of_node": "encoder_embedder.mesh_node_mlp",
    "of_up": "encoder_embedder.grid2mesh_edge_mlp",
    "of_mesh": "encoder_embedder.mesh_edge_mlp",
    "of_down": "decoder_embedder.mesh2grid_edge_mlp",
    "keep": "encoder.src_node_mlp",
    "last": "finale",
}
CROSSINGS = {"up": ("encoder", "dst_node_mlp"), "down": ("decoder", "node_mlp")}
IGNORED = ("device_buffer",)  # an empty one, by which their classes find their device
PARTS = {"of_edge": "lin_efeat", "of_sender": "lin_src", "of_receiver": "lin_dst"}


def load_oneforecast(file: StrPath, config: OneForecastConfig) -> OneForecast:
    """Loads official weights.

    Args:
      file: safetensors of float32.
      config: of the model; `gated=False` reads the GraphCast of the same repository.
    Raises:
      FormatError: no such file, a damaged one, or not all of the model, or more than that.
    """
    source = opened(file)
    shapes = jax.eval_shape(lambda key: OneForecast(config, key=key), jax.random.key(0))
    one = jax.eval_shape(lambda key: block_like(config, key), jax.random.key(0))
    stacks = [("processor_encoder", 1), ("processor", config.blocks - 2), ("processor_decoder", 1)]
    places = [(f"{stack}.processor_layers", 2 * i) for stack, count in stacks for i in range(count)]
    blocks = [filled(one, of_block(source, one, *place)) for place in places]
    model = with_layers(shapes, Stacked([stack_modules(blocks)], len(blocks)))
    model = filled(model, of_ends(source, model))
    source.check_all_taken(IGNORED)
    return model


def block_like(config: OneForecastConfig, key: jax.Array) -> MeshBlock:
    """A block of the model by itself."""
    return MeshBlock(config.width, key=key, heads=config.heads, gated=config.gated)


def of_ends(source: Source, model: OneForecast) -> Named:
    """(path, value) of all but the blocks."""
    for name, theirs in EMBEDDERS.items():
        yield from of_normed(source, getattr(model, name), name, f"{theirs}.model")
    for name, (theirs, node) in CROSSINGS.items():
        part: Crossing = getattr(model, name)
        yield from of_edge(source, part.edge, f"{name}.edge", f"{theirs}.edge_mlp")
        yield from of_normed(source, part.node, f"{name}.node", f"{theirs}.{node}.model")


def of_block(source: Source, block: MeshBlock, stack: str, first: int) -> Named:
    """(path, value) of a block, whose edges and nodes are two entries of their stack."""
    edges, nodes = f"{stack}.{first}", f"{stack}.{first + 1}"
    yield from of_edge(source, block.edge, "edge", f"{edges}.edge_mlp")
    yield from of_normed(source, block.node, "node", f"{nodes}.node_mlp.model")
    if block.gate is None or block.score is None:
        return
    hidden, out = block.gate.last.weight.shape
    width = block.gate.of_edge.weight.shape[0]
    whole = source.take(f"{edges}.gate_net.0.weight", (hidden, 3 * width)).T
    for part, rows in zip(PARTS, np.split(whole, 3), strict=True):
        yield f"gate.{part}.w", matrix(rows.T)
    yield "gate.of_receiver.b", source.take(f"{edges}.gate_net.0.bias", (hidden,))
    yield from of_linear(source, "gate.last", f"{edges}.gate_net.2", (hidden, out))
    for i, place in enumerate((0, 2)):
        shape = block.score.maps[i].weight.shape
        yield from of_linear(source, f"score.maps[{i}]", f"{nodes}.attn_net.{place}", shape)


def of_edge(source: Source, mlp: EdgeMLP, path: str, name: str) -> Named:
    """(path, value) of an edge's MLP."""
    hidden, out = mlp.last.weight.shape
    for part, theirs in PARTS.items():
        shape = (hidden, getattr(mlp, part).weight.shape[0])
        yield f"{path}.{part}.w", matrix(source.take(f"{name}.{theirs}", shape))
    yield f"{path}.of_receiver.b", source.take(f"{name}.bias", (hidden,))
    yield from of_linear(source, f"{path}.last", f"{name}.model.1", (hidden, out))
    yield from of_norm(source, mlp.norm, f"{path}.norm", f"{name}.model.2")


def of_normed(source: Source, mlp: NormedMLP, path: str, name: str) -> Named:
    """(path, value) of two maps and their norm."""
    for i, place in enumerate((0, 2)):
        shape = mlp.mlp.maps[i].weight.shape
        yield from of_linear(source, f"{path}.mlp.maps[{i}]", f"{name}.{place}", shape)
    yield from of_norm(source, mlp.norm, f"{path}.norm", f"{name}.3")


def of_norm(source: Source, norm: object, path: str, name: str) -> Named:
    """(path, value) of a norm, if there is one."""
    if norm is not None:
        (width,) = norm.scale.get_value().shape  # type: ignore[attr-defined]
        yield f"{path}.scale", source.take(f"{name}.weight", (width,))
        yield f"{path}.bias", source.take(f"{name}.bias", (width,))
