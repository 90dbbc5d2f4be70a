"""Documents: how text files are read, split, told apart, and turned into the tokens of a stream.

A file is a document, or several with NUL between them. Every command reads them here, so that the
tenth that training held out is the tenth that compressing and scoring measure on.
"""

import hashlib
import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Integer

from ffnlab.errors import ConfigError, FFNLabError

__all__ = [
    "Encoder",
    "Scored",
    "around",
    "check_ids",
    "digest",
    "documents_of",
    "is_seen",
    "joined",
    "read_documents",
    "scored",
    "split",
    "split_all",
    "starts_with",
]

SEPARATOR = b"\0"
MARK = b"\xef\xbb\xbf"  # the byte order mark, which is not text
HELD_OUT = 0.1  # of every document
SPLIT = "the last tenth of every document, from the line break before it, is held out"
DIGEST = 16  # hexadecimal digits
PROBE = "\0A\xe9"


@runtime_checkable
class Encoder(Protocol):
    """The part of `ffnlab.formats.Tokenizer` that is used here.

    Attributes:
      eos: ids that end a text.
    """

    eos: tuple[int, ...]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, with the special ones that its model expects if `special`."""
        ...


def read_documents(paths: Iterable[str | Path]) -> list[bytes]:
    """Reads UTF-8 text files.

    Args:
      paths: files, kept in the given order; NUL within one separates documents, a byte order mark
        is dropped, and "\\r\\n" becomes "\\n".
    Returns:
      the documents, none empty and none with a NUL in it.
    Raises:
      FFNLabError: a file is missing, a folder, empty, or not UTF-8; all such files are listed.
    """
    documents, problems = [], []
    for path in map(Path, paths):
        try:
            data = path.read_bytes()
            data.decode("utf-8")
        except UnicodeDecodeError as error:
            problems.append(f"{path} is not UTF-8 text (byte {error.start})")
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror}")
        else:
            found = documents_of(data.removeprefix(MARK).replace(b"\r\n", b"\n"))
            documents += found
            if not found:
                problems.append(f"{path} is empty")
    if problems or not documents:
        raise FFNLabError("; ".join(problems) or "no text files were given")
    return documents


def documents_of(text: bytes) -> list[bytes]:
    """The documents between NULs.

    >>> documents_of(joined([b"one", b"two"]))
    [b'one', b'two']
    """
    return [document for document in text.split(SEPARATOR) if document]


def joined(documents: Iterable[bytes]) -> bytes:
    """Documents as one text: a NUL before each.

    >>> joined([b"one", b"two"])
    b'\\x00one\\x00two'
    """
    return b"".join(SEPARATOR + document for document in documents)


def split(document: bytes) -> tuple[bytes, bytes]:
    """(first nine tenths, rest), cut behind a line break, or between characters without one.

    >>> split(b"a\\nb\\nc\\nd\\ne\\nf\\n")
    (b'a\\nb\\nc\\nd\\ne\\n', b'f\\n')
    """
    cut = len(document) - math.ceil(HELD_OUT * len(document))
    at_line = document.rfind(b"\n", 0, cut) + 1
    if at_line == 0:
        while cut and document[cut] & 0xC0 == 0x80:  # inside a character
            cut -= 1
    return document[: at_line or cut], document[at_line or cut :]


def split_all(documents: Sequence[bytes], source: str) -> tuple[list[bytes], list[bytes]]:
    """The two parts of every document, without empty ones.

    Args:
      documents: whole ones.
      source: what they are called in errors.
    Returns:
      (to learn from, held out).
    Raises:
      ConfigError: nothing is left for one of them.
    """
    parts = [split(document) for document in documents]
    first, rest = ([part for part in side if part] for side in zip(*parts, strict=True))
    if not first or not rest:
        raise ConfigError(f"{source} is too short to hold a tenth of it out; give more text")
    return first, rest


def digest(document: bytes) -> str:
    """What tells a document from all others: the beginning of its SHA-256, in hexadecimal."""
    return hashlib.sha256(document).hexdigest()[:DIGEST]


def is_seen(trained: Collection[str], measured: bytes, whole: bytes) -> bool:
    """Whether a model was trained on a text that it is measured on.

    Args:
      trained: digests of the documents, or parts of documents by `split`, that it was trained on.
      measured: the text, a document or the held-out part of one.
      whole: the document.
    Returns:
      whether one of them is known to hold (a part of) the text; other texts with the same lines in
      them are not found.
    """
    known = [whole, measured, *([split(whole)[0]] if measured == whole else [])]
    return any(digest(text) in trained for text in known)


class Scored(NamedTuple):
    """A text as tokens of which some are to be predicted.

    Attributes:
      tokens: [n] int32.
      counted: [n] bool, whether a token is of the text and has something before it.
      nbytes: text bytes that the counted tokens stand for.
    """

    tokens: Integer[np.ndarray, "n"]
    counted: Bool[np.ndarray, "n"]
    nbytes: int

    @property
    def bytes_per_token(self) -> float:
        """Text bytes that one counted token stands for, on average."""
        return self.nbytes / max(1, int(self.counted.sum()))


def scored(text: bytes, tokenizer: Encoder) -> Scored:
    """The tokens of a text, its documents kept apart as its model expects them.

    Where tokens are bytes, that is by NULs: the first begins the text and is not predicted, one
    between documents is a byte that ends a document, and counts as any other. Other tokenizers put
    special tokens before every document, or have a token that ends one; these are never counted,
    and without any the first token of all is not, for want of something before it.

    Args:
      text: UTF-8; NUL separates documents.
      tokenizer: of the model.
    Returns:
      all of the text.
    """
    if is_bytes(tokenizer):
        tokens = np.frombuffer(text, np.uint8).astype(np.int32)
        counted = np.arange(len(tokens)) > 0
        return Scored(tokens, counted, int(counted.sum()))
    start = starts_with(tokenizer) or list(tokenizer.eos[:1])
    words = [document.decode(errors="ignore") for document in documents_of(text)]
    pieces = [tokenizer.encode(document) for document in words]
    tokens = np.asarray([i for ids in pieces for i in (*start, *ids)], np.int32)
    mask = [flag for ids in pieces for flag in (*[False] * len(start), *[True] * len(ids))]
    counted = np.asarray(mask, bool) & (np.arange(len(tokens)) > 0)
    size, of_text = sum(len(document.encode()) for document in words), sum(map(len, pieces))
    return Scored(tokens, counted, round(size * int(counted.sum()) / max(1, of_text)))


def is_bytes(tokenizer: Encoder) -> bool:
    """Whether ids are bytes, NUL among them."""
    return tokenizer.encode(PROBE) == list(PROBE.encode())


def starts_with(tokenizer: Encoder) -> list[int]:
    """The ids that a tokenizer puts before a text; none where ids are bytes."""
    return [] if is_bytes(tokenizer) else around(tokenizer)[0]


def around(tokenizer: Encoder) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts (before, behind) a text."""
    plain, whole = tokenizer.encode("a"), tokenizer.encode("a", special=True)
    for i in range(len(whole) - len(plain) + 1):
        if plain and whole[i : i + len(plain)] == plain:
            return whole[:i], whole[i + len(plain) :]
    return [], []


def check_ids(ids: Integer[np.ndarray, "n"], vocab: int) -> None:
    """Raises ConfigError where the tokenizer makes ids that the model does not have."""
    if len(ids) and int(ids.max()) >= vocab:
        raise ConfigError(
            f"the tokenizer makes id {int(ids.max())}, the model has ids 0..{vocab - 1}: they do "
            "not belong together"
        )
