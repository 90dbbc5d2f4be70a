"""How much the weights of channels that go together amount to, and what makes them unequal.

DepGraph: Towards Any Structural Pruning (2023), section 4.3, as its library `torch-pruning` and
Meta Pruning via Graph Metanetworks (2025) use it. For unit k of a group of `ffnlab.models.groups`

    S_k = sum over parts of |w_k|^2,   w_k: what of a part's numbers goes with the unit
    I_k = S_k / max_j S_j                                                        (importance)
    g_k = alpha^((J_max - J_k) / (J_max - J_min)),   J = sqrt(I)
    R   = 1/2 sum over groups and units of stop(g_k) S_k                         (penalty)

Parts are matrices and the scales of norms; biases, statistics and thresholds do not count. A number
that is in two groups is penalized by both.

What differs from the library: it adds dR / dw to gradients, and R has that gradient. I_k is the
mean over parts there, which the maximum divides out. Where all units of a group are alike, g_k is
0 / 0 there and the group left out; here it is 1. Shortcuts without parameters put no channels into
one group (`ffnlab.models.groups`), which the library cannot trace.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ffnlab import tree
from ffnlab.errors import ConfigError
from ffnlab.layers import Residual, RMSNorm
from ffnlab.models.groups import COLUMNS, ROWS, Group, Part, groups, owner_of
from ffnlab.models.stack import Stacked, unstack
from ffnlab.weights import Weight

__all__ = ["Counted", "counted", "group_penalty", "importance"]

Counted = list[tuple[Part, Array]]  # parts of a group whose numbers count, and their arrays


def counted(model: nnx.Module) -> list[tuple[Group, Counted]]:
    """The groups of a model with what counts of each: matrices and scales of norms, float32.

    Args:
      model: as `ffnlab.models.groups` takes it; it may be traced.
    """
    flat = unstack(model) if isinstance(getattr(model, "layers", None), Stacked) else model
    nodes = dict(tree.walk(flat))
    found = []
    for group in groups(flat):
        pairs = ((part, numbers(nodes, part)) for part in group.parts)
        found.append((group, [(part, x) for part, x in pairs if x is not None]))
    return found


def numbers(nodes: dict[str, object], part: Part) -> Array | None:
    """The array of a part, or None where it does not count."""
    if isinstance(nodes[part.path], Residual):
        return None
    owner, attribute = owner_of(nodes, part.path)
    variable = getattr(owner, attribute)
    if not isinstance(variable, nnx.Param):
        return None
    value = variable.get_value()
    if isinstance(value, Weight):
        return value.dense().astype(jnp.float32)
    if attribute != "scale":
        return None
    gain = value.astype(jnp.float32)
    return gain + owner.offset if isinstance(owner, RMSNorm) else gain


def sums(group: Group, parts: Counted) -> Float[Array, "units"]:
    """S_k of every unit."""
    total = jnp.zeros(group.size, jnp.float32)
    for part, x in parts:
        square = x * x
        if x.ndim > 1:
            square = square.sum({COLUMNS: 0, ROWS: 1}[part.axis])
        total = total + square[part.index].sum(1)
    return total


def normalized(total: Float[Array, "units"]) -> Float[Array, "units"]:
    """Divided by the largest; zeros where all are."""
    largest = total.max()
    return total / jnp.where(largest > 0, largest, 1)


def importance(model: nnx.Module) -> dict[str, Float[Array, "_"]]:
    """I_k of the units of every group, in 0..1, by the group's name.

    Args:
      model: as `ffnlab.models.groups` takes it, of any weights; it may be traced.
    Raises:
      ConfigError: as `groups`.

    >>> from ffnlab.layers import MLP
    >>> found = importance(MLP((4, 3, 2), key=jax.random.key(0)))
    >>> found["maps[0]"].shape, float(found["maps[0]"].max())
    ((3,), 1.0)
    """
    return {group.name: normalized(sums(group, parts)) for group, parts in counted(model)}


def group_penalty(model: nnx.Module, *, alpha: float = 16.0) -> Float[Array, ""]:
    """R: what parts the units of every group into large and small ones where it is minimized.

    Its gradient for a weight w of unit k is g_k w, for one of two groups the sum of both.

    Args:
      model: as for `importance`.
      alpha: by how much more the smallest unit of a group is penalized than the largest, >= 1; the
        authors use 16.
    Raises:
      ConfigError: alpha below 1; as `groups`.
    """
    if not alpha >= 1:
        raise ConfigError(f"alpha={alpha} must be at least 1")
    total = jnp.float32(0)
    for group, parts in counted(model):
        own = sums(group, parts)
        total = total + 0.5 * jnp.sum(jax.lax.stop_gradient(gains(own, alpha)) * own)
    return total


def gains(total: Float[Array, "units"], alpha: float) -> Float[Array, "units"]:
    """g_k of the units of a group; 1 where all are alike."""
    # No gradient is asked of this: a square root at 0 would have none that is finite.
    root = jnp.sqrt(normalized(jax.lax.stop_gradient(total)))
    high, low = root.max(), root.min()
    spread = jnp.where(high > low, high - low, 1)
    return jnp.float32(alpha) ** ((high - root) / spread)
