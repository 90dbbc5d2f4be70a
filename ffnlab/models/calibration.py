"""What methods that calibrate on a model are given, checked before any compute."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, Shaped

from ffnlab.errors import ConfigError

__all__ = ["Given", "Layered", "called", "check_tokens", "given"]


@runtime_checkable
class Layered(Protocol):
    """A model with layers, a list or `models.Stacked`, that is called with what a batch holds."""

    layers: Any
    config: Any

    def __call__(self, *args: Any, **options: Any) -> Any:
        """What the model makes of a batch."""
        ...


class Given(NamedTuple):
    """What a model is called with: `model(*args, **options)`; a pytree of arrays.

    Attributes:
      args: the array that the batch was, or nothing.
      options: the arrays that it had by name.
    """

    args: tuple[Array | np.ndarray, ...]
    options: dict[str, Array | np.ndarray]

    def run(self, model: Layered, **more: Any) -> Any:
        """What a model makes of it."""
        return model(*self.args, **self.options, **more)

    @property
    def first(self) -> Shaped[Array | np.ndarray, "b *s"]:
        """What the model reads first: the tokens, or what stands for them."""
        named = [self.options[name] for name in FIRST if name in self.options]
        return [*self.args, *named, *self.options.values()][0]

    @property
    def tokens(self) -> Int[Array | np.ndarray, "b t"] | None:
        """The tokens, or None where something else stands for them."""
        first = self.first
        return first if first.ndim == 2 and np.issubdtype(first.dtype, np.integer) else None

    @property
    def valid(self) -> Bool[Array | np.ndarray, "b t"] | None:
        """False for padding; None where all are tokens."""
        if "segments" in self.options:
            return self.options["segments"] > 0
        return self.options.get("valid")


FIRST = ("tokens", "embeddings")  # what a text may be given as


def called(model: Callable, inputs: PyTree) -> Any:
    """What a model makes of inputs, which are not looked at.

    Args:
      model: any.
      inputs: a mapping holds arguments by their names, as {"tokens": …, "valid": …} of an encoder;
        anything else is the first argument.

    >>> called(lambda x, y=0: x - y, {"y": 1, "x": 3}), called(lambda x, y=0: x - y, 3)
    (2, 3)
    """
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def given(batch: object, model: Layered, *, least: int = 1) -> Given:
    """A batch as a model takes it, on the host.

    Args:
      batch: an array is the first argument of the model (tokens, of a model with a vocabulary); a
        mapping holds arrays by the names of its arguments: tokens, and `valid`, `types` or what
        else the model takes. Arrays of one size b come first in all.
      model: whose tokens are checked where its config has a vocabulary.
      least: tokens that a row needs.
    Raises:
      ConfigError: names that the model does not take, no text, or tokens that it does not have.

    >>> from ffnlab.testing import tiny_encoder
    >>> batch = {"tokens": [[1, 2]], "valid": np.array([[True, False]])}
    >>> given(batch, tiny_encoder()).options["tokens"].dtype
    dtype('int32')
    """
    vocab = getattr(model.config, "vocab", None)
    if not isinstance(batch, Mapping):
        return Given((_checked(batch, vocab, least),), {})
    parameters = inspect.signature(type(model).__call__).parameters
    known = [name for name in parameters if name not in ("self", "inputs")]
    strange = sorted(str(name) for name in batch if name not in known)
    if strange or not batch:
        raise ConfigError(f"a batch of {sorted(map(str, batch))}; {known} are accepted")
    if vocab is not None and sum(name in batch for name in FIRST) != 1:
        raise ConfigError(f"a batch of {sorted(batch)}: one of {FIRST} is needed")
    arrays = {
        name: _checked(value, vocab if name == "tokens" else None, least)
        for name, value in batch.items()
    }
    rows = {name: value.shape[:1] for name, value in arrays.items()}
    if len(set(rows.values())) > 1:
        raise ConfigError(f"a batch of rows {rows}: one number of rows is accepted")
    return Given((), arrays)


def _checked(value: object, vocab: int | None, least: int) -> Array | np.ndarray:
    if vocab is not None:
        return check_tokens(value, vocab, least=least)
    if isinstance(value, jax.Array):  # a traced one too
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a batch of {type(value).__name__} is no array: {error}") from None
    if array.dtype.kind not in "biuf" or not array.ndim or not len(array):
        raise ConfigError(
            f"a batch of {array.dtype} {array.shape}; numbers [b, ...] with b >= 1 are accepted"
        )
    return array


def check_tokens(batch: object, vocab: int, *, least: int = 1) -> Int[np.ndarray | Array, "b t"]:
    """A batch of token ids as int32 on the host; a traced one as it is, its values not looked at.

    Args:
      batch: integers [b, t], b >= 1, t >= `least`, from 0 to `vocab` - 1.
      vocab: number of ids of the model.
      least: tokens that a row needs.
    Returns:
      the ids, [b, t] int32.
    Raises:
      ConfigError: it is anything else.

    >>> check_tokens([[1, 2], [0, 3]], 4).shape
    (2, 2)
    """
    is_traced = isinstance(batch, jax.core.Tracer)
    try:
        tokens = batch if is_traced else np.asarray(batch)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"a batch of {type(batch).__name__} is no array: {error}") from None
    is_tokens = tokens.ndim == 2 and np.issubdtype(tokens.dtype, np.integer)
    if not is_tokens or tokens.shape[0] < 1 or tokens.shape[1] < least:
        raise ConfigError(
            f"a batch of {tokens.dtype} {tokens.shape}; integer tokens [b, t] with b >= 1 and "
            f"t >= {least} are accepted"
        )
    if is_traced:
        return tokens.astype(np.int32)
    if tokens.min() < 0 or tokens.max() >= vocab:
        raise ConfigError(
            f"token ids from {tokens.min()} to {tokens.max()}; the vocabulary is 0..{vocab - 1}"
        )
    return tokens.astype(np.int32)
