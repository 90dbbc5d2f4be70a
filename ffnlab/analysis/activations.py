"""What the layers of a network give on a batch, and whether a nonlinearity lies behind it.

An MLP has no module for its nonlinearity: the activation of map l is what map l + 1 is given. All
probes of activations ask here, and nowhere else.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Key, PyTree

from ffnlab import tree
from ffnlab.errors import SelectionError
from ffnlab.layers import MLP, Conv, Linear, Noisy

__all__ = ["Recorded", "activations", "network_of", "stage_of"]

INSIDE = "model."  # of a Noisy network
AFTER, BEFORE, OUTPUT = "after", "before", "output"


class Recorded(NamedTuple):
    """What a layer gave.

    Attributes:
      value: [b, …].
      stage: "after" a nonlinearity, "before" one (what a Linear or a Conv gives), or "output": of
        the model, or of a module that has both inside.
    """

    value: Array
    stage: str


def activations(
    model: PyTree, x: PyTree, select: str = "**", *, key: Key[Array, ""] | None = None
) -> dict[str, Recorded]:
    """Runs a model on a batch and records its layers; under jit, and under vmap over members.

    Args:
      model: inputs -> outputs. Blocks of a scanned stack are inside its loop: `models.unstack`
        first. The layers of a `Noisy` network are those of the network inside.
      x: a batch.
      select: of an MLP which of its maps ("maps[*]" for instance), of another model the modules
        whose outputs are recorded, of those that lie in each other the innermost; `*` is any one
        name, `**` anything.
      key: of what a model draws, one that takes `key=`.
    Returns:
      path -> what it gave, in the model's order. Of an MLP each map but the last has what comes
      after the nonlinearity, and the last the model's output.
    Raises:
      SelectionError: the pattern matches nothing that runs.

    >>> net = MLP((3, 4, 2), key=jax.random.key(0))
    >>> {p: (r.value.shape, r.stage) for p, r in activations(net, jnp.ones((5, 3))).items()}
    {'maps[0]': ((5, 4), 'after'), 'maps[1]': ((5, 2), 'output')}
    """
    x = jax.tree.map(jnp.asarray, x)
    whole, model = model, network_of(model)
    if isinstance(model, MLP):
        found = recorded(whole, tree.at("maps[*]"), x, key)
        kept = [name for name in found if name in tree.select(model, tree.at(select))]
        if not kept:
            raise SelectionError(f"select={select!r} matches none of {list(found)}")
        names = list(found)
        after = dict(zip(names, names[1:], strict=False))
        values = {n: found[after[n]].input[0] if n in after else found[n].output for n in kept}
        return {name: Recorded(value, stage_of(model, name)) for name, value in values.items()}
    chosen = tree.select(model, tree.at(select))
    modules = {path: node for path, node in chosen.items() if path and isinstance(node, nnx.Module)}
    if not modules:
        raise SelectionError(f"select={select!r} selects no module below a {type(model).__name__}")
    outer = {
        path for path in modules for other in modules if other.startswith((f"{path}.", f"{path}["))
    }
    modules = {path: node for path, node in modules.items() if path not in outer}
    wanted = tree.Selector(f"{select!r}", lambda path, node: path in modules)
    found = recorded(whole, wanted, x, key)
    return {
        path: Recorded(first_array(record.output), stage_of(model, path))
        for path, record in found.items()
    }


def network_of(model: PyTree) -> PyTree:
    """The network inside a `Noisy` one; another model as it is."""
    return model.model if isinstance(model, Noisy) else model


def recorded(
    model: PyTree, modules: tree.Predicate, x: PyTree, key: Key[Array, ""] | None
) -> dict[str, Any]:
    """What modules of the network saw and gave, each once."""
    options: dict[str, Any] = {} if key is None else {"key": key}
    if not isinstance(model, Noisy):
        return tree.capture(model, modules, x, **options)[1]
    inside = tree.Selector(
        str(modules),
        lambda path, node: path.startswith(INSIDE) and modules(path.removeprefix(INSIDE), node),
    )
    found = tree.capture(model, inside, x, **options)[1]
    return {path.removeprefix(INSIDE): record for path, record in found.items()}


def first_array(output: PyTree) -> Array:
    """What a module gives onwards: a block gives its cache and its report after it."""
    return next(
        leaf for leaf in jax.tree.leaves(output) if jnp.issubdtype(leaf.dtype, jnp.floating)
    )


def stage_of(model: PyTree, path: str) -> str:
    """Where `activations` looks at a layer: "before", "after" or "output"."""
    model = network_of(model)
    if isinstance(model, MLP):
        return OUTPUT if path == f"maps[{len(model.maps) - 1}]" else AFTER
    (module,) = tree.select(model, tree.at(path)).values()
    return BEFORE if isinstance(module, Linear | Conv) else OUTPUT
