"""A model for lm-evaluation-harness: its three kinds of requests on any decoder.

`harness_model(model, tokenizer)` gives what `lm_eval.simple_evaluate(model=…)` takes. The work is
done by `Requests`, which knows nothing of the harness. Rows are sorted by length and padded on the
right to few lengths (powers of two), batches to one size, so few programs are compiled.

The numbers are those of the harness's own class for the same files, `HFLM` of 0.4.13 with a batch
of one (`lm_eval_texts` and `lm_eval_options` have the conventions). What differs on purpose:

- Probabilities are of float32 logits; HFLM has the dtype of the weights.
- Each text of a batch is read as it is alone. In a batch of HFLM the first prompt decides for all
  whether special tokens are put before them, a stop string that is a special token ends only where
  all rows have it, and rotary embeddings that depend on the length go by the longest row.
- Drawn texts have the same distribution, and are other ones.
- What generation_config.json asks for and is not done here (a repetition penalty, beams) is named
  by a warning; in a request it is refused. So are further options of `transformers.generate`.
- A token that ends a text is not part of it even where the tokenizer does not call it special.
  `clean_up_tokenization_spaces`, which `transformers` heeds for tokenizers without merges, is not.
- Where HFLM fails there is an answer: a context without tokens (of blanks alone) is the prefix
  token, the empty continuation is certain, `do_sample` without a temperature has the one of
  generation_config.json, `top_k: -1` is no limit. An empty stop string stops nothing (HFLM ends
  after one token).
- A continuation that has no token of its own, or more than the model can read, is a `ConfigError`
  before any compute (HFLM asserts).
"""

import bisect
import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ffnlab import weights
from ffnlab.errors import FormatError, require
from ffnlab.formats.tokenizer.chat import Message, Renderer
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.models.decoder import Decoder
from ffnlab.text.generate import begin
from ffnlab.text.generation_config import stop_ids
from ffnlab.text.lm_eval.options import Settings, overlooked, read_settings
from ffnlab.text.lm_eval.texts import Row, Texts

__all__ = ["Requests", "harness_model"]

SHORTEST = 32  # rows are padded to this length or a power of two times it
LOOK = 32  # decode steps between two looks for stop strings


class Requests:
    """Answers requests on texts.

    Attributes:
      model: the decoder, prepared.
      tokenizer: its tokenizer.
      texts: encodes them.
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
        self.texts = Texts(tokenizer, model.config)
        self.model = weights.prepare(model)
        self.tokenizer = tokenizer
        self.batch, self.max_tokens = batch, max_tokens
        self.key = jax.random.key(0) if key is None else key
        self.stop = stop_ids(model.config, tokenizer)
        self.renderer = Renderer()

    def loglikelihood(self, pairs: Iterable[tuple[str, str]]) -> list[tuple[float, bool]]:
        """For each (context, continuation): ln p(continuation | context), and whether each of its
        tokens is the most likely one.

        Raises:
          ConfigError: as `Texts.pair`, before any compute.
        """
        return self.score([self.texts.pair(*pair) for pair in pairs])

    def rolling(self, texts: Iterable[str]) -> list[float]:
        """ln p of each whole text after the prefix token, special tokens put around it included."""
        parts = [self.texts.rolling(text) for text in texts]
        scores = iter(self.score([row for rows in parts for row in rows]))
        return [float(sum(next(scores)[0] for _ in rows)) for rows in parts]

    def generate(self, requests: Iterable[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """For each (context, options): the generated text up to the first string of `until` or the
        end-of-text token, without special tokens.

        Options: until, max_gen_toks (also max_new_tokens, max_tokens, max_completion_tokens),
        do_sample, temperature, top_k, top_p, min_p; others where they change nothing.

        Raises:
          ConfigError: other options, or values out of range; all requests are checked first.
        """
        requests = list(requests)
        generation = self.tokenizer.beside.generation
        if unused := {name for _, o in requests for name in overlooked(o, generation)}:
            warnings.warn(
                f"generation_config.json has {', '.join(sorted(unused))}: not done here, and by "
                "HFLM it is; to compare, overrule it in the requests (gen_kwargs)",
                stacklevel=2,
            )
        asked = []
        for text, options in requests:
            wanted = self.settings(options)
            room = self.model.config.max_positions - wanted.max_tokens
            asked.append((self.texts.prompt(text, room), wanted))
        lengths = [len(ids) for ids, _ in asked]
        answers, number = [""] * len(asked), 0
        for wanted in dict.fromkeys(wanted for _, wanted in asked):
            mine = [i for i, (_, other) in enumerate(asked) if other == wanted]
            for group in self.batches(mine, lengths, wanted.max_tokens):
                key = jax.random.fold_in(self.key, number)  # else all batches would draw alike
                texts = self.generate_batch([asked[i][0] for i in group], wanted, key)
                number += 1
                for i, text in zip(group, texts, strict=True):
                    answers[i] = text
        return answers

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
    ) -> str:
        """A conversation as text; where its template refuses it, without the system's messages.

        Args:
          messages: such as {"role": "user", "content": "Hello"}.
          add_generation_prompt: end with what begins an answer, else within the last message.
          template: name of one of several templates; None for "default".
        Raises:
          ConfigError: the model has no chat template, or none of this name.
          FormatError: the template refuses the rest, too.
        """
        render = functools.partial(
            self.tokenizer.chat,
            add_generation_prompt=add_generation_prompt,
            continue_last=not add_generation_prompt,
            template=template,
            renderer=self.renderer,
        )
        try:
            return render(messages)
        except FormatError:
            others = [m for m in messages if m["role"] != "system"]
            if len(others) in (0, len(messages)):
                raise
            return render(others)

    def settings(self, options: Mapping[str, Any]) -> Settings:
        """The options of a generation request, checked."""
        return read_settings(
            options,
            self.tokenizer.beside.generation,
            end=self.texts.end,
            max_tokens=self.max_tokens,
            limit=self.model.config.max_positions,
        )

    def batches(
        self, items: Iterable[int], lengths: Sequence[int], more: int = 0
    ) -> list[list[int]]:
        """Groups of items that are read together: at most `batch`, and of rows that do not change
        each other's rotary frequencies.

        The longest come first, so that a batch too large for the memory fails at once.

        Args:
          items: places in `lengths`.
          lengths: tokens that each has.
          more: tokens that are read behind them.
        """
        config = self.model.config
        ropes = (config.rope, config.local_rope or config.rope)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in sorted(items, key=lambda i: lengths[i], reverse=True):
            call = tuple(rope.call_of(lengths[i], lengths[i] + more) for rope in ropes)
            groups.setdefault(call, []).append(i)
        size = self.batch
        return [g[at : at + size] for g in groups.values() for at in range(0, len(g), size)]

    def score(self, rows: Sequence[Row]) -> list[tuple[float, bool]]:
        """(sum of ln p, all most likely) of each row's scored tokens."""
        answers = [(0.0, True)] * len(rows)
        todo = [i for i, row in enumerate(rows) if row.first < len(row.ids)]
        read = [len(row.ids) - 1 for row in rows]
        for group in self.batches(todo, read):
            longest = read[group[0]]
            width = min(padded(longest), self.model.config.max_positions)
            tokens = np.zeros((self.batch, width + 1), np.int32)
            for place, i in enumerate(group):
                tokens[place, : len(rows[i].ids)] = rows[i].ids
            found = logp_and_best(self.model, tokens, np.int32(longest))
            logp, best = (np.asarray(x) for x in found)
            for place, i in enumerate(group):
                part = slice(rows[i].first - 1, read[i])
                total = float(np.sum(logp[place, part], dtype=np.float64))
                answers[i] = (total, bool(best[place, part].all()))
        return answers

    def generate_batch(self, prompts: list[list[int]], wanted: Settings, key: Array) -> list[str]:
        """Texts of one batch; stops when each row has met a stop string or id."""
        n = wanted.max_tokens
        rows = prompts + [prompts[0][:1]] * (self.batch - len(prompts))  # batches have one size
        model, state, advance = begin(self.model, rows, n, wanted.sampling, key, self.stop, None)
        while True:
            made = [row[row >= 0].tolist() for row in np.asarray(state.tokens)[: len(prompts)]]
            texts = [self.ended(ids, wanted.until) for ids in made]
            stopped = np.asarray(state.stopped)[: len(prompts)] | [met for _, met in texts]
            if stopped.all() or int(state.step) >= n:
                return [text for text, _ in texts]
            state = advance(model, state, min(int(state.step) + LOOK, n))

    def ended(self, ids: list[int], until: Sequence[str]) -> tuple[str, bool]:
        """The text of generated ids up to a stop string, and whether there was one.

        Special tokens are no part of the text, but the strings of `until` may be theirs.
        """

        def met(n: int) -> bool:
            text = self.tokenizer.decode(ids[:n])
            return any(stop in text for stop in until)

        found = met(len(ids))
        end = bisect.bisect_left(range(len(ids)), True, key=met) if found else len(ids)
        return cut(self.tokenizer.decode(ids[:end], skip_special=True), until), found


@jax.jit
def logp_and_best(
    model: Decoder, tokens: Int[Array | np.ndarray, "b u"], longest: Int[Array | np.ndarray, ""]
) -> tuple[Float[Array, "b t"], Bool[Array, "b t"]]:
    """ln p of every token but the first of each row, and whether it was the most likely.

    Args:
      model: any decoder.
      tokens: rows, padded on the right.
      longest: tokens that are read of the longest row; the padding behind it has no place of its
        own, as rotary frequencies may depend on the largest.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    places = jnp.minimum(jnp.arange(inputs.shape[1]), longest - 1)
    logits = model(inputs, positions=jnp.broadcast_to(places, inputs.shape))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    logp = chosen - jax.nn.logsumexp(logits, axis=-1)
    return logp, jnp.argmax(logits, axis=-1) == targets


def padded(n: int) -> int:
    """The padded length of n tokens.

    >>> [padded(n) for n in (0, 1, 32, 33, 64, 65, 200)]
    [32, 32, 32, 64, 64, 128, 256]
    """
    return SHORTEST << (max(n - 1, 0) // SHORTEST).bit_length()


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings, what is left before the second, and so on.

    >>> cut("one two\\n\\nthree", ["\\n", "two"])
    'one '
    """
    for stop in until:
        text = text.partition(stop)[0]
    return text


def harness_model(model: Decoder, tokenizer: Tokenizer, *, batch: int = 8, max_tokens: int = 256):
    """The model as lm-evaluation-harness takes it: `lm_eval.simple_evaluate(model=…)`.

    Its chat template is used with `apply_chat_template=True`, another with that one's name.

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

        template = None  # the name of the chat template that the harness asked for last

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

        @functools.cached_property
        def tokenizer_name(self):
            """Names the tokenizer and its chat template in the harness's caches."""
            return f"ffnlab-{tokenizer.digest()[:16]}"

        def chat_template(self, chat_template=False):
            if chat_template in (False, None):
                return None
            self.template = None if chat_template is True else chat_template
            return tokenizer.beside.chat_template(self.template)

        def apply_chat_template(self, chat_history, add_generation_prompt=True):
            return inner.chat(
                chat_history,
                add_generation_prompt=add_generation_prompt,
                template=self.template,
            )

    return HarnessModel()


def arguments(requests: Iterable[Any]) -> list[tuple]:
    """What each request of the harness asks."""
    return [tuple(request.args) for request in requests]
