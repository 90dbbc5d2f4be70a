"""Options of the harness's generation requests, read as its own model class, HFLM, reads them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ffnlab.errors import ConfigError
from ffnlab.text.generation_config import NOT_DONE, advised_sampling, not_done
from ffnlab.text.sample import Sampling

__all__ = ["Settings", "overlooked", "read_settings"]

# The first that is there counts.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
NUMBERS = {"temperature": float, "top_k": int, "top_p": float, "min_p": float}
OPTIONS = ("until", "do_sample", *NUMBERS, *LENGTHS)


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one generation request wants its text.

    Attributes:
      until: strings that end it; they are not part of it.
      max_tokens: at most so many.
      sampling: how tokens are chosen.
    """

    until: tuple[str, ...]
    max_tokens: int
    sampling: Sampling


def read_settings(
    options: Mapping[str, Any],
    generation: Mapping[str, object],
    *,
    end: str,
    max_tokens: int,
    limit: int,
) -> Settings:
    """The options of one request, checked.

    Args:
      options: of the request.
      generation: content of the model's generation_config.json: how tokens are drawn where the
        request does not say.
      end: text of the end-of-text token, one more string that ends a text.
      max_tokens: where the request does not say.
      limit: tokens that the model reads at once.
    Raises:
      ConfigError: unknown options, or values that are out of range or not done here.
    """
    unknown = sorted(options.keys() - {*OPTIONS, *NOT_DONE})
    if unknown:
        raise ConfigError(f"generation options {unknown} are unknown; accepted: {OPTIONS}")
    for name in not_done(options):
        neutral = " or ".join(map(repr, (None, *NOT_DONE[name])))
        raise ConfigError(f"{name}={options[name]!r} is not done here; {neutral} is accepted")
    length = next((options[n] for n in LENGTHS if options.get(n) is not None), max_tokens)
    if not isinstance(length, int) or not 1 <= length < limit:
        raise ConfigError(f"max_gen_toks={length} must lie in 1..{limit - 1}")
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else until
    if not isinstance(until, list | tuple) or not all(isinstance(stop, str) for stop in until):
        raise ConfigError(f"until={until!r} must be a string or a list of strings")
    until = tuple(stop for stop in dict.fromkeys((*until, end)) if stop)
    return Settings(until, length, sampling(options, generation))


def sampling(options: Mapping[str, Any], generation: Mapping[str, object]) -> Sampling:
    """How tokens are chosen: drawn if `do_sample` is true, or unsaid with a temperature above 0."""
    given = {}
    for name, kind in NUMBERS.items():
        value = options.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | kind):
            raise ConfigError(f"{name}={value!r} must be of type {kind.__name__}")
        given[name] = kind(value)
    drawn = options.get("do_sample")
    if not (given.get("temperature", 0) > 0 if drawn is None else drawn):
        return Sampling()
    if not given.get("temperature", 1):
        del given["temperature"]
    advised, _ = advised_sampling({**generation, "do_sample": True})
    return dataclasses.replace(advised, **given)


def overlooked(options: Mapping[str, Any], generation: Mapping[str, object]) -> list[str]:
    """What generation_config.json asks for, is not done here, and the request does not overrule."""
    return [name for name in not_done(generation) if options.get(name) is None]
