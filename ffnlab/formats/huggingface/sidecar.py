"""`ffnlab.json`: what a model does that a Hugging Face directory cannot say.

The file holds, as JSON (version 1): the number of blocks and their windows, the sublayers that were
removed, per block the formats of cache and queries, post-RoPE key scales and activation thresholds,
and per linear map the activation format and the input threshold. Arrays are lists of numbers, which
say every float32 exactly; an infinite threshold is the string "inf".

A weight in a format of ours (INT4, masked, low rank, …) is in the tensors as the dense matrix it
stands for; `stored` tells what it was and is for readers. Where the tensors are quantized
(`ffnlab.formats.compressed_tensors.reading`), `scales` tells the form that the scales had.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab import tree
from ffnlab.errors import FormatError
from ffnlab.formats.compressed_tensors.packing import in_format
from ffnlab.formats.directory import SIDECAR_FILE
from ffnlab.formats.huggingface.dialects import Config, Model
from ffnlab.formats.huggingface.sidecar_schema import (
    OUTER,
    VERSION,
    BlockExtra,
    LinearExtra,
    ScalesExtra,
    Sidecar,
    keeps_empty_blocks,
    parse,
)
from ffnlab.formats.untrusted import inside, read_json
from ffnlab.layers import Attention, Block, GroupedLinear, Linear, SparseGatedFFN
from ffnlab.layers.linear import Map
from ffnlab.models.config import DecoderConfig
from ffnlab.models.decoder import Decoder
from ffnlab.models.remove import removed
from ffnlab.models.stack import unstack
from ffnlab.storage.files import write_json
from ffnlab.weights import Dense, Int4, Int8, LoRA, SparseInput, Transposed, Weight

M = TypeVar("M", bound=Model)
LINEARS = (
    *("attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"),
    *("ffn.router", "ffn.experts.gate", "ffn.experts.up", "ffn.experts.down"),
)


def read(directory: Path, config: Config) -> Sidecar | None:
    """Reads and checks the sidecar of a model directory; None if it has none.

    Args:
      directory: the model directory.
      config: what its config.json says.
    Raises:
      FormatError: the file is not a sidecar, is of a later version, or does not fit the model.
    """
    file = directory / SIDECAR_FILE
    if not file.exists() and not file.is_symlink():
        return None
    return parse(read_json(inside(directory, SIDECAR_FILE)), config, file)


def write(directory: Path, extra: Sidecar) -> None:
    """Writes the sidecar of a model directory."""
    write_json(directory / SIDECAR_FILE, _to_json(extra))


def extract(model: Model) -> Sidecar:
    """What has to be said about a model beside its config and its dense matrices.

    Raises:
      FormatError: a LoRA whose base rounds or thresholds its input, which is neither a dense matrix
        nor something that the sidecar can say.
    """
    model = unstack(model)
    blocks, linears = {}, {}
    for i, block in enumerate(model.blocks()):
        found = _block_extra(block)
        if found != BlockExtra():
            blocks[i] = found
        for name in LINEARS:
            linear = _linear(block, name)
            if linear is None:
                continue
            said = _linear_extra(f"layers[{i}].{name}", linear.weight, _usual(block, name))
            if said != LinearExtra():
                linears[f"layers[{i}].{name}"] = said
    for name in OUTER:
        linear = _linear(model, name)
        if linear is not None:
            said = _linear_extra(name, linear.weight, Dense)
            linears |= {name: said} if said != LinearExtra() else {}
    config, units = model.config, tuple(removed(model))
    windows = config.windows if isinstance(config, DecoderConfig) else None
    whole = keeps_empty_blocks(config)
    return Sidecar(config.layers, windows, units, blocks, linears, whole)


def _usual(block: Block, name: str) -> type:
    sparse = name == "ffn.up" and isinstance(block.ffn, SparseGatedFFN)
    return Transposed if sparse else Dense


def _linear(module: nnx.Module, name: str) -> Map | None:
    """The linear map at a path in a block or a model; None where there is none."""
    inner = lambda part, field: getattr(part, field, None)  # noqa: E731
    found = functools.reduce(inner, name.split("."), module)
    return found if isinstance(found, Linear | GroupedLinear) else None


def _block_extra(block: Block) -> BlockExtra:
    attn, ffn = block.attn, block.ffn
    fields: dict[str, object] = {}
    if isinstance(attn, Attention):
        fields |= {"kv_format": attn.spec.kv_format, "query_format": attn.spec.query_format}
        if attn.post_scale is not None:
            fields["post_scale"] = _tuples(attn.post_scale.get_value())
    if isinstance(ffn, SparseGatedFFN):
        fields |= {"threshold": _tuples(ffn.threshold.get_value()), "strict": ffn.strict}
    return BlockExtra(**fields)  # type: ignore[arg-type]


def _tuples(values: object) -> tuple:
    """An array's float32 values as nested tuples of Python floats."""
    return _frozen(np.asarray(values, np.float32).tolist())


def _frozen(values: list) -> tuple:
    return tuple(_frozen(item) if isinstance(item, list) else item for item in values)


def _linear_extra(path: str, weight: Weight, usual: type) -> LinearExtra:
    threshold = None
    if isinstance(weight, SparseInput):
        threshold, weight = float(weight.threshold), weight.w
    if isinstance(weight, LoRA) and (runtime_act(weight.base) or _has_threshold(weight.base)):
        raise FormatError(
            f"{path}: a LoRA over a weight that rounds or thresholds its input cannot be written; "
            "merge it first"
        )
    stored = None if isinstance(weight, usual) else type(weight).__name__
    return LinearExtra(runtime_act(weight), threshold, stored)


def _has_threshold(weight: Weight) -> bool:
    return isinstance(weight, SparseInput)


def runtime_act(weight: Weight) -> str | None:
    """The format to which a weight's `matmul` rounds its input, None for none."""
    weight = weight.w if isinstance(weight, Transposed) else weight
    return getattr(weight, "act", None)


def apply(model: M, extra: Sidecar) -> M:
    """The model that a sidecar describes.

    Args:
      model: as its config and dense matrices say; one block per entry of `extra.kept`.
      extra: what they do not say.
    Returns:
      a new model with `extra.blocks` blocks; those lost altogether are empty.
    """
    stored = dict(zip(extra.kept, model.layers, strict=True))
    empty = Block(None, None, None, None)
    new = jax.tree.map(lambda leaf: leaf, model)
    new.layers = nnx.List(
        [
            _restore(i, stored[i], extra) if i in stored else jax.tree.map(lambda x: x, empty)
            for i in range(extra.blocks)
        ]
    )
    for name in OUTER:
        linear = _linear(new, name)
        if linear is not None and name in extra.linears:
            said = extra.linears[name]
            new = tree.replace(new, {name: linear.replace(_weight(name, linear.weight, said))})
    windows = {"windows": extra.windows} if isinstance(model, Decoder) else {}
    new.config = dataclasses.replace(model.config, layers=extra.blocks, **windows)
    return new


def _restore(i: int, block: Block, extra: Sidecar) -> Block:
    for unit, name in ((2 * i, "attn"), (2 * i + 1, "ffn")):
        if unit in extra.removed:
            block = block.without(name)
    block = jax.tree.map(lambda leaf: leaf, block)
    for name in LINEARS:
        path = f"layers[{i}].{name}"
        said, linear = extra.linears.get(path), _linear(block, name)
        if said is not None and linear is not None:
            new = linear.replace(_weight(path, linear.weight, said))
            block = tree.replace(block, {name: new})
    said_of_block = extra.by_block.get(i)
    if said_of_block is not None:
        _restore_block(block, said_of_block)
    return block


def _restore_block(block: Block, said: BlockExtra) -> None:
    if block.attn is not None:
        block.attn.spec = dataclasses.replace(
            block.attn.spec, kv_format=said.kv_format, query_format=said.query_format
        )
        if said.post_scale is not None:
            scale = jnp.asarray(np.array(said.post_scale, np.float32))
            block.attn.post_scale = nnx.data(nnx.Param(scale, axes=("kv_heads", "head_dim")))
    if block.ffn is not None and said.threshold is not None:
        ffn = block.ffn
        up = ffn.up
        if isinstance(up.weight, Dense):
            up = up.replace(Transposed(up.weight.transpose()))
        threshold = jnp.asarray(np.array(said.threshold, np.float32))
        block.ffn = SparseGatedFFN(
            ffn.gate, up, ffn.down, threshold, activation=ffn.activation, strict=said.strict
        )


def _weight(path: str, weight: Weight, said: LinearExtra) -> Weight:
    if said.scales is not None:
        weight = _scaled(path, weight, said.scales)
    if said.act is not None:
        weight = dataclasses.replace(weight, act=said.act)  # type: ignore[call-arg]
    if said.input_threshold is not None:
        weight = SparseInput(weight, jnp.float32(said.input_threshold))
    return weight


def _scaled(path: str, weight: Weight, said: ScalesExtra) -> Weight:
    if not isinstance(weight, Int4 | Int8):
        kind = type(weight).__name__
        raise FormatError(f"{SIDECAR_FILE}: {path} has scales, but the tensors hold it as a {kind}")
    try:
        return in_format(weight, said.group, said.dtype, said.divisor)
    except ValueError as error:
        raise FormatError(f"{SIDECAR_FILE}: {path}: scales: {error}") from None


def _to_json(extra: Sidecar) -> dict[str, object]:
    return {
        "format": "ffnlab",
        "version": VERSION,
        "blocks": extra.blocks,
        "windows": None if extra.windows is None else list(extra.windows),
        "removed": list(extra.removed),
        "by_block": {str(i): _plain(said) for i, said in extra.by_block.items()},
        "linears": {path: _plain(said) for path, said in extra.linears.items()},
    }


def _plain(said: BlockExtra | LinearExtra) -> dict[str, object]:
    """The fields that differ from their defaults; infinities as strings."""
    values = dataclasses.asdict(said)
    usual = dataclasses.asdict(type(said)())
    return {name: _spell(value) for name, value in values.items() if value != usual[name]}


def _spell(value: object) -> object:
    if isinstance(value, tuple):
        return [_spell(item) for item in value]
    if isinstance(value, float) and np.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value


def ignored_by_others(model: Model) -> list[str]:
    """What tools that read only the Hugging Face files will not do, in words; empty if nothing.

    Args:
      model: as given to `save` in format "dense"; `save` itself returns the sentences of either.
    Returns:
      one sentence per kind of thing, with how many places it concerns.
    """
    return list(sentences(extract(model)))


def sentences(extra: Sidecar) -> Iterable[str]:
    """`ignored_by_others` of a sidecar."""
    blocks, linears = extra.by_block.values(), extra.linears.values()
    kinds: Mapping[str, int] = {
        "rounding the input of linear maps to e4m3": sum(x.act is not None for x in linears),
        "thresholds on the input of linear maps": sum(
            x.input_threshold is not None for x in linears
        ),
        "thresholds on FFN activations": sum(b.threshold is not None for b in blocks),
        "post-RoPE scales of keys and queries": sum(b.post_scale is not None for b in blocks),
        "rounding of queries to e4m3": sum(b.query_format is not None for b in blocks),
    }
    for kind in ("int4", "float8"):
        count = sum(b.kv_format == kind for b in blocks)
        if count:
            yield f"{kind} keys and values: in {_places(count, 'block')}"
    for what, count in kinds.items():
        if count:
            place = "linear map" if "linear" in what else "block"
            yield f"{what}: in {_places(count, place)}"
    idle = sum(unit // 2 in extra.kept for unit in extra.removed)
    if idle:
        yield f"removal of {_places(idle, 'sublayer')}: written as zeros, computed in vain"
    formats = sorted({said.stored for said in linears if said.stored is not None})
    for name in formats:
        count = sum(said.stored == name for said in linears)
        yield f"the {name} format: {_places(count, 'linear map')} written as dense matrices"


def _places(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
