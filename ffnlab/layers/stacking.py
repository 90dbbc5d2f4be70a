"""Modules of one structure as one, with a leading axis: what `lax.scan` and `vmap` take.

Compile time and program size of a scanned stack do not grow with depth. Layers may be computed
again in the backward pass instead of stored (rematerialization).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PyTree

from ffnlab.errors import ConfigError

__all__ = [
    "POLICIES",
    "Statistic",
    "check_policy",
    "rematerialized",
    "run_stack",
    "stack_modules",
    "unstack_modules",
    "with_axes",
]

M = TypeVar("M", bound=nnx.Module)
C = TypeVar("C")

# What a layer keeps for its backward pass, besides its input.
POLICIES: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class Statistic(nnx.Variable):
    """What a layer holds that was measured: saved and sharded, never trained and never decayed."""


def stack_modules(modules: Sequence[M]) -> M:
    """One module whose leaves are those of all on a new first axis, logically "layers"."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *modules)
    return with_axes(stacked, lambda axes: ("layers", *axes))


def unstack_modules(stacked: M, n: int) -> list[M]:
    """The n modules that `stack_modules` made one of."""
    alone = with_axes(stacked, lambda axes: axes[1:])
    return [jax.tree.map(lambda leaf, i=i: leaf[i], alone) for i in range(n)]


def of_one(axes: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """The axes of one module's variable, of those that its stack has."""
    return axes[1:] if axes[:1] == ("layers",) else axes


def with_axes(module: C, change: Callable[[tuple[str | None, ...]], tuple[str | None, ...]]) -> C:
    """A copy of a module whose variables with logical axes carry others."""

    def is_named(node: object) -> bool:
        return isinstance(node, nnx.Variable) and node.get_metadata().get("axes") is not None

    def convert(node: object) -> object:
        return node.copy(axes=change(node.axes)) if is_named(node) else node

    return jax.tree.map(convert, module, is_leaf=is_named)


def check_policy(policy: str | None) -> None:
    """Raises ConfigError unless `policy` is a key of `POLICIES` or None."""
    if policy is not None and policy not in POLICIES:
        raise ConfigError(f"policy={policy!r} is not one of {[*POLICIES, None]}")


def rematerialized(call: Callable[..., C], policy: str | None) -> Callable[..., C]:
    """A function that keeps less for its backward pass.

    Args:
      call: of pytrees of arrays.
      policy: a key of `POLICIES`; None gives `call` itself.
    Raises:
      ConfigError: another policy.
    """
    check_policy(policy)
    return call if policy is None else jax.checkpoint(call, policy=POLICIES[policy])


def run_stack(
    stacked: PyTree,
    carry: C,
    call: Callable[[Any, C, Any], tuple[C, Any]],
    *,
    xs: PyTree = None,
    length: int | None = None,
    remat: str | None = None,
) -> tuple[C, PyTree]:
    """Runs alike modules one after the other by `lax.scan`.

        carry, y_i = call(module_i, carry, x_i)

    Args:
      stacked: what `stack_modules` gives, or a list of such; every leaf with a leading axis n.
      carry: what goes from module to module; keeps its shapes and dtypes.
      call: (module, carry, x) -> (carry, y).
      xs: pytree of leaves [n, ...], one slice for each module; None gives None.
      length: n, needed only of modules without arrays.
      remat: what each call keeps for the backward pass, see `rematerialized`.
    Returns:
      (carry, ys), ys with a leading axis n.
    Raises:
      ConfigError: another policy.

    >>> import jax.numpy as jnp
    >>> run_stack(jnp.arange(3.0), jnp.float32(1), lambda m, c, x: (c + m, c))
    (Array(4., dtype=float32), Array([1., 1., 2.], dtype=float32))
    """

    def one(module: PyTree, carry: C, x: PyTree) -> tuple[C, Any]:
        return call(with_axes(module, of_one), carry, x)

    body = rematerialized(one, remat)
    return jax.lax.scan(lambda c, m: body(m[0], c, m[1]), carry, (stacked, xs), length=length)
