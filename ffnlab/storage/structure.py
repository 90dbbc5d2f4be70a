"""What a saved tree is, as JSON: its nodes with their static fields, its leaves with their dtypes.

An array store keeps arrays only. Group sizes, activation formats and model configurations are part
of the tree's structure, so a file restored into the wrong structure would load without a word and
compute something else. `describe` writes the structure down, `check` compares it before any array
is read. Paths are those of jax without the leading dot: `layers[0].ffn.up.w.value.codes`.
"""

import dataclasses
import enum
import math
from collections.abc import Collection, Iterator
from typing import Any

import jax
import numpy as np

from ffnlab.errors import FormatError

__all__ = ["FLAX_METADATA", "FORMAT", "JSONValue", "check", "children", "describe", "later", "told"]

FORMAT = 1
SHOWN = 8  # differences listed in one message

# Variable metadata that flax sets by itself; names differ between its releases.
FLAX_METADATA = frozenset({"eager_sharding", "hijax", "ref", "mesh"})

LATER = "ffnlab.later"  # marks a field of a dataclass, see `later`

JSONValue = None | bool | int | float | str | list | dict


def describe(tree: object) -> dict[str, Any]:
    """Describes a pytree: every inner node with its static fields, every leaf with its dtype.

    Args:
      tree: any pytree: NNX modules, dataclasses, NamedTuples, dicts, lists; leaves may be arrays,
        abstract arrays (`jax.ShapeDtypeStruct`), typed random keys or Python scalars.
    Returns:
      {"format", "nodes", "leaves"}, ready for JSON; leaves are in the order of `jax.tree.leaves`.
    Raises:
      FormatError: a leaf is something that cannot be stored; the message has its path.

    >>> describe({"scale": np.ones(3, "float32")})["leaves"]
    [{'path': "['scale']", 'dtype': 'float32', 'shape': [3]}]
    """
    nodes: list[JSONValue] = []
    leaves: list[JSONValue] = []
    for path, node, keys in walk(tree, ""):
        if keys is None:
            leaves.append(leaf_entry(path, node))
        else:
            nodes.append({"path": path, "type": type(node).__qualname__} | static_part(node, keys))
    return {"format": FORMAT, "nodes": nodes, "leaves": leaves}


def check(saved: object, like: dict[str, Any], source: str, absent: Collection[str] = ()) -> None:
    """Compares a description read from a file with that of the tree it is to fill.

    Args:
      saved: what was read, untrusted.
      like: `describe` of the target.
      source: the file's name, for messages.
      absent: paths of leaves of the target that the file may lack.
    Raises:
      FormatError: they differ; the message lists up to eight differences by path.
    """
    if not isinstance(saved, dict) or saved.get("format") != FORMAT:
        found = saved.get("format") if isinstance(saved, dict) else type(saved).__name__
        raise FormatError(f"{source}: format {found!r} is not {FORMAT}, the one this version reads")
    there = by_path(saved, "leaves", source)
    leaves = {
        path: entry
        for path, entry in by_path(like, "leaves", source).items()
        if path in there or path not in absent
    }
    problems = [
        *differences(by_path(saved, "nodes", source), by_path(like, "nodes", source)),
        *differences(there, leaves),
    ]
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise FormatError(
            f"{source} does not hold the tree asked for:\n  " + "\n  ".join(problems[:SHOWN]) + more
        )
    # Equal as sets of paths; the order must be equal too, as arrays are numbered by it.
    if list(there) != list(leaves):
        raise FormatError(f"{source}: the leaves are not in the order of the tree asked for")


def by_path(description: dict, part: str, source: str) -> dict[str, dict]:
    """The entries of one part, keyed by path; checks that they are entries at all."""
    entries = description.get(part)
    if not isinstance(entries, list):
        raise FormatError(f"{source}: {part!r} is {type(entries).__name__}, not a list")
    for entry in entries:
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise FormatError(f"{source}: an entry of {part!r} has no path")
    keyed = {entry["path"]: entry for entry in entries}
    if len(keyed) != len(entries):
        raise FormatError(f"{source}: a path occurs twice in {part!r}")
    return keyed


def differences(saved: dict[str, dict], like: dict[str, dict]) -> Iterator[str]:
    """One line per path or field that differs."""
    for path in sorted(saved.keys() | like.keys()):
        name = path or "the root"
        if path not in like:
            yield f"{name} is in the file and not in `like`"
        elif path not in saved:
            yield f"{name} is in `like` and not in the file"
        else:
            ours, theirs = like[path], saved[path]
            # A Python scalar's value is what is restored, not part of the structure.
            fields = (ours.keys() | theirs.keys()) - ({"value"} if "python" in ours else set())
            for field in sorted(fields):
                yield from field_differences(f"{name}.{field}", theirs.get(field), ours.get(field))


def field_differences(name: str, saved: JSONValue, like: JSONValue) -> Iterator[str]:
    """Descends into equal kinds of value, so that a message names the innermost field."""
    if isinstance(saved, dict) and isinstance(like, dict):
        for key in sorted(saved.keys() | like.keys()):
            yield from field_differences(f"{name}.{key}", saved.get(key), like.get(key))
    elif saved != like or type(saved) is not type(like):
        yield f"{name.replace('.static.', '.')} is {saved!r} in the file and {like!r} in `like`"


def walk(node: object, path: str) -> Iterator[tuple[str, Any, list | None]]:
    """Yields (path, node, keys of its children); keys is None for a leaf."""
    found = children(node, path)
    yield path, node, None if found is None else [key for key, *_ in found]
    for _, child, where in found or ():
        yield from walk(child, where)


def children(node: object, path: str) -> list[tuple[Any, Any, str]] | None:
    """The parts of a node that are nodes or leaves themselves; None for a leaf.

    Args:
      node: of a pytree.
      path: of the node.
    Returns:
      (key, child, path of the child) in the order of jax; the key is the name, index or key of a
      dict under which the child lies.

    >>> children({"w": [1, 2]}, "a")
    [('w', [1, 2], "a['w']")]
    """
    found, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)
    if len(found) == 1 and found[0][0] == ():
        return None
    pairs = [(key[0], child) for key, child in found if not is_flax_state(key[0])]
    where = jax.tree_util.keystr
    return [(plain(k), c, (path + where((k,))).removeprefix(".")) for k, c in pairs]


def plain(key: Any) -> Any:
    """What a key of jax stands for."""
    for name in ("name", "idx", "key"):
        if hasattr(key, name):
            return getattr(key, name)
    return key


def is_flax_state(key: object) -> bool:
    """Whether a child is flax's own bookkeeping, which has no leaves."""
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name.startswith("_pytree__")


def leaf_entry(path: str, leaf: object) -> dict[str, JSONValue]:
    """{"path", "dtype", "shape"} of an array, {"path", "python", "value"} of a Python scalar."""
    if isinstance(leaf, bool | int | float | complex | str):
        plain = leaf.item() if isinstance(leaf, np.generic) else leaf  # np.float64 is a float
        value = plain if isinstance(plain, bool | int | str) else repr(plain)
        return {"path": path, "python": type(leaf).__name__, "value": value}
    shape, dtype = getattr(leaf, "shape", None), getattr(leaf, "dtype", None)
    if shape is None or dtype is None:
        raise FormatError(f"{path}: cannot store a leaf of type {type(leaf).__name__}")
    if dtype == np.dtype(object):
        raise FormatError(f"{path}: cannot store an array of Python objects")
    if not all(isinstance(n, int) for n in shape):
        raise FormatError(f"{path}: shape {shape} is not known")
    return {"path": path, "dtype": dtype_name(dtype), "shape": [int(n) for n in shape]}


def dtype_name(dtype: Any) -> str:
    """The name that stands for a dtype in files: "bfloat16", "int4", "key<fry>"."""
    return str(dtype) if jax.numpy.issubdtype(dtype, jax.dtypes.prng_key) else np.dtype(dtype).name


def static_part(node: object, keys: list) -> dict[str, JSONValue]:
    """{"static": {...}} with the fields of a node that are not children, or {} without any."""
    get_metadata = getattr(node, "get_metadata", None)
    if callable(get_metadata):  # an NNX Variable
        fields = {k: v for k, v in get_metadata().items() if k not in FLAX_METADATA}
    elif dataclasses.is_dataclass(node):
        fields = {f.name: getattr(node, f.name, None) for f in told(node)}
    elif isinstance(node, dict | list | tuple) or node is None:
        fields = {}
    else:
        fields = {k: v for k, v in vars(node).items() if not k.startswith("_")}
    static = {k: jsonable(fields[k]) for k in sorted(fields.keys() - set(keys))}
    return {"static": static} if static else {}


def later(default: Any) -> Any:
    """A field of a dataclass that older files know nothing of; told where it is not its default.

    >>> @dataclasses.dataclass
    ... class Spec:
    ...     heads: int
    ...     causal: bool = later(True)
    >>> jsonable(Spec(2)), jsonable(Spec(2, False))
    ({'type': 'Spec', 'heads': 2}, {'type': 'Spec', 'heads': 2, 'causal': False})
    """
    return dataclasses.field(default=default, metadata={LATER: True})


def told(node: Any) -> Iterator[dataclasses.Field]:
    """The fields of a dataclass that its description holds."""
    for field in dataclasses.fields(node):
        if LATER not in field.metadata or getattr(node, field.name, None) != field.default:
            yield field


def jsonable(value: object) -> JSONValue:
    """A static value in a form that is equal for equal values, in any process and version."""
    match value:
        case enum.Enum():
            return f"{type(value).__qualname__}.{value.name}"
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else repr(value)
        case tuple() | list():
            return [jsonable(item) for item in value]
        case dict():
            return {str(k): jsonable(value[k]) for k in sorted(value, key=str)}
        case set() | frozenset():
            return sorted((jsonable(item) for item in value), key=repr)
        case np.dtype():
            return value.name
        case np.generic():
            return jsonable(value.item())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: jsonable(getattr(value, f.name)) for f in told(value)}
        return {"type": type(value).__qualname__} | fields
    return getattr(value, "__qualname__", None) or stable_repr(value)


def stable_repr(value: object) -> str:
    """The repr, or the type's name where the repr has a memory address."""
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
