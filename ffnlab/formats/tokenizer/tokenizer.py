"""Text to token ids and back: `tokenizer.json` files, and a byte-level tokenizer of our own.

`Tokenizer.bytes()` has 256 ids, each the value of a byte, and needs no package; id 0, the NUL byte,
begins and ends a text. Everything else is read by `tokenizers` (extra `run`). Both save files that
`tokenizers` and `transformers` load.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.tokenizer import files
from ffnlab.formats.tokenizer.backends import (
    Backend,
    ByteBackend,
    LibraryBackend,
    byte_content,
)
from ffnlab.formats.tokenizer.chat import Message, Renderer, render
from ffnlab.formats.tokenizer.files import Beside
from ffnlab.formats.untrusted import inside, read_json
from ffnlab.storage.files import StrPath, digest, write_json

TOKENIZER_FILE = "tokenizer.json"
FILE_LIMIT = 64 * 1024 * 1024
LAST_ID = 2**31 - 1
REPLACEMENT = "\ufffd"
# Of a UTF-8 character at most three bytes can be there without it being whole; some decoders show
# each of them as a replacement character, and with them all bytes before, for so many ids at most.
UNSURE = 3
WAIT = 8


class Tokenizer:
    """Text to ids and back.

    Attributes:
      backend: does the work.
      bos: id that begins a text, or None.
      eos: ids that end one; may be empty.
      pad: id for padding, or None.
      beside: what stood in the files beside tokenizer.json; kept when saved.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos: int | None = None,
        eos: Sequence[int] = (),
        pad: int | None = None,
        beside: Beside | None = None,
    ):
        """Wraps a backend.

        Special ids may lie beyond those of the backend: a model may have more rows than its
        tokenizer has tokens.

        Raises:
          FormatError: a special id is negative or larger than any id can be.
        """
        for name, index in [("bos", bos), ("pad", pad), *(("eos", i) for i in eos)]:
            if index is not None and not 0 <= index <= LAST_ID:
                raise FormatError(f"{name}={index} is no token id, 0..{LAST_ID}")
        self.backend = backend
        self.bos, self.eos, self.pad = bos, tuple(eos), pad
        self.beside = Beside() if beside is None else beside

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """The byte-level tokenizer: 256 ids, id = byte of the UTF-8 text; 0 is bos, eos and pad.

        >>> Tokenizer.bytes().encode("hé")
        [104, 195, 169]
        """
        return cls(ByteBackend(), bos=0, eos=(0,), pad=0)

    @classmethod
    def load(cls, directory: StrPath) -> "Tokenizer":
        """Reads tokenizer.json, and what the files beside it say of it.

        These are tokenizer_config.json, special_tokens_map.json, generation_config.json,
        chat_template.jinja and additional_chat_templates/. Truncation and padding, which
        fine-tuning leaves in tokenizer.json, are switched off; `split_special_tokens` is honoured.

        Raises:
          FormatError: no tokenizer.json, a damaged one or one that would need far more memory than
            its size, or special tokens it does not have.
          MissingExtraError: `tokenizers` is not installed (the byte-level one does not need it).
        """
        directory = Path(directory)
        if not (directory / TOKENIZER_FILE).exists():
            raise FormatError(f"{directory}: there is no {TOKENIZER_FILE}")
        file = inside(directory, TOKENIZER_FILE)
        content = read_json(file, limit=FILE_LIMIT)
        beside = files.read(directory)
        if content == byte_content():
            return cls(ByteBackend(), bos=0, eos=(0,), pad=0, beside=beside)
        backend = LibraryBackend.read(file, content, split_special=beside.split_special)
        ids = {name: beside.ids(name, backend.id) for name in ("bos", "eos", "pad")}
        first = {name: next(iter(found), None) for name, found in ids.items()}
        return cls(backend, bos=first["bos"], eos=ids["eos"], pad=first["pad"], beside=beside)

    @property
    def size(self) -> int:
        """All ids of the tokenizer are below it."""
        return self.backend.size

    @functools.cached_property
    def special(self) -> frozenset[int]:
        """Ids of all special tokens."""
        named = {self.backend.id(token) for token in self.beside.special_tokens()}
        known = {self.bos, self.pad, *self.eos, *named}
        return self.backend.special | {index for index in known if index is not None}

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          text: any text that UTF-8 can hold.
          special: put around it what the model expects, such as the beginning-of-text id.
        Raises:
          ValueError: a lone surrogate, which UTF-8 does not have.
          FormatError: the tokenizer's file is damaged in a way that shows at this text only.
        """
        check_text(text)
        return self.backend.encode(text, special)

    def spans(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text without special tokens, and of each the (first, end) characters of it.

        Raises:
          ValueError, FormatError: as `encode`.

        >>> Tokenizer.bytes().spans("hé")
        ([104, 195, 169], [(0, 1), (1, 2), (1, 2)])
        """
        check_text(text)
        return self.backend.spans(text)

    def begins_twice(self, ids: Sequence[int]) -> bool:
        """Whether ids begin with two beginning-of-text ids: one was in the text itself."""
        return self.bos is not None and list(ids[:2]) == [self.bos] * 2

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
          ids: token ids; those beyond the tokenizer's, which a model with more rows may make, are
            no text.
          skip_special: leave out all special tokens.
        Raises:
          ValueError: a negative id.
          FormatError: the tokenizer's file is damaged in a way that shows at these ids only.
        """
        ids = [int(i) for i in ids]
        negative = [i for i in ids if i < 0]
        if negative:
            raise ValueError(f"ids holds {negative[0]}; ids are 0 or more")
        skipped = self.special if skip_special else frozenset()
        return self.backend.decode([i for i in ids if i < self.size and i not in skipped])

    def stream(self, after: Iterable[int] = ()) -> "Stream":
        """A decoder that takes ids one by one as they are generated.

        Args:
          after: ids that stand before them; their text is not given out again, but some tokenizers
            write no space before the very first word of a text.
        """
        return Stream(self, after)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        template: str | None = None,
        renderer: Renderer | None = None,
    ) -> str:
        """A conversation as text, by the chat template of the model (see `chat`, beside this).

        Args:
          messages: such as {"role": "user", "content": "Hello"}.
          add_generation_prompt: end with what begins the model's answer.
          continue_last: end within the last message, for the model to go on with it.
          template: name of one of several templates, such as "tool_use"; None for "default".
          renderer: runs the template; one for many conversations makes all but the first quick.
        Returns:
          text with its special tokens in it; `encode` it without `special`.
        Raises:
          ConfigError: the model has no chat template, or none of this name, or the options exclude
            each other.
          FormatError: the template fails, or refuses the conversation.
        """
        text = self.beside.chat_template(template)
        if text is None:
            raise ConfigError("the model has no chat template, in a file or in its tokenizer's")
        return render(
            text,
            [messages],
            tokens=self.roles,
            add_generation_prompt=add_generation_prompt,
            continue_last=continue_last,
            renderer=renderer,
        )[0]

    @property
    def roles(self) -> dict[str, str]:
        """The special tokens by role, such as {"bos_token": "<s>"}, as `transformers` knows them.

        Those that the tokenizer's files name; where they name none, the tokens of its ids.
        """
        return self.beside.tokens() or self._tokens()

    def role(self, name: str) -> int | None:
        """The id of the token in a role such as "bos", by `roles`, or None."""
        token = self.roles.get(f"{name}_token")
        return None if token is None else self.backend.id(token)

    def _tokens(self) -> dict[str, str]:
        """The tokens of bos, eos and pad, where they have one."""
        ids = {"bos": self.bos, "eos": next(iter(self.eos), None), "pad": self.pad}
        found = {role: self.backend.token(i) for role, i in ids.items() if i is not None}
        return {f"{role}_token": token for role, token in found.items() if token is not None}

    def digest(self) -> str:
        """SHA-256 of all that it is: its content, special ids and the files beside it."""
        ids = {"bos": self.bos, "eos": self.eos, "pad": self.pad}
        return digest({"content": self.backend.content(), **ids, **vars(self.beside)})

    def save(self, directory: StrPath) -> None:
        """Writes the files that `load`, `tokenizers` and `transformers` read.

        Args:
          directory: made when missing; gets tokenizer.json, tokenizer_config.json, and those of
            generation_config.json (also where there are several eos ids),
            special_tokens_map.json, chat_template.jinja and additional_chat_templates/ that the
            tokenizer came with. Those that it did not come with are removed, as they are of another
            tokenizer.
        """
        directory = Path(directory)
        write_json(directory / TOKENIZER_FILE, self.backend.content())
        ids = {"bos_token_id": self.bos, "eos_token_id": list(self.eos), "pad_token_id": self.pad}
        named = (
            {} if self.beside.tokens() else self._tokens()
        )  # those in the files stay as they are
        files.write(directory, self.beside, named, ids if len(self.eos) > 1 else {})


def check_text(text: str) -> None:
    """Raises ValueError for a text that UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text cannot be encoded: {error}") from None


class Stream:
    """Decodes ids one by one; never gives half a character.

    The pieces joined are what `decode` of all ids, those before the stream included, adds to the
    text of those before it, where the ids are those of a text.
    """

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        """An empty stream, behind the text of some ids."""
        self._tokenizer = tokenizer
        self._ids = [int(i) for i in after]  # those shown last, as context, and those after them
        self._context = len(self._ids)  # how many of them are context
        self._given = tokenizer.decode(self._ids)  # what was given out of their text

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
