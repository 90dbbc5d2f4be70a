"""Models from Hugging Face directories: all is checked, then read once, straight into place.

The model is first built without its arrays (`jax.eval_shape`), its parameters are matched with the
tensors of the checkpoint, and all that does not fit is reported in one error. Only then are the
values read, parameter by parameter, into their dtype and sharding. `[out, in]` becomes `[in, out]`
in `ffnlab.formats.stream` and nowhere else.
"""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.huggingface import sidecar
from ffnlab.formats.huggingface.dialects import (
    Config,
    Model,
    dialect_of,
    read_beside,
    read_config,
)
from ffnlab.formats.huggingface.finite import not_finite
from ffnlab.formats.huggingface.plan import (
    Decode,
    Packed,
    Plan,
    Task,
    is_variable,
    make_plan,
    variables,
)
from ffnlab.formats.safetensors import Checkpoint, open_directory
from ffnlab.formats.stream import Axes, Placement, place, placement, reader
from ffnlab.formats.untrusted import inside, quoted, read_json
from ffnlab.models.config import DecoderConfig
from ffnlab.progress import track
from ffnlab.storage.files import StrPath
from ffnlab.weights import AxisNames, Dense, Weight


def load(
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Placement = None,
    max_positions: int | None = None,
    check_finite: bool = True,
    extras: bool = True,
    progress: bool = True,
) -> Model:
    """Loads a model directory: Llama, Mistral, Mixtral, Qwen 2/3, Qwen 3 MoE, Gemma 2/3 (text),
    Phi-3 or one of ours as a `Decoder`; BERT, MiniLM and DistilBERT as an `Encoder`; Whisper's
    encoder as an `AudioEncoder`; ViT and DeiT as a `ViT`, `preprocessor_config.json` honoured.

    A stored head that differs from the embedding is used, whatever `tie_word_embeddings` says. The
    index may list the head of a tied model that its shard lacks, as transformers allows. What the
    class named in `architectures` leaves unused (a pooler, the head for the next sentence) is not
    read.

    Args:
      directory: holds config.json and model.safetensors, or shards with their index; an
        `ffnlab.json` beside them is honoured.
      dtype: of the dense parameters, a float type; that of the stored embedding, or of what else
        the model begins with, when None.
      sharding: where parameters go: one sharding for all, or a function of (path, logical axes,
        shape) that returns one; the default device when None.
      max_positions: longest context of the model, tokens: up to what a yarn, longrope or dynamic
        rotary embedding was stretched to (`DecoderConfig.reach`), where that is more than
        `max_position_embeddings`; the latter when None.
      check_finite: refuse NaN and infinity among the values, and a model that gives them for one
        token, which is tried where no `sharding` is given.
      extras: honour `ffnlab.json`; False gives the model that tools see which do not know it.
      progress: draw a bar where someone watches.
    Returns:
      the model, blocks in a list.
    Raises:
      FormatError: files are missing, damaged or hostile, or tensors are missing, unknown, or of
        another shape or dtype than the config says; all such tensors are named at once.
      ConfigError: config.json is absurd, contradicts itself, or names an unknown architecture, or
        max_positions is beyond what the rotary embedding allows.
    """
    directory = Path(directory)
    raw, config, checkpoint, names = _opened(directory, max_positions)
    extra = sidecar.read(directory, config) if extras else None
    config = dialect_of(config).settle(config, checkpoint, names)
    decode = _decode(_entry(raw, "quantization_config"), directory)
    plan = make_plan(config, checkpoint, names, decode)
    tasks = track(plan.tasks, f"loading {directory.name}", enabled=progress)
    model = _read(plan, tasks, checkpoint, _dtype(dtype, plan), sharding, check_finite)
    model = model if extra is None else sidecar.apply(model, extra)
    where = not_finite(model) if check_finite and sharding is None else None
    if where is not None:
        raise FormatError(f"{directory}: {where} gives NaN or infinity for one token")
    return model


def settled_config(directory: StrPath) -> Config:
    """The configuration that `load` gives a model: with what the tensors say of head and pooler.

    Raises:
      FormatError, ConfigError: as `load`, as far as headers tell.
    """
    _, config, checkpoint, names = _opened(Path(directory), None)
    return dialect_of(config).settle(config, checkpoint, names)


def _opened(
    directory: Path, max_positions: int | None
) -> tuple[object, Config, Checkpoint, dict[str, str]]:
    """config.json, what it says, the tensors, and their names in ours -> in the files."""
    if not directory.is_dir():
        raise FormatError(f"{directory}: not a directory")
    raw = read_json(inside(directory, "config.json"))
    config = read_config(raw, where=str(directory / "config.json"))
    config = read_beside(config, directory)
    if max_positions is not None:
        config = _with_positions(config, max_positions)
    dialect, head = dialect_of(config), dialect_of(config).head(config)
    checkpoint = open_directory(
        directory,
        spare=lambda name: head is not None and head in dialect.found(config, [name], raw),
    )
    return raw, config, checkpoint, dialect.found(config, checkpoint.tensors, raw)


def _with_positions(config: Config, positions: int) -> DecoderConfig:
    if not isinstance(config, DecoderConfig):
        raise ConfigError(
            f"max_positions={positions!r}: an encoder has max_positions="
            f"{getattr(config, 'max_positions', None)}"
        )
    if not isinstance(positions, int) or not 1 <= positions <= config.reach:
        rope = config.rope
        raise ConfigError(
            f"max_positions={positions!r} must lie in 1..{config.reach}, what the rotary embedding "
            f"allows (scaling {rope.scaling!r}, factor {rope.factor:g} of {rope.original} tokens)"
        )
    return dataclasses.replace(config, max_positions=positions)


def _entry(raw: object, name: str) -> object:
    return raw.get(name) if isinstance(raw, dict) else None


def _decode(quantization: object, directory: Path) -> Decode | None:
    """The reader of quantized weights that a config asks for, or None."""
    if quantization is None:
        return None
    method = _entry(quantization, "quant_method")
    if method != "compressed-tensors":
        raise ConfigError(
            f"{directory / 'config.json'}: quantization_config has quant_method={quoted(method)}; "
            "'compressed-tensors' is accepted"
        )
    from ffnlab.formats.compressed_tensors import reading as compressed_tensors

    return compressed_tensors.decoder(quantization, str(directory / "config.json"))


def _dtype(dtype: jax.typing.DTypeLike | None, plan: Plan) -> np.dtype:
    if dtype is None:
        # The embedding, or what else a model begins with: only linear maps are packed.
        first = next(task.source for task in plan.tasks if not isinstance(task.source, Packed))
        found = first[0].info.dtype
        return np.dtype(np.float32) if found == np.float64 else found
    found = jax.numpy.dtype(dtype)
    if not jax.numpy.issubdtype(found, jax.numpy.floating):
        raise ConfigError(f"dtype={found}: a float type is accepted")
    return found


def _read(
    plan: Plan,
    tasks: Iterable[Task],
    checkpoint: Checkpoint,
    dtype: np.dtype,
    sharding: Placement,
    check_finite: bool,
) -> Model:
    wanted = variables(plan.model)
    values: dict[str, jax.Array | Weight] = {}
    for task in tasks:
        if isinstance(task.source, Packed):
            for path, weight in zip(task.paths, task.source.build(check_finite), strict=True):
                values[path] = _place_weight(path, weight, wanted[path].axes, sharding)
            continue
        for path, stored in zip(task.paths, task.source, strict=True):
            read = reader(checkpoint, stored, dtype, check_finite=check_finite)
            where = placement(sharding, path, wanted[path].axes, stored.shape)
            array = place(stored.shape, dtype, where, read)
            values[path] = Dense(array) if len(stored.shape) > 1 else array
    treedef = jax.tree.structure(plan.model, is_leaf=is_variable)
    filled = [variable.replace(values[path]) for path, variable in wanted.items()]
    return jax.tree.unflatten(treedef, filled)


def _place_weight(path: str, weight: Weight, axes: Axes, sharding: Placement) -> Weight:
    flat, treedef = jax.tree_util.tree_flatten_with_path(weight)
    names = jax.tree.leaves(weight.leaf_axes(axes), is_leaf=lambda n: isinstance(n, AxisNames))
    placed = []
    for (keys, leaf), leaf_axes in zip(flat, names, strict=True):
        leaf_path = path + jax.tree_util.keystr(keys)
        where = placement(sharding, leaf_path, tuple(leaf_axes), leaf.shape)
        placed.append(jax.device_put(leaf, where))
    return jax.tree.unflatten(treedef, placed)
