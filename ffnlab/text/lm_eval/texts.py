"""Texts as the rows of tokens that the harness's own model class, HFLM, scores and continues.

What stands before a text is decided as there. The prefix token is the tokenizer's beginning-of-text
token, else its end-of-text token, by the names in its files (not by generation_config.json). A text
is encoded with the special tokens that the tokenizer puts around it, unless it begins with the
prefix token (a prompt: with the beginning-of-text token), as texts of chat templates do.
"""

import dataclasses

import numpy as np

from ffnlab.data.text.documents import check_ids
from ffnlab.errors import ConfigError
from ffnlab.formats.tokenizer.tokenizer import Tokenizer
from ffnlab.models.config import DecoderConfig

__all__ = ["Row", "Texts"]

SHOWN = 60  # characters of a text in an error


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens to score.

    Attributes:
      ids: at least 2, at most max_positions + 1.
      first: place of the first scored token, >= 1; all from there on are scored.
    """

    ids: list[int]
    first: int


class Texts:
    """Encodes texts for one model.

    Attributes:
      tokenizer: the model's.
      vocab: ids of the model are below it.
      limit: tokens that the model reads at once, its max_positions.
      prefix: id that stands before a text where nothing else does.
      end: text of the end-of-text token; "" where it has none.
    """

    def __init__(self, tokenizer: Tokenizer, config: DecoderConfig):
        """Finds the special tokens.

        Raises:
          ConfigError: the tokenizer has no prefix token, or one that the model does not have. Other
            such ids are refused where a text has them.
        """
        self.tokenizer, self.vocab, self.limit = tokenizer, config.vocab, config.max_positions
        named = [tokenizer.role("bos"), tokenizer.role("eos"), tokenizer.bos, *tokenizer.eos]
        known = [index for index in named if index is not None]
        if not known:
            raise ConfigError("the tokenizer has no bos or eos id to put before an empty context")
        self.prefix = known[0]
        check_ids(np.asarray([self.prefix]), self.vocab)
        begin, ends = tokenizer.role("bos"), [tokenizer.role("eos"), *tokenizer.eos]
        self.begin = "" if begin is None else tokenizer.decode([begin])
        self.end = next((tokenizer.decode([i]) for i in ends if i is not None), "")
        self.before = tokenizer.decode([self.prefix])

    def pair(self, context: str, continuation: str) -> Row:
        """The row that scores a continuation.

        The blanks at a context's end belong to the continuation, whose tokens are those of the
        whole text behind as many as the context alone has: where a token spans both, the context
        keeps its own tokens. A row too long for the model loses its beginning.

        Raises:
          ConfigError: an id that the model does not have, a continuation that is no token of its
            own, or one of more tokens than the model reads at once.
        """
        if context:
            text = context.rstrip()
            given = self.encode(text)
            scored = self.encode(context + continuation)[len(given) :]
            given = given or [self.prefix]
        else:
            given, scored = [self.prefix], self.encode(continuation, special=False)
            if scored[:1] == given:
                scored = scored[1:]
        if not 0 < len(scored) <= self.limit and context[len(context.rstrip()) :] + continuation:
            raise ConfigError(
                f"the continuation {continuation[:SHOWN]!r} of {context[-SHOWN:]!r} has "
                f"{len(scored)} tokens of its own; 1 to {self.limit} are accepted"
            )
        ids = (given + scored)[-(self.limit + 1) :]
        return Row(ids, len(ids) - len(scored))

    def rolling(self, text: str) -> list[Row]:
        """The rows that together score every token of a text once, special tokens included.

        The first row begins with the prefix token; the last one is as long as the others, where the
        text has as many tokens.
        """
        ids = [self.prefix, *self.encode(text)]
        rows = []
        for start in range(1, len(ids), self.limit):
            end = min(start + self.limit, len(ids))
            begin = max(end - self.limit - 1, 0)
            rows.append(Row(ids[begin:end], start - begin))
        return rows

    def prompt(self, text: str, room: int) -> list[int]:
        """The last `room` ids of a text to continue; the prefix token where it has none."""
        ids = self.encode(text, special=not (self.begin and text.startswith(self.begin)))
        return (ids or [self.prefix])[-room:]

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """Ids of a text, all of which the model has.

        Args:
          special: with the special tokens around it; None decides as the module says.
        """
        if special is None:
            special = not (self.before and text.startswith(self.before))
        ids = self.tokenizer.encode(text, special=special)
        check_ids(np.asarray(ids, np.int64), self.vocab)
        return ids
