"""Text to token ids and back: `tokenizer.json` files, and a byte-level tokenizer of our own.

`Tokenizer.bytes()` has 256 ids, each the value of a byte, and needs no package; id 0, the NUL byte,
begins and ends a text. Everything else is read by `tokenizers` (extra `run`). Both save files that
`tokenizers` and `transformers` load.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from ffnlab.errors import FormatError, require
from ffnlab.files import StrPath, write_json
from ffnlab.models.untrusted import file_size, inside, quoted, read_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
FILE_LIMIT = 256 * 1024 * 1024
REPLACEMENT = "\ufffd"
# Of a UTF-8 character at most three bytes can be there without it being whole; some decoders show
# each of them as a replacement character, and with them all bytes before, for so many ids at most.
UNSURE = 3
WAIT = 8


@runtime_checkable
class Backend(Protocol):
    """What turns text into ids; `tokenizers.Tokenizer` seen from here, or `ByteBackend`."""

    size: int

    def encode(self, text: str, special: bool) -> list[int]:
        """Ids of a text, with the special tokens around it that its model expects if `special`."""
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


class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: does the work.
      bos: id that begins a text, or None.
      eos: ids that end one; may be empty.
      pad: id for padding, or None.
      config: content of tokenizer_config.json; kept when saved.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos: int | None = None,
        eos: Sequence[int] = (),
        pad: int | None = None,
        config: dict[str, object] | None = None,
    ):
        """Wraps a backend.

        Raises:
          FormatError: a special id is not one of the backend's.
        """
        for name, index in [("bos", bos), ("pad", pad), *(("eos", i) for i in eos)]:
            if index is not None and not 0 <= index < backend.size:
                raise FormatError(f"{name}={index} is not an id in 0..{backend.size - 1}")
        self.backend = backend
        self.bos, self.eos, self.pad = bos, tuple(eos), pad
        self.config = {} if config is None else config

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The byte-level tokenizer: 256 ids, id = byte of the UTF-8 text; 0 is bos, eos and pad.

        >>> Tokenizer.bytes().encode("hé")
        [104, 195, 169]
        """
        return cls(ByteBackend(), bos=0, eos=(0,), pad=0)

    @classmethod
    def load(cls, directory: StrPath) -> "Tokenizer":
        """Reads tokenizer.json, and the special ids from the files beside it.

        Raises:
          FormatError: no tokenizer.json, a damaged one, or ids it does not have.
          MissingExtraError: `tokenizers` is not installed (the byte-level one does not need it).
        """
        directory = Path(directory)
        if not (directory / TOKENIZER_FILE).exists():
            raise FormatError(f"{directory}: there is no {TOKENIZER_FILE}")
        file = inside(directory, TOKENIZER_FILE)
        if file_size(file) > FILE_LIMIT:
            raise FormatError(f"{file}: more than {FILE_LIMIT} bytes")
        config = _optional(directory, CONFIG_FILE)
        if file_size(file) < 2**16 and read_json(file) == byte_content():
            return cls(ByteBackend(), bos=0, eos=(0,), pad=0, config=config)
        backend = LibraryBackend.read(file)
        generation = _optional(directory, GENERATION_FILE)
        found = {name: _ids(backend, config, generation, name) for name in ("bos", "eos", "pad")}
        first = {name: next(iter(ids), None) for name, ids in found.items()}
        return cls(backend, bos=first["bos"], eos=found["eos"], pad=first["pad"], config=config)

    @property
    def size(self) -> int:
        """Number of ids."""
        return self.backend.size

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          text: any text that UTF-8 can hold.
          special: put around it what the model expects, such as the beginning-of-text id.
        Raises:
          ValueError: a lone surrogate, which UTF-8 does not have.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text cannot be encoded: {error}") from None
        return self.backend.encode(text, special)

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: token ids.
          skip_special: leave out bos, eos and pad.
        Raises:
          ValueError: an id out of range.
        """
        ids = [int(i) for i in ids]
        wrong = [i for i in ids if not 0 <= i < self.size]
        if wrong:
            raise ValueError(f"ids holds {wrong[0]}, outside 0..{self.size - 1}")
        skipped = {self.bos, self.pad, *self.eos} if skip_special else set()
        return self.backend.decode([i for i in ids if i not in skipped])

    def stream(self) -> "Stream":
        """A decoder that takes ids one by one as they are generated."""
        return Stream(self)

    def save(self, directory: StrPath) -> None:
        """Writes the files that `load`, `tokenizers` and `transformers` read.

        Args:
          directory: made when missing; gets tokenizer.json, tokenizer_config.json and, where there
            are several eos ids, generation_config.json.
        """
        directory = Path(directory)
        write_json(directory / TOKENIZER_FILE, self.backend.content())
        names = {"bos_token": self.bos, "eos_token": next(iter(self.eos), None)}
        names["pad_token"] = self.pad
        usual = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        }
        tokens = {name: self.backend.token(i) for name, i in names.items() if i is not None}
        write_json(directory / CONFIG_FILE, usual | self.config | tokens)
        if len(self.eos) > 1:
            ids = {"bos_token_id": self.bos, "eos_token_id": list(self.eos)}
            write_json(directory / GENERATION_FILE, ids | {"pad_token_id": self.pad})


class Stream:
    """Decodes ids one by one; never gives half a character.

    The pieces joined are `decode` of all ids, where these are the ids of a text.
    """

    def __init__(self, tokenizer: Tokenizer):
        """An empty stream."""
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # those shown last, as context, and those after them
        self._context = 0  # how many of them are context
        self._given = ""  # what was given out of their text

    def push(self, index: int) -> str:
        """Takes one id; returns the text that is now certain, possibly empty."""
        self._ids.append(int(index))
        text = self._tokenizer.decode(self._ids)
        broken = len(text) - len(text.rstrip(REPLACEMENT))
        if broken and not text.startswith(self._given) and len(self._ids) - self._context < WAIT:
            return ""
        new = text[len(self._given) : len(text) - min(broken, UNSURE)]
        self._given += new
        if new and not broken:
            self._ids, self._context = self._ids[self._context :], len(self._ids) - self._context
            self._given = self._tokenizer.decode(self._ids)
        return new

    def finish(self) -> str:
        """The rest: what was held back because it could have become a character."""
        new = self._tokenizer.decode(self._ids)[len(self._given) :]
        self._given += new
        return new


class LibraryBackend:
    """A `tokenizers.Tokenizer`.

    Attributes:
      inner: it.
      size: number of ids, added tokens included.
    """

    def __init__(self, inner: object):
        """Wraps a `tokenizers.Tokenizer`."""
        self.inner = inner
        self.size: int = inner.get_vocab_size(with_added_tokens=True)  # type: ignore[attr-defined]

    @classmethod
    def read(cls, file: Path) -> "LibraryBackend":
        """Reads a tokenizer.json.

        Raises:
          FormatError: `tokenizers` cannot read it.
        """
        library = require("tokenizers", extra="run")
        try:
            return cls(library.Tokenizer.from_file(str(file)))
        except Exception as error:  # noqa: BLE001 (the library raises bare Exception)
            raise FormatError(f"{file}: not a tokenizer: {str(error)[:200]}") from None

    def encode(self, text: str, special: bool) -> list[int]:
        """See `Backend`."""
        return self.inner.encode(text, add_special_tokens=special).ids  # type: ignore

    def decode(self, ids: Sequence[int]) -> str:
        """See `Backend`."""
        return self.inner.decode(list(ids), skip_special_tokens=False)  # type: ignore

    def id(self, token: str) -> int | None:
        """See `Backend`."""
        return self.inner.token_to_id(token)  # type: ignore

    def token(self, index: int) -> str | None:
        """See `Backend`."""
        return self.inner.id_to_token(index)  # type: ignore

    def content(self) -> object:
        """See `Backend`."""
        return json.loads(self.inner.to_str())  # type: ignore


def _optional(directory: Path, name: str) -> dict[str, object]:
    if not (directory / name).exists():
        return {}
    found = read_json(inside(directory, name))
    if not isinstance(found, dict):
        raise FormatError(f"{directory / name}: must hold a JSON object")
    return found


def _ids(
    backend: Backend, config: dict[str, object], generation: dict[str, object], name: str
) -> tuple[int, ...]:
    """Special ids: those generation_config.json lists, else that of tokenizer_config.json."""
    listed = generation.get(f"{name}_token_id")
    if listed is not None:
        found = listed if isinstance(listed, list) else [listed]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise FormatError(f"{GENERATION_FILE}: {name}_token_id={quoted(listed)}: no token id")
        return tuple(found)
    token = config.get(f"{name}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token is None:
        return ()
    index = backend.id(token) if isinstance(token, str) else None
    if index is None:
        raise FormatError(f"{CONFIG_FILE}: {name}_token={quoted(token)} is not a token")
    return (index,)


class ByteBackend:
    """Ids are the bytes of the UTF-8 text."""

    size = 256

    def encode(self, text: str, special: bool) -> list[int]:
        """The bytes, after a NUL if `special`."""
        return [0] * special + list(text.encode())

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
