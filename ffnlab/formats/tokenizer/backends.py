"""What turns text into ids: the library `tokenizers`, or the bytes of the text themselves."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ffnlab.errors import FormatError, require
from ffnlab.formats.tokenizer.check import check
from ffnlab.formats.untrusted import quoted


@runtime_checkable
class Backend(Protocol):
    """What turns text into ids; `tokenizers.Tokenizer` seen from here, or `ByteBackend`.

    Attributes:
      size: all ids are below it.
      special: ids of the tokens that are marked as special.
    """

    size: int
    special: frozenset[int]

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text, with the special tokens around it that its model expects if `special`."""
        ...

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text, and of each the (first, end) characters that it stands for."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        ...

    def id(self, token: str) -> int | None:
        """The id of a token, or None."""
        ...

    def token(self, index: int) -> str | None:
        """The token of an id, or None."""
        ...

    def content(self) -> object:
        """What tokenizer.json holds."""
        ...


class LibraryBackend:
    """A `tokenizers.Tokenizer`, neither cutting texts short nor filling them up.

    Attributes:
      inner: it.
      size: the largest id, added tokens included, and one more.
      special: ids of the added tokens that are marked as special.
      source: what it is called in errors.
    """

    def __init__(self, inner: object, source: str = "the tokenizer"):
        """Wraps a `tokenizers.Tokenizer`, whose truncation and padding are switched off.

        Raises:
          FormatError: the library fails at it.
        """
        self.inner, self.source = inner, source
        with native(source):
            inner.no_truncation()  # type: ignore[attr-defined]
            inner.no_padding()  # type: ignore[attr-defined]
            ids = inner.get_vocab(with_added_tokens=True).values()  # type: ignore[attr-defined]
            added = inner.get_added_tokens_decoder()  # type: ignore[attr-defined]
        self.size: int = max([*ids, *added], default=-1) + 1
        self.special = frozenset(i for i, token in added.items() if token.special)

    @classmethod
    def read(cls, file: Path, content: object, *, split_special: bool = False) -> "LibraryBackend":
        """Reads a tokenizer.json.

        Args:
          file: where it is.
          content: what it holds, as JSON.
          split_special: special tokens that occur in a text are encoded as other text is.
        Raises:
          FormatError: `tokenizers` cannot read it, or would need more memory than it should.
        """
        check(content, str(file))
        library = require("tokenizers", extra="run")
        with native(f"{file}: not a tokenizer"):
            inner = library.Tokenizer.from_file(str(file))
            inner.encode_special_tokens = split_special
        return cls(inner, str(file))

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Backend`."""
        with native(f"{self.source}: cannot encode a text of {len(text)} characters"):
            return self.inner.encode(text, add_special_tokens=special).ids  # type: ignore

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """See `Backend`."""
        with native(f"{self.source}: cannot encode a text of {len(text)} characters"):
            found = self.inner.encode(text, add_special_tokens=False)  # type: ignore
            return found.ids, found.offsets

    def decode(self, ids: Sequence[int]) -> str:
        """See `Backend`."""
        with native(f"{self.source}: cannot decode {len(ids)} ids"):
            return self.inner.decode(list(ids), skip_special_tokens=False)  # type: ignore

    def id(self, token: str) -> int | None:
        """See `Backend`."""
        with native(self.source):
            return self.inner.token_to_id(token)  # type: ignore

    def token(self, index: int) -> str | None:
        """See `Backend`."""
        with native(self.source):
            return self.inner.id_to_token(index)  # type: ignore

    def content(self) -> object:
        """See `Backend`."""
        with native(self.source):
            return json.loads(self.inner.to_str())  # type: ignore


@contextlib.contextmanager
def native(what: str) -> Iterator[None]:
    """Turns what the native library raises into a FormatError that begins with `what`.

    Its errors are bare `Exception`s, and its panics are not even that: they derive from
    `BaseException`, of a class that cannot be imported.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{what}: {quoted(str(error))}") from None


class ByteBackend:
    """Ids are the bytes of the UTF-8 text; NUL is special."""

    size = 256
    special = frozenset({0})

    def encode(self, text: str, special: bool) -> list[int]:
        """The bytes, after a NUL if `special`."""
        return [0] * special + list(text.encode())

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The bytes, of each the one character that it is a part of."""
        lengths = [len(character.encode()) for character in text]
        offsets = [(i, i + 1) for i, length in enumerate(lengths) for _ in range(length)]
        return list(text.encode()), offsets

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes."""
        return np.asarray(ids, np.uint8).tobytes().decode(errors="replace")

    def id(self, token: str) -> int | None:
        """The byte that a token of `byte_content` stands for."""
        return byte_tokens().get(token)

    def token(self, index: int) -> str | None:
        """The token of `byte_content` that stands for a byte."""
        return next((token for token, i in byte_tokens().items() if i == index), None)

    def content(self) -> object:
        """See `byte_content`."""
        return byte_content()


def byte_tokens() -> dict[str, int]:
    """Byte values by the printable character that byte-level tokenizers write for them.

    Printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order. NUL is itself:
    it is a special token, which is matched with the text as it is.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    names = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return {names[b] if b else "\0": b for b in range(256)}


def byte_content() -> dict[str, object]:
    """The tokenizer.json of the byte-level tokenizer: BPE without merges over 256 tokens."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    nul = {"id": 0, "content": "\0", "single_word": False, "lstrip": False, "rstrip": False}
    bos = {"SpecialToken": {"id": "\0", "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [nul | {"normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": level | {"use_regex": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, texts[0]],
            "pair": [bos, texts[0], bos, texts[1]],
            "special_tokens": {"\0": {"id": "\0", "ids": [0], "tokens": ["\0"]}},
        },
        "decoder": level | {"use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": byte_tokens(),
            "merges": [],
        },
    }
