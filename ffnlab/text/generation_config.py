"""What generation_config.json advises: how to draw tokens, and which ids end a text."""

import math
from collections.abc import Mapping

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.tokenizer.files import GENERATION_FILE
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.formats.untrusted import quoted
from ffnlab.models.config import DecoderConfig
from ffnlab.text.sample import Sampling

__all__ = ["advised_sampling", "stop_ids"]

# transformers' values where the file has none.
TEMPERATURE, TOP_K, TOP_P, MIN_P = 1.0, 50.0, 1.0, 0.0
# What else changes the text and is not done here, with the values that change nothing.
NOT_DONE: Mapping[str, tuple[object, ...]] = {
    "bad_words_ids": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "exponential_decay_length_penalty": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "repetition_penalty": (1,),
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "top_h": (),
    "typical_p": (1,),
}


def stop_ids(config: DecoderConfig, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end what a model generates.

    Those that generation_config.json lists, as for `transformers`; without any those of
    config.json, and without these the tokenizer's.
    """
    return tokenizer.beside.listed("eos") or config.eos or tokenizer.eos


def advised_sampling(table: Mapping[str, object]) -> tuple[Sampling, list[str]]:
    """How the makers of a model draw its tokens.

    Args:
      table: content of generation_config.json.
    Returns:
      the sampling, greedy unless `do_sample` is true, and the names of what is not done here.
    Raises:
      FormatError: a value of another type or out of its range.
    """
    sampled = table.get("do_sample")
    if sampled is not None and not isinstance(sampled, bool):
        raise FormatError(f"{GENERATION_FILE}: do_sample={quoted(sampled)}: no boolean")
    unused = not_done(table)
    if not sampled:
        return Sampling(), unused
    temperature = number(table, "temperature", TEMPERATURE)
    top_k, top_p = number(table, "top_k", TOP_K), number(table, "top_p", TOP_P)
    min_p = number(table, "min_p", MIN_P)
    try:
        if top_k < 0 or top_k != int(top_k):
            raise ConfigError(f"top_k={top_k} must be a count")
        return Sampling(temperature, int(top_k), None if top_p == 1 else top_p, min_p), unused
    except ConfigError as error:
        raise FormatError(f"{GENERATION_FILE}: {error}") from None


def not_done(table: Mapping[str, object]) -> list[str]:
    """Names of options that change the text and are not done here, neutral values excepted."""
    return [
        name
        for name, neutral in NOT_DONE.items()
        if table.get(name) is not None and table[name] not in neutral
    ]


def number(table: Mapping[str, object], name: str, default: float) -> float:
    """A finite number in a table."""
    found = table.get(name)
    found = default if found is None else found
    if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
        raise FormatError(f"{GENERATION_FILE}: {name}={quoted(found)}: no number")
    return float(found)
