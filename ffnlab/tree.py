"""Surgery on models: select parts by type, path or predicate and get a new model back.

A model is a pytree; its nodes (modules, variables, weights, list items, arrays) are named by the
path that jax prints, without the leading dot: `layers[0].ffn.up.w`. Nothing here changes its
argument, and a selection that matches nothing is an error, never a silent no-op.
"""

import contextvars
import dataclasses
import difflib
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from ffnlab.errors import SelectionError
from ffnlab.weights.base import is_weight
from ffnlab.weights.base import nbytes as leaf_nbytes

M = TypeVar("M")
Predicate = Callable[[str, object], bool]


@dataclasses.dataclass(frozen=True)
class Selector:
    """A named predicate on (path, node); combine with `&`, `|`, `~`."""

    name: str
    fn: Predicate

    def __call__(self, path: str, node: object) -> bool:
        return bool(self.fn(path, node))

    def __and__(self, other: "Selector") -> "Selector":
        return Selector(f"({self.name} & {other.name})", lambda p, n: self(p, n) and other(p, n))

    def __or__(self, other: "Selector") -> "Selector":
        return Selector(f"({self.name} | {other.name})", lambda p, n: self(p, n) or other(p, n))

    def __invert__(self) -> "Selector":
        return Selector(f"~{self.name}", lambda p, n: not self(p, n))


def of_type(*types: type) -> Selector:
    """Selects nodes that are instances of one of `types`."""
    return Selector(
        f"of_type({', '.join(t.__name__ for t in types)})", lambda _, n: isinstance(n, types)
    )


def at(pattern: str) -> Selector:
    """Selects nodes by path: `*` stands for any one name or index, `**` for anything.

    `at("layers[*].ffn.up")` is every up projection, `at("**.q_norm")` every query norm.
    """
    regex = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", r"[^.\[\]]*")
    compiled = re.compile(regex)
    return Selector(f"at({pattern!r})", lambda p, _: compiled.fullmatch(p) is not None)


def where(fn: Predicate) -> Selector:
    """Selects nodes for which `fn(path, node)` is true."""
    return Selector(f"where({getattr(fn, '__name__', 'fn')})", fn)


def floating(path: str, node: object) -> bool:
    """Whether a node is an array of a dtype that has gradients; a predicate for `partition`.

    Floats of eight bits and fewer are codes or scales of a quantizer, which have none.
    """
    is_array = jax.tree_util.all_leaves([node]) and hasattr(node, "dtype")
    return is_array and jnp.issubdtype(node.dtype, jnp.floating) and node.dtype.itemsize > 1


def children(node: object) -> tuple[list[tuple[str, object]], object]:
    """The named children of one node and the structure that rebuilds it from them."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda n: n is not node)
    if len(flat) == 1 and flat[0][0] == ():
        return [], None
    return [(jax.tree_util.keystr(keys), child) for keys, child in flat], treedef


def walk(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every node below the root, parents before children, as (path, node)."""
    for key, child in children(tree)[0]:
        if key.startswith("._pytree__"):  # nnx bookkeeping
            continue
        name = (path + key).removeprefix(".")
        yield name, child
        yield from walk(child, name)


def select(tree: object, selector: Predicate) -> dict[str, object]:
    """The selected nodes by path, in tree order.

    Raises:
      SelectionError: nothing matches.
    """
    found = {path: n for path, n in walk(tree) if n is not None and selector(path, n)}
    if not found:
        raise SelectionError(_nothing_matches(tree, selector))
    return found


def _nothing_matches(tree: object, selector: Predicate) -> str:
    name = getattr(selector, "name", getattr(selector, "__name__", "selector"))
    paths = [path for path, _ in walk(tree)]
    wanted = re.sub(r"^at\('|'\)$", "", name)
    near = difflib.get_close_matches(wanted.replace("[*]", "[0]"), paths, n=3, cutoff=0.3)
    return f"{name} matches nothing; nearest paths: {near or paths[:3]}"


def copy(tree: M) -> M:
    """A structural copy: new modules, the same arrays."""
    return jax.tree.map(lambda leaf: leaf, tree)


def _rebuild(node: object, new: Mapping[str, object], path: str) -> object:
    named, treedef = children(node)
    if treedef is None:
        return node
    rebuilt = []
    for key, child in named:
        name = (path + key).removeprefix(".")
        if name in new:
            rebuilt.append(new[name])
        elif any(target.startswith(name) for target in new):
            rebuilt.append(_rebuild(child, new, name))
        else:
            rebuilt.append(copy(child))
    return jax.tree.unflatten(treedef, rebuilt)


def replace(tree: M, new: Mapping[str, object]) -> M:
    """A copy of the tree in which each path of `new` holds the given node.

    Raises:
      SelectionError: a path does not exist, or lies inside another of them.
    """
    paths = {path for path, _ in walk(tree)}
    for path in new:
        if path not in paths:
            near = difflib.get_close_matches(path, paths, n=3, cutoff=0.3)
            raise SelectionError(f"path {path!r} does not exist; nearest paths: {near}")
        outer = [p for p in new if p != path and re.match(re.escape(p) + r"[.\[]", path)]
        if outer:
            raise SelectionError(f"selection overlaps: {outer[0]!r} contains {path!r}")
    return _rebuild(tree, new, "")


def map_at_path(
    tree: M, selector: Predicate, fn: Callable[[str, object], object], *, expect: int | None = None
) -> M:
    """A copy of the tree with every selected node replaced by `fn(path, node)`.

    Args:
      expect: number of nodes that must be selected, checked before `fn` runs.
    Raises:
      SelectionError: nothing matches, the count differs from `expect`, or selections overlap.
    """
    found = select(tree, selector)
    if expect is not None and len(found) != expect:
        name = getattr(selector, "name", "selector")
        raise SelectionError(
            f"{name} matches {len(found)} nodes, expected {expect}: {list(found)[:5]}"
        )
    return replace(tree, {path: fn(path, node) for path, node in found.items()})


def map_at(
    tree: M, selector: Predicate, fn: Callable[[object], object], *, expect: int | None = None
) -> M:
    """A copy of the tree with every selected node replaced by `fn(node)`; see `map_at_path`."""
    return map_at_path(tree, selector, lambda _, node: fn(node), expect=expect)


def partition(tree: M, selector: Predicate) -> tuple[M, M]:
    """Splits the leaves into (chosen, rest): two trees of the same type, `None` where a leaf is
    absent.

    A leaf is chosen when it or a node above it is selected. `jax.grad` and optax see only the
    leaves that are there; `combine` puts the two together again.

    Raises:
      SelectionError: nothing matches.
    """
    chosen = list(_selected_leaves(tree, selector, False))
    if not any(chosen):
        raise SelectionError(_nothing_matches(tree, selector))
    leaves, treedef = jax.tree.flatten(tree)
    mine = [leaf if keep else None for leaf, keep in zip(leaves, chosen, strict=True)]
    rest = [None if keep else leaf for leaf, keep in zip(leaves, chosen, strict=True)]
    return jax.tree.unflatten(treedef, mine), jax.tree.unflatten(treedef, rest)


def _selected_leaves(
    node: object, selector: Predicate, inside: bool, path: str = ""
) -> Iterator[bool]:
    named, treedef = children(node)
    if treedef is None:
        if node is not None:
            yield inside
        return
    for key, child in named:
        name = (path + key).removeprefix(".")
        yield from _selected_leaves(child, selector, inside or selector(name, child), name)


def combine(chosen: M, rest: M) -> M:
    """The tree whose leaves come from `chosen` where it has them and from `rest` elsewhere."""
    is_none = lambda node: node is None  # noqa: E731
    a, treedef = jax.tree.flatten(chosen, is_leaf=is_none)
    b, other = jax.tree.flatten(rest, is_leaf=is_none)
    if treedef != other:
        raise ValueError("chosen and rest are not the two parts of one tree (structures differ)")
    merged = [y if x is None else x for x, y in zip(a, b, strict=True)]
    return jax.tree.unflatten(treedef, merged)


def trained(tree: M, selector: Predicate | None = None) -> tuple[M, M]:
    """Splits the leaves as `partition` does, into (what learning changes, the rest).

    Trained are floating arrays of the selected parts. Quantized weights stay whole, scales
    included, as does what else a weight does not train (`Weight.trains`: the base of a LoRA), and
    an `nnx.Variable` that is not an `nnx.Param`.

    Args:
      selector: of the parts that learn; all when None.
    Raises:
      SelectionError: the selector matches nothing, or nothing that can be trained.
    """
    leaves, treedef = jax.tree.flatten(tree)
    chosen = [True] * len(leaves)
    if selector is not None:
        select(tree, selector)
        chosen = list(_selected_leaves(tree, selector, False))
    mine = [a and b for a, b in zip(chosen, _trainable_leaves(tree, False), strict=True)]
    if not any(mine):
        name = getattr(selector, "name", getattr(selector, "__name__", selector))
        raise SelectionError(
            f"trainable={name}: of the arrays selected ({sum(chosen)}) none can be trained; "
            "floating arrays of Params can, quantized weights stay as they are: select other "
            "parts, or put a LoRA around a quantized weight"
        )
    parts = (
        [leaf if keep == kept else None for leaf, keep in zip(leaves, mine, strict=True)]
        for kept in (True, False)
    )
    return tuple(jax.tree.unflatten(treedef, part) for part in parts)


def _trainable_leaves(node: object, fixed: bool) -> Iterator[bool]:
    named, treedef = children(node)
    if treedef is None:
        if node is not None:
            yield not fixed and floating("", node)
        return
    fixed = fixed or (isinstance(node, nnx.Variable) and not isinstance(node, nnx.Param))
    for key, child in named:
        kept = is_weight(node) and not node.trains(key.removeprefix("."))
        yield from _trainable_leaves(child, fixed or kept)


def nbytes(tree: object) -> int:
    """Bytes of all arrays in a tree as stored (int4 counts half a byte)."""
    return sum(leaf_nbytes(leaf) for leaf in jax.tree.leaves(tree))


class Captured(NamedTuple):
    """What one captured module was called with (positional arguments) and what it returned."""

    input: tuple
    output: object


_records: contextvars.ContextVar[dict[str, list[Captured]]] = contextvars.ContextVar("records")


@functools.cache
def _tapped(cls: type[nnx.Module]) -> type[nnx.Module]:
    """A subclass that records its calls while `capture` runs, and is its parent in all else."""

    def call(self: nnx.Module, *args: object, **kwargs: object) -> object:
        output = cls.__call__(self, *args, **kwargs)
        _records.get().setdefault(self.tap_path, []).append(Captured(args, output))
        return output

    return type(f"Tapped{cls.__name__}", (cls,), {"__call__": call})


def _tap(path: str, module: nnx.Module) -> nnx.Module:
    tapped = copy(module)
    tapped.__class__ = _tapped(type(module))
    tapped.tap_path = path
    return tapped


def capture(
    model: nnx.Module,
    selector: Predicate,
    *args: object,
    calls: str = "one",
    **kwargs: object,
) -> tuple[object, dict[str, Captured] | dict[str, tuple[Captured, ...]]]:
    """Runs `model(*args, **kwargs)` and returns (output, what the selected modules saw and gave).

    Works under jit, where everything not used is removed by the compiler. Modules of a scanned
    stack live inside the scan: `models.unstack` first.

    Args:
      selector: selects modules (not arrays or weights).
      calls: "one" gives a `Captured` of each module and refuses those that run more than once;
        "all" gives a tuple of each, one `Captured` per call in order.
    Raises:
      SelectionError: nothing matches, or a selected module did not run.
      ValueError: another `calls`, or a module ran more than once where one call is asked for.
    """
    if calls not in ("one", "all"):
        raise ValueError(f"calls={calls!r} is not one of 'one', 'all'")
    modules = Selector(
        f"{getattr(selector, 'name', 'selector')} among modules",
        lambda path, node: isinstance(node, nnx.Module) and selector(path, node),
    )
    tapped = map_at_path(model, modules, _tap)
    expected = [path for path, node in walk(tapped) if hasattr(node, "tap_path")]
    token = _records.set({})
    try:
        output = tapped(*args, **kwargs)
        records = _records.get()
    finally:
        _records.reset(token)
    missing = [path for path in expected if path not in records]
    if missing:
        raise SelectionError(f"selected modules did not run as calls: {missing[:5]}")
    if calls == "all":
        return output, {path: tuple(found) for path, found in records.items()}
    for path, found in records.items():
        if len(found) > 1:
            raise ValueError(
                f"{path} is called more than once in a run; capture records one call per module, "
                'or with calls="all" a tuple of them'
            )
    return output, {path: found[0] for path, found in records.items()}
