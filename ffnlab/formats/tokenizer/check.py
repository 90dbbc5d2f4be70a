"""Bounds on what a tokenizer.json may ask of the native library.

The library trusts its file: a replacement that is longer than what it replaces, ten times in a row,
or a size at the head of a table, makes it ask for gigabytes, and where it does not get them it ends
the process. Every part that can make a text longer is looked at here before the library sees it, by
its keys, as the library reads parts that do not name their type too.
"""

import base64
import binascii
import math
from collections.abc import Iterator
from typing import Any

from ffnlab.errors import FormatError

GROWTH = 1024  # bytes that one byte of text, or of a token, may become
TEMPLATE = 4096  # special tokens around a text
REPEATS = 16  # copies of a text in one
REGEX = 1 << 14  # bytes
AFFIX = 64  # bytes of what stands before or behind parts of a word
WORD = 10_000  # characters of a word that is looked at whole
ADDED = 1 << 22  # bytes of all added tokens


def check(content: object, where: str) -> None:
    """Raises FormatError where the content of a tokenizer.json would need far more than its size.

    Args:
      content: the file as JSON; what else is wrong with it is left to the library.
      where: what the file is called in errors.
    """
    if not isinstance(content, dict):
        raise FormatError(f"{where}: not a tokenizer: must hold a JSON object")
    limits = {
        "makes text longer": (before(content), GROWTH),
        "makes decoded text longer": (grown(content.get("decoder")), GROWTH),
        "special tokens around a text": (around(content.get("post_processor")), TEMPLATE),
        "copies of a text": (copies(content.get("post_processor")), REPEATS),
        "bytes of added tokens": (added(content.get("added_tokens")), ADDED),
        "bytes of a pattern": (longest(content, "Regex"), REGEX),
        **model_limits(content.get("model")),
    }
    for what, (found, most) in limits.items():
        if found > most:
            raise FormatError(f"{where}: not a tokenizer: {what}: {found:.4g}, at most {most}")


def before(content: dict[str, Any]) -> float:
    """How many bytes a byte of text may become before it is looked up."""
    return grown(content.get("normalizer")) * grown(content.get("pre_tokenizer"))


def grown(part: object) -> float:
    """The product of what the steps of a part may do to a byte."""
    return math.prod((growth(step) for step in objects(part)), start=1.0)


def growth(step: dict[str, Any]) -> float:
    """Bytes that one step may make of one."""
    if "precompiled_charsmap" in step:
        return charsmap(step["precompiled_charsmap"])
    if "pattern" in step and "content" in step:
        pattern, made = step["pattern"], size(step["content"])
        literal = size(pattern.get("String")) if isinstance(pattern, dict) else 0
        return max(1.0, made / literal) if literal else 1.0 + made
    if "prepend" in step:
        return 1.0 + size(step["prepend"])
    if "replacement" in step:  # of spaces, and one more at the start
        return 1.0 + size(step["replacement"])
    # An empty text is found between all characters; a byte is at most two in the letters for it.
    everywhere = "" in (step.get("suffix"), step.get("word_delimiter_token"))
    return 2.0 if everywhere or step.get("type") == "ByteLevel" else 1.0


def charsmap(encoded: object) -> float:
    """The longest replacement in a table of characters, whose head must give its true size.

    It is a little-endian count of bytes, a trie of so many, then replacements that NUL ends.
    """
    try:
        table = base64.b64decode(encoded if isinstance(encoded, str) else "", validate=True)
    except (binascii.Error, ValueError):
        return math.inf
    trie = int.from_bytes(table[:4], "little")
    if len(table) < 4 or trie % 4 or trie > len(table) - 4:
        return math.inf
    return float(max(1, *(len(text) for text in table[4 + trie :].split(b"\0"))))


def around(part: object) -> int:
    """Special tokens that a template puts around a text."""
    return sum(
        len(ids)
        for step in objects(part)
        for ids in (special_ids(step, piece) for piece in pieces(step, "SpecialToken"))
        if isinstance(ids, list)
    )


def special_ids(step: dict[str, Any], piece: object) -> object:
    """The ids of a special token in a template."""
    known, name = step.get("special_tokens"), piece.get("id") if isinstance(piece, dict) else None
    entry = known.get(name) if isinstance(known, dict) and isinstance(name, str) else None
    return entry.get("ids") if isinstance(entry, dict) else None


def copies(part: object) -> int:
    """How often templates repeat a text."""
    found = [len(list(pieces(step, "Sequence"))) for step in objects(part) if "single" in step]
    return math.prod(max(1, count) for count in found)


def pieces(step: dict[str, Any], kind: str) -> Iterator[object]:
    """The pieces of one kind in the template of a single text."""
    listed = step.get("single")
    for piece in listed if isinstance(listed, list) else []:
        if isinstance(piece, dict) and kind in piece:
            yield piece[kind]


def added(tokens: object) -> int:
    """Bytes of all added tokens."""
    listed = tokens if isinstance(tokens, list) else []
    return sum(size(token.get("content")) for token in listed if isinstance(token, dict))


def longest(content: dict[str, Any], key: str) -> int:
    """Bytes of the longest string under a key, anywhere but in the model."""
    parts = [value for name, value in content.items() if name != "model"]
    return max((size(step.get(key)) for step in objects(parts)), default=0)


def model_limits(model: object) -> dict[str, tuple[int, int]]:
    """What a model does for every character or word, and how much of it at most."""
    if not isinstance(model, dict):
        return {}
    affixes = ("continuing_subword_prefix", "end_of_word_suffix", "unk_token")
    limits = {name: (size(model.get(name)), AFFIX) for name in affixes}
    word = model.get("max_input_chars_per_word")
    return limits | {"max_input_chars_per_word": (word if isinstance(word, int) else 0, WORD)}


def objects(part: object) -> Iterator[dict[str, Any]]:
    """Every JSON object in a part, itself included."""
    todo = [part]
    while todo:
        found = todo.pop()
        if isinstance(found, dict):
            yield found
            todo.extend(found.values())
        elif isinstance(found, list):
            todo.extend(found)


def size(text: object) -> int:
    """Bytes of a string; none of anything else."""
    return len(text.encode("utf-8", "surrogatepass")) if isinstance(text, str) else 0
