"""The transforms that a recipe may name. A new method joins by one line."""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from ffnlab.errors import ConfigError
from ffnlab.recipes.options import Option, nearest, options_from
from ffnlab.transform import Transform

__all__ = ["TRANSFORMS", "factory", "options_of"]

# Name in a recipe -> "module:factory"; a module is imported when a recipe names it.
TRANSFORMS: Mapping[str, str] = MappingProxyType(
    {
        "cats": "ffnlab.sparsity.chess:cats",
        "chess": "ffnlab.sparsity.chess:chess",
        "finercut": "ffnlab.pruning.finercut:finercut",
        "fireq": "ffnlab.quantization.fireq:fireq",
        "nearest": "ffnlab.quantization.nearest:nearest",
    }
)


def factory(name: str) -> Callable[..., Transform]:
    """The factory of a transform.

    Args:
      name: a key of `TRANSFORMS`.
    Returns:
      a function whose keyword-only parameters are the options.
    Raises:
      ConfigError: no such transform; the message lists them, the nearest name first.

    >>> factory("finercut").__name__
    'finercut'
    """
    if name not in TRANSFORMS:
        raise ConfigError(
            f"unknown transform {name!r}{nearest(name, TRANSFORMS)}; there are: "
            f"{', '.join(TRANSFORMS)}"
        )
    module, _, attribute = TRANSFORMS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def options_of(name: str) -> dict[str, Option]:
    """The options of a transform by name, with their types and defaults.

    Args:
      name: a key of `TRANSFORMS`.
    Raises:
      ConfigError: no such transform.

    >>> str(options_of("finercut")["rate"])
    "rate: number or 'none' (default 'none')"
    """
    return options_from(factory(name))
