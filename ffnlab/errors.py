"""Errors of ffnlab: every one names the argument or file, what came and what is accepted."""

import importlib
import operator
from types import ModuleType

__all__ = [
    "ConfigError",
    "DamagedError",
    "FFNLabError",
    "FormatError",
    "MeshError",
    "MissingExtraError",
    "NumericalError",
    "SelectionError",
    "at_least",
    "check_seed",
    "first_line",
    "is_known",
    "is_whole",
    "require",
]


class FFNLabError(ValueError):
    """Base of the errors that bad input raises, before any compute."""


class SelectionError(FFNLabError):
    """A selector matched nothing, or not the number of nodes that was expected."""


class FormatError(FFNLabError):
    """A file is damaged, lies about itself, or is not what was asked for."""


class DamagedError(FormatError):
    """Files are not those that were written: cut short, changed, or missing."""


class ConfigError(FFNLabError):
    """An option, recipe or model configuration is unknown, out of range or inconsistent."""


class MeshError(ConfigError):
    """A mesh fits neither the devices that there are, nor what is to be cut by it."""


class NumericalError(FFNLabError):
    """A computation ended in NaN or infinity, or did not converge; the message advises."""


class MissingExtraError(ImportError):
    """A package of an optional extra is not installed; the message gives the install line."""


SEEDS = 2**32  # jax.random.key takes more, and makes the same keys of them


def at_least(least: int, **values: object) -> None:
    """Checks whole numbers that were given; None stands for none.

    Raises:
      ConfigError: one is less, or no whole number: of NaN nothing is less.

    >>> at_least(1, limit=None, window=64)
    """
    for name, value in values.items():
        if value is None:
            continue
        if not is_whole(value):
            raise ConfigError(f"{name}={value!r} must be at least {least}, a whole number")
        if operator.index(value) < least:  # type: ignore[arg-type]
            raise ConfigError(f"{name}={value} must be at least {least}")


def is_whole(value: object) -> bool:
    """Whether a value counts: an integer of Python, NumPy or jax."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def check_seed(seed: object) -> None:
    """Checks a seed, of which each draws something else.

    Raises:
      ConfigError: it is no whole number in 0..2**32 - 1.

    >>> check_seed(7)
    """
    if not is_whole(seed) or not 0 <= operator.index(seed) < SEEDS:  # type: ignore[arg-type]
        raise ConfigError(f"seed={seed!r} must lie in 0..{SEEDS - 1}, a whole number")


def is_known(*values: object) -> bool:
    """Whether numbers have values, so that their range can be checked.

    Those of a function that is traced have none yet: what `ffnlab.learning.members` varies.

    >>> is_known(0.5, None)
    True
    """
    from jax.core import Tracer

    return not any(isinstance(value, Tracer) for value in values)


def require(module: str, *, extra: str) -> ModuleType:
    """Imports an optional dependency, or says which extra brings it.

    Args:
      module: dotted name, for example "tyro" or "matplotlib.pyplot".
      extra: the extra of ffnlab that installs it.
    Returns:
      the imported module.
    Raises:
      MissingExtraError: the package is not installed. An import error that the package itself
        raises, for instance on a machine without a GPU, passes through unchanged.

    >>> require("json", extra="run").__name__
    'json'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise MissingExtraError(
            f"{module} is not installed; it comes with the extra {extra!r}: "
            f"pip install 'ffnlab[{extra}]'",
            name=error.name,
        ) from None


def first_line(error: BaseException) -> str:
    """The first line of a message that may run over pages."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
