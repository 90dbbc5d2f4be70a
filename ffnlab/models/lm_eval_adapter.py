"""A model for lm-evaluation-harness: its three kinds of requests on any decoder.

`harness_model(model, tokenizer)` gives what `lm_eval.simple_evaluate(model=…)` takes. The work is
done by `Requests`, which knows nothing of the harness. Rows are sorted by length and padded on the
right to few lengths (powers of two), batches to one size, so few programs are compiled.

The conventions are the harness's own: the blanks at a context's end belong to the continuation; an
empty context is the model's beginning-of-text id; a text too long for the model loses its
beginning; a rolling text is scored in windows that do not overlap.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import weights
from ffnlab.data.documents import check_ids
from ffnlab.errors import ConfigError, require
from ffnlab.models.decoder import Decoder
from ffnlab.models.generate import begin
from ffnlab.models.sample import Sampling
from ffnlab.models.tokenizer import Tokenizer

__all__ = ["Requests", "harness_model"]

SHORTEST = 32  # rows are padded to this length or a power of two times it
LOOK = 32  # decode steps between two looks for stop strings
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens")
OPTIONS = ("until", "do_sample", "temperature", "top_k", "top_p", *LENGTHS)


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens to score.

    Attributes:
      ids: at least 2, at most max_positions + 1.
      first: place of the first scored token, >= 1; all from there on are scored.
    """

    ids: list[int]
    first: int


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


class Requests:
    """Answers requests on texts.

    Attributes:
      model: the decoder, prepared.
      tokenizer: its tokenizer.
      batch: rows processed at once.
      max_tokens: generated where a request does not say.
      key: of random draws.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch: int = 8,
        max_tokens: int = 256,
        key: Array | None = None,
    ):
        """Prepares the model.

        Raises:
          ConfigError: the tokenizer has no id to put before an empty context, or one that the
            model does not have. Other such ids are refused where a text has them.
        """
        special = [i for i in (tokenizer.bos, *tokenizer.eos) if i is not None]
        self.before_texts = tokenizer.encode("", special=True)
        self.before_nothing = self.before_texts or special[:1]
        if not self.before_nothing:
            raise ConfigError("the tokenizer has no bos or eos id to put before an empty context")
        check_ids(np.asarray(self.before_nothing), model.config.vocab)
        self.model = weights.prepare(model)
        self.tokenizer = tokenizer
        self.batch, self.max_tokens = batch, max_tokens
        self.key = jax.random.key(0) if key is None else key

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p(continuation | context), and whether each of its
        tokens is the most likely one."""
        limit = self.model.config.max_positions + 1
        rows = []
        for context, continuation in pairs:
            text = context.rstrip()
            given = self.context(text)
            whole = self.context(text, context[len(text) :] + continuation)
            rows.append(Row(whole[-limit:], max(1, len(given) - max(0, len(whole) - limit))))
        return self.score(rows)

    def rolling(self, texts: Iterable[str]) -> list[float]:
        """ln p of each whole text, after the beginning-of-text id."""
        limit = self.model.config.max_positions
        rows, owners, sums = [], [], []
        for i, text in enumerate(texts):
            sums.append(0.0)
            ids = self.before_nothing[-1:] + self.encode(text)
            for start in range(0, len(ids) - 1, limit):
                rows.append(Row(ids[start : start + limit + 1], 1))
                owners.append(i)
        for owner, (nats, _) in zip(owners, self.score(rows), strict=True):
            sums[owner] += nats
        return sums

    def generate(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (context, options): the generated text up to the first string of `until`.

        Options: until, max_gen_toks (also max_new_tokens, max_tokens), do_sample, temperature,
        top_k, top_p.

        Raises:
          ConfigError: other options, or values out of range; all requests are checked first.
        """
        asked = [(self.context(text), self.settings(options)) for text, options in requests]
        answers = [""] * len(asked)
        for settings in dict.fromkeys(s for _, s in asked):
            mine = [i for i, (_, s) in enumerate(asked) if s == settings]
            for group in batches(mine, self.batch, lambda i: len(asked[i][0])):
                texts = self.generate_batch([asked[i][0] for i in group], settings)
                for i, text in zip(group, texts, strict=True):
                    answers[i] = text
        return answers

    def context(self, text: str, more: str = "") -> list[int]:
        """Ids of text + more with what the model expects before them."""
        before = self.before_texts if text else self.before_nothing
        return before + self.encode(text + more)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, all of which the model has."""
        ids = self.tokenizer.encode(text)
        check_ids(np.asarray(ids, np.int64), self.model.config.vocab)
        return ids

    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """(sum of ln p, all most likely) of each row's scored tokens."""
        answers = [(0.0, True)] * len(rows)
        todo = [i for i, row in enumerate(rows) if row.first < len(row.ids)]
        for group in batches(todo, self.batch, lambda i: len(rows[i].ids)):
            width = min(
                padded(max(len(rows[i].ids) for i in group) - 1), self.model.config.max_positions
            )
            tokens = np.zeros((self.batch, width + 1), np.int32)
            for place, i in enumerate(group):
                tokens[place, : len(rows[i].ids)] = rows[i].ids
            logp, best = (np.asarray(x) for x in logp_and_best(self.model, tokens))
            for place, i in enumerate(group):
                part = slice(rows[i].first - 1, len(rows[i].ids) - 1)
                total = float(np.sum(logp[place, part], dtype=np.float64))
                answers[i] = (total, bool(best[place, part].all()))
        return answers

    def settings(self, options: Mapping[str, Any]) -> Settings:
        """The options of a request, checked."""
        unknown = sorted(options.keys() - set(OPTIONS))
        if unknown:
            raise ConfigError(f"generation options {unknown} are unknown; accepted: {OPTIONS}")
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        length = next((options[n] for n in LENGTHS if options.get(n) is not None), self.max_tokens)
        if not 1 <= length < self.model.config.max_positions:
            raise ConfigError(
                f"max_gen_toks={length} must lie in 1..{self.model.config.max_positions - 1}"
            )
        temperature = float(options.get("temperature") or 0.0)
        if not options.get("do_sample", temperature > 0):
            temperature = 0.0
        elif temperature == 0.0:
            temperature = 1.0
        sampling = Sampling(temperature, options.get("top_k"), options.get("top_p"))
        return Settings(until, length, sampling)

    def generate_batch(self, prompts: list[list[int]], settings: Settings) -> list[str]:
        """Texts of one batch; stops when each row has met a stop string or id."""
        n = settings.max_tokens
        room = self.model.config.max_positions - n
        rows = [ids[-room:] for ids in prompts]
        rows += [rows[0][:1]] * (self.batch - len(rows))  # so that batches have one size
        model, state, advance = begin(
            self.model, rows, n, settings.sampling, self.key, self.tokenizer.eos, None
        )
        texts = self.texts(state.tokens, len(prompts))
        while int(state.step) < n and not all(
            stopped or cut(text, settings.until) != text
            for stopped, text in zip(np.asarray(state.stopped), texts, strict=False)
        ):
            state = advance(model, state, min(int(state.step) + LOOK, n))
            texts = self.texts(state.tokens, len(prompts))
        return [cut(text, settings.until) for text in texts]

    def texts(self, tokens: Int[Array, "b n"], rows: int) -> list[str]:
        """The first rows as text."""
        return [self.tokenizer.decode(row[row >= 0].tolist()) for row in np.asarray(tokens)[:rows]]


@jax.jit
def logp_and_best(
    model: Decoder, tokens: Int[Array | np.ndarray, "b u"]
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """ln p of every token but the first of each row, and whether it was the most likely."""
    logits, targets = model(tokens[:, :-1]), tokens[:, 1:]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logp, jnp.argmax(logits, axis=-1) == targets


def padded(n: int) -> int:
    """The padded length of n tokens.

    >>> [padded(n) for n in (0, 1, 32, 33, 64, 65, 200)]
    [32, 32, 32, 64, 64, 128, 256]
    """
    return SHORTEST << (max(n - 1, 0) // SHORTEST).bit_length()


def batches(items: Sequence[int], size: int, length: Callable[[int], int]) -> list[list[int]]:
    """Groups of at most `size` items, the longest first, so that a batch too large for the memory
    fails at once."""
    ordered = sorted(items, key=length, reverse=True)
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first stop string in it.

    >>> cut("one two\\n\\nthree", ["\\n", "two"])
    'one '
    """
    found = [place for stop in until if stop and (place := text.find(stop)) >= 0]
    return text[: min(found)] if found else text


def harness_model(model: Decoder, tokenizer: Tokenizer, *, batch: int = 8, max_tokens: int = 256):
    """The model as lm-evaluation-harness takes it: `lm_eval.simple_evaluate(model=…)`.

    Args:
      model: any decoder.
      tokenizer: its tokenizer.
      batch: rows processed at once.
      max_tokens: generated where a task does not say.
    Returns:
      an `lm_eval.api.model.LM`.
    Raises:
      MissingExtraError: the harness is not installed (extra `eval`).
      ConfigError: as `Requests`.
    """
    base = require("lm_eval.api.model", extra="eval").LM
    inner = Requests(model, tokenizer, batch=batch, max_tokens=max_tokens)

    class HarnessModel(base):
        """Delegates to `Requests`."""

        tokenizer_name = "ffnlab"

        def loglikelihood(self, requests, disable_tqdm=False):
            return self.remember(
                "loglikelihood", requests, inner.loglikelihood(arguments(requests))
            )

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            texts = [text for (text,) in arguments(requests)]
            return self.remember("loglikelihood_rolling", requests, inner.rolling(texts))

        def generate_until(self, requests, disable_tqdm=False):
            return self.remember("generate_until", requests, inner.generate(arguments(requests)))

        def remember(self, kind, requests, answers):
            for request, answer in zip(arguments(requests), answers, strict=True):
                self.cache_hook.add_partial(kind, request, answer)
            return answers

    return HarnessModel()


def arguments(requests: Iterable[Any]) -> list[tuple]:
    """What each request of the harness asks."""
    return [tuple(request.args) for request in requests]
