"""The files beside tokenizer.json: what they say of special tokens, of sampling and of chats.

tokenizer_config.json       special tokens by name, options, at times the chat template
special_tokens_map.json     special tokens by name, where tokenizer_config.json names none
generation_config.json      special ids, of which several may end a text; how to draw tokens
chat_template.jinja         the chat template; goes before those of tokenizer_config.json
additional_chat_templates/  further templates, NAME.jinja, such as "tool_use" or "rag"
"""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ffnlab.errors import ConfigError, FormatError
from ffnlab.formats.untrusted import file_size, inside, quoted, read_json
from ffnlab.storage.files import atomic_write, write_json

CONFIG_FILE = "tokenizer_config.json"
SPECIAL_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATES_FOLDER = "additional_chat_templates"
TEMPLATE_LIMIT = 1 << 20
MOST_TEMPLATES = 64
DEFAULT = "default"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
LISTS = ("additional_special_tokens", "extra_special_tokens")

Table = dict[str, object]


@dataclasses.dataclass(frozen=True)
class Beside:
    """What the files beside a tokenizer.json hold.

    Attributes:
      config, special, generation: tokenizer_config.json, special_tokens_map.json and
        generation_config.json; empty where the file is not there.
      templates: those in files by name; chat_template.jinja is the one called "default".
    """

    config: Table = dataclasses.field(default_factory=dict)
    special: Table = dataclasses.field(default_factory=dict)
    generation: Table = dataclasses.field(default_factory=dict)
    templates: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def split_special(self) -> bool:
        """Whether special tokens that occur in a text are encoded as other text is.

        Raises:
          FormatError: `split_special_tokens` is neither true nor false.
        """
        found = self.config.get("split_special_tokens") or False
        if not isinstance(found, bool):
            raise FormatError(f"{CONFIG_FILE}: split_special_tokens={quoted(found)}: no boolean")
        return found

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The templates of chats by name; of files where there are any, else of the config.

        Raises:
          FormatError: one is no text, or has no name.
        """
        found = self.templates or self.config.get("chat_template")
        if isinstance(found, str):
            return {DEFAULT: found}
        if isinstance(found, list) and all(isinstance(item, dict) for item in found):
            found = {item.get("name"): item.get("template") for item in found}
        found = {} if found is None else found
        if not isinstance(found, Mapping) or not all(
            isinstance(part, str) for item in found.items() for part in item
        ):
            raise FormatError(
                f"{CONFIG_FILE}: chat_template={quoted(found)}: neither a text nor a list of "
                "templates with names"
            )
        return found

    def chat_template(self, name: str | None = None) -> str | None:
        """The template of this name, or that called "default"; None where there are none at all.

        Raises:
          ConfigError: there is none of this name.
          FormatError: there are several and none is called "default"; as `chat_templates`.
        """
        found = self.chat_templates
        if not found or (name or DEFAULT) in found:
            return found.get(name or DEFAULT)
        if name is not None:
            raise ConfigError(f"no chat template {name!r}; there are: {', '.join(sorted(found))}")
        raise FormatError(f"the chat templates are {quoted([*found])}, and none is {DEFAULT!r}")

    def token(self, name: str) -> object:
        """The token in a role such as "bos_token", as it is written, or None."""
        for table in (self.config, self.special):
            found = table.get(name)
            found = found.get("content") if isinstance(found, dict) else found
            if found is not None:
                return found
        return None

    def tokens(self) -> dict[str, str]:
        """The special tokens by role, such as {"bos_token": "<s>"}."""
        found = {f"{role}_token": self.token(f"{role}_token") for role in ROLES}
        return {name: token for name, token in found.items() if isinstance(token, str)}

    def special_tokens(self) -> Iterator[str]:
        """All tokens that the files call special."""
        yield from self.tokens().values()
        for table in (self.config, self.special):
            for name in LISTS:
                listed = table.get(name)
                listed = list(listed.values()) if isinstance(listed, dict) else listed
                for token in listed if isinstance(listed, list) else []:
                    token = token.get("content") if isinstance(token, dict) else token
                    if isinstance(token, str):
                        yield token
        decoder = self.config.get("added_tokens_decoder")
        for entry in decoder.values() if isinstance(decoder, dict) else []:
            if isinstance(entry, dict) and entry.get("special") is True:
                if isinstance(entry.get("content"), str):
                    yield entry["content"]

    def listed(self, name: str) -> tuple[int, ...]:
        """Ids that generation_config.json lists for "bos", "eos" or "pad"; -1 is none.

        Raises:
          FormatError: something else than ids.
        """
        listed = self.generation.get(f"{name}_token_id")
        found = listed if isinstance(listed, list) else [listed]
        found = [index for index in found if index is not None]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in found):
            raise FormatError(f"{GENERATION_FILE}: {name}_token_id={quoted(listed)}: no token id")
        return tuple(index for index in found if index != -1)

    def ids(self, name: str, id_of: Callable[[str], int | None]) -> tuple[int, ...]:
        """Special ids: those that generation_config.json lists, else that of the named token.

        Raises:
          FormatError: what is listed is no id, or the token is not one of the tokenizer's.
        """
        if found := self.listed(name):
            return found
        token = self.token(f"{name}_token")
        if token is None:
            return ()
        index = id_of(token) if isinstance(token, str) else None
        if index is None:
            raise FormatError(f"{CONFIG_FILE}: {name}_token={quoted(token)} is not a token")
        return (index,)


def read(directory: Path) -> Beside:
    """Reads those of the files that are there.

    Raises:
      FormatError: one is damaged.
    """
    names = (CONFIG_FILE, SPECIAL_FILE, GENERATION_FILE)
    config, special, generation = (table(directory, name) for name in names)
    return Beside(config, special, generation, templates(directory))


def write(
    directory: Path, beside: Beside, tokens: Mapping[str, str], ids: Mapping[str, object]
) -> None:
    """Writes the files, and removes those that are of another tokenizer.

    Args:
      directory: where to.
      beside: what they held.
      tokens: special tokens by role, for tokenizer_config.json.
      ids: special ids, for generation_config.json.
    """
    usual = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    write_json(directory / CONFIG_FILE, usual | beside.config | dict(tokens))
    tables = {GENERATION_FILE: beside.generation | dict(ids), SPECIAL_FILE: beside.special}
    for name, content in tables.items():
        if content:
            write_json(directory / name, content)
        else:
            (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / TEMPLATES_FOLDER, ignore_errors=True)
    (directory / TEMPLATE_FILE).unlink(missing_ok=True)
    for name, text in beside.templates.items():
        with atomic_write(file_of(directory, name)) as file:
            file.write(text.encode())


def table(directory: Path, name: str) -> Table:
    """The JSON object in a file, empty where there is none."""
    if not (directory / name).exists():
        return {}
    found = read_json(inside(directory, name))
    if not isinstance(found, dict):
        raise FormatError(f"{directory / name}: must hold a JSON object")
    return found


def file_of(directory: Path, name: str) -> Path:
    """Where the template of a name lies."""
    if name == DEFAULT:
        return directory / TEMPLATE_FILE
    return directory / TEMPLATES_FOLDER / f"{name}.jinja"


def templates(directory: Path) -> dict[str, str]:
    """The texts of chat_template.jinja and of the folder of further ones, by name."""
    found = {}
    if (directory / TEMPLATE_FILE).exists():
        found[DEFAULT] = text_of(inside(directory, TEMPLATE_FILE))
    folder = inside(directory, TEMPLATES_FOLDER)
    names = sorted(file.name for file in folder.glob("*.jinja")) if folder.is_dir() else []
    if len(names) > MOST_TEMPLATES:
        raise FormatError(f"{folder}: {len(names)} templates; at most {MOST_TEMPLATES} are read")
    for name in names:
        found.setdefault(name.removesuffix(".jinja"), text_of(inside(folder, name)))
    return found


def text_of(file: Path) -> str:
    """The text of a template's file."""
    if file_size(file) > TEMPLATE_LIMIT:
        raise FormatError(f"{file}: more than {TEMPLATE_LIMIT} bytes")
    try:
        return file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise FormatError(f"{file}: not UTF-8 (byte {error.start})") from None
