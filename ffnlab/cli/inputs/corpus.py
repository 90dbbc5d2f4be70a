"""The text of a training run as tokens, by bytes or by a tokenizer of one's own."""

import dataclasses
import hashlib
import lzma
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Integer

from ffnlab.cli.inputs.data_kinds import DataConfig
from ffnlab.cli.inputs.extended import Extended
from ffnlab.cli.training import TrainConfig, window
from ffnlab.data import (
    HeldOut,
    MaskedBatches,
    Masking,
    PackedBatches,
    TextBatches,
    held_out_windows,
    masked_windows,
    masking_of,
    stdlib_text,
    text_identity,
    validation_split,
)
from ffnlab.data.text.documents import (
    SEPARATOR,
    Scored,
    check_ids,
    digest,
    documents_of,
    joined,
    read_documents,
    scored,
    split_all,
)
from ffnlab.errors import ConfigError
from ffnlab.formats import Tokenizer
from ffnlab.formats.tokenizer.tokenizer import TOKENIZER_FILE
from ffnlab.models import EncoderConfig
from ffnlab.parallel import held_out_bits, held_out_masked

__all__ = ["Corpus", "HiddenText", "load_corpus", "load_hidden", "xz_bits"]


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What a run reads.

    Attributes:
      train: documents to train on, [n] token ids each; one stream of bytes where bytes are tokens
        and nothing is packed.
      held_out: the held-out text as tokens.
      text: the held-out text.
      tokenizer: that made the tokens.
      identity: Python version, SHA-256 and size of both texts, and of the tokenizer's file.
      digests: of the documents trained on and of those held out, by "train" and "held_out".
    """

    train: bytes | Sequence[Integer[np.ndarray, "_"]]
    held_out: Scored
    text: bytes
    tokenizer: Tokenizer
    identity: dict[str, str | int]
    digests: dict[str, list[str]]

    def windows(self, settings: TrainConfig) -> HeldOut:
        """The held-out windows of a run."""
        tokens, counted, _ = self.held_out
        return held_out_windows(tokens, *window(settings), "the held-out text", counted)

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches by position: those of `data`, then those of the extension."""
        data, more = settings.text, settings.extension
        steps, seed = settings.run.steps, settings.run.seed
        short = self._cut(data.batch, data.length, seed, data.packed)
        if not more.steps:
            return short
        long = self._cut(more.batch, more.length, seed + 1, data.packed)
        return Extended(short, long, steps)

    watched = "held_out_bits"

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> {"held_out_bits": bits per token of the held-out windows}."""
        windows = self.windows(settings)
        return lambda predict: {self.watched: held_out_bits(predict, windows)}

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer beside a model."""
        self.tokenizer.save(folder)

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its text and figures."""
        return {
            "text": dict(self.identity),
            "documents": self.digests,
            "held_out_bits_per_byte": scores[self.watched] / self.held_out.bytes_per_token,
            "held_out_window": dict(zip(("length", "stride"), window(settings), strict=True)),
            "xz_bits_per_byte": xz_bits(self.text),
        }

    def _cut(self, batch: int, length: int, seed: int, packed: bool) -> Callable[[int], object]:
        if packed:
            return PackedBatches(self.train, batch, length, seed, "the training documents")
        whole = self.train if isinstance(self.train, bytes) else np.concatenate(self.train)
        return TextBatches(whole, batch, length, seed, "the training text")


@dataclasses.dataclass(frozen=True, eq=False)
class HiddenText:
    """What a run reads whose model finds hidden tokens again.

    Attributes:
      corpus: the text.
      masking: how its tokens are hidden.
    """

    corpus: Corpus
    masking: Masking

    watched = "held_out_bits"

    @property
    def identity(self) -> dict[str, str | int]:
        """Of the text."""
        return self.corpus.identity

    def batches(self, settings: TrainConfig) -> Callable[[int], object]:
        """Batches (tokens, targets) by position: those of `data`, then those of the extension."""
        found = self.corpus.batches(settings)
        if isinstance(found, Extended):
            first, then = (MaskedBatches(rows, self.masking) for rows in (found.first, found.then))  # type: ignore[arg-type]
            return Extended(first, then, found.steps)
        return MaskedBatches(found, self.masking)  # type: ignore[arg-type]

    def scorer(self, settings: TrainConfig) -> Callable[[Callable], dict[str, float]]:
        """predict -> bits of a hidden token of the held-out text, and the share found again."""
        tokens, counted, _ = self.corpus.held_out
        length, source = window(settings)[0], "the held-out text"
        windows = masked_windows(tokens, length, self.masking, counted, source)

        def scores(predict: Callable) -> dict[str, float]:
            bits, found = held_out_masked(predict, windows)
            return {self.watched: bits, "held_out_found": found}

        return scores

    def save_beside(self, folder: Path) -> None:
        """Writes the tokenizer beside a model."""
        self.corpus.save_beside(folder)

    def record(self, scores: Mapping[str, float], settings: TrainConfig) -> dict[str, object]:
        """What the record of a run says of its text and figures."""
        of_text = {"text": dict(self.corpus.identity), "documents": self.corpus.digests}
        return of_text | {"held_out_window": window(settings)[0]} | dict(scores)


def load_hidden(data: DataConfig, model: EncoderConfig) -> HiddenText:
    """Reads and encodes the text of a run whose model finds hidden tokens again.

    Raises:
      FFNLabError, ConfigError: as `load_corpus`, or rows longer than the model.
    """
    if data.length > model.max_positions:
        raise ConfigError(
            f"length={data.length} is more than max_positions={model.max_positions} of the model"
        )
    corpus = load_corpus(data, model.vocab)
    return HiddenText(corpus, masking_of(corpus.tokenizer, model.vocab))


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
    tokenizer = Tokenizer.load(data.tokenizer) if data.tokenizer else Tokenizer.bytes()
    if data.tokenizer:
        file = Path(data.tokenizer) / TOKENIZER_FILE
        identity = identity | {"tokenizer_sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    whole = {"train": documents_of(train), "held_out": documents_of(held_out)}
    digests = {name: [digest(d) for d in documents] for name, documents in whole.items()}
    is_stream = not data.tokenizer and not data.packed
    documents = train if is_stream else with_ends(whole["train"], tokenizer)
    measured = scored(held_out, tokenizer)
    for ids in (*([np.frombuffer(train, np.uint8)] if is_stream else documents), measured.tokens):
        check_ids(ids, vocab)
    return Corpus(documents, measured, held_out, tokenizer, identity, digests)


def xz_bits(text: bytes) -> float:
    """Bits per byte of `xz -9` on a text: what a model has to beat.

    >>> xz_bits(bytes(range(256)) * 64) < 1
    True
    """
    return 8 * len(lzma.compress(text, preset=9)) / len(text)


def with_ends(documents: Sequence[bytes], tokenizer: Tokenizer) -> list[Integer[np.ndarray, "_"]]:
    """Documents as token ids, each with what its model expects around it.

    Of bytes that is a NUL on both sides; of other tokenizers their special tokens, and the first
    end-of-text id where they set none.
    """
    encoded = []
    for document in documents:
        ids = tokenizer.encode(document.decode(errors="replace"), special=True)
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
    train = read_documents(data.text)
    if data.held_out:
        held_out = read_documents(data.held_out)
    else:
        train, held_out = split_all(train, f"text={list(data.text)}")
    text = joined(train) + SEPARATOR
    return text, joined(held_out), text_identity(text, joined(held_out))
