"""Decoders into Hugging Face directories that stock tools load.

A block that lost both sublayers is left out and the config rewritten; a sublayer removed alone is
written as zeros, which add nothing. Weights in formats of ours are written as the dense matrices
they stand for, unless an `Encode` packs them. What the files cannot say goes to `ffnlab.json`.
`[in, out]` becomes `[out, in]` in `_stored` and nowhere else.
"""

import dataclasses
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab.errors import ConfigError, FormatError
from ffnlab.files import StrPath, atomic_dir, write_json
from ffnlab.layers import GatedFFN, SparseGatedFFN
from ffnlab.models import sidecar
from ffnlab.models.config import DecoderConfig
from ffnlab.models.decoder import Decoder
from ffnlab.models.families import write_config
from ffnlab.models.names import Names, Place
from ffnlab.models.plan import variables
from ffnlab.models.safetensors import MODEL_FILES, Entry, write_directory
from ffnlab.models.stack import unstack
from ffnlab.weights import SparseInput, Weight

MAX_SHARD_BYTES = 5 * 10**9
IN_SIDECAR = (".ffn.threshold", ".attn.post_scale")


@runtime_checkable
class Encode(Protocol):
    """Packs linear maps in a quantized form of Hugging Face directories."""

    @property
    def quantization_config(self) -> Mapping[str, object]:
        """What config.json says about the form."""
        ...

    @property
    def act(self) -> str | None:
        """To what its readers round the input of packed maps: None or "e4m3"."""
        ...

    def __call__(self, name: str, weights: tuple[Weight, ...]) -> Mapping[str, Entry] | None:
        """The tensors of one linear map.

        Args:
          name: its Hugging Face name, without ".weight".
          weights: what it holds; several where the family fuses maps, in order along `out`.
        Returns:
          tensors by full name, or None to have the map written dense.
        Raises:
          FormatError: the form rounds inputs where the weights do not.
        """
        ...


def save(
    model: Decoder,
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    encode: Encode | None = None,
) -> None:
    """Writes a model directory that `transformers` loads; `load` gives the same logits back.

    The directory appears as a whole, or stays as it was; files in it that are not of a model
    (a tokenizer, notes) are kept.

    Args:
      model: a list of blocks or stacked; all on this host.
      directory: where to.
      dtype: of all dense tensors, float32, bfloat16 or float16; when None, the widest that a part
        of the model has (a quantized matrix counts as float32: its values need it).
      max_shard_bytes: size above which the tensors are split over several files.
      encode: packs quantized linear maps; all are written dense when None.
    Raises:
      ConfigError: the config's family has no words for the model, or dtype is none of the three.
      FormatError: the model holds a part that is neither a matrix nor in `ffnlab.json`.
    """
    model = unstack(model)
    extra = sidecar.extract(model)
    kept = [model.layers[i] for i in extra.kept]
    config = _kept_config(model, extra.kept)
    for i, block in zip(extra.kept, kept, strict=True):
        if block.ffn is not None and not isinstance(block.ffn, GatedFFN | SparseGatedFFN):
            kind = type(block.ffn).__name__
            raise FormatError(f"layers[{i}].ffn is a {kind}; gated FFNs can be written")
    parts = jax.tree.map(lambda leaf: leaf, model)
    parts.layers = nnx.List(kept)
    writer = _Writer(config, variables(parts), dtype)
    entries = dict(writer.entries(encode))
    if encode is not None:
        extra = _without_packed(extra, writer.packed, encode.act)
    written = write_config(config) | {"dtype": writer.dtype.name, "torch_dtype": writer.dtype.name}
    if encode is not None:
        written["quantization_config"] = dict(encode.quantization_config)
    with atomic_dir(directory) as temporary:
        _keep_others(Path(directory), temporary)
        write_directory(temporary, entries, max_shard_bytes=max_shard_bytes)
        write_json(temporary / "config.json", written)
        if extra.is_needed:
            sidecar.write(temporary, extra)


def _kept_config(model: Decoder, kept: tuple[int, ...]) -> DecoderConfig:
    config = model.config
    windows = None if config.windows is None else tuple(config.windows[i] for i in kept)
    return dataclasses.replace(
        config, layers=len(kept), windows=windows, tie_embeddings=model.head is None
    )


def _without_packed(extra: sidecar.Sidecar, packed: set[str], act: str | None) -> sidecar.Sidecar:
    """The sidecar without what the packed tensors say themselves."""
    linears = {}
    for path, said in extra.linears.items():
        layer = re.match(r"layers\[(\d+)\]", path)
        stored = path
        if layer is not None and int(layer[1]) in extra.kept:
            stored = f"layers[{extra.kept.index(int(layer[1]))}]{path[layer.end() :]}"
        if f"{stored}.w" in packed:
            rest = None if said.act == act else said.act
            said = dataclasses.replace(said, stored=None, act=rest)
        if said != sidecar.LinearExtra():
            linears[path] = said
    return dataclasses.replace(extra, linears=linears)


def _dtype(dtype: jax.typing.DTypeLike | None, held: list[jnp.dtype]) -> np.dtype:
    found = jnp.result_type(*held) if dtype is None else jnp.dtype(dtype)
    if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ConfigError(f"dtype={found}: float32, bfloat16 or float16 is accepted")
    return found


def _keep_others(source: Path, target: Path) -> None:
    """Puts what else is in a model directory beside its new files."""
    if not source.is_dir():
        return
    for item in source.iterdir():
        if MODEL_FILES.fullmatch(item.name) or item.name in ("config.json", sidecar.FILE):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, target / item.name, symlinks=True, copy_function=_link)
        else:
            _link(item, target / item.name)


def _link(source: StrPath, target: StrPath) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


class _Writer:
    """Lists the tensors of a model, made one at a time when they are written."""

    def __init__(
        self,
        config: DecoderConfig,
        held: Mapping[str, nnx.Variable],
        dtype: jax.typing.DTypeLike | None,
    ):
        self.config, self.held = config, held
        self.names = Names(config.family)
        abstract = jax.eval_shape(lambda key: Decoder(config, key=key), jax.random.key(0))
        self.wanted = variables(abstract)
        self.packed: set[str] = set()
        unknown = [p for p in held if p not in self.wanted and not p.endswith(IN_SIDECAR)]
        if unknown:
            raise FormatError(f"{unknown[0]} has no place in a {config.family} directory")
        dtypes = {jnp.dtype(held[p].get_value().dtype) for p in held if p in self.wanted}
        self.dtype = _dtype(dtype, list(dtypes))

    def entries(self, encode: Encode | None) -> Iterator[tuple[str, Entry]]:
        """Pairs (name, tensor) in the order of the model."""
        for path in self.wanted:
            where = self.names.place(path)
            if where is None:
                raise ConfigError(f"a {self.config.family} checkpoint has no place for {path}")
            if where.part == 0:
                packed = self._packed(where, encode)
                yield from packed.items() if packed is not None else [self._dense(where)]

    def _packed(self, where: Place, encode: Encode | None) -> Mapping[str, Entry] | None:
        if encode is None or not where.transposed or not set(where.paths) <= set(self.held):
            return None
        weights = (self.held[path].get_value() for path in where.paths)
        plain = tuple(w.w if isinstance(w, SparseInput) else w for w in weights)
        packed = encode(where.name.removesuffix(".weight"), plain)
        self.packed |= set() if packed is None else set(where.paths)
        return packed

    def _dense(self, where: Place) -> tuple[str, Entry]:
        shapes = [tuple(self.wanted[path].get_value().shape) for path in where.paths]
        shape = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        shape = shape[::-1] if where.transposed else shape
        return where.name, Entry(self.dtype, shape, lambda: self._values(where))

    def _values(self, where: Place) -> np.ndarray:
        parts = [_stored(self._part(path), self.dtype, where.transposed) for path in where.paths]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _part(self, path: str) -> np.ndarray | jax.Array:
        if path not in self.held:  # of a removed sublayer
            shape = self.wanted[path].get_value().shape
            neutral = 1.0 - self.config.norm_offset if path.endswith(".scale") else 0.0
            return np.full(shape, neutral, self.dtype)
        value = self.held[path].get_value()
        return value.dense() if isinstance(value, Weight) else value


def _stored(array: np.ndarray | jax.Array, dtype: np.dtype, transposed: bool) -> np.ndarray:
    values = np.asarray(array).astype(dtype, copy=False)
    return values.T if transposed else values
