"""A model into a native directory: its tree as JSON, each array once, by its path."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats import safetensors
from ffnlab.formats.directory import NATIVE_FILE, keep_others
from ffnlab.formats.native.schema import CONTAINERS, name_of, to_json
from ffnlab.formats.safetensors import Entry, write_directory
from ffnlab.formats.stream import is_finite
from ffnlab.storage.files import StrPath, atomic_dir, write_json
from ffnlab.storage.structure import FLAX_METADATA, JSONValue, children
from ffnlab.weights import Weight

__all__ = ["CARRIERS", "FORMAT", "KNOWN", "VERSION", "save"]

FORMAT, VERSION = "ffnlab", 1
MAX_SHARD_BYTES = 5 * 10**9
# What safetensors has no word for, as what does; one value each.
CARRIERS: Mapping[str, str] = {"int4": "int8", "uint4": "uint8"}
KNOWN: Mapping[str, np.dtype] = {
    **{dtype.name: dtype for dtype in safetensors.DTYPES.values()},
    **{name: np.dtype(getattr(jnp, name)) for name in CARRIERS},
}


def save(
    model: object,
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes any model of listed types; `load` gives the same tree back, bit for bit.

    The directory appears as a whole, or stays as it was; files in it that are not of a model (a
    tokenizer, notes) are kept. Packed weights stay as they are; an array that is at several paths
    is written once.

    Args:
      model: a tree of modules, weights and configurations that ffnlab exports, in dicts, lists and
        tuples; all on this host.
      directory: where to.
      dtype: of what learning changes (`ffnlab.tree.trained`), float32, bfloat16 or float16; as it
        is when None. The rest is never cast.
      max_shard_bytes: size above which the tensors are split over several files.
    Raises:
      ConfigError: dtype is none of the three.
      FormatError: a part of a type that is not listed, a static field that is no plain value, an
        array that cannot be stored, or a trained one that is not finite; its path is named.
    """
    if dtype is not None and jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ConfigError(f"dtype={jnp.dtype(dtype)}: float32, bfloat16 or float16 is accepted")
    writer = _Writer(None if dtype is None else jnp.dtype(dtype))
    tree = writer.node(model, "", trained=True)
    with atomic_dir(directory) as temporary:
        keep_others(Path(directory), temporary)
        write_directory(temporary, writer.entries, max_shard_bytes=max_shard_bytes)
        write_json(temporary / NATIVE_FILE, {"format": FORMAT, "version": VERSION, "tree": tree})


class _Writer:
    """Turns nodes into JSON and notes the arrays on the way, made one at a time when written."""

    def __init__(self, dtype: np.dtype | None):
        self.dtype = dtype
        self.entries: dict[str, Entry] = {}
        self.paths: dict[int, str] = {}  # of arrays by identity; the model keeps them alive

    def node(self, node: object, path: str, *, trained: bool) -> JSONValue:
        """What stands for a node; trained: whether floating arrays in it are learned."""
        if node is None:
            return None
        named = children(node, path)
        if named is None:
            return self.leaf(node, path, trained)
        where = path or "the model"
        kind, static = name_of(node, where), self.static(node, {key for key, *_ in named}, where)
        if isinstance(node, nnx.Variable):
            trained = trained and isinstance(node, nnx.Param)
            value = node.get_raw_value()
            if not isinstance(value, Weight | jax.Array | np.ndarray):
                raise FormatError(f"{where} holds a {type(value).__name__}, no array and no weight")
        parts = {}
        for key, child, child_path in named:
            if isinstance(node, dict) and not isinstance(key, str):
                raise FormatError(f"{where} has the key {key!r}; a dict has strings as keys")
            learns = trained and (not isinstance(node, Weight) or node.trains(str(key)))
            parts[key] = self.node(child, child_path, trained=learns)
        is_sequence = isinstance(node, nnx.List | list | tuple)
        entry: dict[str, JSONValue] = {"type": kind}
        entry |= {"static": static} if static else {}
        return entry | {"children": list(parts.values()) if is_sequence else parts}

    def static(self, node: object, parts: set, where: str) -> dict[str, JSONValue]:
        """The static fields of a node by name."""
        if isinstance(node, nnx.Variable):
            fields = {k: v for k, v in node.get_metadata().items() if k not in FLAX_METADATA}
            if other := sorted(fields.keys() - {"axes"}):
                raise FormatError(f"{where} has the metadata {other[0]!r}; only axes are stored")
        elif isinstance(node, Weight):
            fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}  # type: ignore[arg-type]
        elif type(node) in CONTAINERS.values() or isinstance(node, nnx.List):
            fields = {}
        else:
            fields = {k: v for k, v in vars(node).items() if not k.startswith("_pytree__")}
        fields = {k: v for k, v in fields.items() if k not in parts}
        if private := sorted(k for k in fields if k.startswith("_") or not k.isidentifier()):
            raise FormatError(f"{where} has the private attribute {private[0]!r}")
        return {k: to_json(fields[k], f"{where}.{k}") for k in sorted(fields)}

    def leaf(self, array: object, path: str, trained: bool) -> dict[str, JSONValue]:
        """What stands for an array; the array itself is noted."""
        if not isinstance(array, jax.Array | np.ndarray):
            raise FormatError(f"{path or 'the model'} is a {type(array).__name__}, not an array")
        if id(array) in self.paths:
            return {"same": self.paths[id(array)]}
        is_dense = trained and jnp.issubdtype(array.dtype, jnp.floating)
        name = str(array.dtype) if self.dtype is None or not is_dense else self.dtype.name
        if name not in KNOWN or (KNOWN[name].itemsize == 8 and not jax.config.jax_enable_x64):
            raise FormatError(f"{path}: an array of {name} cannot be stored")
        self.paths[id(array)] = path
        stored = CARRIERS.get(name, name)
        self.entries[path] = Entry(
            KNOWN[stored],
            tuple(array.shape),
            lambda: _values(array, KNOWN[name], KNOWN[stored], path if is_dense else None),
        )
        entry: dict[str, JSONValue] = {"dtype": name, "shape": list(array.shape)}
        return entry | ({"stored": stored} if stored != name else {})


def _values(
    array: jax.Array | np.ndarray, dtype: np.dtype, stored: np.dtype, finite: str | None
) -> np.ndarray:
    """An array as it is written; `finite` is its path where NaN and infinity are refused."""
    with np.errstate(over="ignore"):  # told below
        values = np.asarray(array).astype(dtype, copy=False).astype(stored, copy=False)
    if finite is not None and not is_finite(values):
        raise FormatError(f"{finite} holds NaN or infinity as {dtype}")
    return values
