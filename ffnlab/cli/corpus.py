"""The text of a training run as tokens, by bytes or by a tokenizer of one's own."""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from ffnlab.cli.training import DataConfig, Extended, TrainConfig, window
from ffnlab.compress.text import check_ids
from ffnlab.data import (
    HeldOut,
    PackedBatches,
    TextBatches,
    held_out_windows,
    read_text,
    stdlib_text,
    text_identity,
    validation_split,
)
from ffnlab.data.text import SEPARATOR
from ffnlab.errors import ConfigError
from ffnlab.models import Tokenizer
from ffnlab.models.tokenizer import TOKENIZER_FILE

__all__ = ["Corpus", "load_corpus"]

Tokens = bytes | Integer[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What a run reads.

    Attributes:
      train: documents to train on, [n] token ids each; one stream of bytes where bytes are tokens
        and nothing is packed.
      held_out: the held-out text as one stream of tokens.
      text: the held-out text.
      tokenizer: that made the tokens.
      identity: Python version, SHA-256 and size of both texts, and of the tokenizer's file.
    """

    train: bytes | Sequence[Integer[np.ndarray, "_"]]
    held_out: Tokens
    text: bytes
    tokenizer: Tokenizer
    identity: dict[str, str | int]

    @property
    def bytes_per_token(self) -> float:
        """Bytes of held-out text that a token stands for, on average."""
        size = len(self.text.replace(SEPARATOR, b""))
        return 1.0 if isinstance(self.held_out, bytes) else size / len(self.held_out)

    def windows(self, settings: TrainConfig) -> HeldOut:
        """The held-out windows of a run."""
        return held_out_windows(self.held_out, *window(settings), "the held-out text")

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position: those of `data`, then those of the extension."""
        data, more = settings.data, settings.extension
        steps, seed = settings.run.steps, settings.run.seed
        short = self._cut(data.batch, data.length, seed, data.packed)
        if not more.steps:
            return short
        long = self._cut(more.batch, more.length, seed + 1, data.packed)
        return Extended(short, long, steps)

    def _cut(self, batch: int, length: int, seed: int, packed: bool) -> Callable[[int], object]:
        if packed:
            return PackedBatches(self.train, batch, length, seed, "the training documents")
        whole = self.train if isinstance(self.train, bytes) else np.concatenate(self.train)
        return TextBatches(whole, batch, length, seed, "the training text")


def load_corpus(data: DataConfig, vocab: int) -> Corpus:
    """Reads and encodes the text of a run.

    Args:
      data: where the text is, and its tokenizer.
      vocab: ids that the model has.
    Raises:
      FFNLabError: text or tokenizer cannot be read.
      ConfigError: the tokenizer has ids that the model does not.
    """
    train, held_out, identity = load_text(data)
    if not data.tokenizer:
        tokenizer = Tokenizer.bytes()
        documents = documents_of(train, tokenizer) if data.packed else train
        return Corpus(documents, held_out, held_out, tokenizer, identity)
    tokenizer = Tokenizer.load(data.tokenizer)
    file = Path(data.tokenizer) / TOKENIZER_FILE
    identity = identity | {"tokenizer_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    documents = documents_of(train, tokenizer)
    scored = np.concatenate(documents_of(held_out, tokenizer))
    for ids in (*documents, scored):
        check_ids(ids, vocab)
    return Corpus(documents, scored, held_out, tokenizer, identity)


def documents_of(text: bytes, tokenizer: Tokenizer) -> list[Integer[np.ndarray, "_"]]:
    """The documents between NULs as token ids, each with what its model expects around it.

    Of bytes that is a NUL on both sides; of other tokenizers their special tokens, and the first
    end-of-text id where they set none.
    """
    pieces = [piece for piece in text.split(SEPARATOR) if piece]
    if not pieces:
        raise ConfigError("the text holds no documents")
    encoded = []
    for piece in pieces:
        ids = tokenizer.encode(piece.decode(errors="replace"), special=True)
        if tokenizer.eos and ids[-1:] != [tokenizer.eos[0]]:
            ids = [*ids, tokenizer.eos[0]]
        encoded.append(np.asarray(ids, np.int32))
    return encoded


def load_text(data: DataConfig) -> tuple[bytes, bytes, dict[str, str | int]]:
    """Training text, held-out text and the record of what they are."""
    if data.text in ("stdlib", "stdlib-validation"):
        text = stdlib_text()
        text = text if data.text == "stdlib" else validation_split(text)
        return text.train, text.held_out, text.identity
    if isinstance(data.text, str):
        names = "'stdlib', 'stdlib-validation' or a list of files"
        raise ConfigError(f"text={data.text!r} must be {names}")
    whole = read_text(data.text)
    if data.held_out:
        train_text, held_out = whole, read_text(data.held_out)
    else:
        cut = len(whole) - len(whole) // 10
        train_text, held_out = whole[:cut], whole[cut:]
    return train_text, held_out, text_identity(train_text, held_out)
