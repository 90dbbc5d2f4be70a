"""`ffnlab generate`: continues a prompt, token by token."""

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["generate"]


def generate(
    model: Path | None = None,
    /,
    *,
    prompt: str,
    chat: bool = False,
    max_tokens: int = 200,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    model_sampling: bool = False,
    kv: str | None = None,
    seed: int = 0,
) -> None:
    """Streams the continuation of a prompt; stops at the model's end-of-text tokens.

    Those are what generation_config.json lists, else config.json, else the tokenizer's files.

    Args:
      model: a model directory, or a model that comes with ffnlab, "embedded" or
        "embedded_small"; "embedded" without one.
      prompt: the text to continue.
      chat: the prompt is what a user says, put into the model's chat template; only the answer is
        printed.
      max_tokens: tokens generated at most.
      temperature: 0 takes the most likely token each time, and is what is done without it.
      top_k: draw among this many most likely tokens; 0 for all.
      top_p: draw among the fewest most likely tokens that reach this probability.
      min_p: draw among the tokens with at least this share of the most likely one's probability.
      model_sampling: draw as the model's generation_config.json advises, where nothing is given
        here.
      kv: cache format "dense", "float8" or "int4"; the model's own without it.
      seed: of the draw.
    """
    import jax

    from ffnlab.errors import ConfigError, at_least, check_seed
    from ffnlab.formats import open_model
    from ffnlab.text import stream_tokens
    from ffnlab.text.generation_config import stop_ids

    check_seed(seed)
    at_least(1, max_tokens=max_tokens)
    if not prompt:
        raise ConfigError("prompt is empty; give at least one character")
    decoder, tokenizer = open_model(model)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = chosen(given, tokenizer.beside.generation if model_sampling else None)
    if chat:
        ids = tokenizer.encode(tokenizer.chat([{"role": "user", "content": prompt}]))
    else:
        ids = tokenizer.encode(prompt, special=model is not None)
    if tokenizer.begins_twice(ids):
        warn("the prompt begins with the beginning-of-text token, which is put before it once more")
    tokens = stream_tokens(
        decoder,
        ids,
        max_tokens=max_tokens,
        sampling=sampling,
        key=None if sampling.is_greedy else jax.random.key(seed),
        stop=stop_ids(decoder.config, tokenizer),
        kv=kv,
    )
    text = tokenizer.stream(after=ids)
    print("" if chat else prompt, end="", flush=True)
    try:
        for token in tokens:
            print(text.push(token), end="", flush=True)
    except Exception:
        print(flush=True)  # what went wrong is said on a line of its own
        raise
    print(text.finish())


def chosen(given: Mapping[str, float | None], advice: Mapping[str, object] | None):
    """How tokens are drawn: as it was given, else as generation_config.json advises, if asked.

    Args:
      given: options of the command line by name; None where they were not.
      advice: content of generation_config.json, or None.
    Returns:
      an `ffnlab.text.Sampling`.
    Raises:
      ConfigError: a limit of the draw, and nothing is drawn.
    """
    from ffnlab.errors import ConfigError
    from ffnlab.text import Sampling
    from ffnlab.text.generation_config import advised_sampling

    advised, unused = (Sampling(), []) if advice is None else advised_sampling(advice)
    if unused:
        warn(f"generation_config.json has {', '.join(unused)}, which are not used")
    said = {name: value for name, value in given.items() if value is not None}
    sampling = dataclasses.replace(advised, **said)
    if sampling.is_greedy and said.keys() - {"temperature"}:
        raise ConfigError(
            "top_k, top_p and min_p draw at random; give a temperature above 0 with them"
        )
    return sampling


def warn(message: str) -> None:
    """One line on standard error."""
    print(f"ffnlab generate: warning: {message}", file=sys.stderr)
