"""Transforms that change a model at once, and draw what is new by its place."""

import zlib
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Key

from ffnlab.errors import ConfigError, check_seed
from ffnlab.layers import Linear
from ffnlab.models.stack import check_layered, in_list
from ffnlab.transform import Transform
from ffnlab.tree import Selector

__all__ = ["key_of", "rewriting", "routers"]

routers = Selector(  # few numbers, and where tokens go hangs on small differences of them
    "routers", lambda _, node: isinstance(node, Linear) and node.w.axes[-1] == "router"
)


def rewriting(
    name: str, problems: Callable[[Any], list[str]], change: Callable[[Any], Any]
) -> Transform:
    """A transform without calibration of models in their list form.

    Args:
      name: of the transform.
      problems: what is wrong with a model, a sentence each.
      change: makes the new model.
    """

    def init(model: Any) -> tuple[()]:
        check_layered(model)
        in_list(model, checked)
        return ()

    def checked(model: Any) -> Any:
        found = problems(model)
        if found:
            raise ConfigError(f"{name}: " + "; ".join(found))
        return model

    return Transform(name, init, None, lambda model, stats: in_list(model, change))


def key_of(seed: int, path: str) -> Key[Array, ""]:
    """A key that depends on the place, not on what else is selected.

    Raises:
      ConfigError: a seed that draws as another does (`ffnlab.errors.check_seed`).
    """
    check_seed(seed)
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
