"""Facts as rows of tokens: where a subject ends, and which tokens are to follow.

Each fact has its prompt, the same behind some prefixes, and a text whose meaning is to stay
("SUBJECT is a"). All rows are padded on the left, so that answers end together. Where a subject
ends is read off the characters that each token stands for.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Int

from ffnlab.data.text.documents import around
from ffnlab.editing.facts import ALLOWED, Fact, problems_of
from ffnlab.errors import ConfigError
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.formats.untrusted import quoted
from ffnlab.models.decoder import Decoder
from ffnlab.text.generate import generate
from ffnlab.text.sample import Sampling

__all__ = ["Answers", "Requests", "answers", "prefix_tokens", "requests", "sampled_prefixes"]

STAYS = " is a"  # behind a subject: what is to mean the same as before
# The authors' first words of the texts that a prompt is put behind, and how these go on.
WORDS = ("The", "Therefore", "Because", "I", "You")
LENGTH, TOP_K = 10, 5
END = ". "
NONE = -1


class Row(NamedTuple):
    """One text: its tokens without the last one, which is only predicted; the rest as `Requests`.

    Attributes:
      ids: of the text.
      place: of the last token of the subject in them, or 0 without a subject.
      new: the tokens to be predicted at the end.
    """

    ids: list[int]
    place: int
    new: list[int]


class Answers(NamedTuple):
    """Texts with what is to follow, padded on the left.

    Attributes:
      tokens: [b, t], of each text and of its answer but the last token.
      valid: [b, t], false on padding.
      labels: [b, m], the tokens that the last m positions predict, -1 where there is none.
    """

    tokens: Int[np.ndarray, "b t"]
    valid: Bool[np.ndarray, "b t"]
    labels: Int[np.ndarray, "b m"]


class Requests(NamedTuple):
    """Rows of f facts, r for each: prompt, prompt behind prefixes, and the text that stays.

    Attributes:
      tokens: [f, r, t].
      valid: [f, r, t], false on padding.
      place: [f, r], position of the last token of the subject.
      labels: [f, r, m], the tokens that the last m positions predict, -1 where there is none.
    """

    tokens: Int[np.ndarray | jax.Array, "f r t"]
    valid: Bool[np.ndarray | jax.Array, "f r t"]
    place: Int[np.ndarray | jax.Array, "f r"]
    labels: Int[np.ndarray | jax.Array, "f r m"]


def requests(
    facts: Sequence[Fact], tokenizer: Tokenizer, model: Decoder, prefixes: Sequence[str] = ()
) -> Requests:
    """The rows of facts.

    Args:
      facts: as `facts.checked` gives them.
      tokenizer: of the model.
      model: whose vocabulary and longest context rows must keep to.
      prefixes: texts before the prompt, as they are written; each gives one row more.
    Returns:
      rows of r = 2 + len(prefixes).
    Raises:
      ConfigError: a token reaches over the end of a subject or of a prompt, one is special or not
        of the model, or a text is too long; all facts of which this is so are named.

    >>> from ffnlab.testing import tiny
    >>> from ffnlab.models import Decoder, DecoderConfig
    >>> config = DecoderConfig(128, 8, 8, layers=1, heads=1, kv_heads=1, head_dim=8)
    >>> model = Decoder(config, key=jax.random.key(0))
    >>> rows = requests([Fact("Al", "{} is", " I")], Tokenizer.bytes(), model)
    >>> rows.tokens.shape, rows.place.tolist(), rows.labels[0, 0].tolist()
    ((1, 2, 8), [[3, 2]], [32, 73])
    """
    for prefix in prefixes:
        for problem in problems_of(prefix):
            raise ConfigError(f"prefixes: one {problem}")
    begin, rows, problems = around(tokenizer)[0], [], []
    for fact in facts:
        try:
            parts = [_row(tokenizer, begin, fact, before) for before in ("", *prefixes)]
            rows.append([*parts, _stays(tokenizer, begin, fact)])
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("facts: " + "; ".join(problems[:20]))
    flat = [row for parts in rows for row in parts]
    f, r = len(rows), len(rows[0])
    found = _padded(flat, model)
    t = found.tokens.shape[1]
    place = np.array([t - len(row.ids) + row.place for row in flat], np.int32)
    return Requests(
        found.tokens.reshape(f, r, t),
        found.valid.reshape(f, r, t),
        place.reshape(f, r),
        found.labels.reshape(f, r, -1),
    )


def answers(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer, model: Decoder) -> Answers:
    """Rows of prompts with what may follow them.

    Args:
      pairs: (prompt, answer), texts that follow each other as they are written.
      tokenizer, model: as for `requests`.
    Raises:
      ConfigError: as `requests`.
    """
    begin = around(tokenizer)[0]
    rows = []
    for prompt, answer in pairs:
        ids, cuts = _cut(tokenizer, prompt + answer, (len(prompt),))
        rows.append(Row([*begin, *ids[:-1]], 0, ids[cuts[0] :]))
    return _padded(rows, model)


def _row(tokenizer: Tokenizer, begin: list[int], fact: Fact, before: str) -> Row:
    text = before + fact.text
    ends = (len(before) + len(fact.head), len(text))
    ids, (subject, prompt) = _cut(tokenizer, text + fact.new, ends)
    return Row([*begin, *ids[:-1]], len(begin) + subject - 1, ids[prompt:])


def _stays(tokenizer: Tokenizer, begin: list[int], fact: Fact) -> Row:
    ids, (subject,) = _cut(tokenizer, fact.subject + STAYS, (len(fact.subject),))
    return Row([*begin, *ids], len(begin) + subject - 1, [])


def _cut(tokenizer: Tokenizer, text: str, ends: Sequence[int]) -> tuple[list[int], list[int]]:
    """The ids of a text, and how many of them stand before each of some places in it."""
    ids, spans = tokenizer.spans(text)
    special = sorted(tokenizer.special & set(ids))
    if special:
        raise ConfigError(f"{quoted(text)} has the special token {special[0]} in it")
    counts = []
    for end in ends:
        before = [i for i, (first, _) in enumerate(spans) if first < end]
        last = before[-1] if before else None
        if last is None or spans[last][1] != end:
            cut = "" if last is None else f"; its last token is {quoted(_piece(text, spans[last]))}"
            raise ConfigError(f"{quoted(text[:end])} ends at no boundary of tokens{cut}")
        counts.append(last + 1)
    if counts[-1] == len(ids):
        raise ConfigError(f"nothing of {quoted(text)} is left to be predicted")
    return ids, counts


def _piece(text: str, span: tuple[int, int]) -> str:
    return text[span[0] : span[1]]


def _padded(rows: Sequence[Row], model: Decoder) -> Answers:
    """Rows of one length, checked against a model."""
    vocab, longest = model.config.vocab, model.config.max_positions
    t, m = max(len(row.ids) for row in rows), max(1, *(len(row.new) for row in rows))
    highest = max(max((*row.ids, *row.new)) for row in rows)
    if highest >= vocab:
        raise ConfigError(f"facts have the token {highest}; the model has 0..{vocab - 1}")
    if t > longest:
        raise ConfigError(f"a fact has {t} tokens; the model has a context of {longest}")
    tokens, labels = np.zeros((len(rows), t), np.int32), np.full((len(rows), m), NONE, np.int32)
    valid = np.zeros((len(rows), t), bool)
    for i, (ids, _, new) in enumerate(rows):
        tokens[i, t - len(ids) :] = ids
        valid[i, t - len(ids) :] = True
        labels[i, m - len(new) :] = new
    return Answers(tokens, valid, labels)


def sampled_prefixes(model: Decoder, tokenizer: Tokenizer, seed: int) -> tuple[str, ...]:
    """Texts of the model's own to put a prompt behind: ten tokens after each of five words.

    Args:
      model, tokenizer: see `requests`.
      seed: of the draw, among the five most likely tokens each time.
    Source: `get_context_templates` of the authors' code.
    """
    begin = around(tokenizer)[0]
    found = generate(
        model,
        [[*begin, *tokenizer.encode(word)] for word in WORDS],
        max_tokens=LENGTH,
        sampling=Sampling(1.0, top_k=TOP_K),
        key=jax.random.key(seed),
    )
    texts = (
        word + tokenizer.decode(new, skip_special=True)
        for word, new in zip(WORDS, found.lists(), strict=True)
    )
    clean = ("".join(c for c in text if c.isprintable() or c in ALLOWED) for text in texts)
    return tuple(f"{text}{END}" for text in clean)


def prefix_tokens(tokenizer: Tokenizer) -> int:
    """How many tokens the longest of `sampled_prefixes` has, as far as it is known beforehand.

    >>> prefix_tokens(Tokenizer.bytes())
    21
    """
    longest = max(len(tokenizer.encode(word)) for word in WORDS)
    return longest + LENGTH + len(tokenizer.encode(END))
