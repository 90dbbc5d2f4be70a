"""A model from a native directory: all is checked, then each array is read once, into its place.

The tree is first built without its arrays, by `object.__new__` and never by an `__init__`, and
every array is compared with the tensor of its path; what does not fit is reported at once. Of
listed classes only the checks of weights and configurations run, on fields of the right types.
"""

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ffnlab.compat import bare_module
from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.directory import NATIVE_FILE
from ffnlab.formats.kinds import KINDS, check_runs, kind_of
from ffnlab.formats.native.schema import (
    CONTAINERS,
    checked_fields,
    from_json,
    hints,
    is_config,
    listed,
)
from ffnlab.formats.native.write import CARRIERS, FORMAT, KNOWN, VERSION
from ffnlab.formats.safetensors import Checkpoint, is_shape, open_directory
from ffnlab.formats.stream import PIECE, Index, Placement, aligned, is_finite, place, placement
from ffnlab.formats.untrusted import inside, quoted, read_json
from ffnlab.progress import track
from ffnlab.storage.files import StrPath
from ffnlab.weights import AxisNames, Weight

__all__ = ["is_native", "load", "root_config", "root_type"]

DEPTH, NODES, PROBLEMS_SHOWN = 64, 2**20, 20


def is_native(directory: StrPath) -> bool:
    """Whether a directory says that it holds a model in this format."""
    file = Path(directory) / NATIVE_FILE
    return file.exists() or file.is_symlink()


def root_type(directory: StrPath) -> type:
    """The type of the model in a native directory; no array is looked at.

    Raises:
      FormatError: as `load`.
    """
    tree = _described(Path(directory))
    name = tree.get("type") if isinstance(tree, dict) else None
    kind = listed().get(name) or CONTAINERS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise FormatError(f"{directory}: the model is of no listed type: {quoted(name)}")
    return kind


def root_config(directory: StrPath) -> Any:
    """The static field `config` of the model in a native directory; no array is looked at.

    Raises:
      FormatError: as `load`, or there is none that fits the model's kind.
    """
    tree = _described(Path(directory))
    static = tree.get("static") if isinstance(tree, dict) else None
    given = static.get("config") if isinstance(static, dict) else None
    config, kind = from_json(given, f"{directory}: config"), kind_of(root_type(directory))
    if kind is None or not isinstance(config, KINDS[kind].config):
        raise FormatError(f"{directory}: config is a {type(config).__name__}, of another kind")
    return config


def load(
    directory: StrPath,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    sharding: Placement = None,
    check_finite: bool = True,
    progress: bool = True,
) -> object:
    """Loads what `ffnlab.formats.native.write.save` wrote.

    Args:
      directory: holds ffnlab_model.json and model.safetensors, or shards with their index.
      dtype: of what learning changes (`ffnlab.tree.trained`), a float type; as stored when None.
      sharding: where arrays go: one sharding for all, or a function of (path, logical axes, shape)
        that returns one; the default device when None.
      check_finite: refuse NaN and infinity in what learning changes.
      progress: draw a bar where someone watches.
    Returns:
      the tree that was saved: the same structure and static fields, the arrays bit for bit; arrays
      that were one are one.
    Raises:
      ConfigError: dtype is no float type.
      FormatError: files are missing, damaged, hostile or of a newer version, or describe a model
        that cannot be called; all tensors that do not fit are named at once, before any is read.
    """
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ConfigError(f"dtype={jnp.dtype(dtype)}: a float type is accepted")
    directory = Path(directory)
    tree = _described(directory)
    builder = _Builder(open_directory(directory), None if dtype is None else jnp.dtype(dtype))
    abstract = builder.node(tree, "", trained=True, depth=0)
    builder.finish()
    check_runs(abstract, directory)
    arrays = {}
    for slot in track(builder.slots.values(), f"loading {directory.name}", enabled=progress):
        shape, kept = slot.abstract.shape, np.dtype(slot.abstract.dtype)
        where = placement(sharding, slot.path, slot.axes or (None,) * len(shape), shape)
        read = _reader(builder.checkpoint, slot, check_finite=check_finite and slot.trained)
        arrays[id(slot.abstract)] = place(shape, kept, where, read)
    leaves, treedef = jax.tree.flatten(abstract)
    return jax.tree.unflatten(treedef, [arrays[id(leaf)] for leaf in leaves])


def _described(directory: Path) -> object:
    """The tree in the JSON of a native directory."""
    if not directory.is_dir():
        raise FormatError(f"{directory}: not a directory")
    file = inside(directory, NATIVE_FILE)
    content = read_json(file)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f"{file}: not a model of ffnlab: format must be {FORMAT!r}")
    version = content.get("version")
    if type(version) is not int or version != VERSION:
        raise FormatError(
            f"{file}: version {quoted(version)}; this version of ffnlab reads version {VERSION}"
        )
    if content.keys() != {"format", "version", "tree"}:
        raise FormatError(f"{file}: must have exactly format, version and tree")
    return content["tree"]


@dataclasses.dataclass
class _Slot:
    """An array to read: its place in the abstract tree, and what it is read from."""

    path: str
    abstract: jax.ShapeDtypeStruct
    trained: bool
    axes: tuple[str | None, ...] | None = None


class _Builder:
    """Builds the abstract tree; notes its arrays and what is wrong with them."""

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype | None):
        self.checkpoint, self.dtype = checkpoint, dtype
        self.slots: dict[str, _Slot] = {}
        self.slot_of: dict[int, _Slot] = {}  # by identity of the abstract array
        self.problems: list[str] = []
        self.nodes = 0

    def fail(self, path: str, what: str) -> FormatError:
        """The error of a place."""
        return FormatError(f"{self.checkpoint.origin}: {quoted(path or 'the model')}: {what}")

    def node(self, entry: object, path: str, *, trained: bool, depth: int) -> object:
        """The abstract tree of an entry, which is untrusted; trained: see `_Writer.node`."""
        self.nodes += 1
        if depth > DEPTH or self.nodes > NODES:
            raise self.fail(path, f"nested more than {DEPTH} deep, or over {NODES} nodes in all")
        if entry is None:
            return None
        if not isinstance(entry, dict):
            raise self.fail(path, f"{quoted(entry)} describes no node")
        if "type" not in entry:
            return self.leaf(entry, path, trained)
        name, static = entry["type"], entry.get("static", {})
        kind = (listed() | CONTAINERS).get(name) if isinstance(name, str) else None
        if kind is None or is_config(kind):
            raise self.fail(path, f"{quoted(name)} is no listed type of a node")
        if not entry.keys() <= {"type", "static", "children"} or not isinstance(static, dict):
            raise self.fail(path, "a node has a type, children and an object of static fields")
        inner = trained and not (issubclass(kind, nnx.Variable) and kind is not nnx.Param)
        if issubclass(kind, Weight):
            return self.weight(kind, static, entry.get("children"), path, inner, depth)
        parts = self.children(kind, entry.get("children"), path, inner, depth)
        if issubclass(kind, nnx.Variable):
            return self.variable(kind, static, parts, path)
        if issubclass(kind, nnx.Module):
            return self.module(kind, static, parts, path)
        if static:
            raise self.fail(path, f"a {name} has no static fields")
        return parts if kind is dict else kind(parts.values())

    def children(
        self, kind: type, entries: object, path: str, trained: bool, depth: int
    ) -> dict[str, object]:
        """The abstract children of a node, by name or number."""
        is_sequence = issubclass(kind, nnx.List | list | tuple)
        if not isinstance(entries, list if is_sequence else dict):
            raise self.fail(
                path, f"children of a {kind.__name__} are in no {type(entries).__name__}"
            )
        found = {}
        for i, part in enumerate(entries):
            name, part = (i, part) if is_sequence else (part, entries[part])  # type: ignore[call-overload]
            by_key = is_sequence or kind is dict
            where = f"{path}[{name!r}]" if by_key else f"{path}.{name}".removeprefix(".")
            found[str(name)] = self.node(part, where, trained=trained, depth=depth + 1)
        return found

    def module(self, kind: type, static: dict, parts: dict[str, object], path: str) -> nnx.Module:
        """A module without its `__init__`."""
        if kind is nnx.List:
            if static:
                raise self.fail(path, "a List has no static fields")
            return bare_module(kind, parts, {"_length": len(parts)})
        for name in (*parts, *static):
            own = inspect.getattr_static(kind, name, None)
            if not name.isidentifier() or name.startswith("_") or hasattr(own, "__get__"):
                raise self.fail(path, f"{quoted(name)} is no attribute of a {kind.__name__}")
        if twice := sorted(parts.keys() & static.keys()):
            raise self.fail(path, f"{quoted(twice[0])} is a child and a static field")
        where = f"{self.checkpoint.origin}: {quoted(path)}"
        fields = {name: from_json(value, f"{where}.{name}") for name, value in static.items()}
        return bare_module(kind, parts, fields)

    def variable(
        self, kind: type, static: dict, parts: dict[str, object], path: str
    ) -> nnx.Variable:
        """A Variable with its axes; those of each array in it are noted."""
        value = parts.get("value")
        if parts.keys() != {"value"} or not isinstance(value, Weight | jax.ShapeDtypeStruct):
            raise self.fail(path, f"a {kind.__name__} holds one array or one weight, as 'value'")
        if not static.keys() <= {"axes"}:
            raise self.fail(path, f"a {kind.__name__} has no static fields but axes")
        axes = static.get("axes")
        if axes is None:
            return kind(value, **static)
        names = axes if isinstance(axes, list) else [0]
        if not all(name is None or isinstance(name, str) for name in names):
            raise self.fail(path, f"axes {quoted(axes)} are no list of names")
        axes = tuple(names)
        named = value.leaf_axes(axes) if isinstance(value, Weight) and axes[1:] else AxisNames(axes)
        each = jax.tree.leaves(named, is_leaf=lambda node: isinstance(node, AxisNames))
        for leaf, its in zip(jax.tree.leaves(value), each, strict=False):
            slot = self.slot_of[id(leaf)]
            if slot.axes is None and len(its) == len(leaf.shape):
                slot.axes = tuple(its)
        return kind(value, axes=axes)

    def weight(
        self, kind: type, static: dict, entries: object, path: str, trained: bool, depth: int
    ) -> Weight:
        """A weight of fields of the right types, held against its own check."""
        where = f"{self.checkpoint.origin}: {quoted(path)}"
        marks = {f.name: bool(f.metadata.get("static")) for f in dataclasses.fields(kind)}
        wanted = {name: hints(kind)[name] for name, is_static in marks.items() if is_static}
        fields = checked_fields(static, wanted, kind, where)
        weight, names = object.__new__(kind), marks.keys() - wanted.keys()
        if not isinstance(entries, dict) or entries.keys() != names:
            raise self.fail(path, f"a {kind.__name__} has the children {sorted(names)}")
        for name in sorted(names):
            learns, its = trained and kind.trains(weight, name), f"{path}.{name}".removeprefix(".")
            part = self.node(entries[name], its, trained=learns, depth=depth + 1)
            needed = Weight if hints(kind)[name] is Weight else jax.ShapeDtypeStruct
            if not isinstance(part, needed):
                raise self.fail(its, f"no {needed.__name__}, which a {kind.__name__} has")
            fields[name] = part
        for name, value in fields.items():
            object.__setattr__(weight, name, value)
        try:
            if hasattr(kind, "__post_init__"):
                jax.eval_shape(kind.__post_init__, weight)
        except (ValueError, IndexError) as error:
            raise self.fail(path, f"no {kind.__name__}: {error}") from None
        return weight

    def leaf(self, entry: dict, path: str, trained: bool) -> jax.ShapeDtypeStruct:
        """An array of the file, or one that stands at an earlier path too."""
        if entry.keys() == {"same"}:
            same = entry["same"]
            if not isinstance(same, str) or same not in self.slots:
                raise self.fail(path, f"is said to be {quoted(same)}, which is no earlier array")
            return self.slots[same].abstract
        name, shape = entry.get("dtype"), entry.get("shape")
        if not isinstance(name, str) or name not in KNOWN or not is_shape(shape):
            raise self.fail(path, f"{quoted(entry)} describes no array")
        stored, is_new = CARRIERS.get(name, name), path not in self.slots
        if entry != {"dtype": name, "shape": shape} | (
            {"stored": stored} if stored != name else {}
        ):
            raise self.fail(path, f"{quoted(entry)} describes no array of {name}")
        if not is_new or (KNOWN[name].itemsize == 8 and not jax.config.jax_enable_x64):
            raise self.fail(path, "the path occurs twice" if not is_new else f"{name} needs x64")
        info = self.checkpoint.tensors.get(path)
        if info is None:
            self.problems.append(f"{quoted(path)} is missing")
        elif info.shape != tuple(shape) or info.dtype != KNOWN[stored]:
            self.problems.append(
                f"{quoted(path)} is {info.dtype}{list(info.shape)}, said to be {stored}{shape}"
            )
        trained = trained and jnp.issubdtype(KNOWN[name], jnp.floating)
        dtype = self.dtype if trained and self.dtype is not None else KNOWN[name]
        abstract = jax.ShapeDtypeStruct(tuple(shape), dtype)
        self.slots[path] = self.slot_of[id(abstract)] = _Slot(path, abstract, trained)
        return abstract

    def finish(self) -> None:
        """Raises FormatError with everything that was noted."""
        unknown = [name for name in self.checkpoint.tensors if name not in self.slots]
        problems = [*self.problems, *(f"{quoted(n)} is not part of the model" for n in unknown)]
        if problems:
            shown, more = "\n  ".join(problems[:PROBLEMS_SHOWN]), len(problems) - PROBLEMS_SHOWN
            rest = f"\n  and {more} more" if more > 0 else ""
            raise FormatError(
                f"{self.checkpoint.origin}: {len(problems)} problems:\n  {shown}{rest}"
            )


def _reader(
    checkpoint: Checkpoint, slot: _Slot, *, check_finite: bool
) -> Callable[[Index], np.ndarray]:
    """The function that reads any rectangle of an array, in pieces of rows."""
    info, dtype = checkpoint.tensors[slot.path], np.dtype(slot.abstract.dtype)

    def converted(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # told below
            cast = values.astype(dtype, copy=False)
        if check_finite and not is_finite(cast):
            raise FormatError(f"{info.file}: tensor {quoted(info.name)} holds NaN or infinity")
        if dtype.name in CARRIERS and not np.array_equal(cast.astype(values.dtype), values):
            raise FormatError(f"{info.file}: tensor {quoted(info.name)} is beyond {dtype.name}")
        return cast

    def read(index: Index) -> np.ndarray:
        if not info.shape:
            return converted(checkpoint.read(info.name))
        spans = [part.indices(side)[:2] for part, side in zip(index, info.shape, strict=True)]
        out = aligned([stop - start for start, stop in spans], dtype)
        (first, last), rest = spans[0], tuple(slice(*span) for span in spans[1:])
        step = max(PIECE * max(last - first, 1) // max(out.nbytes, 1), 1)
        for start in range(first, last, step):
            piece = checkpoint.read(info.name, (start, min(start + step, last)))
            out[start - first : start - first + len(piece)] = converted(piece[:, *rest])
        return out

    return read
