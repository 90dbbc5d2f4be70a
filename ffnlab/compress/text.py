"""The text of a job: what calibrates, what is held out, and how both become windows of tokens.

Without files it is the standard library of the running interpreter (`ffnlab.data.stdlib_text`),
whose held-out modules are fixed by name. Files of one's own are split as training splits them
(`ffnlab.data.text.documents`): the first nine tenths of every document calibrate, the rest is
held out.
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Bool, Int

from ffnlab.data import stdlib_text, text_identity
from ffnlab.data.text.documents import (
    SEPARATOR,
    SPLIT,
    Encoder,
    Scored,
    check_ids,
    joined,
    read_documents,
    scored,
    split_all,
    starts_with,
)
from ffnlab.errors import ConfigError
from ffnlab.recipes import Calibration, Evaluation
from ffnlab.storage.files import StrPath

__all__ = ["Samples", "Text", "calibration", "file_text", "held_out", "standard_text"]

PIECE = 1 << 16  # bytes; a long text is sampled in pieces of this size
BYTES_PER_TOKEN = 16  # more than any tokenizer needs on average
LEAST_SAMPLE = 1 << 20  # bytes; a shorter text is encoded as a whole


@dataclasses.dataclass(frozen=True)
class Text:
    """Text to calibrate on and text to measure on.

    Attributes:
      train: UTF-8 bytes; NUL separates documents.
      held_out: the same.
      source: what it is, in a few words.
      split: the rule by which it was divided, as a sentence.
    """

    train: bytes
    held_out: bytes
    source: str
    split: str

    def as_json(self) -> dict[str, object]:
        """What it is: source, rule, and SHA-256 and size of both parts."""
        identity = text_identity(self.train, self.held_out)
        return {"source": self.source, "split": self.split, **identity}


def standard_text() -> Text:
    """The standard library of the running interpreter.

    Raises:
      FFNLabError: the installation has no sources.
    """
    text = stdlib_text()
    return Text(
        text.train,
        text.held_out,
        f"standard library of Python {text.identity['python']}",
        "held-out modules are fixed by name in ffnlab.data.stdlib_text",
    )


def file_text(paths: Sequence[StrPath]) -> Text:
    """Files of one's own, read and split as those to train on are.

    Args:
      paths: UTF-8 files; NUL within one separates documents, which are split one by one.
    Raises:
      FFNLabError: files that cannot be read, are empty or not UTF-8; all are listed.
      ConfigError: nothing is left to hold out.
    """
    names = [str(path) for path in paths]
    train, rest = split_all(read_documents(names), f"text={names}")
    return Text(joined(train), joined(rest), ", ".join(names), SPLIT)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Windows to measure on.

    Attributes:
      tokens: [w, t + 1] int32; the first of each is context only.
      counted: [w, t] bool, which predictions count (padding does not).
      bytes_per_token: text bytes that one counted token stands for, on average.
    """

    tokens: Int[np.ndarray, "w u"]
    counted: Bool[np.ndarray, "w t"]
    bytes_per_token: float

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, counted) in groups of `size`; the last is filled up with rows that count 0."""
        for start in range(0, len(self.tokens), size):
            group = self.tokens[start : start + size], self.counted[start : start + size]
            missing = ((0, size - len(group[0])), (0, 0))
            yield np.pad(group[0], missing), np.pad(group[1], missing)


def encode(text: bytes, tokenizer: Encoder, tokens: int) -> tuple[Scored, list[int]]:
    """A text, or evenly spaced pieces of a long one, as ids.

    Args:
      text: UTF-8; NUL separates documents.
      tokenizer: of the model.
      tokens: how many will be needed; 0: all.
    Returns:
      the text behind what the tokenizer puts before it, and that.
    """
    enough = max(LEAST_SAMPLE, BYTES_PER_TOKEN * tokens)
    if tokens and len(text) > enough:
        text = SEPARATOR.join(pieces(text, enough // PIECE))
    prefix, found = starts_with(tokenizer), scored(text, tokenizer)
    skipped = len(prefix)
    return found._replace(tokens=found.tokens[skipped:], counted=found.counted[skipped:]), prefix


def pieces(text: bytes, count: int) -> list[bytes]:
    """Evenly spaced pieces of PIECE bytes, each begun behind a line break where it has one."""
    starts = np.linspace(0, len(text) - PIECE, max(1, count)).astype(int)
    found = (text[start : start + PIECE] for start in starts)
    return [piece[piece.find(b"\n") + 1 :] for piece in found]


def calibration(
    text: Text, tokenizer: Encoder, settings: Calibration, vocab: int
) -> list[Int[np.ndarray, "b t"]]:
    """Calibration batches: evenly spaced windows of the training text, all of one shape.

    Args:
      text: the job's.
      tokenizer: of the model.
      settings: how much.
      vocab: ids the model has.
    Returns:
      batches of tokens [settings.batch, settings.window] int32.
    Raises:
      ConfigError: too little text for one batch, or a tokenizer of another model.
    """
    (ids, _, _), prefix = encode(text.train, tokenizer, settings.tokens)
    check_ids(ids, vocab)
    fresh = settings.window - len(prefix)
    count = min(settings.tokens // settings.window, len(ids) // max(1, fresh))
    count -= count % settings.batch
    if not count or fresh < 1:
        raise ConfigError(
            f"{text.source} has {len(ids)} tokens to calibrate on; one batch of {settings.batch} "
            f"windows of {settings.window} needs more: give more text, or lower [calibration]"
        )
    starts = np.linspace(0, len(ids) - fresh, count).astype(int)
    rows = ids[starts[:, None] + np.arange(fresh)]
    begin = np.broadcast_to(np.asarray(prefix, np.int32), (count, len(prefix)))
    rows = np.concatenate([begin, rows], axis=1)
    return list(rows.reshape(-1, settings.batch, settings.window))


def held_out(text: Text, tokenizer: Encoder, settings: Evaluation, vocab: int) -> Samples:
    """Windows of the held-out text: all of it one after another, or evenly spaced ones.

    Args:
      text, tokenizer, vocab: as for `calibration`.
      settings: how much.
    Returns:
      `Samples` of rows of settings.window + 1 tokens.
    Raises:
      ConfigError: too little text for one window, or a tokenizer of another model.
    """
    measured, prefix = encode(text.held_out, tokenizer, settings.tokens)
    ids = measured.tokens
    check_ids(ids, vocab)
    width = settings.window + 1 - len(prefix)
    if width < 2 or len(ids) < width:
        raise ConfigError(
            f"{text.source} has {len(ids)} held-out tokens; one window of {settings.window} needs "
            "more: give more text, or lower [evaluation]"
        )
    step = width if prefix else width - 1  # the last token of a row is the context of the next
    starts = np.arange(0, len(ids) if prefix else len(ids) - 1, step)
    wanted = math.ceil(settings.tokens / settings.window)
    if 0 < wanted < len(starts):
        starts = np.linspace(0, len(ids) - width, wanted).astype(int)
    places = starts[:, None] + np.arange(width)
    inside, places = places < len(ids), np.minimum(places, len(ids) - 1)
    rows = np.where(inside, ids[places], 0)
    begin = np.broadcast_to(np.asarray(prefix, np.int32), (len(rows), len(prefix)))
    of_text = [np.zeros_like(begin, bool), inside & measured.counted[places]]
    counted = np.concatenate(of_text, axis=1)[:, 1:]
    return Samples(np.concatenate([begin, rows], axis=1), counted, measured.bytes_per_token)
